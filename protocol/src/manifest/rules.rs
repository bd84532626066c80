//! The methods that a manifest can name. Each is data; the code that it selects says its source.

use serde::{Deserialize, Serialize};

use super::Mode;

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

/// What the pivot's adapter learns from beside labels. `training.cross_entropy_permille` is the share of the labels.
///
/// The sorted losses compare probabilities or logits by their place in descending order, so they say how certain a
/// source is and never of what; what comes must be said by the labels. They need the source's own token logits, which
/// are at its own site only: mode `pairwise`. Positions are compared where a token of the source and one of the pivot
/// begin at the same byte.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "loss", rename_all = "snake_case", deny_unknown_fields)]
pub enum Distillation {
    /// Nothing: cross-entropy alone. What mode `adapters` does; elsewhere the baseline of plain training.
    Labels,
    /// Divergence from records of bytes on the pivot's own token trie; unlisted bytes are one bucket at the root.
    Trie,
    /// As `trie`, but what is not listed is dropped: the listed bytes are the whole target. A baseline; it makes the
    /// pivot too certain (arXiv 2503.16870).
    TrieListed,
    /// As `trie`, and an item whose labelled bytes the pivot predicts better than the target does, as it was before the
    /// round, is learned from labels alone (FedMKT's dual minCE, arXiv 2406.02224). Mode `pairwise` does so anyway.
    DualTrie,
    /// Sorted probabilities (Universal Logit Distillation, arXiv 2402.12030), the largest `symbols` of them and the rest
    /// as one. The paper's weight of 1.5 beside cross-entropy is a `cross_entropy_permille` of 400.
    Uld {
        /// Probabilities compared, 1 to 4096.
        symbols: u32,
    },
    /// Sorted softmax of the standardised largest logits of each model (InfiFusion, arXiv 2501.02795).
    Infifusion {
        /// Logits of each model, 2 to 4096; the authors name 10.
        symbols: u32,
        /// Temperature of the softmax in thousandths, 1 to 100,000; not published, 1000 by default in the docs.
        temperature_permille: u32,
    },
    /// As `infifusion`, and beside it how the largest logits move together over an item: sorted features of the nodes of
    /// their graph (InfiGFusion, arXiv 2505.13893).
    Infigfusion {
        /// Logits of each model, 2 to 4096.
        symbols: u32,
        /// Temperature of the softmax in thousandths, 1 to 100,000.
        temperature_permille: u32,
        /// Weight of the graph's term relative to the other, in thousandths, 1 to 100,000; not published.
        graph_permille: u32,
    },
}

impl Distillation {
    /// The name in documents and settings.
    #[must_use]
    pub const fn name(&self) -> &'static str {
        match self {
            Self::Labels => "labels",
            Self::Trie => "trie",
            Self::TrieListed => "trie_listed",
            Self::DualTrie => "dual_trie",
            Self::Uld { .. } => "uld",
            Self::Infifusion { .. } => "infifusion",
            Self::Infigfusion { .. } => "infigfusion",
        }
    }

    /// Largest logits of the source that each position compares; none where records of bytes are the target.
    #[must_use]
    pub const fn sorted_symbols(&self) -> Option<u32> {
        match *self {
            Self::Labels | Self::Trie | Self::TrieListed | Self::DualTrie => None,
            Self::Uld { symbols }
            | Self::Infifusion { symbols, .. }
            | Self::Infigfusion { symbols, .. } => Some(symbols),
        }
    }

    pub(super) fn check(&self, mode: Mode) -> Result<(), String> {
        let name = self.name();
        let (least, temperature, graph) = match *self {
            Self::Labels | Self::Trie | Self::TrieListed | Self::DualTrie => (0, None, None),
            Self::Uld { .. } => (1, None, None),
            Self::Infifusion {
                temperature_permille,
                ..
            } => (2, Some(temperature_permille), None),
            Self::Infigfusion {
                temperature_permille,
                graph_permille,
                ..
            } => (2, Some(temperature_permille), Some(graph_permille)),
        };
        if let Some(symbols) = self.sorted_symbols()
            && !(least..=4096).contains(&symbols)
        {
            return Err(format!(
                "symbols of distillation {name} is {symbols}, expected {least} to 4096"
            ));
        }
        for (field, value) in [
            ("temperature_permille", temperature),
            ("graph_permille", graph),
        ] {
            if let Some(value) = value
                && !(1..=100_000).contains(&value)
            {
                return Err(format!(
                    "{field} of distillation {name} is {value}, expected 1 to 100000"
                ));
            }
        }
        match (mode, self) {
            (Mode::Adapters, Self::Labels) => Ok(()),
            (Mode::Adapters, _) => Err(format!(
                "distillation {name} is not for mode adapters, which trains on labels of private text; expected labels"
            )),
            (Mode::Unified, _) if self.sorted_symbols().is_some() => Err(format!(
                "distillation {name} compares a source's own token logits, which stay at its site; it is for mode pairwise"
            )),
            (Mode::Pairwise, Self::DualTrie) => Err(
                "distillation dual_trie is what trie does in mode pairwise; expected trie"
                    .to_owned(),
            ),
            (Mode::Unified | Mode::Pairwise, _) => Ok(()),
        }
    }
}
