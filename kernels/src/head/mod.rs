//! The output head together with what follows it: hidden states to losses or records, so that the
//! logits of a batch never exist at once.
//!
//! Logits are `hidden weights^T`; scratch for them is at most [`SCRATCH_BYTES`], or one row, or a
//! block of one row. Scores take chunks of rows and losses blocks of the vocabulary; a batch of those
//! has a few rows of width d beside its logits for each of its rows. Results do not depend on the
//! number of threads.

mod fold;
mod loss;
mod score;

use std::ops::Range;

use half::{bf16, f16};

use crate::cpu::Level;
use crate::element::Element;
use crate::error::HeadError;
use crate::matmul::{View, ViewMut, Write, abt};
use crate::vocab::Vocab;

/// Bytes of logits that exist at a time, unless a single row has more.
pub const SCRATCH_BYTES: usize = 16 << 20;

/// Rows of weights that are used, and widened to `f32` where they are stored in fewer bits, at a
/// time: few enough to stay in a core's cache between logits and gradient.
const BLOCK: usize = 512;

/// Weights of an output head `[V, d]` by storage type, rows in rank order.
#[derive(Clone, Copy, Debug)]
pub enum Weights<'a> {
    /// Single precision.
    F32(&'a [f32]),
    /// The upper half of single precision.
    Bf16(&'a [bf16]),
    /// Half precision.
    F16(&'a [f16]),
}

impl Weights<'_> {
    fn len(&self) -> usize {
        match self {
            Self::F32(weights) => weights.len(),
            Self::Bf16(weights) => weights.len(),
            Self::F16(weights) => weights.len(),
        }
    }
}

/// A vocabulary and the head that predicts it.
#[derive(Clone, Copy, Debug)]
pub struct Head<'a> {
    vocab: &'a Vocab,
    weights: Weights<'a>,
    width: usize,
    /// [`SCRATCH_BYTES`], [`BLOCK`] and the best level but in tests.
    pub(crate) scratch: usize,
    pub(crate) block: usize,
    pub(crate) level: Level,
}

impl<'a> Head<'a> {
    /// Borrows the weights, `[vocab.len(), width]` in rank order ([`Vocab::id_of_rank`]).
    ///
    /// # Errors
    /// Where the number of weights is another, or `width` is zero.
    pub fn new(vocab: &'a Vocab, weights: Weights<'a>, width: usize) -> Result<Self, HeadError> {
        let expected = vocab.len().saturating_mul(width);
        let got = weights.len();
        if got != expected || width == 0 {
            return Err(HeadError::Weights {
                got,
                tokens: vocab.len(),
                width,
            });
        }
        Ok(Self {
            vocab,
            weights,
            width,
            scratch: SCRATCH_BYTES,
            block: BLOCK,
            level: Level::best(),
        })
    }

    /// The vocabulary.
    #[must_use]
    pub fn vocab(&self) -> &'a Vocab {
        self.vocab
    }

    /// Some tokens in blocks of at most [`Self::block`].
    fn even(&self, tokens: Range<usize>) -> impl Iterator<Item = Range<usize>> + use<> {
        let (block, end) = (self.block, tokens.end);
        tokens
            .step_by(block)
            .map(move |first| first..end.min(first + block))
    }

    /// Gives `work` the weights of blocks of tokens as `f32`, with the first token of each.
    fn blocks(
        &self,
        blocks: impl IntoIterator<Item = Range<usize>>,
        mut work: impl FnMut(usize, View<'_>),
    ) {
        let width = self.width;
        let values = |tokens: &Range<usize>| tokens.start * width..tokens.end * width;
        match self.weights {
            Weights::F32(weights) => {
                for tokens in blocks {
                    let weights = &weights[values(&tokens)];
                    work(tokens.start, View::new(weights, tokens.len(), width));
                }
            }
            Weights::Bf16(weights) => {
                widened(blocks, width, |tokens| &weights[values(tokens)], work);
            }
            Weights::F16(weights) => {
                widened(blocks, width, |tokens| &weights[values(tokens)], work);
            }
        }
    }
}

fn widened<'w, T: Element>(
    blocks: impl IntoIterator<Item = Range<usize>>,
    width: usize,
    weights: impl Fn(&Range<usize>) -> &'w [T],
    mut work: impl FnMut(usize, View<'_>),
) {
    let mut wide = Vec::new();
    for tokens in blocks {
        wide.clear();
        wide.extend(weights(&tokens).iter().map(|weight| weight.to_f32()));
        work(tokens.start, View::new(&wide, tokens.len(), width));
    }
}

/// `logits = hidden weights^T`, rows `stride` values apart, by way of its transpose: hidden states are
/// cheaper to pack for the product than weights.
fn product(
    weights: View<'_>,
    hidden: View<'_>,
    by_column: &mut [f32],
    logits: &mut [f32],
    stride: usize,
) {
    const SIDE: usize = 16;
    let (columns, rows) = (weights.rows(), hidden.rows());
    let out = ViewMut::new(by_column, columns, rows);
    abt(out, Write::Replace, weights, hidden, 1.0);
    for first in (0..columns).step_by(SIDE) {
        for row in 0..rows {
            for column in first..columns.min(first + SIDE) {
                logits[row * stride + column] = by_column[column * rows + row];
            }
        }
    }
}
