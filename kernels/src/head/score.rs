//! Branches, records and bits of hidden states, in chunks of rows.

use std::ops::Range;

use super::{Head, product};
use crate::cpu;
use crate::error::ScoreError;
use crate::matmul::View;
use crate::records::{RecordShape, Records};
use crate::score::{self, Branch, ItemTokens, Missed, RecordParts, RecordsJob, ScoreJob};

impl Head<'_> {
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
            let more = cpu::score::branches(self.level, &job, rows, logits, threshold)?;
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
            let more = cpu::score::roots(self.level, self.vocab, rows.start, logits);
            roots.extend(more.map_err(score::branch_error)?);
            Ok::<(), ScoreError>(())
        })?;
        let mut parts = RecordParts::new(&job);
        self.chunks(hidden, |rows, _, logits| {
            parts.add(self.level, rows, logits, &roots)
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
            bits.extend(cpu::score::token_bits(self.level, &job, rows, logits)?);
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
    pub(super) fn chunks<E>(
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
        self.blocks(self.even(0..tokens), |first, weights| {
            product(
                weights,
                hidden,
                &mut by_column,
                &mut logits[first..],
                tokens,
            );
        });
    }
}
