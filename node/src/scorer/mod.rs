//! The third process of a node whose source is behind the site's own model server, vLLM or SGLang.
//!
//! It asks the server for the log-probabilities of the PUBLIC reference set and writes the same shards as the worker would.
//! The worker has private data and opens no socket; the agent has sockets and no data; the scorer connects to one
//! configured address and is given no path of private data; where the kernel has Landlock, no other file and no other port
//! can be opened.
//!
//! A server lists the K likeliest tokens of a position, `consilium_kernels::listed` makes records of them and keeps the
//! mass that is not listed in the tail: a source that is asked for few tokens looks worse than it is, never better. Inside
//! of an observed token that is not among the K, each byte pays for all that the list does not show, so K should be as large
//! as the server allows.

mod answer;
mod client;
mod confine;
mod error;
mod jobs;
mod probe;
mod run;
mod score;
mod server;
pub mod settings;
mod sglang;
mod source;
mod vllm;

pub use error::ScorerError;
pub use jobs::{Scorer, ScorerSettings};
pub use probe::Probed;
pub use run::run;
pub use settings::{RawServer, ServerKind, ServerSettings};
