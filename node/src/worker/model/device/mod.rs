//! The decoder in candle's tensor operations, for devices whose memory the host's operations cannot reach.
//!
//! Forward and backward passes are written out block by block, as on the host: candle's own backward pass would also
//! multiply out the gradient of every frozen matrix, and would drop gradients behind its fused operations without a
//! word. So softmax, norm and rotation may be candle's fused ones. On the host's memory the same code runs too, which is how it
//! is tested.
//!
//! Matrices and activations have the placement's type; sums of norms, probabilities of the head, gradients of trained
//! tensors and what the optimiser keeps are f32.

mod attention;
mod blocks;
mod head;
mod linear;
mod ops;
mod pass;
mod placement;
mod scoring;
#[cfg(test)]
mod tests;

pub use placement::Placement;

pub(crate) use head::LOGITS;
pub(crate) use pass::DevicePass;
pub(crate) use scoring::DeviceKeyValues;
