//! What can go wrong between a score job and the site's model server.

use std::path::PathBuf;

use consilium_kernels::{ListedError, RecordError, ScoreError};
use consilium_protocol::reference::ReferenceError;
use consilium_protocol::shard::ShardError;

use crate::spool::SpoolError;
use crate::worker::WorkError;

/// Why a job cannot be scored through the server, or the scorer cannot run.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ScorerError {
    /// A setting that cannot be used.
    #[error("source_server.{key} is {value}, expected {expected}")]
    Setting {
        /// The key in node.toml; the option of the same name.
        key: &'static str,
        /// What stands there.
        value: String,
        /// What may stand there.
        expected: String,
    },
    /// A file of the settings or the source cannot be used.
    #[error("{}: {problem}", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// What is wrong, and what would be right.
        problem: String,
    },
    /// The server cannot be reached, or broke off.
    #[error("{url}: {problem}{fix}")]
    Transport {
        /// The endpoint.
        url: String,
        /// What happened.
        problem: String,
        /// What to do, with a separator in front; may be empty.
        fix: String,
    },
    /// The server refused or failed.
    #[error("{url} answered {status}: {said}{fix}")]
    Refused {
        /// The endpoint.
        url: String,
        /// HTTP status.
        status: u16,
        /// The server's own words, cut.
        said: String,
        /// What to do, with a separator in front; may be empty.
        fix: String,
    },
    /// A response that is not what was asked for.
    #[error("{url}: {problem}")]
    Response {
        /// The endpoint.
        url: String,
        /// What is wrong, and what would be right.
        problem: String,
    },
    /// Log-probabilities of one position that are no top of a softmax.
    #[error(
        "{url}: prompt {prompt}, token {token}: {source}; the scorer needs raw log-probabilities"
    )]
    Listed {
        /// The endpoint.
        url: String,
        /// Index of the prompt in its request.
        prompt: usize,
        /// Index of the predicted token in the prompt.
        token: usize,
        /// What is wrong.
        source: ListedError,
    },
    /// The records.
    #[error(transparent)]
    Score(#[from] ScoreError),
    /// The columns of the records.
    #[error(transparent)]
    Record(#[from] RecordError),
    /// The shard.
    #[error(transparent)]
    Shard(#[from] ShardError),
    /// The reference set.
    #[error(transparent)]
    Reference(#[from] ReferenceError),
    /// The spool.
    #[error(transparent)]
    Spool(#[from] SpoolError),
    /// The source's tokenizer, a text, or the process.
    #[error(transparent)]
    Work(#[from] WorkError),
    /// The process was asked to end, or the job was withdrawn.
    #[error("stopped before the end")]
    Stopped,
}
