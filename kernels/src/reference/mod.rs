//! The operations as the formulas read: `f64`, whole vocabulary, no ranges. The other backends are
//! held to these.

pub(crate) mod adapters;
pub(crate) mod fusion;
pub(crate) mod loss;
pub(crate) mod score;
mod sorted;

use std::ops::Range;

use crate::backend::NotFinite;
use crate::element::Element;
use crate::vocab::Vocab;

/// A row of logits as `f64`, the tokens that carry mass only.
pub(crate) fn wide<T: Element>(
    vocab: &Vocab,
    logits: &[T],
    row: usize,
) -> Result<Vec<f64>, NotFinite> {
    let start = row * vocab.len();
    let live = logits[start..start + vocab.live()].iter();
    let wide: Vec<f64> = live.map(|&logit| f64::from(logit.to_f32())).collect();
    match wide.iter().position(|logit| !logit.is_finite()) {
        Some(column) => Err(NotFinite { row, column }),
        None => Ok(wide),
    }
}

/// `ln sum exp` over the ranks that `belongs` accepts; minus infinity over none.
pub(crate) fn log_mass(logits: &[f64], belongs: impl Fn(usize) -> bool) -> f64 {
    let members = || {
        (0..logits.len())
            .filter(|&rank| belongs(rank))
            .map(|rank| logits[rank])
    };
    let max = members().fold(f64::NEG_INFINITY, f64::max);
    if max == f64::NEG_INFINITY {
        return max;
    }
    max + members().map(|logit| (logit - max).exp()).sum::<f64>().ln()
}

/// Ranks below a prefix, found by comparing every token.
pub(crate) fn below(vocab: &Vocab, prefix: &[u8]) -> Range<usize> {
    let starts = |&rank: &u32| vocab.token_bytes(rank).starts_with(prefix);
    let first = (0..vocab.byte_tokens()).find(starts).unwrap_or(0) as usize;
    first..first + (0..vocab.byte_tokens()).filter(starts).count()
}
