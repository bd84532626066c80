//! Records of a source over the reference set.

mod build;
mod shard;
mod tokens;

pub(crate) use build::{ShardBuilder, items_in};
pub(crate) use shard::STOP_SHARE;
pub use shard::{ScoreStats, Scored, score_items, score_shard};
pub use tokens::score_token_shard;
pub(crate) use tokens::{TokenColumns, bits, evidence, score_token_items};

#[cfg(test)]
mod tests;
