//! Tokenizers as byte strings: what each token spells, exactly.

mod bpe;
pub mod chat;
mod check;
mod error;
mod spelling;

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::OnceLock;

use consilium_kernels::{TokenKind, Vocab};
use serde_json::Value;

pub use bpe::train_bpe;
pub use chat::ChatTemplate;
pub use error::TokenizerError;
use spelling::{as_written, bytes_of, spelling};

/// Largest `tokenizer.json` that is read, in bytes.
const LARGEST: u64 = 256 << 20;

/// Names of end-of-record tokens where no file names one.
const USUAL_ENDS: [&str; 4] = ["<|endoftext|>", "</s>", "<|end_of_text|>", "<eos>"];

/// What one token means.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum TokenEntry {
    /// Spells these bytes.
    Bytes(Vec<u8>),
    /// Ends a record.
    EndOfRecord,
    /// Padding and other special tokens.
    Ignored,
}

/// A `tokenizer.json` whose tokens are known as bytes.
#[derive(Debug)]
pub struct Tokenizer {
    inner: tokenizers::Tokenizer,
    source: Vec<u8>,
    entries: Vec<TokenEntry>,
    start_of_record: u32,
    end_of_record: u32,
    /// The file's own tokenizer, for rendered conversations; made when first needed.
    rendered: OnceLock<tokenizers::Tokenizer>,
}

impl Tokenizer {
    /// Reads `tokenizer.json` of a model folder. End-of-record tokens come from `config.json`,
    /// `generation_config.json` and `tokenizer_config.json`, else by their usual names.
    pub fn load(folder: &Path) -> Result<Self, TokenizerError> {
        let path = folder.join("tokenizer.json");
        let source = read(&path)?;
        let mut ids = Vec::new();
        let mut names = Vec::new();
        for file in [
            "config.json",
            "generation_config.json",
            "tokenizer_config.json",
        ] {
            let path = folder.join(file);
            if !path.exists() {
                continue;
            }
            let object: Value = parse(&path, &read(&path)?)?;
            match &object["eos_token_id"] {
                Value::Array(several) => ids.extend(several.iter().filter_map(Value::as_u64)),
                one => ids.extend(one.as_u64()),
            }
            let name = &object["eos_token"];
            names.extend(
                name.as_str()
                    .or_else(|| name["content"].as_str())
                    .map(str::to_owned),
            );
        }
        Self::new(&path, source, &ids, &names)
    }

    /// Parses a `tokenizer.json`; `path` is for messages.
    pub fn from_bytes(path: &Path, source: Vec<u8>) -> Result<Self, TokenizerError> {
        Self::new(path, source, &[], &[])
    }

    /// The file as it was read.
    pub fn source(&self) -> &[u8] {
        &self.source
    }

    /// Number of ids, unused ones included.
    pub fn size(&self) -> usize {
        self.entries.len()
    }

    /// The token that ends records.
    pub fn end_of_record(&self) -> u32 {
        self.end_of_record
    }

    /// Names and ids of special tokens, by id: the text that chat templates write for them.
    pub fn special_tokens(&self) -> Vec<(String, u32)> {
        let added = self.inner.get_added_tokens_decoder();
        let mut special: Vec<(String, u32)> = added
            .into_iter()
            .filter(|(_, token)| token.special)
            .map(|(id, token)| (token.content, id))
            .collect();
        special.sort_by_key(|(_, id)| *id);
        special
    }

    /// The token that starts records: what the tokenizer puts before a text, else the one that ends records.
    pub fn start_of_record(&self) -> u32 {
        self.start_of_record
    }

    /// What each id means, for a model with `rows` rows; rows without a token are ignored.
    pub fn token_table(&self, rows: usize) -> Result<Vec<TokenEntry>, TokenizerError> {
        if rows < self.entries.len() {
            return Err(TokenizerError::TooManyTokens {
                tokens: self.entries.len(),
                rows,
            });
        }
        let mut table = self.entries.clone();
        table.resize(rows, TokenEntry::Ignored);
        Ok(table)
    }

    /// The byte-sorted vocabulary for a model with `rows` rows.
    pub fn vocab(&self, rows: usize) -> Result<Vocab, TokenizerError> {
        let table = self.token_table(rows)?;
        let kinds = table.iter().map(|entry| match entry {
            TokenEntry::Bytes(bytes) => TokenKind::Bytes(bytes),
            TokenEntry::EndOfRecord => TokenKind::EndOfRecord,
            TokenEntry::Ignored => TokenKind::Ignored,
        });
        Ok(Vocab::new(kinds)?)
    }

    /// Token ids that spell exactly `text`. Special tokens in the text are text.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>, TokenizerError> {
        if text.is_empty() {
            return Ok(Vec::new());
        }
        let encoding =
            self.inner
                .encode_fast(text, false)
                .map_err(|error| TokenizerError::Encode {
                    reason: error.to_string(),
                })?;
        let ids = encoding.get_ids();
        let mut rest = text.as_bytes();
        for &id in ids {
            let bytes = match self.entries.get(id as usize) {
                Some(TokenEntry::Bytes(bytes)) => bytes.as_slice(),
                _ => &[],
            };
            match rest.strip_prefix(bytes) {
                Some(tail) if !bytes.is_empty() => rest = tail,
                _ => return Err(not_exact(text, rest)),
            }
        }
        if rest.is_empty() {
            Ok(ids.to_vec())
        } else {
            Err(not_exact(text, rest))
        }
    }

    /// Token ids of a rendered conversation, as transformers gives them: names of special tokens become those tokens, and
    /// the ids need not spell the text.
    pub fn encode_rendered(&self, text: &str) -> Result<Vec<u32>, TokenizerError> {
        let failed = |reason: String| TokenizerError::Encode { reason };
        let tokenizer = match self.rendered.get() {
            Some(tokenizer) => tokenizer,
            None => {
                let made = without_limits(&self.source).map_err(failed)?;
                self.rendered.get_or_init(|| made)
            }
        };
        let encoding = tokenizer
            .encode_fast(text, false)
            .map_err(|error| failed(error.to_string()))?;
        Ok(encoding.get_ids().to_vec())
    }

    /// Whether a text holds the name of a special token.
    pub fn names_special_token(&self, text: &str) -> bool {
        let added = self.inner.get_added_vocabulary().get_vocab();
        let mut names = added.keys();
        names.any(|name| text.contains(name.as_str()))
    }

    fn new(
        path: &Path,
        source: Vec<u8>,
        end_ids: &[u64],
        end_names: &[String],
    ) -> Result<Self, TokenizerError> {
        let invalid = |reason: String| TokenizerError::Invalid {
            path: path.into(),
            reason,
        };
        check::unique(&source).map_err(invalid)?;
        let mut json: Value = parse(path, &source)?;
        let spelling = spelling(&json).ok_or_else(|| {
            invalid(
                "neither a byte-level nor a byte-fallback vocabulary, so tokens have no bytes"
                    .into(),
            )
        })?;
        as_written(&mut json);
        json["truncation"] = Value::Null;
        json["padding"] = Value::Null;
        let mut inner: tokenizers::Tokenizer =
            serde_json::from_value(json).map_err(|error| invalid(error.to_string()))?;
        inner.set_encode_special_tokens(true);

        let vocabulary: BTreeMap<u32, String> = inner
            .get_vocab(true)
            .into_iter()
            .map(|(token, id)| (id, token))
            .collect();
        let size = vocabulary
            .last_key_value()
            .map_or(0, |(&id, _)| id as usize + 1);
        if size == 0 || size > vocabulary.len().saturating_mul(2) + 4096 {
            return Err(invalid(format!(
                "{} tokens with ids up to {size}",
                vocabulary.len()
            )));
        }
        let mut own: Vec<String> = inner.get_vocab(false).into_keys().collect();
        own.sort_unstable();
        check::bytes(spelling, own.iter().map(String::as_str)).map_err(invalid)?;
        let added = inner.get_added_tokens_decoder();
        let mut entries = vec![TokenEntry::Ignored; size];
        for (&id, token) in &vocabulary {
            let bytes = match added.get(&id) {
                Some(added) if added.special => continue,
                Some(_) => Some(token.as_bytes().to_vec()),
                None => bytes_of(spelling, token),
            };
            if let Some(bytes) = bytes.filter(|bytes| !bytes.is_empty()) {
                entries[id as usize] = TokenEntry::Bytes(bytes);
            }
        }
        let by_name = |name: &str| {
            vocabulary
                .iter()
                .find(|(_, token)| *token == name)
                .map(|(&id, _)| id)
        };
        let mut ends: Vec<u32> = end_names.iter().filter_map(|name| by_name(name)).collect();
        ends.extend(end_ids.iter().filter_map(|&id| u32::try_from(id).ok()));
        ends.retain(|id| (*id as usize) < size);
        if ends.is_empty() {
            ends.extend(USUAL_ENDS.iter().find_map(|name| by_name(name)));
        }
        let Some(&end_of_record) = ends.first() else {
            return Err(invalid(
                "no end-of-record token; name it as `eos_token` in tokenizer_config.json".into(),
            ));
        };
        for end in ends {
            entries[end as usize] = TokenEntry::EndOfRecord;
        }
        let before = inner.encode_fast("", true);
        let before = before.map_err(|error| invalid(error.to_string()))?;
        let before = before.get_ids().first().copied();
        let is_special = |id: &u32| entries.get(*id as usize) == Some(&TokenEntry::Ignored);
        Ok(Self {
            inner,
            source,
            start_of_record: before.filter(is_special).unwrap_or(end_of_record),
            entries,
            end_of_record,
            rendered: OnceLock::new(),
        })
    }
}

/// The tokenizer of a file, without cutting and padding.
fn without_limits(source: &[u8]) -> Result<tokenizers::Tokenizer, String> {
    let parsed = serde_json::from_slice(source);
    let mut json: Value = parsed.map_err(|error| error.to_string())?;
    json["truncation"] = Value::Null;
    json["padding"] = Value::Null;
    serde_json::from_value(json).map_err(|error| error.to_string())
}

fn not_exact(text: &str, rest: &[u8]) -> TokenizerError {
    TokenizerError::NotExact {
        bytes: text.len(),
        at: text.len() - rest.len(),
    }
}

fn read(path: &Path) -> Result<Vec<u8>, TokenizerError> {
    let failed = |source| TokenizerError::Read {
        path: path.into(),
        source,
    };
    let size = std::fs::metadata(path).map_err(failed)?.len();
    if size > LARGEST {
        let reason = format!("{size} bytes, more than {LARGEST}");
        return Err(TokenizerError::Invalid {
            path: path.into(),
            reason,
        });
    }
    std::fs::read(path).map_err(failed)
}

fn parse(path: &Path, bytes: &[u8]) -> Result<Value, TokenizerError> {
    let invalid = |reason: String| TokenizerError::Invalid {
        path: path.into(),
        reason,
    };
    let value: Value = serde_json::from_slice(bytes).map_err(|error| invalid(error.to_string()))?;
    if value.is_object() {
        Ok(value)
    } else {
        Err(invalid("not a JSON object".into()))
    }
}

#[cfg(test)]
mod tests;
