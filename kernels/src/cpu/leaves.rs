//! One logits row, cut into runs of columns that every group of its loss takes whole.
//!
//! Each leaf is summed once and gets one coefficient, the sum over the groups that hold it, so that
//! the gradient is `exp(z - shift) * coefficient`: a row is read, then rewritten, and nothing of its
//! length is stored.

use std::ops::Range;

use crate::cpu::simd::{Level, Piece, largest, scale_exp, sum_exp};
use crate::element::Element;

/// Below this mass, relative to its shift, a run is summed again against its own largest logit: what
/// is left of `f32` underneath would no longer resolve its members.
const SCARCE: f64 = 1e-20;

/// Beyond this mass the shift was too small, and coefficients would leave `f32`.
const ABUNDANT: f64 = 1e30;

/// Columns that say where the logits of a row are: any value near its largest will do as the shift.
const SAMPLE: usize = 256;

/// Leaves of one row; reused from row to row.
#[derive(Debug, Default)]
pub(super) struct Leaves {
    /// Start of each leaf, and the end of the last.
    bounds: Vec<u32>,
    /// Sum of `exp(z - shift)`.
    mass: Vec<f64>,
    shift: Vec<f32>,
    coefficient: Vec<f64>,
    pieces: Vec<Piece>,
    /// Shift of blocks, and leaves of the last, which count from its first column.
    pub(super) common: f32,
    part_bounds: Vec<u32>,
    part_mass: Vec<f64>,
}

impl Leaves {
    /// Cuts `0..live` wherever a range begins or ends.
    pub(super) fn cut<'a>(&mut self, live: u32, ranges: impl IntoIterator<Item = &'a Range<u32>>) {
        self.bounds.clear();
        self.bounds.extend([0, live]);
        for range in ranges {
            self.bounds.extend([range.start, range.end]);
        }
        self.bounds.sort_unstable();
        self.bounds.dedup();
    }

    /// Takes leaves of one column each: some logits, and last one of a mass relative to a shift.
    pub(super) fn set(&mut self, logits: &[f32], shift: f32, mass: f64) {
        let leaves = logits.len() + 1;
        self.bounds.clear();
        self.bounds
            .extend(0..=u32::try_from(leaves).expect("ranks are u32"));
        self.shift.clear();
        self.shift.extend(logits.iter().copied().chain([shift]));
        self.mass.clear();
        self.mass.resize(logits.len(), 1.0);
        self.mass.push(mass);
        self.coefficient.clear();
        self.coefficient.resize(leaves, 0.0);
    }

    /// Sums every leaf.
    ///
    /// # Errors
    /// The first column that is not finite.
    pub(super) fn sum<T: Element>(&mut self, level: Level, row: &[T]) -> Result<(), usize> {
        let leaves = self.bounds.len() - 1;
        let mut shift = largest(level, &row[..row.len().min(SAMPLE)]);
        self.mass.clear();
        self.mass.resize(leaves, 0.0);
        if !sum_exp(level, row, &self.bounds, shift, &mut self.mass) {
            let is_bad = |value: &T| !value.to_f32().is_finite();
            return Err(row.iter().position(is_bad).unwrap_or(0));
        }
        if self.mass.iter().sum::<f64>() > ABUNDANT {
            shift = largest(level, row);
            sum_exp(level, row, &self.bounds, shift, &mut self.mass);
        }
        self.shift.clear();
        self.shift.resize(leaves, shift);
        self.coefficient.clear();
        self.coefficient.resize(leaves, 0.0);
        Ok(())
    }

    /// Adds the columns from `first` on to their leaves; blocks come in order. A part of a leaf that is
    /// scarce or abundant is summed against its own largest logit, so that no leaf has to be summed
    /// again.
    ///
    /// # Errors
    /// The first column that is not finite.
    pub(super) fn add_block(
        &mut self,
        level: Level,
        first: usize,
        block: &[f32],
    ) -> Result<(), usize> {
        if first == 0 {
            let leaves = self.bounds.len() - 1;
            self.common = largest(level, &block[..block.len().min(SAMPLE)]);
            for values in [&mut self.mass, &mut self.coefficient] {
                values.clear();
                values.resize(leaves, 0.0);
            }
            self.shift.clear();
            self.shift.resize(leaves, f32::MIN);
        }
        let leaves = self.within(first, block.len());
        self.part_bounds.clear();
        self.part_bounds.push(0);
        let ends = &self.bounds[leaves.start + 1..=leaves.end];
        self.part_bounds
            .extend(ends.iter().map(|&end| local(end, first, block.len())));
        self.part_mass.clear();
        self.part_mass.resize(leaves.len(), 0.0);
        if !sum_exp(
            level,
            block,
            &self.part_bounds,
            self.common,
            &mut self.part_mass,
        ) {
            let bad = block.iter().position(|value| !value.is_finite());
            return Err(first + bad.unwrap_or(0));
        }
        for (part, leaf) in leaves.enumerate() {
            let (mut shift, mut mass) = (self.common, self.part_mass[part]);
            if !(SCARCE..=ABUNDANT).contains(&mass) {
                let columns = self.part_bounds[part]..self.part_bounds[part + 1];
                let columns = &block[columns.start as usize..columns.end as usize];
                shift = largest(level, columns);
                let end = self.part_bounds[part + 1] - self.part_bounds[part];
                sum_exp(
                    level,
                    columns,
                    &[0, end],
                    shift,
                    std::slice::from_mut(&mut mass),
                );
            }
            self.merge(leaf, shift, mass);
        }
        Ok(())
    }

    /// The shift of the last block where it is one part of a leaf, neither scarce nor abundant.
    pub(super) fn plain_shift(&self) -> Option<f32> {
        let is_plain = matches!(self.part_mass[..], [mass] if (SCARCE..=ABUNDANT).contains(&mass));
        is_plain.then_some(self.common)
    }

    /// Adds a mass to that of a leaf, in the larger of both scales.
    fn merge(&mut self, leaf: usize, shift: f32, mass: f64) {
        let (own_shift, own) = (&mut self.shift[leaf], &mut self.mass[leaf]);
        let change = f64::from(shift) - f64::from(*own_shift);
        if change > 0.0 {
            *own = mass + *own * (-change).exp();
            *own_shift = shift;
        } else {
            *own += mass * change.exp();
        }
    }

    /// Leaves that have some of the columns from `first` on.
    fn within(&self, first: usize, columns: usize) -> Range<usize> {
        if columns == 0 {
            return 0..0;
        }
        let end = self
            .bounds
            .partition_point(|&bound| (bound as usize) < first + columns);
        let start = self
            .bounds
            .partition_point(|&bound| bound as usize <= first);
        start - 1..end
    }

    /// All leaves.
    pub(super) fn all(&self) -> Range<usize> {
        0..self.mass.len()
    }

    /// Leaves of a range of ranks that begins and ends where leaves do.
    pub(super) fn span(&self, ranks: &Range<u32>) -> Range<usize> {
        let leaf = |rank| self.bounds.partition_point(|&bound| bound < rank);
        leaf(ranks.start)..leaf(ranks.end)
    }

    /// `ln sum exp` over some leaves; their shift is lowered where they are scarce, which leaves that
    /// were summed block by block, and whose row is empty here, never are.
    pub(super) fn log_mass<T: Element>(
        &mut self,
        level: Level,
        row: &[T],
        leaves: Range<usize>,
    ) -> f64 {
        let (shift, mass) = self.total(leaves.clone());
        if mass >= SCARCE || row.is_empty() {
            return f64::from(shift) + mass.ln();
        }
        self.lower(level, row, leaves.clone());
        let (shift, mass) = self.total(leaves);
        f64::from(shift) + mass.ln()
    }

    /// `ln sum exp` over several spans; each is lowered by itself where all are scarce.
    pub(super) fn log_mass_of<T: Element>(
        &mut self,
        level: Level,
        row: &[T],
        spans: &[Range<usize>],
    ) -> f64 {
        let total = |leaves: &Self| {
            let shift = spans
                .iter()
                .map(|span| leaves.total(span.clone()).0)
                .fold(f32::MIN, f32::max);
            let scaled = spans.iter().map(|span| {
                let (own, mass) = leaves.total(span.clone());
                mass * (f64::from(own) - f64::from(shift)).exp()
            });
            (f64::from(shift), scaled.sum::<f64>())
        };
        let (mut shift, mut mass) = total(self);
        if mass < SCARCE && !row.is_empty() {
            for span in spans {
                self.lower(level, row, span.clone());
            }
            (shift, mass) = total(self);
        }
        shift + mass.ln()
    }

    /// Mass of some leaves relative to the largest of their shifts.
    fn total(&self, leaves: Range<usize>) -> (f32, f64) {
        let shifts = &self.shift[leaves.clone()];
        let largest = shifts.iter().copied().fold(f32::MIN, f32::max);
        let mass = self.mass[leaves].iter().zip(shifts).map(|(&mass, &shift)| {
            if shift < largest {
                mass * (f64::from(shift) - f64::from(largest)).exp()
            } else {
                mass
            }
        });
        (largest, mass.sum())
    }

    /// Sums some leaves again, against the largest logit of all; leaves that are lower stay, since a
    /// coefficient in a higher scale may leave the range of floats.
    fn lower<T: Element>(&mut self, level: Level, row: &[T], leaves: Range<usize>) {
        let columns = self.bounds[leaves.start] as usize..self.bounds[leaves.end] as usize;
        let shift = largest(level, &row[columns]);
        for leaf in leaves {
            if shift >= self.shift[leaf] {
                continue;
            }
            let bounds = &self.bounds[leaf..leaf + 2];
            sum_exp(level, row, bounds, shift, &mut self.mass[leaf..=leaf]);
            let change = f64::from(shift) - f64::from(self.shift[leaf]);
            self.coefficient[leaf] *= change.exp();
            self.shift[leaf] = shift;
        }
    }

    /// Adds `amount * exp(z - log_mass)` to the gradient of some leaves.
    pub(super) fn add(&mut self, leaves: Range<usize>, amount: f64, log_mass: f64) {
        let mut last = (f32::NAN, 0.0);
        for leaf in leaves {
            let shift = self.shift[leaf];
            if shift.to_bits() != last.0.to_bits() {
                last = (shift, amount * (f64::from(shift) - log_mass).exp());
            }
            self.coefficient[leaf] += last.1;
        }
    }

    /// Gradient of a leaf of one column.
    pub(super) fn gradient(&self, leaf: usize) -> f64 {
        self.coefficient[leaf] * self.mass[leaf]
    }

    /// What the exponentials of a leaf, relative to its shift, are multiplied by.
    pub(super) fn coefficient(&self, leaf: usize) -> f64 {
        self.coefficient[leaf]
    }

    /// Overwrites the row by its gradient.
    pub(super) fn write<T: Element>(&mut self, level: Level, row: &mut [T]) {
        self.write_block(level, 0, row);
    }

    /// Overwrites the columns from `first` on by their gradient.
    pub(super) fn write_block<T: Element>(&mut self, level: Level, first: usize, block: &mut [T]) {
        let leaves = self.within(first, block.len());
        self.pieces.clear();
        self.pieces.extend(leaves.map(|leaf| {
            #[expect(clippy::cast_possible_truncation, reason = "gradients are at most f32")]
            let factor = self.coefficient[leaf] as f32;
            Piece {
                end: local(self.bounds[leaf + 1], first, block.len()),
                shift: self.shift[leaf],
                factor,
            }
        }));
        scale_exp(level, block, &self.pieces);
    }
}

/// A bound of leaves as a column of a block.
fn local(bound: u32, first: usize, columns: usize) -> u32 {
    u32::try_from((bound as usize - first).min(columns)).expect("ranks are u32")
}
