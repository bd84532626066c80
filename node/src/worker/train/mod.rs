//! Training of all weights or of adapters.

pub mod adamw;
pub mod checkpoint;
pub mod distill;
pub mod external;
pub mod held_out;
pub mod language_model;
pub mod run;
pub mod schedule;
pub mod targets;

use std::path::PathBuf;

use consilium_kernels::LossError;

use super::data::DataError;
use super::model::ModelError;

pub use adamw::{AdamW, AdamWConfig};
pub use language_model::{Progress, TrainConfig, Trainer, train_language_model};
pub use schedule::{Decay, Schedule};

/// Why training stopped.
#[derive(Debug, thiserror::Error)]
pub enum TrainError {
    /// The model or a file of it is at fault.
    #[error(transparent)]
    Model(#[from] ModelError),
    /// The data is at fault.
    #[error(transparent)]
    Data(#[from] DataError),
    /// The loss could not be computed.
    #[error("loss: {0}")]
    Loss(#[from] LossError),
    /// Training diverged.
    #[error("step {step}: the {what} is not finite; lower the learning rate")]
    NotFinite {
        /// Step, from 0.
        step: u64,
        /// Loss or gradient.
        what: &'static str,
    },
    /// A checkpoint is unusable.
    #[error("{path}: {reason}")]
    Checkpoint {
        /// File.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
    /// A run folder belongs to another run.
    #[error(
        "{}: a checkpoint of another run ({what}); name another folder with `run`, or delete the file to start again",
        path.display()
    )]
    OtherRun {
        /// Checkpoint.
        path: PathBuf,
        /// What differs.
        what: &'static str,
    },
    /// The optimiser's state belongs to other tensors.
    #[error("the optimiser's state does not fit the model's trainable tensors")]
    OtherModel,
}

#[cfg(test)]
mod tests;
