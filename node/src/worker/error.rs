//! Why a piece of the worker's work cannot be done.

use std::path::PathBuf;

use consilium_kernels::{LossError, RecordError, ScoreError};
use consilium_protocol::evaluation::EvaluationError;
use consilium_protocol::reference::ReferenceError;
use consilium_protocol::shard::ShardError;

use super::data::DataError;
use super::holdout::HoldoutError;
use super::model::ModelError;
use super::part::PartError;
use super::tokenizer::TokenizerError;
use super::tokenizer::chat::ChatError;
use super::train::TrainError;
use super::train::external::ExternalError;
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
    /// Data to train on.
    #[error(transparent)]
    Data(#[from] DataError),
    /// Training: an optimiser, its state, or the data.
    #[error(transparent)]
    Train(#[from] TrainError),
    /// Training by the site's own command.
    #[error(transparent)]
    External(#[from] ExternalError),
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
    /// A run that does not fit the machine.
    #[error("the run needs {} of memory{place} and {} are free ({source_of}); {fix}", size(*needed), size(*available))]
    Memory {
        /// ` on the device`, or nothing.
        place: &'static str,
        /// Bytes that it needs.
        needed: u64,
        /// Bytes that it may take.
        available: u64,
        /// Who says so.
        source_of: String,
        /// What would fit.
        fix: String,
    },
    /// The process was asked to end, or the job was withdrawn.
    #[error("stopped before the end")]
    Stopped,
}

/// Bytes for people.
pub(crate) fn size(bytes: u64) -> String {
    let unit = |shift: u32| bytes as f64 / (1_u64 << shift) as f64;
    if bytes >= 1 << 30 {
        format!("{:.2} GiB", unit(30))
    } else {
        format!("{:.1} MiB", unit(20))
    }
}
