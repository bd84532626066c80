//! Fast paths against the reference.

mod loss;
mod score;
