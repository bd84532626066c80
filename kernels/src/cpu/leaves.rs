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

    /// Leaves of a range of ranks that begins and ends where leaves do.
    pub(super) fn span(&self, ranks: &Range<u32>) -> Range<usize> {
        let leaf = |rank| self.bounds.partition_point(|&bound| bound < rank);
        leaf(ranks.start)..leaf(ranks.end)
    }

    /// `ln sum exp` over some leaves; their shift is lowered where they are scarce.
    pub(super) fn log_mass<T: Element>(
        &mut self,
        level: Level,
        row: &[T],
        leaves: Range<usize>,
    ) -> f64 {
        let (shift, mass) = self.total(leaves.clone());
        if mass >= SCARCE {
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
        if mass < SCARCE {
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

    /// Overwrites the row by its gradient.
    pub(super) fn write<T: Element>(&mut self, level: Level, row: &mut [T]) {
        self.pieces.clear();
        let leaves = self.bounds[1..]
            .iter()
            .zip(&self.shift)
            .zip(&self.coefficient);
        for ((&end, &shift), &coefficient) in leaves {
            #[expect(clippy::cast_possible_truncation, reason = "gradients are at most f32")]
            let factor = coefficient as f32;
            self.pieces.push(Piece { end, shift, factor });
        }
        scale_exp(level, row, &self.pieces);
    }
}
