//! The decoder: Llama, Mistral, Qwen 2 and 3, Phi 3 and 4, with optional low-rank adapters: in f32 with operations of our own on
//! the host, or in candle's wherever a [`Placement`] says.
//!
//! Rows of the output head are kept in rank order, the order of the byte-sorted vocabulary, so that
//! logits of tokens with a common prefix are neighbours. Embeddings stay in the order of ids.

mod adapter_config;
mod adapter_folder;
mod attention;
mod block;
pub mod config;
mod decoder;
mod device;
mod error;
mod feed_forward;
mod frozen;
mod head;
mod linear;
mod load;
mod lora;
mod parameters;
mod pass;
#[cfg(test)]
mod reference;
mod rope;
mod save;
mod scoring;
pub mod tensors;
#[cfg(test)]
mod tests;
mod weights;

pub use consilium_kernels::layers::Segment;

pub use adapter_config::{AdapterConfig, Targets};
pub use adapter_folder::{load_adapter, save_adapter};
pub use config::{ConfigError, Family, ModelConfig, Rope, RopeScaling, SlidingWindow};
pub use decoder::{Model, Packed};
pub use device::Placement;
pub use error::ModelError;
pub use frozen::{BaseStorage, OffloadFile};
pub use load::{OpenFolder, load_folder, load_folder_as, open_folder, random, random_as};
pub use lora::LoraConfig;
pub use pass::{Gradients, Pass};
pub use save::save_folder;
pub use scoring::{BranchToken, KeyValues, ScoringPass};
pub use tensors::{NamedTensor, NamedTensors};

pub(crate) use decoder::Head;
pub(crate) use device::LOGITS as DEVICE_LOGITS;
pub(crate) use parameters::{Slot, edit, is_plain, with_floats};
pub(crate) use pass::FurtherLoss;
