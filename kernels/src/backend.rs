//! Which implementation of an operation runs.
//!
//! Public functions check their inputs once, then hand them to [`Backend::best`]. An implementation
//! gets only checked inputs, never returns anything but values and cells that are not finite, and
//! is held to the reference by the tests beside it. A faster one is a new variant here and a new
//! arm in each dispatch.

/// An implementation of the operations of this crate.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Backend {
    /// Plain loops in `f64`, written after the formulas: the measure of the others. Slow.
    Reference,
    /// Portable vectorised loops over sorted ranges; rows in parallel on the current rayon pool, in
    /// fixed chunks, so that results do not depend on the number of threads.
    Cpu,
}

impl Backend {
    /// The fastest implementation that this machine has.
    #[must_use]
    pub fn best() -> Self {
        Self::Cpu
    }
}

/// A logit that is NaN or infinite.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct NotFinite {
    pub(crate) row: usize,
    pub(crate) column: usize,
}
