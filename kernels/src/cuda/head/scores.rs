//! Scores and losses of hidden states of the host. Rows of logits pass by chunk by chunk; what stays of a row are the
//! masses of its segments.

use std::ops::Range;

use crate::backend::NotFinite;
use crate::cuda::device::Buffer;
use crate::cuda::head::ResidentHead;
use crate::cuda::raw::Rows;
use crate::cuda::rows::RowsError;
use crate::cuda::score::{Scoring, SummedRows};
use crate::element::Dtype;
use crate::error::{CudaError, LossError, ScoreError};
use crate::loss::ItemLoss;
use crate::records::{RecordShape, Records};
use crate::score::{Branch, ItemTokens, Missed};

impl ResidentHead<'_> {
    /// [`crate::Head::loss`] of checked inputs.
    pub(crate) fn loss_of(
        &self,
        hidden: &[f32],
        items: &[ItemLoss<'_>],
        grad_hidden: &mut [f32],
        grad_weight: Option<&mut [f32]>,
    ) -> Result<f64, LossError> {
        let mut hidden = self.wide_hidden(hidden)?;
        let mut of_weights = match grad_weight {
            Some(_) => Some(self.weight_gradient()?),
            None => None,
        };
        let loss = self.loss(items, &mut hidden, of_weights.as_mut())?;
        self.gradient(&hidden, grad_hidden)?;
        if let (Some(gradient), Some(to)) = (of_weights, grad_weight) {
            let mut more = vec![0.0; to.len()];
            self.download_weights(&gradient, &mut more)?;
            for (to, more) in to.iter_mut().zip(more) {
                *to += more;
            }
        }
        Ok(loss)
    }

    /// [`crate::Head::branches`] of checked inputs.
    pub(crate) fn branches(
        &self,
        hidden: &[f32],
        items: &[&[u32]],
        threshold: f32,
    ) -> Result<Vec<Vec<Branch>>, ScoreError> {
        let scoring = self.scoring(items)?;
        let found = scoring.no_branches()?;
        self.sum(hidden, scoring.rows(), |first, rows| {
            scoring.find(first, rows, threshold, &found)
        })?;
        Ok(scoring.by_item(&found)?)
    }

    /// [`crate::Head::records`] of checked inputs.
    pub(crate) fn records(
        &self,
        hidden: &[f32],
        branch_hidden: &[f32],
        items: &[ItemTokens<'_>],
        shape: &RecordShape,
        out: &mut Records,
    ) -> Result<Vec<Missed>, ScoreError> {
        let tokens: Vec<&[u32]> = items.iter().map(|item| item.tokens).collect();
        let lists: Vec<&[Branch]> = items.iter().map(|item| item.branches).collect();
        let none = std::iter::repeat_n(None, branch_hidden.len() / self.width.max(1));
        let branches =
            SummedRows::new(self.device, self.vocab, none, Dtype::F32, (0, self.wide()))?;
        self.sum(branch_hidden, &branches, |_, _| Ok(()))
            .map_err(|error| match error {
                RowsError::NotFinite(NotFinite { row, column }) => {
                    ScoreError::BranchNotFinite { row, column }
                }
                RowsError::Cuda(error) => error.into(),
            })?;
        let scoring = self.scoring(&tokens)?;
        self.sum(hidden, scoring.rows(), |_, _| Ok(()))?;
        scoring.write(&lists, Some(&branches), shape, out)
    }

    /// [`crate::Head::token_bits`] of checked inputs.
    pub(crate) fn token_bits(
        &self,
        hidden: &[f32],
        items: &[&[u32]],
    ) -> Result<Vec<f64>, ScoreError> {
        let scoring = self.scoring(items)?;
        self.sum(hidden, scoring.rows(), |_, _| Ok(()))?;
        scoring.token_bits()
    }

    fn scoring(&self, items: &[&[u32]]) -> Result<Scoring<'static>, ScoreError> {
        Scoring::at(self.device, self.vocab, items, Dtype::F32, (0, self.wide()))
    }

    /// Elements from row to row of logits.
    fn wide(&self) -> usize {
        self.vocab.len().next_multiple_of(8)
    }

    /// Sums the rows of all hidden states, with `after` for every chunk while its logits are there; waits.
    fn sum(
        &self,
        hidden: &[f32],
        summed: &SummedRows<'_>,
        after: impl Fn(usize, &Rows) -> Result<(), CudaError>,
    ) -> Result<(), RowsError> {
        let rows = hidden.len() / self.width.max(1);
        let chunk = self.chunk.min(rows.max(1));
        let states = self.states(hidden)?;
        let logits: Buffer<f32> = self.device.allocate(chunk * self.wide())?;
        let chunks: Vec<Range<usize>> = (0..rows)
            .step_by(chunk)
            .map(|start| start..rows.min(start + chunk))
            .collect();
        let bad: Buffer<u64> = self.device.filled(chunks.len(), 0xff)?;
        for (index, chunk) in chunks.iter().enumerate() {
            self.forward(&states, chunk, (logits.address(), self.wide()))?;
            let bad = bad.address() + (index * size_of::<u64>()) as u64;
            let job = summed.part(chunk, logits.address(), bad)?;
            summed.sum(&job)?;
            after(chunk.start, &job)?;
        }
        let bad = self.device.download(&bad, chunks.len())?;
        let cells = bad.iter().map(|&cell| usize::try_from(cell).ok());
        let first = cells.zip(&chunks).find_map(|(cell, chunk)| {
            Some((cell.filter(|&cell| cell != usize::MAX)?, chunk.start))
        });
        match first {
            None => Ok(()),
            Some((cell, start)) => Err(RowsError::NotFinite(NotFinite {
                row: start + cell / self.vocab.len(),
                column: cell % self.vocab.len(),
            })),
        }
    }
}
