//! Select and calculate, the first two steps of SCE (arXiv 2408.07990, section 3.3).
//!
//! Select: of a matrix, the positions where the adapters differ most, those whose variance is among
//! the largest, a tenth in the paper. Calculate: an adapter's weight is its sum of squares there,
//! over that of all adapters. Usage, chunk by chunk: [`spreads`] into [`super::Magnitudes`], again
//! into [`super::Narrowed`], whose threshold makes [`Squares`].

use super::same_length;
use crate::element::Element;
use crate::error::AdapterError;

/// `out[j]` = sum over the adapters of the squared distances of value j from their mean: the
/// variance times their number. Beyond `f32` it is the largest `f32`.
///
/// # Errors
/// Where there are no adapters, or one has not as many values as `out` or one that is not finite.
pub fn spreads<T: Element>(adapters: &[&[T]], out: &mut [f32]) -> Result<(), AdapterError> {
    same_length(adapters, out.len())?;
    super::finite(adapters)?;
    for (index, out) in out.iter_mut().enumerate() {
        *out = spread(adapters, index);
    }
    Ok(())
}

#[expect(
    clippy::cast_possible_truncation,
    reason = "only the order of spreads matters; beyond f32 it saturates"
)]
fn spread<T: Element>(adapters: &[&[T]], index: usize) -> f32 {
    let values = adapters
        .iter()
        .map(|values| f64::from(values[index].to_f32()));
    let mean = values.clone().sum::<f64>() / adapters.len() as f64;
    let spread: f64 = values.map(|value| (value - mean) * (value - mean)).sum();
    (spread as f32).min(f32::MAX)
}

/// Sums of squares where adapters differ at least by a threshold.
#[derive(Clone, Debug)]
pub struct Squares {
    threshold: f32,
    sums: Vec<f64>,
}

impl Squares {
    /// Nothing seen yet. `threshold` is of [`spreads`].
    #[must_use]
    pub fn new(adapters: usize, threshold: f32) -> Self {
        Self {
            threshold,
            sums: vec![0.0; adapters],
        }
    }

    /// Adds a chunk. Chunks of any size, in the order of the values.
    ///
    /// # Errors
    /// Where the number of adapters is another, they differ in length, or a value is not finite.
    pub fn observe<T: Element>(&mut self, adapters: &[&[T]]) -> Result<(), AdapterError> {
        super::count("adapters", adapters.len(), self.sums.len())?;
        let length = adapters.first().map_or(0, |values| values.len());
        same_length(adapters, length)?;
        super::finite(adapters)?;
        for index in 0..length {
            if spread(adapters, index) >= self.threshold {
                for (sum, values) in self.sums.iter_mut().zip(adapters) {
                    let value = f64::from(values[index].to_f32());
                    *sum += value * value;
                }
            }
        }
        Ok(())
    }

    /// Weights that sum to one; equal ones where nothing differs from zero.
    #[must_use]
    pub fn finish(self) -> Vec<f64> {
        let total: f64 = self.sums.iter().sum();
        let equal = 1.0 / self.sums.len().max(1) as f64;
        let share = |sum: &f64| if total > 0.0 { sum / total } else { equal };
        self.sums.iter().map(share).collect()
    }
}
