//! Fast paths against the reference.

pub(crate) mod head;
pub(crate) mod loss;
pub(crate) mod score;
