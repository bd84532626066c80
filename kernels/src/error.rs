//! What can be wrong with the inputs of an operation; one enum per area.

/// Why a list of tokens is not a vocabulary.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum VocabError {
    /// A byte token spells nothing; declare it as ignored.
    #[error("token {id} has an empty byte string; declare it as ignored")]
    EmptyToken {
        /// Token id.
        id: usize,
    },
    /// Nothing can end a record.
    #[error("no token means end of record")]
    NoEndOfRecord,
    /// Nothing spells bytes.
    #[error("no token spells bytes")]
    NoByteTokens,
    /// Ranks and offsets are `u32`.
    #[error("more than 2^32 - 1 tokens or token bytes")]
    TooLarge,
}

/// Why columns are not records.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RecordError {
    /// The number of slots is outside what the symbol space allows.
    #[error("{k} slots per position, allowed are 1 to {max}")]
    Slots {
        /// Slots asked for.
        k: usize,
        /// Largest number of slots.
        max: usize,
    },
    /// The fill is not a share of the mass.
    #[error("fill of {permille} permille, allowed are 0 to 1000")]
    Fill {
        /// Fill asked for.
        permille: u32,
    },
    /// A column does not have one entry per position (or slot).
    #[error("{column} has {got} entries, expected {expected}")]
    Length {
        /// Name of the column.
        column: &'static str,
        /// Entries found.
        got: usize,
        /// Entries that the other columns ask for.
        expected: usize,
    },
    /// Symbols of a position are not strictly ascending, or a slot follows an unused one.
    #[error("symbols of position {position} are not ascending")]
    Order {
        /// Position in the record.
        position: usize,
    },
    /// A slot that repeats its predecessor carries a code other than 255.
    #[error("unused slot of position {position} carries a code")]
    UnusedSlot {
        /// Position in the record.
        position: usize,
    },
    /// The masses of a position do not sum to one within what quantising explains.
    #[error("position {position} has mass {permille} permille, expected 975 to 1025")]
    Mass {
        /// Position in the record.
        position: usize,
        /// Sum of all masses.
        permille: u64,
    },
}

/// Why a list of log-probabilities is no top of a softmax.
#[derive(Clone, Copy, Debug, PartialEq, thiserror::Error)]
pub enum ListedError {
    /// A log-probability is NaN or above zero.
    #[error("token {id} has log-probability {value}, expected 0 or less")]
    Value {
        /// Id of the token.
        id: u32,
        /// Its value.
        value: f32,
    },
    /// A token is there twice.
    #[error("token {id} is listed twice")]
    Twice {
        /// Id of the token.
        id: u32,
    },
    /// The probabilities sum to more than one.
    #[error("the listed probabilities sum to {sum}, expected at most 1")]
    Sum {
        /// Their sum.
        sum: f64,
    },
    /// Fewer tokens than were asked for, and not all there are.
    #[error("{got} tokens are listed, expected the {top} likeliest")]
    Few {
        /// Tokens listed.
        got: usize,
        /// Tokens expected.
        top: usize,
    },
}

/// Why logits could not be scored.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum ScoreError {
    /// A row of listed probabilities lacks the token that was observed there.
    #[error("row {row} does not list the observed token")]
    NotListed {
        /// Row of the item.
        row: usize,
    },
    /// A logit is NaN or infinite.
    #[error("logit at row {row}, column {column} is not finite")]
    NotFinite {
        /// Row of the logits.
        row: usize,
        /// Rank of the token.
        column: usize,
    },
    /// A logit of a branch forward is NaN or infinite.
    #[error("branch logit at row {row}, column {column} is not finite")]
    BranchNotFinite {
        /// Row of the branch logits.
        row: usize,
        /// Rank of the token.
        column: usize,
    },
    /// A slice does not have the size that tokens and vocabulary ask for.
    #[error("{what} has {got} entries, expected {expected}")]
    Length {
        /// Name of the slice.
        what: &'static str,
        /// Entries found.
        got: usize,
        /// Entries expected.
        expected: usize,
    },
    /// A target token is out of range, ignored or an end of record.
    #[error("token {position} of the target has rank {rank}, which spells no bytes")]
    NotAByteToken {
        /// Index in the target.
        position: usize,
        /// Its rank.
        rank: u32,
    },
    /// A branch is not an interior stop of its token, or branches are not in ascending order.
    #[error("branch {index} is no interior stop of the target, or out of order")]
    Branch {
        /// Index among the branches.
        index: usize,
    },
    /// The output or the shape is not a record's.
    #[error(transparent)]
    Record(#[from] RecordError),
    /// The device failed.
    #[error(transparent)]
    Cuda(#[from] CudaError),
}

/// Why a loss could not be computed.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum LossError {
    /// A logit is NaN or infinite.
    #[error("logit at row {row}, column {column} is not finite")]
    NotFinite {
        /// Row of the logits.
        row: usize,
        /// Rank of the token.
        column: usize,
    },
    /// A slice does not have the size that tokens and vocabulary ask for.
    #[error("{what} has {got} entries, expected {expected}")]
    Length {
        /// Name of the slice.
        what: &'static str,
        /// Entries found.
        got: usize,
        /// Entries expected.
        expected: usize,
    },
    /// A label is out of range or ignored, or a target token spells no bytes.
    #[error("label {position} has rank {rank}, which is no label here")]
    Label {
        /// Index among the labels.
        position: usize,
        /// Its rank.
        rank: u32,
    },
    /// A symbol of a token-space target is no token of the vocabulary.
    #[error("target position {position} lists token id {id}, which the vocabulary does not have")]
    Symbol {
        /// Position of the target.
        position: usize,
        /// Token id.
        id: u32,
    },
    /// The weight is NaN or infinite.
    #[error("weight is not finite")]
    Weight,
    /// The temperature of a standardised target divides.
    #[error("temperature {temperature} is no positive number")]
    Temperature {
        /// Temperature given.
        temperature: f32,
    },
    /// The device failed.
    #[error(transparent)]
    Cuda(#[from] CudaError),
}

/// Why weights are not the head of a vocabulary.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum HeadError {
    /// The number of weights is not that of `[tokens, width]`.
    #[error("head has {got} weights, expected {tokens} tokens of width {width}")]
    Weights {
        /// Weights given.
        got: usize,
        /// Tokens of the vocabulary.
        tokens: usize,
        /// Values per token, at least one.
        width: usize,
    },
    /// The weights could not be copied to a device.
    #[error(transparent)]
    Cuda(#[from] CudaError),
}

/// Why records could not be fused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum FusionError {
    /// One weight per source, or per position and source.
    #[error("{weights} weights, expected {expected}")]
    Weights {
        /// Weights given.
        weights: usize,
        /// Weights that sources and positions ask for.
        expected: usize,
    },
    /// A statistic of no sources.
    #[error("no sources")]
    Nothing,
    /// A trimmed mean must leave something.
    #[error("trim of {permille} permille at each end, allowed are 0 to 499")]
    Trim {
        /// Trim asked for.
        permille: u32,
    },
    /// One label per position.
    #[error("{labels} labels, expected {expected}")]
    Labels {
        /// Labels given.
        labels: usize,
        /// Positions.
        expected: usize,
    },
    /// A sample of nothing.
    #[error("no draws: a sampled target needs at least one")]
    Draws,
    /// Weights are shares of 2^16.
    #[error("weights sum to {sum}, expected 65536")]
    WeightSum {
        /// Their sum.
        sum: u64,
    },
    /// Sources disagree about the item's length.
    #[error("source {source_index} has {got} positions, expected {expected}")]
    Positions {
        /// Index of the source.
        source_index: usize,
        /// Its positions.
        got: usize,
        /// Positions of the first source, or of the item.
        expected: usize,
    },
    /// The output or the shape is not a record's.
    #[error(transparent)]
    Record(#[from] RecordError),
    /// The device failed.
    #[error(transparent)]
    Cuda(#[from] CudaError),
}

/// Why CUDA is not used.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CudaError {
    /// The program was built without it.
    #[error("built without CUDA; build with the feature `cuda`")]
    NotBuilt,
    /// The driver's library is not installed.
    #[error("no NVIDIA driver: looked for {names}; install one of version 550 or later")]
    NoDriver {
        /// Library names tried.
        names: &'static str,
    },
    /// The driver cannot read this program's kernels.
    #[error(
        "the NVIDIA driver supports CUDA {found}, needed is {needed}; install driver 550 or later"
    )]
    OldDriver {
        /// What it supports.
        found: String,
        /// What the kernels need.
        needed: &'static str,
    },
    /// The driver is there, but no device.
    #[error("no NVIDIA device is visible; check nvidia-smi and CUDA_VISIBLE_DEVICES")]
    NoDevice,
    /// The device lacks instructions that the kernels use.
    #[error("{name} has compute capability {found}; needed is 8.0 or later")]
    OldDevice {
        /// Name of the device.
        name: String,
        /// Its compute capability.
        found: String,
    },
    /// A call of the driver or of cuBLAS failed.
    #[error("{what} failed: {reason}")]
    Driver {
        /// What was attempted.
        what: &'static str,
        /// The driver's word for it.
        reason: String,
    },
    /// The inputs are beyond what the kernels handle; the CPU handles them.
    #[error("too much for the CUDA kernels: {what}; use the CPU backend")]
    Unsupported {
        /// What is too large or unusual.
        what: &'static str,
    },
}

/// Errors that may mean that only the kernels of the device do not take the inputs.
#[cfg(feature = "cuda")]
pub(crate) trait Refusal {
    fn is_refusal(&self) -> bool;
}

#[cfg(feature = "cuda")]
impl Refusal for LossError {
    fn is_refusal(&self) -> bool {
        matches!(self, Self::Cuda(CudaError::Unsupported { .. }))
    }
}

#[cfg(feature = "cuda")]
impl Refusal for ScoreError {
    fn is_refusal(&self) -> bool {
        matches!(self, Self::Cuda(CudaError::Unsupported { .. }))
    }
}

/// Why adapters could not be merged.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum AdapterError {
    /// The CUDA backend could not do it.
    #[error(transparent)]
    Cuda(#[from] CudaError),
    /// No adapters, or no values.
    #[error("nothing to merge")]
    Nothing,
    /// Not one of something per adapter.
    #[error("{got} {what}, expected {expected}")]
    Count {
        /// What is counted.
        what: &'static str,
        /// How many there are.
        got: usize,
        /// How many there must be.
        expected: usize,
    },
    /// An adapter has another number of values than the result, or a factor another size.
    #[error("adapter {adapter} has {got} values, expected {expected}")]
    Length {
        /// Index of the adapter.
        adapter: usize,
        /// Its values.
        got: usize,
        /// Values expected.
        expected: usize,
    },
    /// A value is NaN or infinite.
    #[error("value {index} of adapter {adapter} is not finite")]
    NotFinite {
        /// Index of the adapter.
        adapter: usize,
        /// Index of the value within the chunk or factor.
        index: usize,
    },
    /// A weight or scale is NaN, infinite, or negative where that has no meaning.
    #[error("the weight of adapter {adapter} is not finite, or negative where none may be")]
    Weight {
        /// Index of the adapter.
        adapter: usize,
    },
    /// A threshold is NaN.
    #[error("the threshold of adapter {adapter} is no number")]
    Threshold {
        /// Index of the adapter.
        adapter: usize,
    },
    /// A trimmed mean must leave something.
    #[error("trim of {permille} permille at each end, allowed are 0 to 499")]
    Trim {
        /// Trim asked for.
        permille: u32,
    },
    /// A density must keep something.
    #[error("density of {permille} permille, allowed are 1 to 1000")]
    Density {
        /// Density asked for.
        permille: u32,
    },
    /// A second pass saw other values than the first.
    #[error("the passes over the values saw different values")]
    Changed,
    /// A result is beyond the range of `f32`.
    #[error("result {index} is beyond the range of f32")]
    Overflow {
        /// Index of the value.
        index: usize,
    },
}

impl AdapterError {
    /// The same error where the values begin at `start`.
    pub(crate) fn shifted(self, start: usize) -> Self {
        match self {
            Self::NotFinite { adapter, index } => Self::NotFinite {
                adapter,
                index: start + index,
            },
            other => other,
        }
    }
}
