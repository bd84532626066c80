//! Rows whose terms name few columns: these are taken out, and all others have one coefficient.
//!
//! What is left is read in whole blocks, each summed against its own largest logit, so that no sum is
//! scarce or abundant, and written in whole blocks. The terms then see a short row: the columns that
//! were taken out, and one that stands for the rest.

use std::ops::Range;

use crate::cpu::loss::Worker;
use crate::cpu::simd::{Level, Piece, largest, scale_exp, sum_exp_near};
use crate::element::{Dtype, Element};
use crate::loss::Groups;

/// Columns that are taken out at most: above this, cutting the row takes no longer.
const MOST: usize = 8192;

/// Columns of a block: few enough that they are still in a core's nearest cache when they are summed.
const BLOCK: usize = 4096;

/// Columns that were taken out, and the blocks of the rest; reused from row to row.
#[derive(Debug, Default)]
pub(super) struct Short {
    /// Ascending.
    columns: Vec<u32>,
    logits: Vec<f32>,
    blocks: Vec<Block>,
    pieces: Vec<Piece>,
}

/// Sum of the exponentials of a block relative to its largest logit.
#[derive(Clone, Copy, Debug)]
struct Block {
    shift: f32,
    mass: f64,
}

impl Worker {
    /// Loss of the groups that were set, whose row becomes the gradient; `None`, and the row as it was,
    /// where they name more than a few columns, or all.
    ///
    /// # Errors
    /// The first column that is not finite.
    pub(super) fn run_short<T: Element>(
        &mut self,
        level: Level,
        live: &mut [T],
    ) -> Result<Option<f64>, usize> {
        let end = u32::try_from(live.len()).expect("ranks are u32");
        let top = &self.top.columns;
        if !named(&self.groups, top, end, &mut self.short.columns) {
            return Ok(None);
        }
        self.short.sum(level, live)?;
        let mut short = std::mem::take(&mut self.short);
        let rest = short.rest();
        self.shorten(&short.columns, &short.logits, rest);
        let loss = self.losses::<T>(level, &[]) + self.sorted::<T>(level, live, &[]);
        let last = short.columns.len();
        short.write(level, live, self.leaves.coefficient(last), rest.shift);
        for (leaf, &column) in short.columns.iter().enumerate() {
            #[expect(clippy::cast_possible_truncation, reason = "gradients are at most f32")]
            let gradient = self.leaves.gradient(leaf) as f32;
            live[column as usize] = T::from_f32(gradient);
        }
        self.short = short;
        self.add(live);
        Ok(Some(loss))
    }

    /// Makes the row of the groups that were set, and of the largest columns, a short one: some
    /// columns, ascending, that hold all classes, and one for the rest.
    fn shorten(&mut self, columns: &[u32], logits: &[f32], rest: Block) {
        let narrow = |column: usize| u32::try_from(column).expect("ranks are u32");
        let place = |rank: u32| narrow(columns.partition_point(|&column| column < rank));
        for class in &mut self.groups.classes {
            class.ranks = place(class.ranks.start)..place(class.ranks.end);
        }
        for group in &mut self.groups.list {
            group.support = 0..narrow(columns.len() + 1);
        }
        for column in &mut self.places {
            let place = place(column.start);
            *column = place..place + 1;
        }
        self.leaves.set(logits, rest.shift, rest.mass);
    }

    /// Loss of the groups that were set, which name some columns only and no largest; the rest has a
    /// mass relative to a shift. Returns the gradients of the columns and the coefficient of the rest
    /// as well.
    pub(super) fn short_losses(
        &mut self,
        level: Level,
        columns: &[u32],
        logits: &[f32],
        (shift, mass): (f32, f64),
    ) -> (f64, Vec<f64>, f64) {
        self.shorten(columns, logits, Block { shift, mass });
        let loss = self.losses::<f32>(level, &[]);
        let gradients = (0..columns.len()).map(|leaf| self.leaves.gradient(leaf));
        let gradients = gradients.collect();
        (loss, gradients, self.leaves.coefficient(columns.len()))
    }
}

/// Lists the columns before `end` that classes and the largest name, ascending; false where a support
/// is a part of the row, or the columns are too many or all.
pub(super) fn named(groups: &Groups, top: &[Range<u32>], end: u32, columns: &mut Vec<u32>) -> bool {
    columns.clear();
    if groups.list.iter().any(|group| group.support != (0..end)) {
        return false;
    }
    let classes = groups.classes.iter().map(|class| &class.ranks);
    let count: usize = classes.clone().chain(top).map(ExactSizeIterator::len).sum();
    if count > MOST {
        return false;
    }
    columns.extend(classes.chain(top).cloned().flatten());
    columns.sort_unstable();
    columns.dedup();
    columns.len() < end as usize
}

impl Short {
    /// Sums the blocks of a row without the columns that were named, whose logits are kept.
    fn sum<T: Element>(&mut self, level: Level, row: &mut [T]) -> Result<(), usize> {
        self.logits.clear();
        for &column in &self.columns {
            let logit = std::mem::replace(&mut row[column as usize], lowest());
            self.logits.push(logit.to_f32());
        }
        self.blocks.clear();
        let next = BLOCK * size_of::<T>();
        let mut is_finite = self.logits.iter().all(|logit| logit.is_finite());
        let mut taken = self.columns.as_slice();
        for (index, block) in row.chunks(BLOCK).enumerate() {
            let end = index * BLOCK + block.len();
            let here = taken.partition_point(|&column| (column as usize) < end);
            taken = &taken[here..];
            let shift = largest(level, block);
            let mut mass = 0.0;
            is_finite &= sum_exp_near(level, block, shift, next, &mut mass);
            // Anything but zero only where the whole block is as low.
            let of_taken = (f64::from(lowest::<T>().to_f32()) - f64::from(shift)).exp();
            let mass = if here == block.len() {
                0.0
            } else {
                mass - here as f64 * of_taken
            };
            self.blocks.push(Block { shift, mass });
        }
        for (&column, &logit) in self.columns.iter().zip(&self.logits) {
            row[column as usize] = T::from_f32(logit);
        }
        if is_finite {
            return Ok(());
        }
        let is_bad = |value: &T| !value.to_f32().is_finite();
        Err(row.iter().position(is_bad).unwrap_or(0))
    }

    /// All blocks together.
    fn rest(&self) -> Block {
        let blocks = || self.blocks.iter().filter(|block| block.mass > 0.0);
        let shift = blocks().map(|block| block.shift).fold(f32::MIN, f32::max);
        let scaled = |block: &Block| block.mass * (f64::from(block.shift) - f64::from(shift)).exp();
        Block {
            shift,
            mass: blocks().map(scaled).sum(),
        }
    }

    /// Overwrites the row by `coefficient exp(z - shift)`.
    fn write<T: Element>(&mut self, level: Level, row: &mut [T], coefficient: f64, shift: f32) {
        self.pieces.clear();
        let (mut end, columns) = (0, row.len());
        for block in &self.blocks {
            end = columns.min(end + BLOCK);
            let change = f64::from(block.shift) - f64::from(shift);
            #[expect(clippy::cast_possible_truncation, reason = "gradients are at most f32")]
            let factor = (coefficient * change.exp()) as f32;
            self.pieces.push(Piece {
                end: u32::try_from(end).expect("ranks are u32"),
                shift: block.shift,
                factor,
            });
        }
        scale_exp(level, row, &self.pieces);
    }
}

/// The lowest finite value of a type, which takes the place of a column that is taken out.
fn lowest<T: Element>() -> T {
    T::from_f32(match T::DTYPE {
        Dtype::F32 => f32::MIN,
        Dtype::Bf16 => half::bf16::MIN.to_f32(),
        Dtype::F16 => half::f16::MIN.to_f32(),
    })
}
