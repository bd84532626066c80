//! Merging the values of many adapters, chunk by chunk.
//!
//! Values come as slices: one per adapter, all of the same tensors in the same order, or one chunk
//! of these at a time, so that nobody has to hold more than a chunk of each. [`merge`] works value
//! by value; what a rule must know of all values first, it learns by passes over the chunks:
//! [`Magnitudes`] for TIES and SCE, [`Squares`] for SCE. [`product`] has what concerns low-rank
//! products rather than values.
//!
//! Sums run in `f64` in the order of the adapters, which callers make that of the institutions;
//! results depend on neither chunks nor threads.

mod density;
pub mod product;
mod sce;

pub use density::{Magnitudes, Narrowed};
pub use sce::{Squares, spreads};

use crate::backend::Backend;
use crate::element::Element;
use crate::error::AdapterError;
use crate::fusion::Robust;
use crate::{cpu, reference};

/// How the values of several adapters become one.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Merging<'a> {
    /// `sum_i w_i x_i`, one weight per adapter: a mean (FedAvg, arXiv 1602.05629) where they sum to
    /// one.
    Sum {
        /// One weight per adapter.
        weights: &'a [f64],
    },
    /// The mean of what remains without the d smallest and d largest values, where d is that of
    /// [`Robust`] (arXiv 1803.01498, definitions 1 and 2).
    ///
    /// Of factors this means nothing unless all share one of them: B A = (B G)(G^-1 A).
    Robust(Robust),
    /// TIES (arXiv 2306.01708, algorithm 1): values below their adapter's threshold in magnitude are
    /// dropped; the sign with the larger sum of `w_i |x_i|` wins; the result is the mean, weighted by
    /// w, of the values that have it. Zeros vote for nothing and do not count; 0 on a tie.
    Ties {
        /// One weight per adapter, none negative; all 1 in the paper.
        weights: &'a [f64],
        /// One per adapter, of all its values or of the tensor's: see [`Magnitudes`].
        thresholds: &'a [f32],
    },
    /// The last step of SCE (arXiv 2408.07990, section 3.3), erase: the sign of `sum_i x_i` wins;
    /// the result is the mean, weighted by w, of the values that have it. 0 where the sum is 0.
    Sce {
        /// One weight per adapter, none negative: those of [`Squares`].
        weights: &'a [f64],
    },
}

impl Merging<'_> {
    fn check(&self, adapters: usize) -> Result<(), AdapterError> {
        let (weights, signed) = match *self {
            Self::Sum { weights } => (weights, true),
            Self::Ties { weights, .. } | Self::Sce { weights } => (weights, false),
            Self::Robust(Robust::TrimmedMean { trim_permille }) if trim_permille >= 500 => {
                return Err(AdapterError::Trim {
                    permille: trim_permille,
                });
            }
            Self::Robust(_) => return Ok(()),
        };
        count("weights", weights.len(), adapters)?;
        let wrong = |weight: &f64| !weight.is_finite() || (!signed && *weight < 0.0);
        if let Some(adapter) = weights.iter().position(wrong) {
            return Err(AdapterError::Weight { adapter });
        }
        let Self::Ties { thresholds, .. } = *self else {
            return Ok(());
        };
        count("thresholds", thresholds.len(), adapters)?;
        match thresholds.iter().position(|threshold| threshold.is_nan()) {
            Some(adapter) => Err(AdapterError::Threshold { adapter }),
            None => Ok(()),
        }
    }
}

fn count(what: &'static str, got: usize, expected: usize) -> Result<(), AdapterError> {
    if got == expected {
        Ok(())
    } else {
        Err(AdapterError::Count {
            what,
            got,
            expected,
        })
    }
}

/// Merges a chunk: `out[j]` from the value j of every adapter.
///
/// # Errors
/// Where there are no adapters, one has not as many values as `out` or a value that is not finite,
/// or weights, thresholds or the trim cannot be; also where a result is beyond `f32`. `out` holds
/// nothing of use then.
pub fn merge<T: Element>(
    merging: Merging<'_>,
    adapters: &[&[T]],
    out: &mut [f32],
) -> Result<(), AdapterError> {
    Backend::best().merge(merging, adapters, out)
}

impl Backend {
    /// [`merge`] on this implementation.
    ///
    /// # Errors
    /// As [`merge`].
    pub fn merge<T: Element>(
        self,
        merging: Merging<'_>,
        adapters: &[&[T]],
        out: &mut [f32],
    ) -> Result<(), AdapterError> {
        same_length(adapters, out.len())?;
        merging.check(adapters.len())?;
        match self {
            Self::Reference => {
                finite(adapters)?;
                reference::adapters::merge(merging, adapters, out);
                match out.iter().position(|value| !value.is_finite()) {
                    Some(index) => Err(AdapterError::Overflow { index }),
                    None => Ok(()),
                }
            }
            Self::Cpu => cpu::adapters::merge(merging, adapters, out),
            #[cfg(feature = "cuda")]
            Self::Cuda => crate::cuda::merge(crate::cuda::device()?, merging, adapters, out),
            #[cfg(not(feature = "cuda"))]
            Self::Cuda => Err(crate::error::CudaError::NotBuilt.into()),
        }
    }
}

/// Whether there are adapters, all with this many values.
fn same_length<T>(adapters: &[&[T]], expected: usize) -> Result<(), AdapterError> {
    if adapters.is_empty() {
        return Err(AdapterError::Nothing);
    }
    for (adapter, values) in adapters.iter().enumerate() {
        if values.len() != expected {
            return Err(AdapterError::Length {
                adapter,
                got: values.len(),
                expected,
            });
        }
    }
    Ok(())
}

/// The first value that is not finite: least index, then least adapter.
pub(crate) fn finite<T: Element>(adapters: &[&[T]]) -> Result<(), AdapterError> {
    for index in 0..adapters.first().map_or(0, |values| values.len()) {
        for (adapter, values) in adapters.iter().enumerate() {
            if !values[index].to_f32().is_finite() {
                return Err(AdapterError::NotFinite { adapter, index });
            }
        }
    }
    Ok(())
}
