//! Why contributions could not be fused.

use std::fmt;
use std::path::PathBuf;

use consilium_protocol::InstitutionId;

/// Whose bytes an error speaks of.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Origin {
    /// The adapter that the inner round started from.
    Start,
    /// The outer optimiser's state.
    Momentum,
    /// A member's contribution.
    Institution(InstitutionId),
    /// A file of the pivot, or its folder.
    Pivot(PathBuf),
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Start => f.write_str("start adapter"),
            Self::Momentum => f.write_str("outer momentum"),
            Self::Institution(institution) => write!(f, "contribution of {institution}"),
            Self::Pivot(path) => write!(f, "pivot, {}", path.display()),
        }
    }
}

/// What is wrong with a tensor.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum TensorProblem {
    /// It is not there.
    #[error("is missing")]
    Missing,
    /// It has no place in this adapter.
    #[error("does not belong to the adapter")]
    Unexpected,
    /// Another type than those named second.
    #[error("is {0}, expected {1}")]
    Type(String, &'static str),
    /// Another shape.
    #[error("has shape {got:?}, expected {expected:?}")]
    Shape {
        /// Shape found.
        got: Vec<usize>,
        /// Shape that the start adapter asks for; 0 stands for any length.
        expected: Vec<usize>,
    },
    /// A rank that no rule takes.
    #[error("has rank {got}, expected 1 to {most}")]
    Rank {
        /// Rank found.
        got: usize,
        /// Four times the manifest's.
        most: usize,
    },
    /// Not the start's, where the merge rule keeps that.
    #[error(
        "differs from the start adapter's at element {0}; merge rule ffa averages B alone, train with A frozen"
    )]
    Moved(usize),
    /// NaN or infinite.
    #[error("is not finite at element {0}")]
    NotFinite(usize),
    /// Beyond what an adapter's value can sensibly be.
    #[error("is beyond ±10000 at element {0}")]
    TooLarge(usize),
}

/// Why contributions could not be fused, or the first adapter not be made.
#[derive(Debug, thiserror::Error)]
pub enum FusionError {
    /// A file could not be read.
    #[error("{origin}: {source}")]
    Io {
        /// Whose.
        origin: Origin,
        /// What the system said.
        source: std::io::Error,
    },
    /// The manifest names a layer that the pivot does not have.
    #[error(
        "target_modules: the pivot has no matrix `model.layers.*.{0}.weight`; use the names of its linear layers"
    )]
    Target(String),
    /// The manifest names a module that has no tensor of its own.
    #[error(
        "modules_to_save: the pivot has no tensor `{0}.weight`; a tied head has none: name the embedding, or untie the pivot"
    )]
    Saved(String),
    /// Bytes that are no safetensors file, or a folder without one.
    #[error("{origin}: {problem}")]
    Format {
        /// Whose.
        origin: Origin,
        /// What is wrong.
        problem: String,
    },
    /// A tensor that is missing, superfluous or malformed.
    #[error("{origin}: tensor {tensor} {problem}")]
    Tensor {
        /// Whose.
        origin: Origin,
        /// Its name.
        tensor: String,
        /// What is wrong.
        problem: TensorProblem,
    },
    /// A shard that is not the one that was asked for, or whose records are malformed.
    #[error("shard {shard} of {institution}: {problem}")]
    Shard {
        /// Whose.
        institution: InstitutionId,
        /// Index of the shard in the round.
        shard: u32,
        /// What is wrong.
        problem: String,
    },
    /// The manifest asks for what this version cannot fuse.
    #[error("manifest: {0}")]
    Unsupported(&'static str),
    /// The reference set is not that of the manifest.
    #[error("reference set: {0}")]
    Reference(String),
    /// Records that cannot be fused.
    #[error("shard {shard}, item {item}: {source}")]
    Records {
        /// Index of the shard in the round.
        shard: u32,
        /// Item of the reference set.
        item: u64,
        /// What the kernel said.
        source: consilium_kernels::FusionError,
    },
    /// The same institution twice.
    #[error("{0} contributed twice")]
    Twice(InstitutionId),
    /// Nobody contributed, or all weights are zero.
    #[error("no contribution with a weight above zero")]
    Nothing,
    /// Entries of updates that cannot be merged.
    #[error("tensor {tensor}: {source}")]
    Entries {
        /// Layer or tensor.
        tensor: String,
        /// What the kernel said.
        source: consilium_kernels::AdapterError,
    },
    /// The singular values of a matrix were not found.
    #[error("tensor {0}: the decomposition did not converge")]
    Diverged(String),
    /// A merged value does not fit into an `f32`.
    #[error("tensor {0}: the merged values are too large for f32")]
    Overflow(String),
    /// The merged adapter has no header in safetensors.
    #[error("adapter: {0}")]
    Encode(String),
    /// The disk does not take what was merged.
    #[error("adapter: cannot be written: {0}")]
    Write(#[source] std::io::Error),
}
