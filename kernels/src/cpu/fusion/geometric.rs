//! Weighted geometric means: sums of codes, masses of the sums.

use std::ops::Range;

use super::keep::Keeper;
use crate::code::{self, FLOOR};
use crate::fusion::{MASS_BITS, Mixing, exp2_minus};
use crate::records::{ColumnsMut, RecordShape, RecordView, Symbol};

pub(super) fn run<S: Symbol>(
    mixing: Mixing<'_>,
    sources: &[RecordView<'_, S>],
    range: Range<usize>,
    shape: &RecordShape,
    out: &mut ColumnsMut<'_, S>,
) {
    let mut keeper = Keeper::new(shape);
    let mut pool = Pool::default();
    for (index, position) in range.enumerate() {
        pool.clear();
        let weights = mixing.weights(position, sources.len());
        for (&weight, source) in weights.iter().zip(sources).filter(|pair| *pair.0 > 0) {
            pool.add(u64::from(weight), source, position);
        }
        let end = pool.masses(|symbol, mass| keeper.push(symbol, mass));
        keeper.write(index, end, out);
    }
}

/// Exponents of one position.
///
/// A symbol's exponent is `unlisted`, what it would be if nobody listed it, plus what those who list
/// it say otherwise.
#[derive(Default)]
struct Pool<S> {
    /// Listed symbols with weight times (own code - code of an unlisted symbol), unmerged.
    differences: Vec<(S, i64)>,
    unlisted: i64,
    end: i64,
    tail: i64,
}

impl<S: Symbol> Pool<S> {
    fn clear(&mut self) {
        self.differences.clear();
        (self.unlisted, self.end, self.tail) = (0, 0, 0);
    }

    #[expect(
        clippy::cast_possible_wrap,
        reason = "weights have 17 bits, codes and logarithms 9"
    )]
    fn add(&mut self, weight: u64, source: &RecordView<'_, S>, position: usize) {
        let weight = weight as i64;
        let (symbols, codes) = source.used(position);
        let tail = i64::from(source.tail()[position]);
        let unlisted = if S::HAS_END {
            let others = 256_u64.saturating_sub(symbols.len() as u64);
            tail + i64::from(code::log2_sixteenths(others))
        } else {
            i64::from(FLOOR)
        };
        self.unlisted += weight * unlisted;
        self.tail += weight * tail;
        if let Some(&end) = source.end().get(position) {
            self.end += weight * i64::from(end);
        }
        let pairs = symbols.iter().zip(codes);
        self.differences
            .extend(pairs.map(|(&symbol, &code)| (symbol, weight * (i64::from(code) - unlisted))));
    }

    /// Hands over the listed symbols with their masses out of 2^48; that of the end.
    fn masses(&mut self, mut take: impl FnMut(S, u64)) -> u64 {
        self.differences.sort_unstable_by_key(|&(symbol, _)| symbol);
        self.differences.dedup_by(|next, kept| {
            let same = next.0 == kept.0;
            if same {
                kept.1 += next.1;
            }
            same
        });
        let listed = self.differences.iter();
        let exponents = listed.map(|&(_, difference)| self.unlisted + difference);
        let (others, nobody) = if S::HAS_END {
            (
                256_u64.saturating_sub(self.differences.len() as u64),
                self.unlisted,
            )
        } else {
            (1, self.tail)
        };
        let nobody = (others > 0).then_some(nobody);
        let end = S::HAS_END.then_some(self.end);
        let least = exponents.chain(end).chain(nobody).min().unwrap_or(0);
        let mass = |exponent: i64| {
            let above = u128::try_from(exponent - least).unwrap_or(0);
            u128::from(exp2_minus(above << 12) >> 30)
        };
        let end = end.map_or(0, mass);
        let listed = self.differences.iter();
        let total = listed
            .map(|&(_, difference)| mass(self.unlisted + difference))
            .sum::<u128>()
            + end
            + u128::from(others) * nobody.map_or(0, mass);
        let renormalised =
            |mass: u128| u64::try_from((mass << MASS_BITS) / total).unwrap_or(u64::MAX);
        for &(symbol, difference) in &self.differences {
            take(symbol, renormalised(mass(self.unlisted + difference)));
        }
        renormalised(end)
    }
}
