//! Losses of hidden states: the logits of a batch of rows pass by in blocks of the vocabulary, once
//! or twice.
//!
//! Terms that sort logits need whole rows, which come in chunks. Where every class is a few tokens, one pass is enough ([`crate::cpu::blocks`]). Otherwise the
//! first pass sums the leaves of each row, and the second turns logits into gradients; the logits of
//! as many blocks as fit the scratch outlive the first pass, and the others are made again. A batch
//! is all of that at once that makes products efficient, which rows of [`SCRATCH_BYTES`] are not
//! where a vocabulary is large.
//!
//! [`SCRATCH_BYTES`]: super::SCRATCH_BYTES

use std::ops::Range;

use rayon::prelude::*;

use super::{Head, Weights, product};
use crate::backend::NotFinite;
use crate::cpu::blocks::{Passed, PassingRow};
use crate::cpu::passes::PassingTwice;
use crate::element::Element;
use crate::error::LossError;
use crate::loss::{self, ItemLoss, LossJob};
use crate::matmul::{View, ViewMut, Write, ab, atb};

/// Rows of logits that one task takes at least.
pub(super) const ROWS: usize = 8;

/// Rows that pass twice together at most: more would not make products faster, but leave fewer
/// blocks of logits for the second pass.
const BATCH: usize = 128;

impl Head<'_> {
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
            && let Some(total) = self.loss_in_one_pass(&job, hidden, grad_hidden)
        {
            return Ok(total);
        }
        if job.needs_whole_rows() {
            return self.loss_in_rows(&job, hidden, grad_hidden, grad_weight);
        }
        let mut total = 0.0;
        for rows in self.batches(job.rows(), BATCH) {
            let values = rows.start * self.width..rows.end * self.width;
            let (hidden, grads) = (&hidden[values.clone()], &mut grad_hidden[values]);
            let folded = if grad_weight.is_none() && !self.fits(rows.len()) {
                self.loss_in_folds(&job, rows.clone(), hidden, grads)?
            } else {
                None
            };
            let losses = match folded {
                Some(losses) => losses,
                None => {
                    self.loss_in_two_passes(&job, rows, hidden, grads, grad_weight.as_deref_mut())?
                }
            };
            total = losses.iter().fold(total, |sum, loss| sum + loss);
        }
        Ok(total)
    }

    /// [`Self::loss`] by way of whole rows of logits, for terms that sort them.
    fn loss_in_rows(
        &self,
        job: &LossJob<'_>,
        hidden: &[f32],
        grad_hidden: &mut [f32],
        mut grad_weight: Option<&mut [f32]>,
    ) -> Result<f64, LossError> {
        let (tokens, width) = (self.vocab.len(), self.width);
        let mut total = 0.0;
        self.chunks(hidden, |rows, hidden, logits| {
            let losses = crate::cpu::loss::rows(self.level, job, rows.clone(), logits)?;
            total = losses.iter().fold(total, |sum, loss| sum + loss);
            let count = rows.len();
            let grads = View::new(logits, count, tokens);
            let hidden = View::new(hidden, count, width);
            let grad_hidden = &mut grad_hidden[rows.start * width..rows.end * width];
            grad_hidden.fill(0.0);
            self.blocks(self.even(0..tokens), |first, weights| {
                let grads = grads.columns(first, weights.rows());
                let out = ViewMut::new(grad_hidden, count, width);
                ab(out, Write::Add, grads, weights, 1.0);
            });
            if let Some(grad) = &mut grad_weight {
                let out = ViewMut::new(grad, tokens, width);
                atb(out, Write::Add, grads, hidden, 1.0);
            }
            Ok::<(), LossError>(())
        })?;
        Ok(total)
    }

    /// Rows in batches of about equal size, of at most `most` and such that two blocks of logits fit
    /// the scratch.
    fn batches(&self, rows: usize, most: usize) -> impl Iterator<Item = Range<usize>> + use<> {
        let fits = self.scratch / (2 * self.block * size_of::<f32>());
        let batches = rows.div_ceil(fits.min(most).max(1)).max(1);
        let batch = rows.div_ceil(batches).max(1);
        (0..rows)
            .step_by(batch)
            .map(move |start| start..rows.min(start + batch))
    }

    /// [`Self::loss`] of some rows by way of two passes; returns the loss of each.
    fn loss_in_two_passes(
        &self,
        job: &LossJob<'_>,
        rows: Range<usize>,
        hidden: &[f32],
        grads: &mut [f32],
        mut grad_weight: Option<&mut [f32]>,
    ) -> Result<Vec<f64>, NotFinite> {
        let level = self.level;
        let (count, tokens, width) = (rows.len(), self.vocab.len(), self.width);
        let hidden = View::new(hidden, count, width);
        let mut passing: Vec<PassingTwice> = rows
            .clone()
            .map(|row| PassingTwice::new(job, row))
            .collect();
        // One of the blocks that fit is where products are transposed.
        let size = count * self.block.min(tokens);
        let fits = self.scratch / (size * size_of::<f32>());
        let blocks = tokens.div_ceil(self.block);
        let slots = fits.saturating_sub(1).clamp(1, blocks);
        let mut scratch = vec![0.0; slots * size];
        let mut by_column = vec![0.0; size];
        let slot = |first: usize| first / self.block % slots * size;
        self.blocks(self.even(0..tokens), |first, weights| {
            let columns = weights.rows();
            let logits = &mut scratch[slot(first)..][..count * columns];
            product(weights, hidden, &mut by_column, logits, columns);
            let live = self.live_in(first, columns);
            logits
                .par_chunks_exact(columns)
                .zip(&mut passing)
                .with_min_len(ROWS)
                .for_each(|(logits, row)| row.sum(level, first, &logits[..live]));
        });
        let losses: Vec<Result<f64, NotFinite>> = passing
            .par_iter_mut()
            .zip(rows)
            .with_min_len(ROWS)
            .map(|(passing, row)| {
                let loss = passing.close(level);
                loss.map_err(|column| NotFinite { row, column })
            })
            .collect();
        let losses = losses.into_iter().collect::<Result<Vec<f64>, _>>()?;

        // Those that are kept come first: the others take their places.
        let kept = (blocks - slots) * self.block;
        grads.fill(0.0);
        for tokens in [kept..tokens, 0..kept] {
            self.blocks(self.even(tokens), |first, weights| {
                let columns = weights.rows();
                let logits = &mut scratch[slot(first)..][..count * columns];
                if first < kept {
                    product(weights, hidden, &mut by_column, logits, columns);
                }
                let live = self.live_in(first, columns);
                logits
                    .par_chunks_exact_mut(columns)
                    .zip(&mut passing)
                    .with_min_len(ROWS)
                    .for_each(|(logits, row)| {
                        let (live, ignored) = logits.split_at_mut(live);
                        row.write(level, first, live);
                        ignored.fill(0.0);
                    });
                let logits = View::new(logits, count, columns);
                let grads = ViewMut::new(grads, count, width);
                ab(grads, Write::Add, logits, weights, 1.0);
                if let Some(grad) = &mut grad_weight {
                    let grad = ViewMut::new(&mut grad[first * width..], columns, width);
                    atb(grad, Write::Add, logits, hidden, 1.0);
                }
            });
        }
        Ok(losses)
    }

    /// Whether all logits of so many rows fit the scratch, with a block beside them.
    fn fits(&self, rows: usize) -> bool {
        let columns = (self.vocab.len().div_ceil(self.block) + 1) * self.block;
        rows * columns * size_of::<f32>() <= self.scratch
    }

    /// Columns of a block that carry mass.
    fn live_in(&self, first: usize, columns: usize) -> usize {
        self.vocab.live().saturating_sub(first).min(columns)
    }

    /// [`Self::loss`] of a frozen head in one pass over the weights; `None` where a row does not
    /// allow it.
    fn loss_in_one_pass(
        &self,
        job: &LossJob<'_>,
        hidden: &[f32],
        grad_hidden: &mut [f32],
    ) -> Option<f64> {
        let mut total = 0.0;
        for rows in self.batches(job.rows(), usize::MAX) {
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
        let level = self.level;
        let count = rows.len();
        let mut passing = rows
            .map(|row| PassingRow::new(job, row))
            .collect::<Option<Vec<_>>>()?;
        let hidden = View::new(hidden, count, self.width);
        let mut scratch = vec![0.0; count * self.block];
        let mut by_column = scratch.clone();
        self.blocks(self.even(0..self.vocab.len()), |first, weights| {
            let columns = weights.rows();
            let live = self.live_in(first, columns);
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
    pub(super) fn add_row(&self, row: usize, factor: f32, to: &mut [f32]) {
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
            Weights::Packed(weights) => {
                let mut wide = vec![0.0; self.width];
                weights.slice(row, 1).decode(&mut wide);
                add(&wide, factor, to);
            }
        }
    }
}
