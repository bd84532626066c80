//! The output head together with what follows it: hidden states to losses or records, in chunks of
//! rows, so that the logits of a batch never exist at once.
//!
//! Logits are `hidden weights^T`; scratch for them is at most [`SCRATCH_BYTES`], or one row. Results
//! do not depend on where chunks end: rows are independent once it is known where they stand, and
//! what a row leaves to the next is carried over.

mod loss;
mod score;

use std::ops::Range;

use half::{bf16, f16};

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
    /// [`SCRATCH_BYTES`] and [`BLOCK`] but in tests.
    pub(crate) scratch: usize,
    pub(crate) block: usize,
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
        })
    }

    /// The vocabulary.
    #[must_use]
    pub fn vocab(&self) -> &'a Vocab {
        self.vocab
    }

    /// Gives `work` some tokens' weights in blocks of at most `block` rows as `f32`, with the first row
    /// of each.
    fn blocks(&self, tokens: Range<usize>, mut work: impl FnMut(usize, View<'_>)) {
        let values = tokens.start * self.width..tokens.end * self.width;
        let firsts = tokens.step_by(self.block);
        let most = self.block * self.width;
        match self.weights {
            Weights::F32(weights) => {
                for (first, weights) in firsts.zip(weights[values].chunks(most)) {
                    let rows = weights.len() / self.width;
                    work(first, View::new(weights, rows, self.width));
                }
            }
            Weights::Bf16(weights) => self.widened(firsts, &weights[values], work),
            Weights::F16(weights) => self.widened(firsts, &weights[values], work),
        }
    }

    fn widened<T: Element>(
        &self,
        firsts: impl Iterator<Item = usize>,
        weights: &[T],
        mut work: impl FnMut(usize, View<'_>),
    ) {
        let most = self.block * self.width;
        let mut block = vec![0.0; most.min(weights.len())];
        for (first, weights) in firsts.zip(weights.chunks(most)) {
            for (wide, weight) in block.iter_mut().zip(weights) {
                *wide = weight.to_f32();
            }
            let rows = weights.len() / self.width;
            work(first, View::new(&block, rows, self.width));
        }
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
