//! The reference set: public text, one item a line of JSON.
//!
//! ```json
//! {"context": "", "target": "ref kavo -> use dolin 40mg.", "unlabeled": [[16, 26]]}
//! ```
//!
//! `context` and `unlabeled` may be left out. Ranges are byte offsets into the target; their bytes are no label and
//! routing scores leave them out. The set's identity is the SHA-256 of the file.
//!
//! Two more fields are optional. `domain` names what an item is about; reports of contributions are broken down by it.
//! `tokens` is for rounds in token space, whose aggregator has no tokenizer: pairs of a token's id and the bytes of the
//! target that it spells, in order, with the token that ends a record as `[id, 0]`. Records then have one position for each.

use std::ops::Range;

use serde::Deserialize;

use crate::ids::Digest;
use crate::limits;

/// One item: text that is given, and text whose bytes are predicted.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Item {
    /// Text before the target; each source wraps it in its own template.
    pub context: String,
    /// Text whose bytes the records predict; at least one byte.
    pub target: String,
    /// Byte ranges of the target that are no label: ascending, disjoint, inside of the target.
    pub unlabeled: Vec<Range<usize>>,
    /// What the item is about, if the set says so: 1 to 64 bytes.
    pub domain: Option<String>,
    /// Tokens of the target with the bytes that each spells; empty where the set does not say.
    pub tokens: Vec<(u32, u32)>,
}

impl Item {
    /// Positions of this item's records: one per byte and one for the end of the record.
    #[must_use]
    pub fn positions(&self) -> usize {
        self.target.len().saturating_add(1)
    }
}

/// A parsed reference set with its digest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ReferenceSet {
    digest: Digest,
    items: Vec<Item>,
}

/// Why bytes are no reference set.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("reference set, line {line}: {problem}")]
pub struct ReferenceError {
    /// Line number from 1; 0 for the whole file.
    pub line: usize,
    /// What is wrong.
    pub problem: String,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Line {
    #[serde(default)]
    context: String,
    target: String,
    #[serde(default)]
    unlabeled: Vec<[usize; 2]>,
    #[serde(default)]
    domain: Option<String>,
    #[serde(default)]
    tokens: Vec<(u32, u32)>,
}

impl ReferenceSet {
    /// Parses a whole file.
    ///
    /// # Errors
    /// The first line that is no item, or an empty file.
    pub fn parse(bytes: &[u8]) -> Result<Self, ReferenceError> {
        let mut items = Vec::new();
        for (index, line) in bytes.split(|&byte| byte == b'\n').enumerate() {
            if line.is_empty() {
                continue;
            }
            let number = index.saturating_add(1);
            items.push(item(line).map_err(|problem| ReferenceError {
                line: number,
                problem,
            })?);
        }
        if items.is_empty() {
            return Err(ReferenceError {
                line: 0,
                problem: "holds no items".to_owned(),
            });
        }
        Ok(Self {
            digest: Digest::of(bytes),
            items,
        })
    }

    /// SHA-256 of the file.
    #[must_use]
    pub const fn digest(&self) -> Digest {
        self.digest
    }

    /// The items in file order.
    #[must_use]
    pub fn items(&self) -> &[Item] {
        &self.items
    }
}

fn item(line: &[u8]) -> Result<Item, String> {
    let line: Line = serde_json::from_slice(line).map_err(|error| error.to_string())?;
    if line.target.is_empty() {
        return Err("target is empty".to_owned());
    }
    if line.target.len() > limits::ITEM || line.context.len() > limits::ITEM {
        return Err(format!(
            "context and target may have {} bytes each",
            limits::ITEM
        ));
    }
    let mut end = 0;
    let mut unlabeled = Vec::with_capacity(line.unlabeled.len());
    for [from, to] in line.unlabeled {
        if from < end || to <= from || to > line.target.len() {
            return Err(format!(
                "unlabeled range [{from}, {to}] must be ascending and inside of the target's {} bytes",
                line.target.len()
            ));
        }
        end = to;
        unlabeled.push(from..to);
    }
    if line
        .domain
        .as_ref()
        .is_some_and(|domain| !(1..=64).contains(&domain.len()))
    {
        return Err("domain must have 1 to 64 bytes".to_owned());
    }
    let spelled = line.tokens.iter().fold(0_u64, |sum, (_, bytes)| {
        sum.saturating_add(u64::from(*bytes))
    });
    if !line.tokens.is_empty() && u64::try_from(line.target.len()) != Ok(spelled) {
        return Err(format!(
            "tokens spell {spelled} bytes, the target has {}",
            line.target.len()
        ));
    }
    Ok(Item {
        context: line.context,
        target: line.target,
        unlabeled,
        domain: line.domain,
        tokens: line.tokens,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bad_line_is_named_by_its_number() {
        let good = "{\"target\":\"abc\",\"unlabeled\":[[0,1],[2,3]]}\n";
        let set = ReferenceSet::parse(good.as_bytes()).unwrap();
        assert_eq!(set.items()[0].unlabeled, vec![0..1, 2..3]);
        assert_eq!(set.items()[0].positions(), 4);
        for bad in [
            "{\"target\":\"\"}",
            "{\"target\":\"abc\",\"unlabeled\":[[2,1]]}",
            "{\"target\":\"abc\",\"unlabeled\":[[0,4]]}",
            "{\"target\":\"abc\",\"unlabeled\":[[0,2],[1,3]]}",
            "{\"target\":\"abc\",\"answer\":1}",
            "{\"target\":\"abc\",\"domain\":\"\"}",
            "{\"target\":\"abc\",\"tokens\":[[5,2]]}",
            "abc",
        ] {
            let error = ReferenceSet::parse(format!("{good}{bad}").as_bytes()).unwrap_err();
            assert_eq!(error.line, 2, "{bad}: {error}");
        }
        assert!(ReferenceSet::parse(b"\n\n").is_err());
        let line = "{\"target\":\"abc\",\"domain\":\"law\",\"tokens\":[[5,2],[7,1],[0,0]]}";
        let set = ReferenceSet::parse(line.as_bytes()).unwrap();
        assert_eq!(set.items()[0].domain.as_deref(), Some("law"));
        assert_eq!(set.items()[0].tokens, [(5, 2), (7, 1), (0, 0)]);
    }
}
