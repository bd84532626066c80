//! Operations of a decoder's layers on row-major f32 slices, each with a hand-written backward pass.
//!
//! A caller lends inputs and outputs; nothing here knows how a model holds its weights. Sums run in a fixed order, so that
//! results depend on the vectors of the machine and on nothing else.

pub mod attention;
pub mod bias;
pub mod head_norm;
mod lanes;
pub mod norm;
pub mod rope;
pub mod rows;
pub mod scratch;
pub mod swiglu;
#[cfg(test)]
mod tests;

pub use attention::{Branch, Heads, Segment};
pub use rope::{Angles, RopeTable};
pub use scratch::Scratch;
