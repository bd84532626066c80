//! Adapters: the first one of a round, and the merge of trained ones.

mod blocks;
pub(super) mod check;
pub(super) mod defence;
mod entries;
pub(super) mod initial;
mod linalg;
mod lowrank;
pub(super) mod merge;
mod outer;
pub(super) mod output;
mod pivot;
pub(super) mod report;
mod round;
mod rules;
mod sketch;
pub(super) mod tensors;
#[cfg(test)]
mod tests;
