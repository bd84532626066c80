//! Fast paths against the reference.

mod head;
mod loss;
mod score;
