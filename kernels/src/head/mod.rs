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
mod top;

use std::ops::Range;
#[cfg(feature = "cuda")]
use std::sync::Arc;

use half::{bf16, f16};

use crate::backend::Backend;
use crate::cpu::Level;
#[cfg(feature = "cuda")]
use crate::cuda::{self, ResidentHead};
use crate::element::Element;
#[cfg(feature = "cuda")]
use crate::error::Refusal;
use crate::error::{CudaError, HeadError};
use crate::matmul::{View, ViewMut, Write, abt};
use crate::quant::Matrix;
use crate::vocab::Vocab;

pub use top::{GraphItem, TopLogits};

/// Bytes of logits that exist at a time, unless a single row has more.
pub const SCRATCH_BYTES: usize = 16 << 20;

/// Weights from which on [`Head::best`] uses a device: one row of logits is then 8 million operations,
/// while a call to a device starts about twenty kernels and copies, however little there is to do.
pub const DEVICE_WEIGHTS: usize = 1 << 22;

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
    /// A frozen matrix in fewer bits. Its head runs on the host.
    Packed(Matrix<'a>),
}

impl Weights<'_> {
    fn len(&self) -> usize {
        match self {
            Self::F32(weights) => weights.len(),
            Self::Bf16(weights) => weights.len(),
            Self::F16(weights) => weights.len(),
            Self::Packed(weights) => weights.rows() * weights.columns(),
        }
    }
}

/// A vocabulary and the head that predicts it; clones share what is on a device.
///
/// Where the weights are on a device as well, all operations run there, and only losses, gradients
/// and records come back; inputs that the kernels do not take ([`crate::CudaError::Unsupported`]) are
/// computed on the host. Results agree with the host's within the error of sums in `f32`, gradients
/// before a narrower head within the rounding of its type.
#[derive(Clone, Debug)]
pub struct Head<'a> {
    vocab: &'a Vocab,
    weights: Weights<'a>,
    width: usize,
    #[cfg(feature = "cuda")]
    pub(crate) resident: Option<Arc<ResidentHead<'a>>>,
    /// [`SCRATCH_BYTES`], [`BLOCK`] and the best level but in tests.
    pub(crate) scratch: usize,
    pub(crate) block: usize,
    pub(crate) level: Level,
}

impl<'a> Head<'a> {
    /// Borrows the weights, `[vocab.len(), width]` in rank order ([`Vocab::id_of_rank`]), and runs on
    /// the host.
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
            #[cfg(feature = "cuda")]
            resident: None,
            scratch: SCRATCH_BYTES,
            block: BLOCK,
            level: Level::best(),
        })
    }

    /// [`Self::new`], with a copy of the weights on the device where there is one and the head has at
    /// least [`DEVICE_WEIGHTS`]. The copy is made here, once: keep the head.
    ///
    /// # Errors
    /// As [`Self::new`], or where the copy fails.
    pub fn best(vocab: &'a Vocab, weights: Weights<'a>, width: usize) -> Result<Self, HeadError> {
        let is_worth_it = weights.len() >= DEVICE_WEIGHTS;
        let is_on_host = matches!(weights, Weights::Packed(_));
        if is_worth_it && !is_on_host && Backend::present().contains(&Backend::Cuda) {
            Self::resident(vocab, weights, width)
        } else {
            Self::new(vocab, weights, width)
        }
    }

    /// [`Self::new`], with a copy of the weights on the device.
    ///
    /// # Errors
    /// As [`Self::new`], or where there is no device or the copy fails.
    pub fn resident(
        vocab: &'a Vocab,
        weights: Weights<'a>,
        width: usize,
    ) -> Result<Self, HeadError> {
        #[cfg(feature = "cuda")]
        {
            let head = Self::new(vocab, weights, width)?;
            let device = cuda::device()?;
            let resident = match weights {
                Weights::F32(weights) => ResidentHead::upload(device, vocab, weights, width),
                Weights::Bf16(weights) => ResidentHead::upload(device, vocab, weights, width),
                Weights::F16(weights) => ResidentHead::upload(device, vocab, weights, width),
                Weights::Packed(_) => {
                    let what = "a head in fewer bits";
                    Err(CudaError::Unsupported { what })
                }
            }?;
            let resident = Some(Arc::new(resident));
            Ok(Self { resident, ..head })
        }
        #[cfg(not(feature = "cuda"))]
        {
            Self::new(vocab, weights, width).and_then(|_| Err(CudaError::NotBuilt.into()))
        }
    }

    /// What `work` gives on the device; `None` where the host has to do it.
    #[cfg(feature = "cuda")]
    fn on_device<R, E: Refusal>(
        &self,
        work: impl FnOnce(&ResidentHead<'_>) -> Result<R, E>,
    ) -> Option<Result<R, E>> {
        let result = work(self.resident.as_deref()?);
        let is_refused = result.as_ref().is_err_and(Refusal::is_refusal);
        (!is_refused).then_some(result)
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
            Weights::Packed(weights) => {
                let mut wide = Vec::new();
                for tokens in blocks {
                    wide.resize(tokens.len() * width, 0.0);
                    weights.slice(tokens.start, tokens.len()).decode(&mut wide);
                    work(tokens.start, View::new(&wide, tokens.len(), width));
                }
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
