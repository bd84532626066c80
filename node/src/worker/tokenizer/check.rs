//! A vocabulary in which every id is one token and every byte can be spelled.

use std::collections::BTreeMap;
use std::fmt;

use serde::de::{Deserialize, Deserializer, IgnoredAny, MapAccess, SeqAccess, Visitor};

use super::spelling::{Spelling, bytes_of};

#[derive(serde::Deserialize)]
struct File {
    model: Model,
    #[serde(default)]
    added_tokens: Vec<Added>,
}

#[derive(serde::Deserialize)]
struct Model {
    vocab: Tokens,
}

#[derive(serde::Deserialize)]
struct Added {
    id: u32,
    content: String,
}

/// Tokens in the order of the file, those written twice included.
struct Tokens(Vec<(String, u32)>);

impl<'de> Deserialize<'de> for Tokens {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(TokensVisitor).map(Self)
    }
}

/// Takes an object of ids by token, or a list of tokens with scores.
struct TokensVisitor;

impl<'de> Visitor<'de> for TokensVisitor {
    type Value = Vec<(String, u32)>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object of token ids, or a list of tokens and scores")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
        let mut tokens = Vec::new();
        while let Some(entry) = map.next_entry()? {
            tokens.push(entry);
        }
        Ok(tokens)
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Self::Value, A::Error> {
        let mut tokens = Vec::new();
        for id in 0.. {
            let Some((token, _)) = list.next_element::<(String, IgnoredAny)>()? else {
                break;
            };
            tokens.push((token, id));
        }
        Ok(tokens)
    }
}

/// Checks that no token and no id of `tokenizer.json` is there twice; the parsers behind keep the last without a word.
pub(super) fn unique(source: &[u8]) -> Result<(), String> {
    let file: File = serde_json::from_slice(source).map_err(|error| error.to_string())?;
    let mut by_token: BTreeMap<&str, u32> = BTreeMap::new();
    let mut by_id: BTreeMap<u32, &str> = BTreeMap::new();
    for (token, id) in &file.model.vocab.0 {
        if let Some(other) = by_token.insert(token, *id) {
            return Err(format!(
                "model.vocab: token `{token}` is there twice, as {other} and {id}"
            ));
        }
        if let Some(other) = by_id.insert(*id, token) {
            return Err(format!(
                "model.vocab: id {id} is both `{other}` and `{token}`"
            ));
        }
    }
    for Added { id, content } in &file.added_tokens {
        match by_id.insert(*id, content) {
            Some(other) if other != content => {
                return Err(format!(
                    "added_tokens: id {id} is `{content}`, but also `{other}`"
                ));
            }
            _ => {}
        }
    }
    Ok(())
}

/// Checks that each byte that UTF-8 uses has a token, and in a byte-fallback vocabulary exactly one of the kind `<0xAB>`.
pub(super) fn bytes<'a>(
    spelling: Spelling,
    tokens: impl Iterator<Item = &'a str>,
) -> Result<(), String> {
    let mut token_of: [Option<&str>; 256] = [None; 256];
    for token in tokens {
        let is_fallback = token.starts_with("<0x") && token.len() == "<0xAB>".len();
        if spelling == Spelling::ByteFallback && !is_fallback {
            continue;
        }
        let bytes = bytes_of(spelling, token);
        let Some(&[byte]) = bytes.as_deref() else {
            continue;
        };
        if let Some(other) = token_of[usize::from(byte)].replace(token) {
            return Err(format!("byte {byte:#04x} is both `{other}` and `{token}`"));
        }
    }
    let is_used = |byte: &u8| !matches!(byte, 0xc0 | 0xc1 | 0xf5..=0xff);
    let missing = (0..=255_u8)
        .filter(is_used)
        .find(|&byte| token_of[usize::from(byte)].is_none());
    match missing {
        Some(byte) => Err(format!(
            "no token for byte {byte:#04x}, so not every text can be written"
        )),
        None => Ok(()),
    }
}
