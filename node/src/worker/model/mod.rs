//! The decoder: Llama family and Qwen2, f32, with optional low-rank adapters.
//!
//! Rows of the output head are kept in rank order, the order of the byte-sorted vocabulary, so that
//! logits of tokens with a common prefix are neighbours. Embeddings stay in the order of ids.

mod adapter_folder;
mod attention;
mod block;
pub mod config;
mod decoder;
mod error;
mod feed_forward;
mod frozen;
mod head;
mod load;
mod lora;
mod ops;
mod parameters;
#[cfg(test)]
mod reference;
mod save;
mod scoring;
pub mod tensors;
#[cfg(test)]
mod tests;

pub use adapter_folder::{load_adapter, save_adapter};
pub use config::{ConfigError, Family, ModelConfig, Rope, RopeScaling};
pub use decoder::{Gradients, Model, Packed, Pass};
pub use error::ModelError;
pub use frozen::{BaseStorage, OffloadFile};
pub use load::{load_folder, load_folder_as, random, random_as};
pub use lora::LoraConfig;
pub use ops::attention::Segment;
pub use save::save_folder;
pub use scoring::{BranchToken, KeyValues, ScoringPass};
pub use tensors::{NamedTensor, NamedTensors};

pub(crate) use adapter_folder::{SAVED, TARGETS};
pub(crate) use decoder::Head;
pub(crate) use ops::simd::wide;
pub(crate) use parameters::{edit, with_floats};
