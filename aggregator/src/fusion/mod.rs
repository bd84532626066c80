//! Fusion of contributions: values in, values out, adapters as files. No store, no network, no clock.
//!
//! Records become targets by integer arithmetic, the same bytes on every machine. Adapters are merged in `f64`, in
//! the order of the institutions' names and on one thread per matrix: the same bytes for any order of arrival and any
//! number of threads, but on another kind of processor the last bit may differ, because faer picks its instructions there.

mod account;
mod adapter;
mod error;
mod records;
mod screening;

pub use account::{Accountant, Accounts, DomainAccount, MemberAccount, holdout};
pub use adapter::check::{AdapterLayout, adapter_rank, check_adapter};
pub use adapter::defence::{Exclusion, Gram, Vote, Votes, defend};
pub use adapter::initial::initial_adapter;
pub use adapter::merge::{MergeInput, MergeOutput, Merged, merge, merge_in_memory};
pub use adapter::output::{MemoryFile, Sink};
pub use adapter::report::{MatrixTruncation, MemberReport, MergeReport, Truncation};
pub use adapter::tensors::Content;
pub use error::{FusionError, Origin, TensorProblem};
pub use records::{FusedShard, ShardRouting, check_reference, check_shard, fuse_shard};
pub use screening::{Flag, Screen, Screened};
