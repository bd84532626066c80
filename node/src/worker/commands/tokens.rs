//! What `consilium-node tokens` does: a reference set whose items say their tokens, for a round in token space.

use std::path::Path;

use consilium_protocol::Digest;
use consilium_protocol::manifest::SymbolSpace;
use consilium_protocol::reference::ReferenceSet;
use serde_json::{Map, Value};

use crate::hub::ModelPlace;
use crate::worker::error::WorkError;
use crate::worker::files::write_atomic;
use crate::worker::tokenizer::Tokenizer;
use crate::worker::tokens::tokens_of;

/// Writes a copy of a reference file with the tokens that the tokenizer of `model` makes of each target, and returns the
/// symbol space that a round names with it. Of the model its tokenizer is read, and what says which token ends records.
///
/// # Errors
/// A file cannot be read or written, or a target cannot be tokenised.
pub fn tokens(
    model: &ModelPlace,
    reference: &Path,
    output: &Path,
) -> Result<SymbolSpace, WorkError> {
    let tokenizer = Tokenizer::load(&model.resolve()?)?;
    let vocab = tokenizer.vocab(tokenizer.size())?;
    let bytes = std::fs::read(reference).map_err(|source| WorkError::Read {
        path: reference.to_owned(),
        source,
    })?;
    let wrong = |problem: String| WorkError::File {
        path: reference.to_owned(),
        problem,
    };
    ReferenceSet::parse(&bytes).map_err(|error| wrong(error.to_string()))?;
    let mut text = Vec::new();
    for line in bytes
        .split(|&byte| byte == b'\n')
        .filter(|line| !line.is_empty())
    {
        let mut item: Map<String, Value> =
            serde_json::from_slice(line).map_err(|error| wrong(error.to_string()))?;
        let target = item
            .get("target")
            .and_then(Value::as_str)
            .unwrap_or_default();
        let tokens = tokens_of(&tokenizer, &vocab, target)?;
        item.insert(
            "tokens".to_owned(),
            tokens.iter().map(|&(id, bytes)| vec![id, bytes]).collect(),
        );
        serde_json::to_writer(&mut text, &item).map_err(|error| wrong(error.to_string()))?;
        text.push(b'\n');
    }
    write_atomic(output, [text.as_slice()]).map_err(|source| WorkError::Write {
        path: output.to_owned(),
        source,
    })?;
    Ok(SymbolSpace::Tokens {
        tokenizer: Digest::of(tokenizer.source()),
        size: u32::try_from(tokenizer.size()).unwrap_or(u32::MAX),
    })
}
