//! Records of a source over the reference set.

mod shard;

pub use shard::{ScoreStats, Scored, score_shard};

#[cfg(test)]
mod tests;
