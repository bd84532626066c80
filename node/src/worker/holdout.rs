//! The private holdout: one item a line of JSON.
//!
//! ```json
//! {"context": "ref kavo -> use", "target": " dolin 40mg.", "choices": [" dolin 40mg.", " merak 40mg."]}
//! ```
//!
//! `context` and `choices` may be left out. The target is measured in bits per byte given the context; where there are
//! choices they are ranked, and the target is the right one. Cut before a blank, not after it: most tokenizers bind a
//! blank to the word that follows.

use std::path::{Path, PathBuf};

use serde::Deserialize;

/// One item.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct HoldoutItem {
    /// Text before the target, not scored.
    #[serde(default)]
    pub context: String,
    /// What truly follows, at least one byte.
    pub target: String,
    /// Candidates, the target among them; empty for bits per byte only.
    #[serde(default)]
    pub choices: Vec<String>,
}

/// Why a file is no holdout. Never quotes a line: the text is private.
#[derive(Debug, thiserror::Error)]
pub enum HoldoutError {
    /// The file cannot be read.
    #[error("cannot read holdout {}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// The file holds no items.
    #[error("holdout {} holds no items; it takes one JSON object a line", .0.display())]
    Empty(PathBuf),
    /// A line that is no item.
    #[error("holdout {}, line {line}: {problem}", path.display())]
    Line {
        /// The file.
        path: PathBuf,
        /// Number from 1.
        line: usize,
        /// What is wrong.
        problem: &'static str,
    },
}

/// Reads a file of items.
///
/// # Errors
/// The file cannot be read, the first line that is no item, or no items at all.
pub fn read(path: &Path) -> Result<Vec<HoldoutItem>, HoldoutError> {
    let bytes = std::fs::read(path).map_err(|source| HoldoutError::Read {
        path: path.to_owned(),
        source,
    })?;
    parse(&bytes, path)
}

fn parse(bytes: &[u8], path: &Path) -> Result<Vec<HoldoutItem>, HoldoutError> {
    let mut items = Vec::new();
    for (line, text) in (1..).zip(bytes.split(|&byte| byte == b'\n')) {
        if text.trim_ascii().is_empty() {
            continue;
        }
        let refuse = |problem| HoldoutError::Line {
            path: path.to_owned(),
            line,
            problem,
        };
        let item: HoldoutItem = serde_json::from_slice(text).map_err(|_| {
            refuse("is no JSON object with the text fields context, target and the list choices")
        })?;
        check(&item).map_err(refuse)?;
        items.push(item);
    }
    if items.is_empty() {
        return Err(HoldoutError::Empty(path.to_owned()));
    }
    Ok(items)
}

fn check(item: &HoldoutItem) -> Result<(), &'static str> {
    let choices = &item.choices;
    if item.target.is_empty() || choices.iter().any(String::is_empty) {
        return Err("target and choices must have at least one byte");
    }
    if !choices.is_empty() && !choices.contains(&item.target) {
        return Err("the target is none of the choices");
    }
    let mut sorted: Vec<_> = choices.iter().collect();
    sorted.sort_unstable();
    sorted.dedup();
    if sorted.len() != choices.len() || choices.len() == 1 {
        return Err("choices must be at least two, and all different");
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bad_line_is_named_but_never_quoted() {
        let good = r#"{"target":"ab","choices":["ab","cd"]}"#;
        let file = Path::new("holdout.jsonl");
        let both = format!("{good}\n\n{{\"context\":\"x\",\"target\":\"y\"}}");
        let items = parse(both.as_bytes(), file);
        assert_eq!(items.unwrap().len(), 2);
        for bad in [
            r#"{"target":""}"#,
            r#"{"target":"secret","choices":["ab","cd"]}"#,
            r#"{"target":"secret","choices":["secret"]}"#,
            r#"{"target":"secret","choices":["secret","secret"]}"#,
            r#"{"target":"secret","answer":1}"#,
            "secret",
        ] {
            let error = parse(format!("{good}\n{bad}\n").as_bytes(), file).unwrap_err();
            let text = error.to_string();
            assert!(text.contains("holdout.jsonl, line 2"), "{bad}: {text}");
            assert!(!text.contains("secret"), "{text}");
        }
        assert!(matches!(parse(b"\n", file), Err(HoldoutError::Empty(_))));
    }
}
