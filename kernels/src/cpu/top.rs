//! The largest logits of a row, and the logarithm of its mass.

use std::cmp::Reverse;
use std::ops::Range;

use crate::cpu::simd::{Level, above, largest, sum_exp};
use crate::element::Element;

/// Runs of columns per column that is asked for: the largest of the runs say what is looked at again.
const RUNS: usize = 8;

/// Columns of a run.
const RUN: Range<usize> = 64..4096;

/// Columns of the largest logits; reused from row to row.
#[derive(Debug, Default)]
pub(super) struct Top {
    /// Each as a range of one column, largest logit first, the lower column on a tie.
    pub(super) columns: Vec<Range<u32>>,
    /// Their logits.
    pub(super) logits: Vec<f64>,
    maxima: Vec<f32>,
    sorted: Vec<f32>,
    found: Vec<u32>,
    keys: Vec<Reverse<u64>>,
}

impl Top {
    /// Finds `count` columns, or all of a shorter row. Those of a row that is not finite mean nothing.
    pub(super) fn find<T: Element>(&mut self, level: Level, row: &[T], count: usize) {
        self.keys.clear();
        self.columns.clear();
        self.logits.clear();
        if count == 0 {
            return;
        }
        let run = (row.len() / (RUNS * count)).clamp(RUN.start, RUN.end);
        self.maxima.clear();
        let maxima = row.chunks(run).map(|run| largest(level, run));
        self.maxima.extend(maxima);
        // As many runs have a column that is no smaller than this.
        let least = if self.maxima.len() > count {
            self.sorted.clone_from(&self.maxima);
            let descending = |a: &f32, b: &f32| b.total_cmp(a);
            *self.sorted.select_nth_unstable_by(count - 1, descending).1
        } else {
            f32::MIN
        };
        self.found.clear();
        for (index, &most) in self.maxima.iter().enumerate() {
            if most >= least {
                let start = index * run;
                let end = row.len().min(start + run);
                let below = least.next_down();
                above(level, &row[..end], start, below, &mut self.found);
            }
        }
        self.keys
            .extend(self.found.iter().map(|&column| key(row, column)));
        if self.keys.len() > count {
            self.keys.select_nth_unstable(count - 1);
            self.keys.truncate(count);
        }
        self.keys.sort_unstable();
        let columns = self.keys.iter().map(|&key| column(key));
        for column in columns {
            self.columns.push(column..column + 1);
            self.logits.push(f64::from(row[column as usize].to_f32()));
        }
    }
}

/// Columns of the `count` largest logits, largest first, the lower column on a tie; all of a shorter row.
pub(crate) fn largest_columns<T: Element>(level: Level, row: &[T], count: usize) -> Vec<u32> {
    let mut top = Top::default();
    top.find(level, row, count);
    top.columns.iter().map(|column| column.start).collect()
}

/// `ln sum exp` of a row that is not empty; else the first column that is not finite.
pub(crate) fn log_mass<T: Element>(level: Level, row: &[T]) -> Result<f64, usize> {
    let (shift, mut sum) = (largest(level, row), [0.0]);
    let columns = u32::try_from(row.len()).unwrap_or(u32::MAX);
    if sum_exp(level, row, &[0, columns], shift, &mut sum) {
        return Ok(f64::from(shift) + sum[0].ln());
    }
    let is_bad = |value: &T| !value.to_f32().is_finite();
    Err(row.iter().position(is_bad).unwrap_or_default())
}

/// A logit above the complement of its column, so that the order of the keys is that of the choice.
fn key<T: Element>(row: &[T], column: u32) -> Reverse<u64> {
    // Adding zero makes the two zeros equal.
    let bits = (row[column as usize].to_f32() + 0.0).to_bits();
    let ordered = if bits >> 31 == 1 {
        !bits
    } else {
        bits | 1 << 31
    };
    Reverse(u64::from(ordered) << 32 | u64::from(!column))
}

#[expect(clippy::cast_possible_truncation, reason = "the lower half")]
fn column(key: Reverse<u64>) -> u32 {
    !(key.0 as u32)
}

#[cfg(test)]
mod tests {
    use half::bf16;

    use super::*;
    use crate::testing::{Random, stored};

    fn check<T: Element>(values: &[f32], counts: &[usize]) {
        let row: Vec<T> = stored(values);
        let mut order: Vec<u32> = (0..u32::try_from(row.len()).unwrap()).collect();
        let value = |column: u32| row[column as usize].to_f32();
        order.sort_by(|&a, &b| value(b).partial_cmp(&value(a)).unwrap());
        for level in Level::present() {
            let mut top = Top::default();
            for &count in counts {
                top.find(level, &row, count);
                let found: Vec<u32> = top.columns.iter().map(|column| column.start).collect();
                let expected = &order[..count.min(order.len())];
                assert_eq!(found, expected, "{level:?}, {count} of {}", row.len());
            }
        }
    }

    #[test]
    fn the_largest_are_those_of_a_stable_sort() {
        let counts = [0, 1, 2, 7, 32, 300, 5000];
        let mut random = Random(5);
        for length in [0, 1, 15, 16, 17, 63, 64, 65, 81, 1000, 4097, 20_000] {
            let values = random.logits(length, 9.0);
            check::<f32>(&values, &counts);
            check::<bf16>(&values, &counts);
            let mut ascending = values.clone();
            ascending.sort_unstable_by(f32::total_cmp);
            check::<f32>(&ascending, &counts);
            let ties: Vec<f32> = values.iter().map(|value| value.round() * 0.0).collect();
            check::<f32>(&ties, &counts);
            let lowest = vec![f32::MIN; length];
            check::<f32>(&lowest, &counts);
        }
    }
}
