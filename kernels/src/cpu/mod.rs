//! Portable fast path: one exponential pass per row, then sums over contiguous ranges.
//!
//! Sums are never differences of a cumulative sum, which in `f32` loses small masses altogether.
//! Rows are independent and run in parallel in fixed chunks; what chunks return is combined in
//! order.

pub(crate) mod adapters;
mod exp;
pub(crate) mod fusion;
pub(crate) mod loss;
pub(crate) mod multiversion;
mod network;
mod row;
pub(crate) mod score;
