//! Fusion in fixed runs of positions, written in place.
//!
//! [`copy`] is for one source of full weight, [`mix`] for weighted sums, [`geometric`] for weighted
//! products, [`robust`] for statistics; [`keep`] chooses and encodes what they have summed.

mod copy;
mod geometric;
mod keep;
mod mix;
mod robust;

use rayon::prelude::*;

use crate::code;
use crate::fusion::{Mixing, WEIGHT_UNITY};
use crate::records::{ColumnsMut, RecordShape, RecordView, Records, Symbol};

/// Positions of one task.
const RUN: usize = 256;
/// Positions that are added to the output at once: new memory is still in the cache when it is
/// written again.
const BLOCK: usize = 64 * RUN;
/// Positions that are copied at once, and then looked at: both sides are still in the cache.
const COPIED: usize = 4096;

pub(crate) fn fuse<S: Symbol>(
    mixing: Mixing<'_>,
    sources: &[RecordView<'_, S>],
    shape: &RecordShape,
    out: &mut Records<S>,
) {
    let positions = sources.first().map_or(0, RecordView::positions);
    let task = Task {
        mixing,
        sources,
        shape,
    };
    let copied = task.copied();
    let (block, run) = match copied {
        Some(_) => (COPIED, COPIED),
        None => (BLOCK, RUN),
    };
    for start in (0..positions).step_by(block) {
        let count = block.min(positions - start);
        let part = copied.and_then(|source| source.slice(start..start + count));
        let columns = match part {
            // What was checked with the shape: the numbers of slots are the same.
            Some(part) => out.extend_from(part),
            None => out.extend_by(count),
        };
        if columns.positions() <= run {
            task.run(start, columns);
            continue;
        }
        columns
            .runs(run)
            .into_par_iter()
            .enumerate()
            .for_each(|(index, columns)| task.run(start + index * run, columns));
    }
}

struct Task<'a, 'r, S> {
    mixing: Mixing<'a>,
    sources: &'a [RecordView<'r, S>],
    shape: &'a RecordShape,
}

impl<S: Symbol> Task<'_, '_, S> {
    /// The source whose positions stay as they are, but for a few.
    fn copied(&self) -> Option<RecordView<'_, S>> {
        let Mixing::Item(weights) = self.mixing else {
            return None;
        };
        let only = weights.iter().position(|&weight| weight == WEIGHT_UNITY)?;
        let source = self.sources[only];
        copy::fits(&source, self.shape).then_some(source)
    }

    /// Writes the positions from `start` on; where a source was copied, those that do not stay.
    fn run(&self, start: usize, mut columns: ColumnsMut<'_, S>) {
        let range = start..start + columns.positions();
        match self.mixing {
            Mixing::Robust(rule) => {
                robust::run(rule, self.sources, range, self.shape, &mut columns);
            }
            Mixing::Geometric(_) => {
                geometric::run(self.mixing, self.sources, range, self.shape, &mut columns);
            }
            Mixing::Item(_) | Mixing::Positions(_) => match self.copied() {
                Some(source) => copy::mend(&source, range, self.shape, &mut columns),
                None => mix::run(self.mixing, self.sources, range, self.shape, &mut columns),
            },
        }
    }
}

/// Shares of a source at one position: `(mass << 32) / total`, rounded down, by a reciprocal.
#[derive(Clone, Copy)]
struct Shares {
    total: u64,
    inverse: u64,
}

impl Shares {
    /// Of a position with these codes in its used slots.
    #[inline(always)]
    fn of_source<S: Symbol>(source: &RecordView<'_, S>, position: usize, codes: &[u8]) -> Self {
        let mass = |&code: &u8| u64::from(code::mass(code));
        let listed: u64 = codes.iter().map(mass).sum();
        let end = source.end().get(position).map_or(0, mass);
        Self::of_total(listed + end + mass(&source.tail()[position]))
    }

    #[inline(always)]
    fn of_total(total: u64) -> Self {
        Self {
            total,
            inverse: u64::MAX / total,
        }
    }

    /// `dividend / total` and the remainder, for dividends up to 2^63: what the reciprocal lacks is
    /// then less than one.
    #[inline(always)]
    fn divide(self, dividend: u64) -> (u64, u64) {
        let product = u128::from(dividend) * u128::from(self.inverse);
        let quotient = (product >> 64) as u64;
        let rest = dividend - quotient * self.total;
        let more = rest >= self.total;
        (
            quotient + u64::from(more),
            if more { rest - self.total } else { rest },
        )
    }

    /// `(value << 48) / total` for values up to 2^32 and totals below 2^46, by long division.
    #[inline(always)]
    fn wide(self, value: u64) -> u64 {
        let (upper, rest) = self.divide(value << 31);
        (upper << 17) + self.divide(rest << 17).0
    }

    /// Below 2^32: a tail is never without mass, so no code has all of it.
    #[inline(always)]
    fn of(self, code: u8) -> u64 {
        self.divide(u64::from(code::mass(code)) << 32).0
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::Random;

    #[test]
    fn shares_by_reciprocal_are_those_of_division() {
        let mut random = Random(7);
        for round in 0..20_000 {
            let total = match round % 3 {
                0 => u64::from(code::mass(255)) + random.next() % (1 << 20),
                1 => (1 << 31) - (1 << 27) + random.next() % (1 << 28),
                _ => 1 + random.next() % (4098 << 31),
            };
            let shares = Shares::of_total(total);
            for code in 0..=255 {
                let exact = (u64::from(code::mass(code)) << 32) / total;
                assert_eq!(shares.of(code), exact, "code {code} of {total}");
            }
            let (value, total) = (random.next() >> 32, 1 + total % (1 << 46));
            let exact = (u128::from(value) << 48) / u128::from(total);
            let wide = Shares::of_total(total).wide(value.min(total));
            if value <= total {
                assert_eq!(u128::from(wide), exact, "{value} of {total}");
            }
        }
    }
}
