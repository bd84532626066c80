//! Tokenizers as byte strings: what each token spells, exactly.

mod bpe;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use consilium_kernels::{TokenKind, Vocab, VocabError};
use serde_json::Value;

pub use bpe::train_bpe;

/// Largest `tokenizer.json` that is read, in bytes.
const LARGEST: u64 = 256 << 20;

/// Names of end-of-record tokens where no file names one.
const USUAL_ENDS: [&str; 4] = ["<|endoftext|>", "</s>", "<|end_of_text|>", "<eos>"];

/// Why a tokenizer was refused, or could not encode a text.
#[derive(Debug, thiserror::Error)]
pub enum TokenizerError {
    /// A file could not be read.
    #[error("{path}: cannot read: {source}")]
    Read {
        /// File.
        path: PathBuf,
        /// Cause.
        source: std::io::Error,
    },
    /// A file could not be written.
    #[error("{path}: cannot write: {source}")]
    Write {
        /// File.
        path: PathBuf,
        /// Cause.
        source: std::io::Error,
    },
    /// A file is not what it should be.
    #[error("{path}: {reason}")]
    Invalid {
        /// File.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
    /// The vocabulary could not be trained.
    #[error("cannot train a vocabulary: {reason}")]
    Train {
        /// What is wrong.
        reason: String,
    },
    /// The tokenizer failed on a text.
    #[error("cannot tokenise: {reason}")]
    Encode {
        /// What it said.
        reason: String,
    },
    /// The tokens of a text spell something else, so scores of its bytes would be wrong.
    #[error(
        "the tokens of a text of {bytes} bytes spell something else from byte {at} on: the tokenizer \
         normalises text, or has no token for it"
    )]
    NotExact {
        /// Length of the text.
        bytes: usize,
        /// First byte of the first token that differs.
        at: usize,
    },
    /// A model has fewer rows than the tokenizer has tokens.
    #[error("the tokenizer has {tokens} tokens, the model only {rows} rows")]
    TooManyTokens {
        /// Tokens.
        tokens: usize,
        /// Rows of the embedding.
        rows: usize,
    },
    /// The vocabulary cannot be sorted.
    #[error(transparent)]
    Vocab(#[from] VocabError),
}

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
    end_of_record: u32,
}

/// How a vocabulary writes bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Spelling {
    /// GPT-2: one printable character per byte.
    ByteLevel,
    /// SentencePiece: text with `▁` for the space, `<0xAB>` for single bytes.
    ByteFallback,
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

    /// The token that starts and ends records.
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
        let mut json: Value = parse(path, &source)?;
        let spelling = spelling(&json).ok_or_else(|| {
            invalid(
                "neither a byte-level nor a byte-fallback vocabulary, so tokens have no bytes"
                    .into(),
            )
        })?;
        without_leading_space(&mut json);
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
        Ok(Self {
            inner,
            source,
            entries,
            end_of_record,
        })
    }
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

/// The decoder says how tokens turn into bytes.
fn spelling(json: &Value) -> Option<Spelling> {
    let mut kinds = vec![&json["decoder"]["type"]];
    if let Some(parts) = json["decoder"]["decoders"].as_array() {
        kinds.extend(parts.iter().map(|part| &part["type"]));
    }
    let has = |kind: &str| kinds.iter().any(|found| found.as_str() == Some(kind));
    if has("ByteLevel") {
        Some(Spelling::ByteLevel)
    } else if has("ByteFallback") || json["model"]["byte_fallback"] == Value::Bool(true) {
        Some(Spelling::ByteFallback)
    } else {
        None
    }
}

/// Takes away what puts a space before a text: tokens must spell the text and nothing else.
fn without_leading_space(json: &mut Value) {
    fn parts<'a>(json: &'a mut Value, field: &str, list: &str) -> Vec<&'a mut Value> {
        match json.get_mut(field) {
            Some(part) if part.get(list).is_some_and(Value::is_array) => part[list]
                .as_array_mut()
                .map(|parts| parts.iter_mut().collect())
                .unwrap_or_default(),
            Some(part) => vec![part],
            None => Vec::new(),
        }
    }
    for part in parts(json, "normalizer", "normalizers") {
        if part["type"] == "Prepend" {
            part["prepend"] = Value::String(String::new());
        }
    }
    for part in parts(json, "pre_tokenizer", "pretokenizers") {
        match part["type"].as_str() {
            Some("Metaspace") => {
                part["prepend_scheme"] = Value::String("never".into());
                if let Some(object) = part.as_object_mut() {
                    object.remove("add_prefix_space");
                }
            }
            Some("ByteLevel") => part["add_prefix_space"] = Value::Bool(false),
            _ => {}
        }
    }
}

fn bytes_of(spelling: Spelling, token: &str) -> Option<Vec<u8>> {
    match spelling {
        Spelling::ByteLevel => token.chars().map(byte_of).collect(),
        Spelling::ByteFallback => {
            let hex = token
                .strip_prefix("<0x")
                .and_then(|rest| rest.strip_suffix('>'));
            match hex
                .filter(|hex| hex.len() == 2)
                .and_then(|hex| u8::from_str_radix(hex, 16).ok())
            {
                Some(byte) => Some(vec![byte]),
                None => Some(token.replace('\u{2581}', " ").into_bytes()),
            }
        }
    }
}

/// The byte that GPT-2's `bytes_to_unicode` writes as `character`: printable Latin-1 stands for itself,
/// the other 68 bytes are the characters from 256 on, in order.
fn byte_of(character: char) -> Option<u8> {
    let is_printable = |byte: u8| matches!(byte, 33..=126 | 161..=172 | 174..=255);
    match u32::from(character) {
        code @ 0..=255 => u8::try_from(code).ok().filter(|&byte| is_printable(byte)),
        code => (0..=255u8)
            .filter(|&byte| !is_printable(byte))
            .nth(code as usize - 256),
    }
}

#[cfg(test)]
mod tests;
