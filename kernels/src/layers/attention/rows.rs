//! Rows of one head, padded to whole lanes.

use std::ops::Range;

use crate::layers::lanes::{LANES, exp};
use crate::layers::rope::Angles;

/// Copies one head of every row, padded.
#[inline(always)]
pub(super) fn gather(
    rows: &[f32],
    stride: usize,
    first: usize,
    dim: usize,
    padded: usize,
    out: &mut Vec<f32>,
) {
    let len = rows.len() / stride;
    reset(out, len * padded);
    for (row, out) in rows.chunks_exact(stride).zip(out.chunks_exact_mut(padded)) {
        out[..dim].copy_from_slice(&row[first..first + dim]);
    }
}

/// The same, scaled and rotated to its row's position.
#[inline(always)]
pub(super) fn gather_rotated(
    (rows, stride, first): (&[f32], usize, usize),
    (dim, padded): (usize, usize),
    rope: &Angles,
    scale: f32,
    out: &mut Vec<f32>,
) {
    let len = rows.len() / stride;
    reset(out, len * padded);
    let pairs = rows.chunks_exact(stride).zip(out.chunks_exact_mut(padded));
    for (position, (row, out)) in pairs.enumerate() {
        rope.rotate(&row[first..first + dim], position, scale, &mut out[..dim]);
    }
}

/// Padding must be zero, and stays zero: only the first `dim` values of a row are ever written.
#[inline(always)]
pub(super) fn reset(buffer: &mut Vec<f32>, len: usize) {
    buffer.clear();
    buffer.resize(len, 0.0);
}

/// `columns[d][j] = rows[j][d]`, columns padded to a multiple of the lanes.
#[inline(always)]
pub(super) fn transpose(rows: &[f32], padded: usize, columns: &mut Vec<f32>) {
    let len = rows.len() / padded;
    let stride = len.next_multiple_of(LANES);
    reset(columns, padded * stride);
    for (j, row) in rows.chunks_exact(padded).enumerate() {
        for (d, &value) in row.iter().enumerate() {
            columns[d * stride + j] = value;
        }
    }
}

/// `out[j] = row . rows[j]` for `j` in `keys`, rounded out to whole lanes.
#[inline(always)]
pub(super) fn scores(
    row: &[f32],
    columns: &[f32],
    stride: usize,
    keys: Range<usize>,
    out: &mut [f32],
) {
    for first in (whole(keys.start)..keys.end).step_by(LANES) {
        let mut sums = [0f32; LANES];
        for (d, &value) in row.iter().enumerate() {
            let column = &columns[d * stride + first..][..LANES];
            for lane in 0..LANES {
                sums[lane] = column[lane].mul_add(value, sums[lane]);
            }
        }
        out[first..first + LANES].copy_from_slice(&sums);
    }
}

/// The start of the lanes that hold place `j`.
#[inline(always)]
pub(super) fn whole(j: usize) -> usize {
    j - j % LANES
}

/// `out += sum over j of weights[j * step] rows[j]`
#[inline(always)]
pub(super) fn mix(weights: &[f32], step: usize, rows: &[f32], padded: usize, out: &mut [f32]) {
    for first in (0..padded).step_by(LANES) {
        let mut sums = [0f32; LANES];
        sums.copy_from_slice(&out[first..first + LANES]);
        for (row, &weight) in rows.chunks_exact(padded).zip(weights.iter().step_by(step)) {
            let row = &row[first..first + LANES];
            for lane in 0..LANES {
                sums[lane] = row[lane].mul_add(weight, sums[lane]);
            }
        }
        out[first..first + LANES].copy_from_slice(&sums);
    }
}

/// Softmax of the values at `keys`; the rest of `row` becomes zero.
#[inline(always)]
fn softmax(row: &mut [f32], keys: Range<usize>) {
    row[..keys.start].fill(f32::NEG_INFINITY);
    row[keys.end..].fill(f32::NEG_INFINITY);
    let mut peaks = [f32::NEG_INFINITY; LANES];
    for chunk in row.chunks_exact(LANES) {
        for lane in 0..LANES {
            peaks[lane] = peaks[lane].max(chunk[lane]);
        }
    }
    let peak = peaks.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let mut sums = [0f32; LANES];
    for chunk in row.chunks_exact_mut(LANES) {
        for lane in 0..LANES {
            // `exp` clamps: masked places come out near 1e-38, far below rounding.
            let value = exp(chunk[lane] - peak);
            chunk[lane] = value;
            sums[lane] += value;
        }
    }
    let inverse = 1.0 / sums.iter().sum::<f32>();
    for value in row.iter_mut() {
        *value *= inverse;
    }
    row[..keys.start].fill(0.0);
    row[keys.end..].fill(0.0);
}

/// Softmax over the whole lanes that hold `keys`; what lies before them is left alone.
#[inline(always)]
pub(super) fn softmax_of(row: &mut [f32], keys: Range<usize>) {
    let first = whole(keys.start);
    softmax(&mut row[first..], keys.start - first..keys.end - first);
}
