//! Which implementation of an operation runs.
//!
//! Public functions check their inputs once, then hand them to [`Backend::best`]. An implementation
//! gets only checked inputs, never returns anything but values and cells that are not finite, and
//! is held to the reference by the tests beside it. A faster one is a new variant here and a new
//! arm in each dispatch.

use crate::error::CudaError;

/// An implementation of the operations of this crate.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Backend {
    /// Plain loops in `f64`, written after the formulas: the measure of the others. Slow.
    Reference,
    /// Portable vectorised loops over sorted ranges; rows in parallel on the current rayon pool, in
    /// fixed chunks, so that results do not depend on the number of threads.
    Cpu,
    /// Kernels on an NVIDIA device; where there is none, or the feature `cuda` is off, an error.
    Cuda,
}

impl Backend {
    /// The fastest implementation for values that lie in the memory of the host.
    ///
    /// That is the CPU even where there is a device: moving logits to it takes longer than scoring them here. The
    /// device pays where its inputs already are, as in a head that stays on it.
    #[must_use]
    pub fn best() -> Self {
        Self::Cpu
    }

    /// Implementations that work on this machine.
    #[must_use]
    pub fn present() -> Vec<Self> {
        let cuda = cuda_missing().is_none().then_some(Self::Cuda);
        [Self::Reference, Self::Cpu]
            .into_iter()
            .chain(cuda)
            .collect()
    }

    /// Implementations that do not, and why.
    #[must_use]
    pub fn absent() -> Vec<(Self, CudaError)> {
        cuda_missing()
            .into_iter()
            .map(|reason| (Self::Cuda, reason))
            .collect()
    }
}

#[cfg(feature = "cuda")]
fn cuda_missing() -> Option<CudaError> {
    crate::cuda::device().err()
}

#[cfg(not(feature = "cuda"))]
fn cuda_missing() -> Option<CudaError> {
    Some(CudaError::NotBuilt)
}

/// A logit that is NaN or infinite.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct NotFinite {
    pub(crate) row: usize,
    pub(crate) column: usize,
}
