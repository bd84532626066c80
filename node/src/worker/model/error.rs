//! What can go wrong with a model.

use std::path::PathBuf;

use consilium_kernels::HeadError;

use super::config::ConfigError;

/// Why a model, an adapter or a batch was refused.
#[derive(Debug, thiserror::Error)]
pub enum ModelError {
    /// The settings of the model are unusable.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// The output head does not fit the vocabulary.
    #[error(transparent)]
    Head(#[from] HeadError),
    /// A file could not be read.
    #[error("{path}: cannot read: {source}")]
    Read {
        /// File.
        path: PathBuf,
        /// Cause.
        source: std::io::Error,
    },
    /// A file could not be written.
    #[error("{path}: cannot write: {source}")]
    Write {
        /// File.
        path: PathBuf,
        /// Cause.
        source: std::io::Error,
    },
    /// A file is no safetensors file.
    #[error("{origin}: not a whole safetensors file: {source}")]
    Decode {
        /// File or stream.
        origin: String,
        /// Cause.
        source: safetensors::SafeTensorError,
    },
    /// Tensors could not be written in safetensors form.
    #[error("cannot encode tensors: {source}")]
    Encode {
        /// Cause.
        source: safetensors::SafeTensorError,
    },
    /// A tensor is missing.
    #[error("{origin}: tensor `{name}` is missing")]
    MissingTensor {
        /// File or stream.
        origin: String,
        /// Tensor.
        name: String,
    },
    /// A tensor in two files.
    #[error("{origin}: tensor `{name}` is in another file of the folder as well")]
    TwiceTensor {
        /// File.
        origin: String,
        /// Tensor.
        name: String,
    },
    /// A tensor that the architecture does not have.
    #[error("{origin}: tensor `{name}` does not belong to this architecture")]
    UnknownTensor {
        /// File or stream.
        origin: String,
        /// Tensor.
        name: String,
    },
    /// A tensor of another shape.
    #[error("{origin}: tensor `{name}` has shape {got:?}, expected {expected:?}")]
    WrongShape {
        /// File or stream.
        origin: String,
        /// Tensor.
        name: String,
        /// Shape in the file.
        got: Vec<usize>,
        /// Shape of the model.
        expected: Vec<usize>,
    },
    /// A tensor of a type that is not read.
    #[error("{origin}: tensor `{name}` is {dtype}, expected F32, BF16 or F16")]
    WrongType {
        /// File or stream.
        origin: String,
        /// Tensor.
        name: String,
        /// Type in the file.
        dtype: String,
    },
    /// A tensor with infinite values or NaN.
    #[error("{origin}: tensor `{name}` has values that are not finite")]
    NotFinite {
        /// File or stream.
        origin: String,
        /// Tensor.
        name: String,
    },
    /// The order of the vocabulary is no permutation of the model's ids.
    #[error("the vocabulary order is not a permutation of {vocab_size} ids")]
    BadOrder {
        /// Rows of the model's embedding.
        vocab_size: usize,
    },
    /// Adapters that the model cannot have.
    #[error("{field}: {reason}")]
    BadLora {
        /// Field of the adapter's settings.
        field: &'static str,
        /// What is wrong, and what would be right.
        reason: String,
    },
    /// The model has no adapters.
    #[error("the model has no adapters")]
    NoAdapter,
    /// No weight of the model is trainable.
    #[error("no weight of the model is trainable; call `train_all` or `attach_lora` first")]
    Frozen,
    /// A trainable tensor got no gradient.
    #[error("tensor `{name}` got no gradient")]
    NoGradient {
        /// First tensor of the bank.
        name: String,
    },
    /// A batch does not fit the model.
    #[error("batch: {reason}")]
    BadBatch {
        /// What is wrong.
        reason: String,
    },
    /// A tensor operation failed.
    #[error(transparent)]
    Tensor(#[from] candle_core::Error),
}
