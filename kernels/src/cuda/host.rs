//! The operations on logits of the host: there and back. Moving logits costs more than the CPU takes to score them, so
//! these serve tests and callers that have nothing better to do with their CPU.

use crate::cuda::{BranchRows, Logits, LossJob, Scoring, device};
use crate::element::Element;
use crate::error::{LossError, ScoreError};
use crate::loss::ItemLoss;
use crate::records::{RecordShape, Records};
use crate::score::{Branch, ItemTokens, Missed};
use crate::vocab::Vocab;

/// Interior stops of every item above a threshold.
///
/// # Errors
/// As [`crate::score::branches`], or where the device fails.
pub fn branches<T: Element>(
    vocab: &Vocab,
    items: &[&[u32]],
    logits: &[T],
    threshold: f32,
) -> Result<Vec<Vec<Branch>>, ScoreError> {
    let device = device()?;
    let logits = Logits::upload(device, logits)?;
    let scoring = Scoring::new(device, vocab, items, &logits)?;
    scoring.sum()?;
    scoring.branches(threshold)
}

/// Bits of every item.
///
/// # Errors
/// As [`crate::score::token_bits`], or where the device fails.
pub fn token_bits<T: Element>(
    vocab: &Vocab,
    items: &[&[u32]],
    logits: &[T],
) -> Result<Vec<f64>, ScoreError> {
    let device = device()?;
    let logits = Logits::upload(device, logits)?;
    let scoring = Scoring::new(device, vocab, items, &logits)?;
    scoring.sum()?;
    scoring.token_bits()
}

/// Appends the positions of all items to `out`; `branch_logits` has one row per branch, item by item.
///
/// # Errors
/// As [`crate::score::records`], or where the device fails.
pub fn records<T: Element>(
    vocab: &Vocab,
    items: &[ItemTokens<'_>],
    logits: &[T],
    branch_logits: &[T],
    shape: &RecordShape,
    out: &mut Records,
) -> Result<Vec<Missed>, ScoreError> {
    let device = device()?;
    let logits = Logits::upload(device, logits)?;
    let branch_logits = Logits::upload(device, branch_logits)?;
    let tokens: Vec<&[u32]> = items.iter().map(|item| item.tokens).collect();
    let branches: Vec<&[Branch]> = items.iter().map(|item| item.branches).collect();
    let scoring = Scoring::new(device, vocab, &tokens, &logits)?;
    scoring.sum()?;
    let branches = BranchRows {
        branches: &branches,
        logits: &branch_logits,
    };
    scoring.records(vocab, Some(branches), shape, out)
}

/// Sum of all terms in nats; `logits` become its gradient.
///
/// # Errors
/// Where sizes disagree, a rank or label is out of range, a logit is not finite, or the device fails; `logits` are then
/// of no use.
pub fn loss_in_place<T: Element>(
    vocab: &Vocab,
    items: &[ItemLoss<'_>],
    logits: &mut [T],
) -> Result<f64, LossError> {
    let device = device()?;
    let mut rows = Logits::upload(device, logits)?;
    let job = LossJob::new(device, vocab, items, &mut rows)?;
    job.run()?;
    let loss = job.loss()?;
    drop(job);
    rows.download(device, logits)?;
    Ok(loss)
}
