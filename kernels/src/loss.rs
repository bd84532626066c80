//! Losses of a language model on one item, with closed-form gradients.
//!
//! **Trie loss.** The student's vocabulary is a trie of bytes; `M(u)` is the mass of all tokens
//! below node `u`, itself included. For an observed token of n bytes at byte o, with `q_j` the
//! target at byte j and `x` the observed bytes, the nodes and their classes are
//!
//! | k | node | classes and their targets |
//! |---|---|---|
//! | 0 | root | first byte c: `q_o(c)`; end of record: `q_o(end)`; ghost: the tail |
//! | 0 < k < n | `t[..k]` | child c: `q_{o+k}(c)`; stop: all listed mass that is no child |
//! | n | token `t`, where it has children | child c other than `x_{o+n}`: `q_{o+n}(c)`; stop: the rest |
//!
//! and the loss is the sum over nodes of `-sum_c target_c ln(mass_c / M(u))`, targets normalised
//! per node. Stop exists where the node is a token. Its gradient is `dz_v += p_v (1/M(u) - target_c
//! / mass_c)` for every token v below u in class c, which sums to zero over the node. With one-hot
//! targets the sum telescopes to the cross-entropy of the tokens.
//!
//! *Root fix.* Byte c other than `x_o` has target 0 at the root where previous token + c is still a
//! trie node: that mass belongs to the previous token's own node. The item's first token has no
//! previous one.
//!
//! *Tail.* At the root it is a ghost bucket over all first bytes that are neither listed nor
//! removed by the root fix: spread in proportion to the student's own mass there, so that no
//! gradient flows inside. At deeper nodes it is dropped. Code 255 reads as zero.
//!
//! *Degenerate cases.* Target mass of a byte that no token starts with is dropped; a node left
//! without target mass is skipped. A class whose mass underflows is exponentiated again against its
//! own maximum, so a target that the student finds impossible still has its finite loss and full
//! gradient.

use crate::backend::{Backend, NotFinite};
use crate::code::{self, FLOOR};
use crate::error::LossError;
use crate::records::RecordView;
use crate::vocab::Vocab;
#[cfg(feature = "cuda")]
use crate::cuda;
#[cfg(not(feature = "cuda"))]
use crate::error::CudaError;
use crate::{cpu, reference};

/// A row of [`cross_entropy`] without a label: no loss, gradient untouched.
pub const NO_LABEL: u32 = u32::MAX;

/// Trie loss of one item in nats, times `weight`; adds its gradient to `grad`.
///
/// `tokens` are the ranks of the target's m tokens without the end; `target` has one position per
/// byte and one for the end; `logits` and `grad` are `[m + 1, V]`: row i predicts token i, the last
/// row the end of the record.
///
/// # Errors
/// Where sizes disagree, a rank spells no bytes, or a logit or the weight is not finite; `grad` is
/// then of no use.
pub fn trie_loss(
    vocab: &Vocab,
    tokens: &[u32],
    target: RecordView<'_>,
    logits: &[f32],
    weight: f32,
    grad: &mut [f32],
) -> Result<f64, LossError> {
    Backend::best().trie_loss(vocab, tokens, target, logits, weight, grad)
}

/// Cross-entropy of labels in nats, times `weight`; adds its gradient to `grad`.
///
/// `labels` are ranks, one per row of `logits` and `grad` `[labels.len(), V]`; [`NO_LABEL`] skips a
/// row. A label stands for its class: all tokens with the same bytes, or all that end a record.
///
/// # Errors
/// Where sizes disagree, a label is ignored or out of range, or a logit or the weight is not
/// finite; `grad` is then of no use.
pub fn cross_entropy(
    vocab: &Vocab,
    labels: &[u32],
    logits: &[f32],
    weight: f32,
    grad: &mut [f32],
) -> Result<f64, LossError> {
    Backend::best().cross_entropy(vocab, labels, logits, weight, grad)
}

impl Backend {
    /// [`trie_loss`] on this implementation.
    ///
    /// # Errors
    /// As [`trie_loss`].
    pub fn trie_loss(
        self,
        vocab: &Vocab,
        tokens: &[u32],
        target: RecordView<'_>,
        logits: &[f32],
        weight: f32,
        grad: &mut [f32],
    ) -> Result<f64, LossError> {
        let job = TrieJob::new(vocab, tokens, target, weight)?;
        check_rows(vocab, tokens.len() + 1, logits, grad)?;
        let loss = match self {
            Self::Reference => reference::loss::trie_loss(&job, logits, grad),
            Self::Cpu => cpu::loss::trie_loss(&job, logits, grad),
            #[cfg(feature = "cuda")]
            Self::Cuda => {
                let terms = [cuda::Term::Trie { target, weight }];
                return add_on_device(vocab, tokens, &terms, logits, grad);
            }
            #[cfg(not(feature = "cuda"))]
            Self::Cuda => return Err(CudaError::NotBuilt.into()),
        };
        Ok(loss?)
    }

    /// [`cross_entropy`] on this implementation.
    ///
    /// # Errors
    /// As [`cross_entropy`].
    pub fn cross_entropy(
        self,
        vocab: &Vocab,
        labels: &[u32],
        logits: &[f32],
        weight: f32,
        grad: &mut [f32],
    ) -> Result<f64, LossError> {
        check_weight(weight)?;
        check_rows(vocab, labels.len(), logits, grad)?;
        for (position, &rank) in labels.iter().enumerate() {
            if rank != NO_LABEL && rank as usize >= vocab.live() {
                return Err(LossError::Label { position, rank });
            }
        }
        let loss = match self {
            Self::Reference => reference::loss::cross_entropy(vocab, labels, logits, weight, grad),
            Self::Cpu => cpu::loss::cross_entropy(vocab, labels, logits, weight, grad),
            #[cfg(feature = "cuda")]
            Self::Cuda => {
                let Some(last) = labels.len().checked_sub(1) else {
                    return Ok(0.0);
                };
                // Labels alone cut a row along themselves, so any tokens will do.
                let terms = [cuda::Term::Labels { labels, weight }];
                return add_on_device(vocab, &vec![0; last], &terms, logits, grad);
            }
            #[cfg(not(feature = "cuda"))]
            Self::Cuda => return Err(CudaError::NotBuilt.into()),
        };
        Ok(loss?)
    }
}

#[cfg(feature = "cuda")]
fn add_on_device(
    vocab: &Vocab,
    tokens: &[u32],
    terms: &[cuda::Term<'_>],
    logits: &[f32],
    grad: &mut [f32],
) -> Result<f64, LossError> {
    let mut rows = logits.to_vec();
    let loss = cuda::host::loss_in_place(vocab, &[cuda::ItemLoss { tokens, terms }], &mut rows)?;
    for (grad, value) in grad.iter_mut().zip(rows) {
        *grad += value;
    }
    Ok(loss)
}

impl From<NotFinite> for LossError {
    fn from(NotFinite { row, column }: NotFinite) -> Self {
        Self::NotFinite { row, column }
    }
}

/// Checked inputs of a trie loss, but for the logits.
#[derive(Clone, Copy, Debug)]
pub(crate) struct TrieJob<'a> {
    pub(crate) vocab: &'a Vocab,
    pub(crate) tokens: &'a [u32],
    pub(crate) target: RecordView<'a>,
    pub(crate) weight: f64,
}

impl<'a> TrieJob<'a> {
    pub(crate) fn new(
        vocab: &'a Vocab,
        tokens: &'a [u32],
        target: RecordView<'a>,
        weight: f32,
    ) -> Result<Self, LossError> {
        check_weight(weight)?;
        let mut bytes = 0;
        for (position, &rank) in tokens.iter().enumerate() {
            if rank >= vocab.byte_tokens() {
                return Err(LossError::Label { position, rank });
            }
            bytes += vocab.token_bytes(rank).len();
        }
        let (got, expected) = (target.positions(), bytes + 1);
        if got != expected {
            return Err(LossError::Length {
                what: "target positions",
                got,
                expected,
            });
        }
        Ok(Self {
            vocab,
            tokens,
            target,
            weight: f64::from(weight),
        })
    }

    /// First byte of a token of the target; `None` past the last, where the record ends.
    pub(crate) fn first_byte(&self, token: usize) -> Option<u8> {
        self.tokens
            .get(token)
            .map(|&rank| self.vocab.token_bytes(rank)[0])
    }
}

/// Probability of a code in a target: the floor reads as zero, so that a one-hot target can be
/// written.
pub(crate) fn probability(code: u8) -> f64 {
    if code == FLOOR {
        0.0
    } else {
        code::decode(code)
    }
}

fn check_weight(weight: f32) -> Result<(), LossError> {
    if weight.is_finite() {
        Ok(())
    } else {
        Err(LossError::Weight)
    }
}

fn check_rows(vocab: &Vocab, rows: usize, logits: &[f32], grad: &[f32]) -> Result<(), LossError> {
    let expected = rows.saturating_mul(vocab.len());
    for (what, got) in [("logits", logits.len()), ("gradient", grad.len())] {
        if got != expected {
            return Err(LossError::Length {
                what,
                got,
                expected,
            });
        }
    }
    Ok(())
}
