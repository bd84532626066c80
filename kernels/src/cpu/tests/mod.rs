//! Fast paths against the reference.

pub(crate) mod loss;
pub(crate) mod score;
