//! What runs: each logits row is read once, in order, by the widest vectors that the machine has.
//!
//! Sums run over contiguous ranges and are never differences of a cumulative sum, which in `f32`
//! loses small masses altogether. Rows are independent and run in parallel; what they return is
//! combined in order.

pub(crate) mod adapters;
pub(crate) mod blocks;
mod encode;
pub(crate) mod fold;
pub(crate) mod fusion;
mod leaves;
pub(crate) mod loss;
mod masses;
pub(crate) mod multiversion;
mod network;
pub(crate) mod passes;
pub(crate) mod score;
mod short;
mod simd;
mod sorted;
#[cfg(test)]
pub(crate) mod tests;
mod top;

pub(crate) use encode::encode;
pub(crate) use masses::{Dense, END};
pub(crate) use simd::Level;
pub(crate) use top::{largest_columns, log_mass};
