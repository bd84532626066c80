//! Losses of a language model on logits, with closed-form gradients written in place.
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
//!
//! **Labels.** `-ln p(class of the label)`: cross-entropy.
//!
//! **Tokens.** `-sum_c target_c ln p_c` over the classes of the listed tokens, normalised together
//! with the tail, which is one more class: all tokens not listed ([`Tail::Ghost`]), so that the
//! gradient inside it is `p_v (1 - tail / mass)`. Dropping it instead normalises over the listed
//! alone, which is right for targets that were sampled: drawing tokens from the teacher and storing
//! their frequencies makes the expected gradient that of the whole distribution (random-sampling
//! distillation, arXiv 2503.16870).

//!
//! **Sorted.** Universal logit distillation (Boizard et al., arXiv 2402.12030), on the K symbols that
//! the target lists: `sum_{i <= K} |p_(i) - q_(i)| + |p_rest - q_rest|`, with `p_(i)` the student's
//! i-th largest probability, `q_(i)` the target's i-th largest share, zero past the last token, and
//! the rests what is left of each to one. One remainder instead of all small probabilities makes
//! this a lower bound of the paper's sum. With `s` the sign of each difference, zero at equality, the
//! gradient is `p_v (s_v - sum_i s_i p_i)`.
//!
//! **Standardised.** The pair loss of InfiFusion (arXiv 2501.02795): of the K largest logits of
//! each side, in descending order, `l^ = (l - mean) / (deviation + 0.001)` with mean and (population)
//! deviation over these K, `p^ = softmax(l^ / temperature)`, and the loss `sum_k |p^_k - q^_k|`. The
//! paper uses K = 10 and mixes `1 - lambda` of cross-entropy with `lambda` of this, averaged over
//! positions: that is what weights are for. Its gradient reaches the K logits alone.
//!
//! Both compare by place, so the target may come from any vocabulary, and its symbols are not read;
//! neither can say *which* token is likely, which a term beside them must. Of a target's codes, mass
//! in steps of 1/16 bit, the first reads probabilities (255 as zero, normalised) and the second
//! logits: log-probabilities are logits less a constant of the position, which standardising
//! removes. A floor, 255, stands for itself there: a smaller logit is not told from it. K is what a
//! position lists; records that are filled to less than all of the mass list fewer where the
//! teacher is certain. What codes do not carry is the order of tokens that share a code, and
//! anything below the K-th but its sum. K above the student's number of tokens counts as that number
//! in the second.

mod graph;
mod groups;
mod sorted;

use crate::backend::{Backend, NotFinite};
use crate::code::{self, FLOOR};
use crate::element::Element;
use crate::error::LossError;
use crate::records::RecordView;
use crate::rows::Rows;
use crate::vocab::Vocab;
use crate::{cpu, reference};

pub use graph::graph;
pub(crate) use groups::{Group, Groups, Place, first_byte};
pub(crate) use sorted::{EPSILON, Measure, Sorted, slope};

/// A row of [`Term::Labels`] without a label: no loss, no gradient.
pub const NO_LABEL: u32 = u32::MAX;

/// One loss over the rows of an item, times `weight`.
#[derive(Clone, Copy, Debug)]
pub enum Term<'a> {
    /// Trie loss of next-byte records: one position per byte of the item's tokens and one for the
    /// end.
    Trie {
        /// What to learn.
        target: RecordView<'a>,
        /// Factor of loss and gradient.
        weight: f32,
    },
    /// Cross-entropy of one rank per row; [`NO_LABEL`] skips a row. A label stands for its class:
    /// all tokens with the same bytes, or all that end a record.
    Labels {
        /// Ranks, one per row.
        labels: &'a [u32],
        /// Factor of loss and gradient.
        weight: f32,
    },
    /// Token-space records, one position per row. Symbols are token ids, not ranks, so that they
    /// mean the same to everyone who has the tokenizer.
    Tokens {
        /// What to learn.
        target: RecordView<'a, u32>,
        /// Factor of loss and gradient.
        weight: f32,
        /// What becomes of the mass that is not listed.
        tail: Tail,
    },
    /// Sorted probabilities of any vocabulary: the listed symbols against as many of the student's
    /// largest, the rest as one. At most one position per row; rows past the last have no loss, as
    /// where answers are cut to the shorter.
    Sorted {
        /// What to learn.
        target: RecordView<'a, u32>,
        /// Factor of loss and gradient.
        weight: f32,
    },
    /// Sorted, standardised logits of any vocabulary; rows as in [`Term::Sorted`].
    Standardised {
        /// What to learn.
        target: RecordView<'a, u32>,
        /// Factor of loss and gradient.
        weight: f32,
        /// Divides the standardised logits; above zero.
        temperature: f32,
    },
}

/// What the unlisted mass of a token-space target asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Tail {
    /// All unlisted tokens together hold it, split in proportion to the student's own mass.
    Ghost,
    /// Nothing: the listed tokens are the whole target.
    Dropped,
}

/// An item and what to learn from it.
#[derive(Clone, Copy, Debug)]
pub struct ItemLoss<'a> {
    /// Ranks of the m observed tokens without the end, which trie terms follow. Row i of the item
    /// predicts token i, row m the end. Without a trie term they are not read: the item then has as
    /// many rows as its first term has labels or positions (m + 1 without terms).
    pub tokens: &'a [u32],
    /// Summed.
    pub terms: &'a [Term<'a>],
}

impl ItemLoss<'_> {
    /// Rows of logits that the item takes.
    #[must_use]
    pub fn rows(&self) -> usize {
        let is_trie = |term: &Term<'_>| matches!(term, Term::Trie { .. });
        match self.terms.first() {
            Some(Term::Labels { labels, .. }) if !self.terms.iter().any(is_trie) => labels.len(),
            Some(
                Term::Tokens { target, .. }
                | Term::Sorted { target, .. }
                | Term::Standardised { target, .. },
            ) if !self.terms.iter().any(is_trie) => target.positions(),
            _ => self.tokens.len() + 1,
        }
    }
}

/// Sum of all terms of all items in nats; overwrites `logits`, the rows of all items one after the
/// other `[rows, V]`, with its gradient. Ignored tokens get zeros.
///
/// # Errors
/// Where sizes disagree, a rank, label or symbol does not fit the vocabulary, or a logit or weight
/// is not finite; `logits` are then of no use.
pub fn loss_in_place<T: Element>(
    vocab: &Vocab,
    items: &[ItemLoss<'_>],
    logits: &mut [T],
) -> Result<f64, LossError> {
    Backend::best().loss_in_place(vocab, items, logits)
}

impl Backend {
    /// [`loss_in_place`] on this implementation.
    ///
    /// # Errors
    /// As [`loss_in_place`].
    pub fn loss_in_place<T: Element>(
        self,
        vocab: &Vocab,
        items: &[ItemLoss<'_>],
        logits: &mut [T],
    ) -> Result<f64, LossError> {
        let job = LossJob::new(vocab, items)?;
        check_length(
            "logits",
            logits.len(),
            job.rows().saturating_mul(vocab.len()),
        )?;
        let rows = 0..job.rows();
        let losses = match self {
            Self::Reference => reference::loss::rows(&job, rows, logits),
            Self::Cpu => cpu::loss::rows(cpu::Level::best(), &job, rows, logits),
            #[cfg(feature = "cuda")]
            Self::Cuda => return crate::cuda::host::loss_in_place(vocab, items, logits),
            #[cfg(not(feature = "cuda"))]
            Self::Cuda => return Err(crate::error::CudaError::NotBuilt.into()),
        };
        Ok(losses?.iter().sum())
    }
}

impl From<NotFinite> for LossError {
    fn from(NotFinite { row, column }: NotFinite) -> Self {
        Self::NotFinite { row, column }
    }
}

/// Checked items, and where their rows are.
#[derive(Clone, Debug)]
pub(crate) struct LossJob<'a> {
    pub(crate) vocab: &'a Vocab,
    pub(crate) items: &'a [ItemLoss<'a>],
    rows: Rows,
    /// Byte at which the token of each row starts in its item; zeros without a trie term.
    offsets: Vec<usize>,
}

impl<'a> LossJob<'a> {
    pub(crate) fn new(vocab: &'a Vocab, items: &'a [ItemLoss<'a>]) -> Result<Self, LossError> {
        let mut offsets = Vec::new();
        let mut counts = Vec::with_capacity(items.len());
        for item in items {
            counts.push(check_item(vocab, item, &mut offsets)?);
        }
        Ok(Self {
            vocab,
            items,
            rows: Rows::new(counts),
            offsets,
        })
    }

    /// Rows of all items.
    pub(crate) fn rows(&self) -> usize {
        self.rows.len()
    }

    /// Whether a term sorts the logits of a row.
    pub(crate) fn needs_whole_rows(&self) -> bool {
        let sorts =
            |term: &Term<'_>| matches!(term, Term::Sorted { .. } | Term::Standardised { .. });
        self.items.iter().any(|item| item.terms.iter().any(sorts))
    }

    /// Item of a row, and its place there.
    pub(crate) fn place(&self, row: usize) -> (&'a ItemLoss<'a>, Place) {
        let (item, index) = self.rows.find(row);
        let offset = self.offsets[row];
        (&self.items[item], Place { index, offset })
    }
}

/// Rows of an item, whose byte offsets are added to `offsets`.
fn check_item(
    vocab: &Vocab,
    item: &ItemLoss<'_>,
    offsets: &mut Vec<usize>,
) -> Result<usize, LossError> {
    let rows = item.rows();
    let before = offsets.len();
    offsets.resize(before + rows, 0);
    for term in item.terms {
        let weight = match term {
            Term::Trie { target, weight } => {
                let bytes = byte_offsets(vocab, item.tokens, &mut offsets[before..])?;
                check_length("target positions", target.positions(), bytes + 1)?;
                weight
            }
            Term::Labels { labels, weight } => {
                check_length("labels", labels.len(), rows)?;
                for (position, &rank) in labels.iter().enumerate() {
                    if rank != NO_LABEL && rank as usize >= vocab.live() {
                        return Err(LossError::Label { position, rank });
                    }
                }
                weight
            }
            Term::Tokens { target, weight, .. } => {
                check_length("target positions", target.positions(), rows)?;
                for (slot, &id) in target.symbols().iter().enumerate() {
                    if id as usize >= vocab.len() {
                        let position = slot / target.k();
                        return Err(LossError::Symbol { position, id });
                    }
                }
                weight
            }
            Term::Sorted { target, weight } => {
                check_length("target positions", target.positions().max(rows), rows)?;
                weight
            }
            Term::Standardised {
                target,
                weight,
                temperature,
            } => {
                check_length("target positions", target.positions().max(rows), rows)?;
                if !(temperature.is_finite() && *temperature > 0.0) {
                    let temperature = *temperature;
                    return Err(LossError::Temperature { temperature });
                }
                weight
            }
        };
        if !weight.is_finite() {
            return Err(LossError::Weight);
        }
    }
    Ok(rows)
}

/// Writes where each token starts and returns the number of bytes.
fn byte_offsets(vocab: &Vocab, tokens: &[u32], offsets: &mut [usize]) -> Result<usize, LossError> {
    let mut bytes = 0;
    for (position, &rank) in tokens.iter().enumerate() {
        if rank >= vocab.byte_tokens() {
            return Err(LossError::Label { position, rank });
        }
        offsets[position] = bytes;
        bytes += vocab.token_bytes(rank).len();
    }
    offsets[tokens.len()] = bytes;
    Ok(bytes)
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

pub(crate) fn check_length(
    what: &'static str,
    got: usize,
    expected: usize,
) -> Result<(), LossError> {
    if got == expected {
        Ok(())
    } else {
        Err(LossError::Length {
            what,
            got,
            expected,
        })
    }
}
