//! The products of one matrix, a block of rows at a time: what rules on entries see.

use faer::Mat;

use super::entries::Updates;
use super::linalg::product;
use super::lowrank::Factors;
use super::round::MatrixInputs;
use super::sketch::RowBlocks;
use crate::fusion::error::FusionError;

/// Entries of a block of one member.
const BLOCK: usize = 1 << 15;

/// Updates of one matrix, a block of rows at a time.
pub(super) struct MatrixUpdates {
    /// `scale (theta_m - theta_0)` of each member, as factors.
    updates: Vec<Factors>,
    shape: [usize; 2],
    block: usize,
}

impl MatrixUpdates {
    pub(super) fn new(inputs: &MatrixInputs, scales: &[f64], shape: [usize; 2]) -> Self {
        let previous = &inputs.previous;
        // The start of a first round has a B of zeros: nothing to subtract.
        let moved = previous.b.norm_max() > 0.0;
        let updates = inputs.members.iter().zip(scales).map(|(member, &scale)| {
            let mut terms = vec![(scale, member)];
            if moved {
                terms.push((-scale, previous));
            }
            Factors::beside(&terms, shape, 0)
        });
        Self {
            updates: updates.collect(),
            shape,
            block: (BLOCK / shape[1].max(1)).clamp(1, shape[0].max(1)),
        }
    }
}

impl Updates for MatrixUpdates {
    fn chunks(&self) -> usize {
        self.shape[0].div_ceil(self.block)
    }

    #[expect(
        clippy::cast_possible_truncation,
        reason = "what does not fit f32 becomes infinite and is refused by the rule"
    )]
    fn chunk(&self, index: usize) -> Result<(usize, Vec<Vec<f32>>), FusionError> {
        let from = index * self.block;
        let count = self.block.min(self.shape[0] - from);
        let values = self.updates.iter().map(|update| {
            let b = update.b.get(from..from + count, ..);
            let block = product(update.at.as_ref(), b.transpose());
            let rows = (0..count).flat_map(|row| block.col_as_slice(row));
            rows.map(|&value| value as f32).collect()
        });
        Ok((from * self.shape[1], values.collect()))
    }
}

/// The result of a rule on entries as a matrix.
pub(super) struct MergedBlocks<'a> {
    pub(super) shape: [usize; 2],
    pub(super) blocks: usize,
    pub(super) merge: &'a dyn Fn(usize) -> Result<(usize, Vec<f32>), FusionError>,
}

impl RowBlocks for MergedBlocks<'_> {
    fn shape(&self) -> [usize; 2] {
        self.shape
    }

    fn blocks(&self) -> usize {
        self.blocks
    }

    fn block(&self, index: usize) -> Result<(usize, Mat<f64>), FusionError> {
        let (start, values) = (self.merge)(index)?;
        let columns = self.shape[1].max(1);
        let rows = values.len() / columns;
        let block = Mat::from_fn(columns, rows, |i, j| f64::from(values[j * columns + i]));
        Ok((start / columns, block))
    }
}
