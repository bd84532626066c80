//! Why a piece of the worker's work cannot be done.

use std::path::PathBuf;

use consilium_kernels::{LossError, RecordError, ScoreError};
use consilium_protocol::evaluation::EvaluationError;
use consilium_protocol::reference::ReferenceError;
use consilium_protocol::shard::ShardError;

use super::holdout::HoldoutError;
use super::model::ModelError;
use super::part::PartError;
use super::tokenizer::TokenizerError;
use super::tokenizer::chat::ChatError;
use super::train::TrainError;
use crate::hub::HubError;
use crate::spool::SpoolError;

/// Why work ended early. The text stays at the site and never holds private text.
#[derive(Debug, thiserror::Error)]
pub enum WorkError {
    /// A model, an adapter or a batch.
    #[error(transparent)]
    Model(#[from] ModelError),
    /// The tokenizer.
    #[error(transparent)]
    Tokenizer(#[from] TokenizerError),
    /// A model that is not on this machine.
    #[error(transparent)]
    Hub(#[from] HubError),
    /// The chat template of a model.
    #[error(transparent)]
    Chat(#[from] ChatError),
    /// A target that the model cannot hold.
    #[error("a target has more tokens than the model's limit of {limit}; cut the text")]
    TooLong {
        /// The model's limit.
        limit: usize,
    },
    /// Items that are not in the reference set.
    #[error("items {first}..{last} are empty or outside of the reference set's {items}")]
    Items {
        /// First item.
        first: u64,
        /// Item after the last.
        last: u64,
        /// Items of the set.
        items: usize,
    },
    /// A part of the reference set.
    #[error(transparent)]
    Part(#[from] PartError),
    /// Logits cannot be scored: the model is broken.
    #[error("scoring: {0}")]
    Score(#[from] ScoreError),
    /// A loss cannot be computed.
    #[error("loss: {0}")]
    Loss(#[from] LossError),
    /// Records that are not well-formed.
    #[error("records: {0}")]
    Record(#[from] RecordError),
    /// A shard that is not well-formed.
    #[error(transparent)]
    Shard(#[from] ShardError),
    /// Targets that do not belong to the reference set.
    #[error("targets: {0}")]
    Targets(String),
    /// A part none of whose items can be used.
    #[error("no item of the part fits a row of tokens; raise row_tokens")]
    NothingToTrain,
    /// The reference set.
    #[error(transparent)]
    Reference(#[from] ReferenceError),
    /// The holdout.
    #[error(transparent)]
    Holdout(#[from] HoldoutError),
    /// The evaluation document.
    #[error(transparent)]
    Evaluation(#[from] EvaluationError),
    /// The spool.
    #[error(transparent)]
    Spool(#[from] SpoolError),
    /// Training: an optimiser, its state, or the data.
    #[error(transparent)]
    Train(#[from] TrainError),
    /// A folder or file cannot be read.
    #[error("cannot read {}", path.display())]
    Read {
        /// Which.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// A file cannot be written.
    #[error("cannot write {}", path.display())]
    Write {
        /// Which.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// The operating system refuses something to the process.
    #[error("cannot {doing}")]
    Process {
        /// What.
        doing: &'static str,
        /// Why.
        source: std::io::Error,
    },
    /// A file that does not say what it should.
    #[error("{}: {problem}", path.display())]
    File {
        /// Which.
        path: PathBuf,
        /// Where, what is wrong, and what would be right.
        problem: String,
    },
    /// A setting that this version cannot do.
    #[error("{field}: {problem}")]
    Setting {
        /// Name of the setting.
        field: &'static str,
        /// What is wrong, and what would be right.
        problem: String,
    },
    /// The process was asked to end, or the job was withdrawn.
    #[error("stopped before the end")]
    Stopped,
}
