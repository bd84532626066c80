//! Weighted sums of the sources' shares.

use std::ops::Range;

use super::Shares;
use super::keep::Keeper;
use crate::cpu::multiversion::multiversion;
use crate::fusion::Mixing;
use crate::records::{ColumnsMut, RecordShape, RecordView, Symbol};

multiversion! {
    /// Fuses a range of positions to the positions of `out`.
    pub(super) fn run<S: Symbol>(
        mixing: Mixing<'_>,
        sources: &[RecordView<'_, S>],
        range: Range<usize>,
        shape: &RecordShape,
        out: &mut ColumnsMut<'_, S>,
    ) {
        let mut mixer = Mixer::new(shape);
        for (index, position) in range.enumerate() {
            mixer.fuse(mixing, sources, position, index, out);
        }
    }
}

multiversion! {
    /// Fuses some positions, each to the same position of `out`.
    pub(super) fn run_some<S: Symbol>(
        mixing: Mixing<'_>,
        sources: &[RecordView<'_, S>],
        positions: &[usize],
        shape: &RecordShape,
        out: &mut ColumnsMut<'_, S>,
    ) {
        if positions.is_empty() {
            return;
        }
        let mut mixer = Mixer::new(shape);
        for &position in positions {
            mixer.fuse(mixing, sources, position, position, out);
        }
    }
}

/// The space for one position.
struct Mixer<S> {
    keeper: Keeper<S>,
    bytes: ByteSums,
    tokens: Vec<(S, u64)>,
}

impl<S: Symbol> Mixer<S> {
    fn new(shape: &RecordShape) -> Self {
        Self {
            keeper: Keeper::new(shape),
            bytes: ByteSums::default(),
            tokens: Vec::new(),
        }
    }

    /// Fuses one position of the sources to position `index` of `out`.
    #[inline(always)]
    fn fuse(
        &mut self,
        mixing: Mixing<'_>,
        sources: &[RecordView<'_, S>],
        position: usize,
        index: usize,
        out: &mut ColumnsMut<'_, S>,
    ) {
        let mut end = 0;
        let weights = mixing.weights(position, sources.len());
        for (&weight, source) in weights.iter().zip(sources).filter(|pair| *pair.0 > 0) {
            let weight = u64::from(weight);
            let (symbols, codes) = source.used(position);
            let shares = Shares::of_source(source, position, codes);
            end += source
                .end()
                .get(position)
                .map_or(0, |&code| weight * shares.of(code));
            for (&symbol, &code) in symbols.iter().zip(codes) {
                let mass = weight * shares.of(code);
                if S::HAS_END {
                    self.bytes.add(symbol.index(), mass);
                } else {
                    self.tokens.push((symbol, mass));
                }
            }
        }
        let keeper = &mut self.keeper;
        if S::HAS_END {
            self.bytes
                .drain(|byte, mass| keeper.push(S::of(byte), mass));
        } else {
            merge(&mut self.tokens);
            self.tokens
                .drain(..)
                .for_each(|(token, mass)| keeper.push(token, mass));
        }
        keeper.write(index, end, out);
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
