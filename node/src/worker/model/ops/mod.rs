//! Operations of the decoder on row-major f32 slices, each with a hand-written backward pass.
//!
//! The decoder composes them into blocks that candle sees as one custom op each: candle's own
//! backward allocates and adds once per edge of the graph, computes gradients of frozen weights, and
//! drops the gradient of its fused operations without a word.

pub(crate) mod attention;
pub(crate) mod head_norm;
pub(crate) mod linear;
pub(crate) mod norm;
pub(crate) mod rope;
pub(crate) mod scratch;
pub(crate) mod simd;
pub(crate) mod swiglu;
