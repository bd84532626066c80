//! Token space: the tokenizer that a round's members share, and whether a model and a reference set keep to it.

use consilium_kernels::Vocab;
use consilium_protocol::Digest;
use consilium_protocol::manifest::SymbolSpace;
use consilium_protocol::reference;

use super::error::WorkError;
use super::tokenizer::{Tokenizer, TokenizerError};

/// Checks that a model's tokenizer is the round's. In byte space any will do.
///
/// # Errors
/// Another `tokenizer.json`, or another number of tokens in it; `whose` names the model.
pub(crate) fn check_tokenizer(
    tokenizer: &Tokenizer,
    whose: &str,
    space: SymbolSpace,
) -> Result<(), WorkError> {
    let SymbolSpace::Tokens {
        tokenizer: expected,
        size,
    } = space
    else {
        return Ok(());
    };
    let got = Digest::of(tokenizer.source());
    let tokens = tokenizer.size();
    let problem = if got != expected {
        format!(
            "tokenizer.json of {whose} has digest {got}, the round's tokenizer has {expected}; this takes a model with \
             that file, or a round in byte space"
        )
    } else if u32::try_from(tokens) != Ok(size) {
        format!(
            "its size is {size}, tokenizer.json of {whose} has {tokens} tokens; open the round with size {tokens}"
        )
    } else {
        return Ok(());
    };
    Err(WorkError::Setting {
        field: "symbol_space",
        problem,
    })
}

/// Checks that the `tokens` of item `number` are those that a model with this vocabulary predicts: its own of the target,
/// and perhaps one that ends the record.
///
/// # Errors
/// The first place where they differ.
pub(crate) fn check_item(
    vocab: &Vocab,
    number: u64,
    item: &reference::Item,
    target: &[u32],
) -> Result<(), WorkError> {
    let own = spelled(vocab, target);
    let ends = |&(id, bytes): &(u32, u32)| {
        let rank = vocab.rank_of_id().get(id as usize);
        bytes == 0 && rank.is_some_and(|rank| vocab.end_ranks().contains(rank))
    };
    let rest = item.tokens.strip_prefix(own.as_slice());
    if rest.is_some_and(|rest| rest.is_empty() || matches!(rest, [last] if ends(last))) {
        return Ok(());
    }
    let same = own.iter().zip(&item.tokens).take_while(|(a, b)| a == b);
    let at = same.count();
    let problem = match (item.tokens.get(at), own.get(at)) {
        (None, _) if item.tokens.is_empty() => "has none".to_owned(),
        (Some(theirs), Some(own)) => {
            format!("number {at} is {theirs:?}, the round's tokenizer gives {own:?}")
        }
        (Some(theirs), None) => {
            format!("number {at} is {theirs:?}, expected [id, 0] of a token that ends records")
        }
        (None, _) => format!("end after {at}, the round's tokenizer gives {}", own.len()),
    };
    Err(WorkError::Setting {
        field: "tokens",
        problem: format!(
            "of item {number} of the reference set: {problem}; make the field with the round's tokenizer.json"
        ),
    })
}

/// What a reference set says of a target in its field `tokens`, the token that ends the record the last.
///
/// # Errors
/// The tokenizer does not give the text's bytes back.
pub fn tokens_of(
    tokenizer: &Tokenizer,
    vocab: &Vocab,
    target: &str,
) -> Result<Vec<(u32, u32)>, TokenizerError> {
    let mut tokens = spelled(vocab, &tokenizer.encode(target)?);
    tokens.push((tokenizer.end_of_record(), 0));
    Ok(tokens)
}

/// Tokens that spell bytes, with how many.
fn spelled(vocab: &Vocab, ids: &[u32]) -> Vec<(u32, u32)> {
    let length = |&id: &u32| {
        let rank = vocab.rank_of_id().get(id as usize);
        let bytes = rank.map_or(0, |&rank| vocab.token_bytes(rank).len());
        (id, u32::try_from(bytes).unwrap_or(u32::MAX))
    };
    ids.iter().map(length).collect()
}
