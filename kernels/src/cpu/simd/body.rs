//! The passes, over any way to hold 16 lanes.

use super::{LANES, Piece};
use crate::element::Element;

/// Vectors that one `f32` accumulator takes before it is added in `f64`: error does not grow with
/// the row.
const BLOCK: usize = 64;

/// Bytes ahead of what is read that are asked for. One core does not keep enough reads going by itself:
/// 9.7 GB/s without, 10.7 at 256 bytes, 12.3 at 2 KiB, for the sum of an array on a Sapphire Rapids.
pub(super) const AHEAD: usize = 2048;

/// 16 lanes of `f32`. A value of an implementing type exists only where its instructions do.
pub(super) trait Lanes: Copy {
    type V: Copy;

    fn splat(self, value: f32) -> Self::V;
    fn load<T: Element>(self, from: &[T; LANES]) -> Self::V;
    /// Asks for what comes so many bytes after these values, so that it is in the cache when it is read.
    fn ahead<T: Element>(self, of: &[T; LANES], bytes: usize);
    /// Fewer than 16 values; the other lanes are [`f32::MIN`].
    fn load_some<T: Element>(self, from: &[T]) -> Self::V;
    fn store<T: Element>(self, to: &mut [T; LANES], value: Self::V);
    fn store_some<T: Element>(self, to: &mut [T], value: Self::V);
    fn add(self, a: Self::V, b: Self::V) -> Self::V;
    fn sub(self, a: Self::V, b: Self::V) -> Self::V;
    fn mul(self, a: Self::V, b: Self::V) -> Self::V;
    /// `a * b + c`, rounded once or twice.
    fn mul_add(self, a: Self::V, b: Self::V, c: Self::V) -> Self::V;
    fn max(self, a: Self::V, b: Self::V) -> Self::V;
    /// `value` where it is not below the floor, zero elsewhere.
    fn from(self, value: Self::V, floor: Self::V) -> Self::V;
    /// A bit per lane, the first lowest: whether `a` is larger.
    fn above(self, a: Self::V, b: Self::V) -> u32;
    /// `2^x` for `x` up to 127; zero below -126, minus infinity included; infinite from 129 on.
    fn exp2(self, x: Self::V) -> Self::V;
    /// Lanes added in halves: 8 + 8, 4 + 4, 2 + 2, 1 + 1.
    fn sum(self, value: Self::V) -> f32;
    fn largest(self, value: Self::V) -> f32;
}

/// Coefficients of `2^r`, lowest first, minimax for `r` in -1/2..1/2: relative error below 1.1e-7.
#[expect(
    clippy::approx_constant,
    reason = "the best first coefficient is not quite ln 2"
)]
pub(super) const EXP2: [f32; 6] = [
    1.0,
    0.693_147,
    0.240_222_42,
    0.055_507_336,
    0.009_671_513,
    0.001_326_472_7,
];

#[inline(always)]
fn exp<L: Lanes>(lanes: L, values: L::V, shift: L::V) -> L::V {
    let log2_e = lanes.splat(std::f32::consts::LOG2_E);
    lanes.exp2(lanes.mul(lanes.sub(values, shift), log2_e))
}

#[inline(always)]
pub(super) fn largest<L: Lanes, T: Element>(lanes: L, values: &[T]) -> f32 {
    let mut best = [lanes.splat(f32::MIN); 4];
    let (vectors, rest) = values.as_chunks::<LANES>();
    let (quads, singles) = vectors.as_chunks::<4>();
    for quad in quads {
        for (best, vector) in best.iter_mut().zip(quad) {
            *best = lanes.max(*best, lanes.load(vector));
        }
    }
    for vector in singles {
        best[0] = lanes.max(best[0], lanes.load(vector));
    }
    best[1] = lanes.max(best[1], lanes.load_some(rest));
    lanes.largest(lanes.max(lanes.max(best[0], best[1]), lanes.max(best[2], best[3])))
}

#[inline(always)]
pub(super) fn sum_exp<L: Lanes, T: Element>(
    lanes: L,
    row: &[T],
    bounds: &[u32],
    shift: f32,
    out: &mut [f64],
    ahead: usize,
) -> bool {
    let shift = lanes.splat(shift);
    let zero = lanes.splat(0.0);
    let mut poison = zero;
    let mut start = bounds.first().map_or(0, |&start| start as usize);
    for (out, &end) in out.iter_mut().zip(&bounds[bounds.len().min(1)..]) {
        let end = end as usize;
        let (vectors, rest) = row[start..end].as_chunks::<LANES>();
        start = end;
        let mut total = 0.0;
        for block in vectors.chunks(BLOCK) {
            let mut sums = [zero; 2];
            let (pairs, single) = block.as_chunks::<2>();
            for pair in pairs {
                for (sum, vector) in sums.iter_mut().zip(pair) {
                    lanes.ahead(vector, ahead);
                    let values = lanes.load(vector);
                    // Zero for every finite value, NaN for the others; NaN stays.
                    poison = lanes.mul_add(values, zero, poison);
                    *sum = lanes.add(*sum, exp(lanes, values, shift));
                }
            }
            for vector in single {
                let values = lanes.load(vector);
                poison = lanes.mul_add(values, zero, poison);
                sums[0] = lanes.add(sums[0], exp(lanes, values, shift));
            }
            total += f64::from(lanes.sum(lanes.add(sums[0], sums[1])));
        }
        if !rest.is_empty() {
            let values = lanes.load_some(rest);
            poison = lanes.mul_add(values, zero, poison);
            total += f64::from(lanes.sum(exp(lanes, values, shift)));
        }
        *out = total;
    }
    !lanes.sum(poison).is_nan()
}

/// Smaller products become zero. Sums of numbers near the smallest normal one take a hundred times as
/// long as others, and a gradient so small changes nothing: this one leaves room for the products that
/// are made of it, while 2^-100 is far below the rounding of any coefficient.
pub(super) const SMALLEST: f32 = 7.888_609e-31;

#[inline(always)]
pub(super) fn scale_exp<L: Lanes, T: Element>(lanes: L, row: &mut [T], pieces: &[Piece]) {
    let mut start = 0;
    // The next row: reading it takes as long as this one's exponentials.
    let next = size_of_val(row);
    for piece in pieces {
        let end = piece.end as usize;
        let values = &mut row[start..end];
        start = end;
        if piece.factor == 0.0 {
            values.fill(T::default());
            continue;
        }
        let (shift, factor) = (lanes.splat(piece.shift), lanes.splat(piece.factor));
        // Compared before the product, which would itself be slow.
        let floor = lanes.splat(SMALLEST / piece.factor.abs());
        let scaled = |values| lanes.mul(lanes.from(exp(lanes, values, shift), floor), factor);
        let (vectors, rest) = values.as_chunks_mut::<LANES>();
        for vector in vectors {
            lanes.ahead(vector, next);
            lanes.store(vector, scaled(lanes.load(vector)));
        }
        if !rest.is_empty() {
            let scaled = scaled(lanes.load_some(rest));
            lanes.store_some(rest, scaled);
        }
    }
}

#[inline(always)]
pub(super) fn above<L: Lanes, T: Element>(
    lanes: L,
    row: &[T],
    start: usize,
    threshold: f32,
    found: &mut Vec<u32>,
) {
    let threshold = lanes.splat(threshold);
    let (vectors, rest) = row[start..].as_chunks::<LANES>();
    let (quads, singles) = vectors.as_chunks::<4>();
    let mut at = start;
    for [a, b, c, d] in quads {
        let (a, b, c, d) = (lanes.load(a), lanes.load(b), lanes.load(c), lanes.load(d));
        if lanes.above(lanes.max(lanes.max(a, b), lanes.max(c, d)), threshold) != 0 {
            for (index, values) in [a, b, c, d].into_iter().enumerate() {
                note(found, at + index * LANES, lanes.above(values, threshold));
            }
        }
        at += 4 * LANES;
    }
    for vector in singles {
        note(found, at, lanes.above(lanes.load(vector), threshold));
        at += LANES;
    }
    let used = (1 << rest.len()) - 1;
    note(
        found,
        at,
        used & lanes.above(lanes.load_some(rest), threshold),
    );
}

/// Appends a column for each bit.
#[inline(always)]
#[expect(clippy::cast_possible_truncation, reason = "ranks are u32")]
fn note(found: &mut Vec<u32>, first: usize, mut bits: u32) {
    while bits != 0 {
        found.push(first as u32 + bits.trailing_zeros());
        bits &= bits - 1;
    }
}
