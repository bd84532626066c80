//! Fusion of contributions: values in, values out. No store, no network, no clock.
//!
//! Records become targets by integer arithmetic, the same bytes on every machine. Adapters are merged in `f64`, in
//! the order of the institutions' names and on one thread per matrix: the same bytes for any order of arrival and any
//! number of threads.

mod adapter;
mod error;

pub use adapter::check::{AdapterLayout, check_adapter};
pub use adapter::initial::initial_adapter;
pub use adapter::merge::{MatrixTruncation, MergeInput, Merged, Truncation, merge};
pub use error::{FusionError, Origin, TensorProblem};
