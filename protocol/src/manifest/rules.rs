//! The methods that a manifest can name. Each is data; the code that it selects says its source.

use serde::{Deserialize, Serialize};

/// How records become targets.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "rule", rename_all = "snake_case", deny_unknown_fields)]
pub enum FusionRule {
    /// Mixture with weights proportional to exp(-sharpness x bits per byte) of each item.
    Softmax {
        /// 20 by default.
        sharpness: u32,
    },
    /// The source with the fewest bits per byte takes the item (FuseLLM, InfiFusion).
    MinCe,
    /// Plain average: a baseline, not a recommendation.
    Uniform,
}

impl FusionRule {
    pub(super) fn check(&self) -> Result<(), String> {
        match *self {
            Self::Softmax { sharpness } if !(1..=1000).contains(&sharpness) => {
                Err(format!("sharpness is {sharpness}, expected 1 to 1000"))
            }
            _ => Ok(()),
        }
    }
}

/// What the pivot's adapter learns from beside labels.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "loss", rename_all = "snake_case", deny_unknown_fields)]
pub enum Distillation {
    /// Divergence from records of bytes on the pivot's own token trie.
    Trie,
}

impl Distillation {
    #[expect(
        clippy::unnecessary_wraps,
        reason = "objectives with parameters have ranges"
    )]
    pub(super) fn check(&self) -> Result<(), String> {
        match *self {
            Self::Trie => Ok(()),
        }
    }
}
