//! Fast paths against the reference.

mod head;
pub(crate) mod loss;
pub(crate) mod score;
