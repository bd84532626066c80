//! The output head together with what follows it: hidden states to losses or records, in chunks of
//! rows, so that the logits of a batch never exist at once.
//!
//! Logits are `hidden weights^T`; scratch for them is at most [`SCRATCH_BYTES`], or one row. Results
//! do not depend on where chunks end: rows are independent once it is known where they stand, and
//! what a row leaves to the next is carried over.

use std::ops::Range;
#[cfg(feature = "cuda")]
use std::sync::Arc;

use half::{bf16, f16};
use rayon::prelude::*;

use crate::backend::Backend;
use crate::cpu::blocks::{Passed, PassingRow};
use crate::cpu::{self, Level};
#[cfg(feature = "cuda")]
use crate::cuda::{self, ResidentHead};
use crate::element::Element;
#[cfg(not(feature = "cuda"))]
use crate::error::CudaError;
#[cfg(feature = "cuda")]
use crate::error::Refusal;
use crate::error::{HeadError, LossError, ScoreError};
use crate::loss::{self, ItemLoss, LossJob};
use crate::matmul::{View, ViewMut, Write, ab, abt, atb};
use crate::records::{RecordShape, Records};
use crate::score::{self, Branch, ItemTokens, Missed, RecordParts, RecordsJob, ScoreJob};
use crate::vocab::Vocab;

/// Bytes of logits that exist at a time, unless a single row has more.
pub const SCRATCH_BYTES: usize = 16 << 20;

/// Weights from which on [`Head::best`] uses a device: one row of logits is then 8 million operations,
/// while a call to a device starts about twenty kernels and copies, however little there is to do.
pub const DEVICE_WEIGHTS: usize = 1 << 22;

/// Rows of weights that are used, and widened to `f32` where they are stored in fewer bits, at a
/// time: few enough to stay in a core's cache between logits and gradient.
const BLOCK: usize = 512;

/// Rows of logits that one task takes at least.
const ROWS: usize = 8;

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
    /// [`SCRATCH_BYTES`] and [`BLOCK`] but in tests.
    pub(crate) scratch: usize,
    pub(crate) block: usize,
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
        })
    }

    /// [`Self::new`], with a copy of the weights on the device where there is one and the head has at
    /// least [`DEVICE_WEIGHTS`]. The copy is made here, once: keep the head.
    ///
    /// # Errors
    /// As [`Self::new`], or where the copy fails.
    pub fn best(vocab: &'a Vocab, weights: Weights<'a>, width: usize) -> Result<Self, HeadError> {
        let is_worth_it = weights.len() >= DEVICE_WEIGHTS;
        if is_worth_it && Backend::present().contains(&Backend::Cuda) {
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

    /// [`loss::loss_in_place`] of hidden states `[P, d]`, whose gradient overwrites `grad_hidden`;
    /// that of the weights `[V, d]` is added to `grad_weight`. A frozen head gives `None` and does no
    /// work for it.
    ///
    /// # Errors
    /// As [`loss::loss_in_place`]; gradients are then of no use.
    pub fn loss(
        &self,
        hidden: &[f32],
        items: &[ItemLoss<'_>],
        grad_hidden: &mut [f32],
        mut grad_weight: Option<&mut [f32]>,
    ) -> Result<f64, LossError> {
        let job = LossJob::new(self.vocab, items)?;
        let values = job.rows().saturating_mul(self.width);
        loss::check_length("hidden states", hidden.len(), values)?;
        loss::check_length("gradient of hidden states", grad_hidden.len(), values)?;
        if let Some(grad) = &grad_weight {
            loss::check_length("gradient of weights", grad.len(), self.weights.len())?;
        }
        #[cfg(feature = "cuda")]
        if let Some(result) = self
            .on_device(|head| head.loss_of(hidden, items, grad_hidden, grad_weight.as_deref_mut()))
        {
            return result;
        }
        if grad_weight.is_none()
            && let Some(total) = self.loss_in_blocks(&job, hidden, grad_hidden)
        {
            return Ok(total);
        }
        let mut total = 0.0;
        self.chunks(hidden, |rows, hidden, logits| {
            let losses = cpu::loss::rows(Level::best(), &job, rows.clone(), logits)?;
            total = losses.iter().fold(total, |sum, loss| sum + loss);
            let columns = rows.start * self.width..rows.end * self.width;
            self.backward(logits, &mut grad_hidden[columns]);
            if let Some(grad) = &mut grad_weight {
                let (count, tokens) = (rows.len(), self.vocab.len());
                let grad = ViewMut::new(grad, tokens, self.width);
                let logits = View::new(logits, count, tokens);
                atb(
                    grad,
                    Write::Add,
                    logits,
                    View::new(hidden, count, self.width),
                    1.0,
                );
            }
            Ok::<(), LossError>(())
        })?;
        Ok(total)
    }

    /// [`Self::loss`] of a frozen head in one pass over the weights; `None` where a row does not
    /// allow it.
    fn loss_in_blocks(
        &self,
        job: &LossJob<'_>,
        hidden: &[f32],
        grad_hidden: &mut [f32],
    ) -> Option<f64> {
        let mut total = 0.0;
        let most = (self.scratch / (2 * self.block * size_of::<f32>())).max(1);
        for start in (0..job.rows()).step_by(most) {
            let rows = start..job.rows().min(start + most);
            let values = rows.start * self.width..rows.end * self.width;
            let grads = &mut grad_hidden[values.clone()];
            let passed = self.pass_blocks(job, rows, &hidden[values], grads)?;
            total = passed.iter().fold(total, |sum, row| sum + row.loss);
            grads
                .par_chunks_exact_mut(self.width)
                .zip(passed)
                .for_each(|(grad, row)| {
                    grad.iter_mut().for_each(|grad| *grad *= row.rest);
                    for (column, factor) in row.listed {
                        self.add_row(column as usize, factor, grad);
                    }
                });
        }
        Some(total)
    }

    /// Rows of a job whose logits pass by; `grads` becomes the sum of the exponentials times their
    /// weights.
    fn pass_blocks(
        &self,
        job: &LossJob<'_>,
        rows: Range<usize>,
        hidden: &[f32],
        grads: &mut [f32],
    ) -> Option<Vec<Passed>> {
        let level = Level::best();
        let count = rows.len();
        let mut passing = rows
            .map(|row| PassingRow::new(job, row))
            .collect::<Option<Vec<_>>>()?;
        let hidden = View::new(hidden, count, self.width);
        let mut scratch = vec![0.0; count * self.block];
        let mut by_column = scratch.clone();
        self.blocks(self.block, |first, weights| {
            let live = self.vocab.live().saturating_sub(first).min(weights.rows());
            let columns = weights.rows();
            let logits = &mut scratch[..count * columns];
            product(weights, hidden, &mut by_column, logits, columns);
            logits
                .par_chunks_exact_mut(columns)
                .zip(&mut passing)
                .with_min_len(ROWS)
                .for_each(|(logits, row)| {
                    let (live, ignored) = logits.split_at_mut(live);
                    row.pass(level, first, live);
                    ignored.fill(0.0);
                });
            let write = if first == 0 {
                Write::Replace
            } else {
                Write::Add
            };
            let grads = ViewMut::new(grads, count, self.width);
            ab(
                grads,
                write,
                View::new(logits, count, columns),
                weights,
                1.0,
            );
        });
        passing
            .into_par_iter()
            .with_min_len(ROWS)
            .map(|row| row.finish(level))
            .collect()
    }

    /// `to += factor weights[row]`
    fn add_row(&self, row: usize, factor: f32, to: &mut [f32]) {
        fn add<T: Element>(weights: &[T], factor: f32, to: &mut [f32]) {
            for (to, weight) in to.iter_mut().zip(weights) {
                *to += factor * weight.to_f32();
            }
        }
        let values = row * self.width..(row + 1) * self.width;
        match self.weights {
            Weights::F32(weights) => add(&weights[values], factor, to),
            Weights::Bf16(weights) => add(&weights[values], factor, to),
            Weights::F16(weights) => add(&weights[values], factor, to),
        }
    }

    /// [`score::branches_of`] of hidden states `[P, d]`.
    ///
    /// # Errors
    /// As [`score::branches_of`].
    pub fn branches(
        &self,
        hidden: &[f32],
        items: &[&[u32]],
        threshold: f32,
    ) -> Result<Vec<Vec<Branch>>, ScoreError> {
        let job = ScoreJob::new(self.vocab, items)?;
        self.check_hidden("hidden states", hidden, job.rows())?;
        #[cfg(feature = "cuda")]
        if let Some(result) = self.on_device(|head| head.branches(hidden, items, threshold)) {
            return result;
        }
        let mut found = Vec::new();
        self.chunks(hidden, |rows, _, logits| {
            let more = cpu::score::branches(Level::best(), &job, rows, logits, threshold)?;
            found.extend(more);
            Ok::<(), ScoreError>(())
        })?;
        Ok(job.by_item(found))
    }

    /// [`score::records_of`] of hidden states `[P, d]` and those after each branch
    /// `[branches, d]`.
    ///
    /// # Errors
    /// As [`score::records_of`].
    pub fn records(
        &self,
        hidden: &[f32],
        branch_hidden: &[f32],
        items: &[ItemTokens<'_>],
        shape: &RecordShape,
        out: &mut Records,
    ) -> Result<Vec<Missed>, ScoreError> {
        let tokens: Vec<&[u32]> = items.iter().map(|item| item.tokens).collect();
        let score = ScoreJob::new(self.vocab, &tokens)?;
        let job = RecordsJob::new(score, items, shape)?;
        self.check_hidden("hidden states", hidden, job.score.rows())?;
        self.check_hidden(
            "hidden states of branches",
            branch_hidden,
            job.branch_rows(),
        )?;
        out.check_k(shape.k)?;
        #[cfg(feature = "cuda")]
        if let Some(result) =
            self.on_device(|head| head.records(hidden, branch_hidden, items, shape, out))
        {
            return result;
        }
        let mut roots = Vec::with_capacity(job.branch_rows());
        self.chunks(branch_hidden, |rows, _, logits| {
            let more = cpu::score::roots(Level::best(), self.vocab, rows.start, logits);
            roots.extend(more.map_err(score::branch_error)?);
            Ok::<(), ScoreError>(())
        })?;
        let mut parts = RecordParts::new(&job);
        self.chunks(hidden, |rows, _, logits| {
            parts.add(Level::best(), rows, logits, &roots)
        })?;
        parts.finish(out)
    }

    /// [`score::token_bits_of`] of hidden states `[P, d]`.
    ///
    /// # Errors
    /// As [`score::token_bits_of`].
    pub fn token_bits(&self, hidden: &[f32], items: &[&[u32]]) -> Result<Vec<f64>, ScoreError> {
        let job = ScoreJob::new(self.vocab, items)?;
        self.check_hidden("hidden states", hidden, job.rows())?;
        #[cfg(feature = "cuda")]
        if let Some(result) = self.on_device(|head| head.token_bits(hidden, items)) {
            return result;
        }
        let mut bits = Vec::with_capacity(job.rows());
        self.chunks(hidden, |rows, _, logits| {
            bits.extend(cpu::score::token_bits(Level::best(), &job, rows, logits)?);
            Ok::<(), ScoreError>(())
        })?;
        Ok(job.sums(&bits))
    }

    fn check_hidden(
        &self,
        what: &'static str,
        hidden: &[f32],
        rows: usize,
    ) -> Result<(), ScoreError> {
        score::check_length(what, hidden.len(), rows.saturating_mul(self.width))
    }

    /// Gives `work` the logits of some rows after the other, with those rows and their hidden
    /// states.
    fn chunks<E>(
        &self,
        hidden: &[f32],
        mut work: impl FnMut(Range<usize>, &[f32], &mut [f32]) -> Result<(), E>,
    ) -> Result<(), E> {
        let tokens = self.vocab.len();
        let rows = hidden.len() / self.width;
        let most = (self.scratch / (tokens * size_of::<f32>())).max(1);
        let chunk = rows.div_ceil(rows.div_ceil(most).max(1)).max(1);
        let mut logits = vec![0.0; chunk.min(rows) * tokens];
        for start in (0..rows).step_by(chunk) {
            let end = rows.min(start + chunk);
            let hidden = &hidden[start * self.width..end * self.width];
            let logits = &mut logits[..(end - start) * tokens];
            self.forward(hidden, logits);
            work(start..end, hidden, logits)?;
        }
        Ok(())
    }

    /// `logits = hidden weights^T`
    fn forward(&self, hidden: &[f32], logits: &mut [f32]) {
        let (rows, tokens) = (hidden.len() / self.width, self.vocab.len());
        let hidden = View::new(hidden, rows, self.width);
        let mut by_column = vec![0.0; rows * self.block.min(tokens)];
        self.blocks(self.block, |first, weights| {
            product(
                weights,
                hidden,
                &mut by_column,
                &mut logits[first..],
                tokens,
            );
        });
    }

    /// `grad_hidden = logits weights`
    fn backward(&self, logits: &[f32], grad_hidden: &mut [f32]) {
        let (rows, tokens) = (grad_hidden.len() / self.width, self.vocab.len());
        let logits = View::new(logits, rows, tokens);
        self.blocks(self.vocab.len(), |first, weights| {
            let write = if first == 0 {
                Write::Replace
            } else {
                Write::Add
            };
            let grad_hidden = ViewMut::new(grad_hidden, rows, self.width);
            ab(
                grad_hidden,
                write,
                logits.columns(first, weights.rows()),
                weights,
                1.0,
            );
        });
    }

    /// Gives `work` the weights in blocks of at most `most` rows as `f32`, with the first row of each.
    fn blocks(&self, most: usize, work: impl FnMut(usize, View<'_>)) {
        match self.weights {
            Weights::F32(weights) => {
                let mut work = work;
                for (index, weights) in weights.chunks(most * self.width).enumerate() {
                    let rows = weights.len() / self.width;
                    work(index * most, View::new(weights, rows, self.width));
                }
            }
            Weights::Bf16(weights) => self.widened(weights, most, work),
            Weights::F16(weights) => self.widened(weights, most, work),
        }
    }

    fn widened<T: Element>(
        &self,
        weights: &[T],
        most: usize,
        mut work: impl FnMut(usize, View<'_>),
    ) {
        let most = most.min(self.block).min(self.vocab.len());
        let mut block = vec![0.0; most * self.width];
        for (index, weights) in weights.chunks(most * self.width).enumerate() {
            for (wide, weight) in block.iter_mut().zip(weights) {
                *wide = weight.to_f32();
            }
            let rows = weights.len() / self.width;
            work(index * most, View::new(&block, rows, self.width));
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
