//! The half of a node that has data, models and the processor, and never opens a socket.

pub mod commands;
pub mod data;
pub mod device;
mod error;
pub mod evaluate;
pub(crate) mod files;
pub mod holdout;
pub mod jobs;
pub mod model;
pub mod monitor;
pub mod part;
pub mod peft;
pub mod plan;
pub mod progress;
pub(crate) mod reference;
mod run;
pub mod score;
pub mod source;
pub mod tensorboard;
#[cfg(test)]
pub(crate) mod testing;
pub mod tokenizer;
pub mod tokens;
pub mod train;

pub use error::WorkError;
pub use jobs::{Folders, Worker};
pub use monitor::Monitor;
pub use run::{RunOptions, run};
pub use source::LoadedModel;
