//! The output head together with what follows it: hidden states to losses or records, in chunks of
//! rows, so that the logits of a batch never exist at once.
//!
//! Logits are `hidden weights^T`; scratch for them is at most [`SCRATCH_BYTES`], or one row. Results
//! do not depend on where chunks end: rows are independent once it is known where they stand, and
//! what a row leaves to the next is carried over.

use std::ops::Range;

use half::{bf16, f16};

use crate::cpu::{self, Level};
use crate::element::Element;
use crate::error::{HeadError, LossError, ScoreError};
use crate::loss::{self, ItemLoss, LossJob};
use crate::matmul::{View, ViewMut, Write, ab, abt, atb};
use crate::records::{RecordShape, Records};
use crate::score::{self, Branch, ItemTokens, Missed, RecordParts, RecordsJob, ScoreJob};
use crate::vocab::Vocab;

/// Bytes of logits that exist at a time, unless a single row has more.
pub const SCRATCH_BYTES: usize = 16 << 20;

/// Rows of weights that are widened to `f32` at a time, where they are stored in fewer bits.
const WIDENED: usize = 1024;

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
        })
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
        let most = (SCRATCH_BYTES / (tokens * size_of::<f32>())).max(1);
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
        self.blocks(|first, weights| {
            let logits = ViewMut::new(logits, rows, tokens).columns(first, weights.rows());
            abt(logits, Write::Replace, hidden, weights, 1.0);
        });
    }

    /// `grad_hidden = logits weights`
    fn backward(&self, logits: &[f32], grad_hidden: &mut [f32]) {
        let (rows, tokens) = (grad_hidden.len() / self.width, self.vocab.len());
        let logits = View::new(logits, rows, tokens);
        self.blocks(|first, weights| {
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

    /// Gives `work` the weights in blocks of rows as `f32`, with the first row of each.
    fn blocks(&self, work: impl FnMut(usize, View<'_>)) {
        match self.weights {
            Weights::F32(weights) => {
                let mut work = work;
                work(0, View::new(weights, self.vocab.len(), self.width));
            }
            Weights::Bf16(weights) => self.widened(weights, work),
            Weights::F16(weights) => self.widened(weights, work),
        }
    }

    fn widened<T: Element>(&self, weights: &[T], mut work: impl FnMut(usize, View<'_>)) {
        let mut block = vec![0.0; WIDENED.min(self.vocab.len()) * self.width];
        for (index, weights) in weights.chunks(WIDENED * self.width).enumerate() {
            for (wide, weight) in block.iter_mut().zip(weights) {
                *wide = weight.to_f32();
            }
            let rows = weights.len() / self.width;
            work(index * WIDENED, View::new(&block, rows, self.width));
        }
    }
}
