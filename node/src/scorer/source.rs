//! What the scorer knows of the source: its tokenizer, and how wide it is. No weights.

use std::path::Path;

use consilium_kernels::Vocab;
use serde_json::Value;

use super::error::ScorerError;
use crate::worker::WorkError;
use crate::worker::data::Item;
use crate::worker::source::fit;
use crate::worker::tokenizer::Tokenizer;

/// Largest `config.json` in bytes.
const CONFIG: u64 = 1 << 20;
/// Names of the width of the residual stream, by family.
const WIDTHS: [&str; 3] = ["hidden_size", "n_embd", "d_model"];

/// Tokenizer and vocabulary of a model folder.
#[derive(Debug)]
pub(super) struct Source {
    pub(super) tokenizer: Tokenizer,
    pub(super) vocab: Vocab,
    /// Width of the residual stream.
    pub(super) hidden_size: usize,
}

impl Source {
    /// Reads `tokenizer.json` and `config.json` of a folder; weights may be elsewhere.
    ///
    /// # Errors
    /// A file is missing or cannot be used.
    pub(super) fn load(folder: &Path) -> Result<Self, ScorerError> {
        let tokenizer = Tokenizer::load(folder).map_err(WorkError::from)?;
        let vocab = tokenizer.vocab(tokenizer.size()).map_err(WorkError::from)?;
        let hidden_size = hidden_size(&folder.join("config.json"))?;
        Ok(Self {
            tokenizer,
            vocab,
            hidden_size,
        })
    }

    /// Tokens of an item within `limit`; see [`fit`].
    ///
    /// # Errors
    /// Text that cannot be tokenised, or a target that alone does not fit.
    pub(super) fn item(
        &self,
        context: &str,
        target: &str,
        limit: usize,
    ) -> Result<Item, ScorerError> {
        let item = fit(&self.tokenizer, context, target, limit)?;
        item.ok_or_else(|| ScorerError::Setting {
            key: "max_tokens",
            value: limit.to_string(),
            expected: "room for the longest target of the reference set and two tokens".to_owned(),
        })
    }

    /// Ranks of token ids that the tokenizer gave.
    pub(super) fn ranks(&self, ids: &[u32]) -> Vec<u32> {
        let ranks = self.vocab.rank_of_id();
        ids.iter().map(|&id| ranks[id as usize]).collect()
    }
}

/// The width that bounds how many symbols a record may hold; composite models keep it in `text_config`.
fn hidden_size(path: &Path) -> Result<usize, ScorerError> {
    let file = |problem: String| ScorerError::File {
        path: path.to_owned(),
        problem,
    };
    let cannot = |error: std::io::Error| file(format!("cannot read: {error}"));
    let length = std::fs::metadata(path).map_err(cannot)?.len();
    if length > CONFIG {
        return Err(file(format!("{length} bytes, expected at most {CONFIG}")));
    }
    let bytes = std::fs::read(path).map_err(cannot)?;
    let config: Value =
        serde_json::from_slice(&bytes).map_err(|error| file(format!("not JSON: {error}")))?;
    let width = [&config, &config["text_config"]]
        .into_iter()
        .flat_map(|object| WIDTHS.map(|name| object[name].as_u64()))
        .flatten()
        .next();
    width
        .and_then(|width| usize::try_from(width).ok())
        .filter(|width| (1..=1 << 20).contains(width))
        .ok_or_else(|| {
            let names = WIDTHS.join(", ");
            file(format!(
                "expected the model's width as one of {names}, 1 to 1048576"
            ))
        })
}
