//! Adapters: the first one of a round, and the merge of trained ones.

pub(super) mod check;
pub(super) mod initial;
mod linalg;
mod lowrank;
pub(super) mod merge;
mod output;
mod pivot;
mod tensors;
#[cfg(test)]
mod tests;
