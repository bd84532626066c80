//! Adapters block by block: a block of every adapter is widened into rows that stay in the cache,
//! then all rules run along the rows.

use rayon::prelude::*;

use super::multiversion::multiversion;
use super::network::sort_columns;
use crate::adapters::{Merging, finite};
use crate::element::Element;
use crate::error::AdapterError;

/// Values of one task.
const TASK: usize = 1 << 16;
/// Values of a row: the rows of 8 adapters fit the first-level cache.
const BLOCK: usize = 1024;
/// Values that are computed at once, a whole number of vectors.
const LANES: usize = 16;

pub(crate) fn merge<T: Element>(
    merging: Merging<'_>,
    adapters: &[&[T]],
    out: &mut [f32],
) -> Result<(), AdapterError> {
    let failed: Vec<usize> = out
        .par_chunks_mut(TASK)
        .enumerate()
        .filter_map(|(task, out)| {
            let start = task * TASK;
            let parts: Vec<&[T]> = adapters
                .iter()
                .map(|values| &values[start..start + out.len()])
                .collect();
            (!merge_task(merging, &parts, out)).then_some(start)
        })
        .collect();
    let Some(&start) = failed.first() else {
        return Ok(());
    };
    let task = start..out.len().min(start + TASK);
    let parts: Vec<&[T]> = adapters
        .iter()
        .map(|values| &values[task.clone()])
        .collect();
    finite(&parts).map_err(|error| error.shifted(start))?;
    let overflow = out[task].iter().position(|value| !value.is_finite());
    Err(AdapterError::Overflow {
        index: start + overflow.unwrap_or(0),
    })
}

multiversion! {
    /// False where a value or a result is not finite.
    fn merge_task<T: Element>(merging: Merging<'_>, adapters: &[&[T]], out: &mut [f32]) -> bool {
        let mut rows = vec![0.0; BLOCK * adapters.len()];
        for (index, out) in out.chunks_mut(BLOCK).enumerate() {
            // The last lanes of a short block are zeros, which no rule minds.
            let width = out.len().next_multiple_of(LANES);
            let rows = &mut rows[..width * adapters.len()];
            let mut finite = true;
            for (row, values) in rows.chunks_exact_mut(width).zip(adapters) {
                let values = &values[index * BLOCK..][..out.len()];
                finite &= widen(values, &mut row[..values.len()]);
                row[values.len()..].fill(0.0);
            }
            if !finite {
                return false;
            }
            match merging {
                Merging::Sum { weights } => sum(rows, width, weights, out),
                Merging::Robust(rule) => {
                    sort_columns(rows, width);
                    let dropped = rule.dropped(adapters.len());
                    mean(&rows[dropped * width..(adapters.len() - dropped) * width], width, out);
                }
                Merging::Ties { weights, thresholds } => elect(
                    rows,
                    width,
                    weights,
                    |adapter| (f64::from(thresholds[adapter]), weights[adapter]),
                    out,
                ),
                Merging::Sce { weights } => elect(rows, width, weights, |_| (0.0, 1.0), out),
            }
            if !out.iter().fold(true, |finite, value| finite & value.is_finite()) {
                return false;
            }
        }
        true
    }
}

/// Widens values and says whether all are finite. Negative zeros become positive, so that equal
/// values are the same bits.
#[inline(always)]
fn widen<T: Element>(values: &[T], row: &mut [f32]) -> bool {
    let mut finite = true;
    for (row, value) in row.iter_mut().zip(values) {
        let value = value.to_f32();
        finite &= value.abs() < f32::INFINITY;
        *row = value + 0.0;
    }
    finite
}

#[inline(always)]
fn sum(rows: &[f32], width: usize, weights: &[f64], out: &mut [f32]) {
    for (group, out) in out.chunks_mut(LANES).enumerate() {
        let mut sums = [0.0_f64; LANES];
        for (row, &weight) in rows.chunks_exact(width).zip(weights) {
            for (sum, &value) in sums.iter_mut().zip(lanes(row, group)) {
                *sum += weight * f64::from(value);
            }
        }
        narrow(&sums, out);
    }
}

#[inline(always)]
fn mean(rows: &[f32], width: usize, out: &mut [f32]) {
    let count = (rows.len() / width) as f64;
    for (group, out) in out.chunks_mut(LANES).enumerate() {
        let mut sums = [0.0_f64; LANES];
        for row in rows.chunks_exact(width) {
            for (sum, &value) in sums.iter_mut().zip(lanes(row, group)) {
                *sum += f64::from(value);
            }
        }
        for sum in &mut sums {
            *sum /= count;
        }
        narrow(&sums, out);
    }
}

/// The mean, weighted, of the values of the elected sign; `terms` gives an adapter's threshold and
/// the weight of its votes.
#[inline(always)]
fn elect(
    rows: &[f32],
    width: usize,
    weights: &[f64],
    terms: impl Fn(usize) -> (f64, f64),
    out: &mut [f32],
) {
    for (group, out) in out.chunks_mut(LANES).enumerate() {
        // Votes, weighted values and weights, of the positive and of the negative values.
        let mut plus = [[0.0_f64; LANES]; 3];
        let mut minus = [[0.0_f64; LANES]; 3];
        for (adapter, row) in rows.chunks_exact(width).enumerate() {
            let (threshold, vote) = terms(adapter);
            let weight = weights[adapter];
            for (lane, &value) in lanes(row, group).iter().enumerate() {
                let value = f64::from(value);
                let kept = if value.abs() >= threshold { value } else { 0.0 };
                let (up, down) = (kept.max(0.0), kept.min(0.0));
                plus[0][lane] += vote * up;
                minus[0][lane] += vote * down;
                plus[1][lane] += weight * up;
                minus[1][lane] += weight * down;
                plus[2][lane] += if kept > 0.0 { weight } else { 0.0 };
                minus[2][lane] += if kept < 0.0 { weight } else { 0.0 };
            }
        }
        let mut merged = [0.0_f64; LANES];
        for lane in 0..LANES {
            let balance = plus[0][lane] + minus[0][lane];
            let side = if balance > 0.0 { &plus } else { &minus };
            let weight = side[2][lane];
            let mean = side[1][lane] / weight;
            merged[lane] = if balance == 0.0 || weight == 0.0 {
                0.0
            } else {
                mean
            };
        }
        narrow(&merged, out);
    }
}

#[inline(always)]
fn lanes(row: &[f32], group: usize) -> &[f32; LANES] {
    row[group * LANES..]
        .first_chunk()
        .expect("rows are padded to whole groups")
}

#[inline(always)]
#[expect(
    clippy::cast_possible_truncation,
    reason = "overflow becomes infinite and is refused by the caller"
)]
fn narrow(values: &[f64; LANES], out: &mut [f32]) {
    for (out, &value) in out.iter_mut().zip(values) {
        *out = value as f32;
    }
}
