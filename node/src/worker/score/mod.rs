//! Records of a source over the reference set.

mod build;
mod shard;

pub(crate) use build::{ShardBuilder, items_in};
pub(crate) use shard::STOP_SHARE;
pub use shard::{ScoreStats, Scored, score_items, score_shard};

#[cfg(test)]
mod tests;
