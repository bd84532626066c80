//! Adapters as low-rank products `s B A`, B `[rows, r]` and A `[r, columns]`, row-major.
//!
//! Factors of separately trained adapters are not comparable, products are: `(B G)(G^-1 A)` is the
//! same update. Norms, distances, cosines and robust weights need only the inner products, and a
//! weighted sum of products is the product of stacked factors, so no product is ever formed.

use gemm::{Parallelism, gemm};

use crate::element::Element;
use crate::error::AdapterError;

/// Rows of B or columns of A that are widened to `f64` at once.
const PANEL: usize = 512;

/// Factors of one matrix of one adapter.
#[derive(Clone, Copy, Debug)]
pub struct Factors<'a, T> {
    /// `[rows, rank]`.
    pub b: &'a [T],
    /// `[rank, columns]`.
    pub a: &'a [T],
    /// Inner dimension, from 1; adapters may differ.
    pub rank: usize,
    /// The factor s, such as alpha / rank.
    pub scale: f64,
}

/// `G[i, j] = <s_i B_i A_i, s_j B_j A_j>`, the Frobenius inner products, `[n, n]` row-major.
///
/// They are `s_i s_j trace((B_i^T B_j)(A_j A_i^T))`: per adapter and panel one product with the
/// stack of all, `O((rows + columns) R^2)` for R the sum of the ranks. Sums run in `f64`, panel by
/// panel, on the calling thread.
///
/// # Errors
/// Where there are no adapters, a factor does not have the size of `rows`, `columns` and its rank, or
/// a value is not finite.
pub fn gram<T: Element>(
    factors: &[Factors<'_, T>],
    rows: usize,
    columns: usize,
) -> Result<Vec<f64>, AdapterError> {
    check(factors, rows, columns)?;
    let total: usize = factors.iter().map(|factor| factor.rank).sum();
    let b = inner(total, rows, |row, panel| {
        for factor in factors {
            let values = &factor.b[row * factor.rank..][..factor.rank];
            panel.extend(values.iter().map(|value| f64::from(value.to_f32())));
        }
    });
    let a = inner(total, columns, |column, panel| {
        for factor in factors {
            let values = factor.a.iter().skip(column).step_by(columns);
            panel.extend(values.map(|value| f64::from(value.to_f32())));
        }
    });
    let starts = starts(factors);
    let mut out = Vec::with_capacity(factors.len() * factors.len());
    for (i, first) in factors.iter().enumerate() {
        for (j, second) in factors.iter().enumerate() {
            let mut sum = 0.0;
            for p in starts[i]..starts[i] + first.rank {
                for q in starts[j]..starts[j] + second.rank {
                    sum += b[p * total + q] * a[p * total + q];
                }
            }
            out.push(first.scale * second.scale * sum);
        }
    }
    Ok(out)
}

/// Stacked factors of `sum_i w_i s_i B_i A_i` (FLoRA, arXiv 2409.05976, equation 7): B `[rows, R]`
/// beside each other as they are, A `[R, columns]` below each other with weight and scale, R the sum
/// of the ranks.
///
/// # Errors
/// As [`gram`]; also where there is not one finite weight per adapter or a value overflows.
pub fn stack<T: Element>(
    factors: &[Factors<'_, T>],
    weights: &[f64],
    rows: usize,
    columns: usize,
) -> Result<(Vec<f32>, Vec<f32>), AdapterError> {
    check(factors, rows, columns)?;
    super::count("weights", weights.len(), factors.len())?;
    if let Some(adapter) = weights.iter().position(|weight| !weight.is_finite()) {
        return Err(AdapterError::Weight { adapter });
    }
    let total: usize = factors.iter().map(|factor| factor.rank).sum();
    let mut b = Vec::with_capacity(rows * total);
    for row in 0..rows {
        for factor in factors {
            let values = &factor.b[row * factor.rank..][..factor.rank];
            b.extend(values.iter().map(|value| value.to_f32()));
        }
    }
    let mut a = Vec::with_capacity(total * columns);
    for (factor, weight) in factors.iter().zip(weights) {
        let scale = weight * factor.scale;
        #[expect(
            clippy::cast_possible_truncation,
            reason = "overflow becomes infinite and is refused below"
        )]
        a.extend(
            factor
                .a
                .iter()
                .map(|value| (f64::from(value.to_f32()) * scale) as f32),
        );
    }
    match a.iter().position(|value| !value.is_finite()) {
        Some(index) => Err(AdapterError::Overflow { index }),
        None => Ok((b, a)),
    }
}

fn starts<T>(factors: &[Factors<'_, T>]) -> Vec<usize> {
    let sums = factors.iter().scan(0, |next, factor| {
        let start = *next;
        *next += factor.rank;
        Some(start)
    });
    sums.collect()
}

/// `X^T X` `[total, total]` of a matrix X `[length, total]` whose rows `fill` appends to a panel.
fn inner(total: usize, length: usize, fill: impl Fn(usize, &mut Vec<f64>)) -> Vec<f64> {
    let mut sum = vec![0.0; total * total];
    let mut panel = Vec::with_capacity(PANEL * total);
    let stride = isize::try_from(total).unwrap_or(isize::MAX);
    for start in (0..length).step_by(PANEL) {
        panel.clear();
        let rows = PANEL.min(length - start);
        (start..start + rows).for_each(|row| fill(row, &mut panel));
        debug_assert_eq!(panel.len(), rows * total, "one value per rank and row");
        #[expect(unsafe_code, reason = "the gemm crate takes pointers and strides")]
        // SAFETY: `sum` is [total, total] and `panel` [rows, total], both row-major without gaps.
        unsafe {
            gemm(
                total,
                total,
                rows,
                sum.as_mut_ptr(),
                1,
                stride,
                true,
                panel.as_ptr(),
                stride,
                1,
                panel.as_ptr(),
                1,
                stride,
                1.0,
                1.0,
                false,
                false,
                false,
                Parallelism::None,
            );
        }
    }
    sum
}

fn check<T: Element>(
    factors: &[Factors<'_, T>],
    rows: usize,
    columns: usize,
) -> Result<(), AdapterError> {
    if factors.is_empty() {
        return Err(AdapterError::Nothing);
    }
    for (adapter, factor) in factors.iter().enumerate() {
        if !factor.scale.is_finite() {
            return Err(AdapterError::Weight { adapter });
        }
        for (values, length) in [(factor.b, rows), (factor.a, columns)] {
            let expected = length.saturating_mul(factor.rank);
            if values.len() != expected || factor.rank == 0 {
                return Err(AdapterError::Length {
                    adapter,
                    got: values.len(),
                    expected,
                });
            }
            if let Some(index) = values.iter().position(|value| !value.to_f32().is_finite()) {
                return Err(AdapterError::NotFinite { adapter, index });
            }
        }
    }
    Ok(())
}
