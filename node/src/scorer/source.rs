//! What the scorer knows of the source: its tokenizer, its chat template where contexts are wrapped in it, and how wide it is.
//! No weights.

use std::path::Path;

use consilium_kernels::Vocab;
use consilium_protocol::Clock as _;
use consilium_protocol::time::SystemClock;
use serde_json::Value;

use super::error::ScorerError;
use crate::width;
use crate::worker::WorkError;
use crate::worker::data::Item;
use crate::worker::source::fit;
use crate::worker::tokenizer::chat::Message;
use crate::worker::tokenizer::{ChatTemplate, Tokenizer};

/// Largest `config.json` in bytes.
const CONFIG: u64 = 1 << 20;

/// Tokenizer and vocabulary of a model folder.
#[derive(Debug)]
pub(super) struct Source {
    pub(super) tokenizer: Tokenizer,
    pub(super) vocab: Vocab,
    /// The template that contexts are wrapped in, if they are.
    chat: Option<ChatTemplate>,
    /// Width of the residual stream.
    pub(super) hidden_size: usize,
}

impl Source {
    /// Reads `tokenizer.json`, `config.json` and, if contexts are to be wrapped in it, the chat template of a folder; weights
    /// may be elsewhere.
    ///
    /// # Errors
    /// A file is missing or cannot be used.
    pub(super) fn load(folder: &Path, chat_template: bool) -> Result<Self, ScorerError> {
        let tokenizer = Tokenizer::load(folder).map_err(WorkError::from)?;
        let config = Shape::load(&folder.join("config.json"))?;
        // The head may have rows without a token; a server lists these as well.
        let rows = config.vocab_size.max(tokenizer.size());
        let vocab = tokenizer.vocab(rows).map_err(WorkError::from)?;
        let chat = || ChatTemplate::load(folder, SystemClock.now()).map_err(WorkError::from);
        Ok(Self {
            tokenizer,
            vocab,
            chat: chat_template.then(chat).transpose()?,
            hidden_size: config.hidden_size,
        })
    }

    /// The token that starts records.
    pub(super) fn start(&self) -> u32 {
        self.tokenizer.start_of_record()
    }

    /// The token that ends them.
    pub(super) fn end(&self) -> u32 {
        self.tokenizer.end_of_record()
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
        let item = fit(&self.tokenizer, self.chat.as_ref(), context, target, limit)?;
        item.ok_or_else(|| ScorerError::Setting {
            key: "max_tokens",
            value: limit.to_string(),
            expected: "room for the longest target of the reference set and two tokens".to_owned(),
        })
    }

    /// What the template makes of a short context, the date that it may print included; empty where there is none. Parts of a
    /// job that were scored under another one are not taken.
    ///
    /// # Errors
    /// The template fails.
    pub(super) fn frame(&self) -> Result<String, ScorerError> {
        let Some(chat) = &self.chat else {
            return Ok(String::new());
        };
        let rendered = chat.render(&[Message::new("user", "?")], true);
        Ok(rendered.map_err(WorkError::from)?.text)
    }

    /// Ranks of token ids that the tokenizer gave.
    pub(super) fn ranks(&self, ids: &[u32]) -> Vec<u32> {
        let ranks = self.vocab.rank_of_id();
        ids.iter().map(|&id| ranks[id as usize]).collect()
    }
}

/// What is read of `config.json`; composite models keep it in `text_config`.
struct Shape {
    /// Bounds how many symbols a record may hold.
    hidden_size: usize,
    /// Rows of the head, 0 if the file does not say.
    vocab_size: usize,
}

impl Shape {
    fn load(path: &Path) -> Result<Self, ScorerError> {
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
        let number = |names: &[&str], most: usize| {
            let found = width::number(&config, names);
            let size = found.and_then(|size| usize::try_from(size).ok());
            match (found, size.filter(|size| (1..=most).contains(size))) {
                (_, Some(size)) => Ok(Some(size)),
                (None, _) => Ok(None),
                (Some(size), None) => {
                    let names = names.join(", ");
                    Err(file(format!("{names} is {size}, expected 1 to {most}")))
                }
            }
        };
        let hidden_size = number(&width::NAMES, 1 << 20)?;
        let names = width::NAMES.join(", ");
        let missing = || file(format!("expected the model's width as one of {names}"));
        Ok(Self {
            hidden_size: hidden_size.ok_or_else(missing)?,
            vocab_size: number(&["vocab_size"], 1 << 24)?.unwrap_or(0),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn width_and_rows_are_found_under_the_names_of_many_families() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("config.json");
        let load = |text: &str| {
            std::fs::write(&path, text).unwrap();
            let shape = Shape::load(&path);
            shape.map(|shape| (shape.hidden_size, shape.vocab_size))
        };
        assert_eq!(
            load("{\"hidden_size\":64,\"vocab_size\":9}").unwrap(),
            (64, 9)
        );
        assert_eq!(load("{\"n_embd\":32}").unwrap(), (32, 0));
        let nested = "{\"text_config\":{\"hidden_size\":8,\"vocab_size\":7}}";
        assert_eq!(load(nested).unwrap(), (8, 7));
        for (text, part) in [
            ("{}", "hidden_size, n_embd, d_model"),
            ("[", "not JSON"),
            ("{\"hidden_size\":0}", "expected 1 to"),
            (
                "{\"hidden_size\":8,\"vocab_size\":99999999999}",
                "vocab_size is",
            ),
        ] {
            let problem = load(text).unwrap_err().to_string();
            assert!(
                problem.contains(part) && problem.contains("config.json"),
                "{problem}"
            );
        }
    }
}
