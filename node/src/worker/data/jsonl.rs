//! Records from JSONL and plain text.

use std::path::Path;

use serde_json::{Map, Value};

use super::{DataError, Record};

/// Reads a `.jsonl` or `.json` file of objects with `text`, `context` and `target`, or `prompt` and
/// `completion`; any other file as text, one record a line. Blank lines are skipped.
pub fn read_records(path: &Path) -> Result<Vec<Record>, DataError> {
    let bytes = std::fs::read(path).map_err(|source| DataError::Read {
        path: path.into(),
        source,
    })?;
    let is_json = path
        .extension()
        .is_some_and(|extension| extension == "jsonl" || extension == "json");
    let mut records = Vec::new();
    for (index, line) in bytes.split(|&byte| byte == b'\n').enumerate() {
        let refuse = |reason: String| DataError::Line {
            path: path.into(),
            line: index + 1,
            reason,
        };
        let line = line.strip_suffix(b"\r").unwrap_or(line);
        let line =
            std::str::from_utf8(line).map_err(|error| refuse(format!("not UTF-8: {error}")))?;
        if line.trim().is_empty() {
            continue;
        }
        let record = if is_json {
            parse(line).map_err(refuse)?
        } else {
            Record {
                context: String::new(),
                target: line.to_owned(),
            }
        };
        records.push(record);
    }
    if records.is_empty() {
        Err(DataError::NoRecords { path: path.into() })
    } else {
        Ok(records)
    }
}

fn parse(line: &str) -> Result<Record, String> {
    let object: Map<String, Value> =
        serde_json::from_str(line).map_err(|error| format!("not a JSON object: {error}"))?;
    let text = |field: &str| match object.get(field) {
        None | Some(Value::Null) => Ok(None),
        Some(Value::String(text)) => Ok(Some(text.clone())),
        Some(_) => Err(format!("field `{field}` is not text")),
    };
    let (context, target) = if let Some(target) = text("text")? {
        (None, target)
    } else if let Some(target) = text("target")? {
        (text("context")?, target)
    } else if let Some(target) = text("completion")? {
        (text("prompt")?, target)
    } else {
        return Err(
            "expected `text`, or `context` and `target`, or `prompt` and `completion`".into(),
        );
    };
    if target.is_empty() {
        return Err("nothing to predict: the text is empty".into());
    }
    Ok(Record {
        context: context.unwrap_or_default(),
        target,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(name: &str, text: &[u8]) -> Result<Vec<Record>, DataError> {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join(name), text).unwrap();
        read_records(&folder.path().join(name))
    }

    #[test]
    fn all_three_shapes_and_plain_text_are_read() {
        let record = |context: &str, target: &str| Record {
            context: context.into(),
            target: target.into(),
        };
        let lines = br#"{"text":"a"}
{"context":"b","target":"c","unlabeled":[[0,1]]}

{"prompt":"d","completion":"e"}"#;
        let want = [record("", "a"), record("b", "c"), record("d", "e")];
        assert_eq!(read("x.jsonl", lines).unwrap(), want);
        assert_eq!(
            read("x.txt", b"a\r\n\nb c\n").unwrap(),
            [record("", "a"), record("", "b c")]
        );
    }

    #[test]
    fn a_bad_line_is_named() {
        for (bad, reason) in [
            ("{\"text\":\"a\"", "not a JSON object"),
            ("[1]", "not a JSON object"),
            ("{\"text\":3}", "field `text` is not text"),
            ("{\"body\":\"a\"}", "expected `text`"),
            ("{\"text\":\"\"}", "nothing to predict"),
        ] {
            let error = read(
                "x.jsonl",
                format!("{{\"text\":\"ok\"}}\n{bad}\n").as_bytes(),
            );
            let message = error.unwrap_err().to_string();
            assert!(
                message.contains("x.jsonl:2: ") && message.contains(reason),
                "{message}"
            );
        }
        let message = read("x.txt", b"fine\n\xff\xfe\n").unwrap_err().to_string();
        assert!(message.contains("x.txt:2: not UTF-8"), "{message}");
    }
}
