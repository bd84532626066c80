//! Weighted sums of the sources' shares.

use std::ops::Range;

use super::Shares;
use super::keep::Keeper;
use crate::cpu::multiversion::multiversion;
use crate::fusion::Mixing;
use crate::records::{ColumnsMut, RecordShape, RecordView, Symbol};

multiversion! {
    pub(super) fn run<S: Symbol>(
        mixing: Mixing<'_>,
        sources: &[RecordView<'_, S>],
        range: Range<usize>,
        shape: &RecordShape,
        out: &mut ColumnsMut<'_, S>,
    ) {
        let mut keeper = Keeper::new(shape);
        let mut bytes = ByteSums::default();
        let mut tokens: Vec<(S, u64)> = Vec::new();
        for (index, position) in range.enumerate() {
            let mut end = 0;
            let weights = mixing.weights(position, sources.len());
            for (&weight, source) in weights.iter().zip(sources).filter(|pair| *pair.0 > 0) {
                let weight = u64::from(weight);
                let (symbols, codes) = source.used(position);
                let shares = Shares::of_source(source, position, codes);
                end += source.end().get(position).map_or(0, |&code| weight * shares.of(code));
                for (&symbol, &code) in symbols.iter().zip(codes) {
                    let mass = weight * shares.of(code);
                    if S::HAS_END {
                        bytes.add(symbol.index(), mass);
                    } else {
                        tokens.push((symbol, mass));
                    }
                }
            }
            if S::HAS_END {
                bytes.drain(|byte, mass| keeper.push(S::of(byte), mass));
            } else {
                merge(&mut tokens);
                tokens.drain(..).for_each(|(token, mass)| keeper.push(token, mass));
            }
            keeper.write(index, end, out);
        }
    }
}

/// Masses of bytes, and which bytes have one.
struct ByteSums {
    sums: [u64; 256],
    seen: [u8; 257],
    count: usize,
}

impl Default for ByteSums {
    fn default() -> Self {
        Self {
            sums: [0; 256],
            seen: [0; 257],
            count: 0,
        }
    }
}

impl ByteSums {
    /// Adds a mass, which is positive: of a listed symbol and a source that has weight.
    #[inline(always)]
    #[expect(clippy::cast_possible_truncation, reason = "a remainder of 256")]
    fn add(&mut self, byte: usize, mass: u64) {
        let byte = byte % 256;
        let sum = &mut self.sums[byte];
        self.seen[self.count] = byte as u8;
        self.count += usize::from(*sum == 0);
        *sum += mass;
    }

    #[inline(always)]
    fn drain(&mut self, mut take: impl FnMut(usize, u64)) {
        for &byte in &self.seen[..self.count] {
            let byte = usize::from(byte);
            take(byte, std::mem::take(&mut self.sums[byte]));
        }
        self.count = 0;
    }
}

/// Adds up the masses of equal symbols.
fn merge<S: Symbol>(masses: &mut Vec<(S, u64)>) {
    masses.sort_unstable_by_key(|&(symbol, _)| symbol);
    masses.dedup_by(|next, kept| {
        let same = next.0 == kept.0;
        if same {
            kept.1 += next.1;
        }
        same
    });
}
