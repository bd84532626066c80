//! The methods that a manifest can name. Each is data; the code that it selects says its source.

use serde::{Deserialize, Serialize};

use super::Mode;
use crate::limits;

/// How records become targets.
///
/// Bits per byte are recomputed by the aggregator from the records at the labelled symbols of an item. Where a reference
/// set declares no unlabeled span, `softmax`, `confidence` and `log_average` score causally, as `causal` always does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "rule", rename_all = "snake_case", deny_unknown_fields)]
pub enum FusionRule {
    /// Mixture with weights proportional to exp(-sharpness x bits per byte) of each item. The form of `FuseLLM`'s `AvgCE`
    /// (arXiv 2401.10491), in bits per byte and sharper.
    Softmax {
        /// 20 by default.
        sharpness: u32,
    },
    /// The source with the fewest bits per byte takes the item (`FuseLLM`'s `MinCE`, arXiv 2401.10491; `InfiFusion`, arXiv
    /// 2501.02795).
    MinCe,
    /// As `softmax`, but each position by the labelled bytes before it: an answer that nobody knows cannot spoil the
    /// weights of what precedes it.
    Causal {
        /// 20 by default.
        sharpness: u32,
    },
    /// As `softmax`, times exp(-k x entropy of the source at the position, in bits). The form of uncertainty-weighted
    /// fusion (the first version of arXiv 2501.02795; Selective-FD, s41467-023-44383-9), here a factor and never alone:
    /// off its domain the over-confident would win.
    Confidence {
        /// 20 by default.
        sharpness: u32,
        /// k in thousandths, 2000 by default.
        entropy_permille: u32,
    },
    /// Plain average (`FedMD`, arXiv 1910.03581): a baseline, not a recommendation.
    Uniform,
    /// Geometric mean with the weights of `softmax` (logarithmic opinion pool, Genest and Zidek, 1986).
    LogAverage {
        /// 20 by default.
        sharpness: u32,
    },
    /// Median of each symbol's probability, renormalised, among the sources competent for the item (arXiv 1803.01498,
    /// definition 1). Among disjoint specialists a plain median is the worst rule: the majority is wrong everywhere.
    Median {
        /// Sources count whose bits per byte exceed the best's by at most this, in thousandths of a bit.
        #[serde(default = "competence")]
        competence_millibits: u32,
    },
    /// Mean of each symbol's probability without the largest and smallest, renormalised, among the sources competent
    /// for the item (arXiv 1803.01498, definition 2).
    TrimmedMean {
        /// As for `median`.
        #[serde(default = "competence")]
        competence_millibits: u32,
        /// Share of the competent sources that is dropped at each end, in thousandths, rounded down.
        trim_permille: u32,
    },
    /// `ExpGuard` (arXiv 2402.12265): mixture of the sources competent for the item, with weights proportional to exp(-eta
    /// x distance). The distance is a source's mean total variation from the competent sources' median, over the items of
    /// the shard for which it and at least two others are competent. The paper multiplies over rounds and measures
    /// from a geometric median. With a `sharpness` above 0 it is softmax routing times trust, called `guarded_softmax`; in a
    /// shard that has no item for which three are competent nobody is doubted, and routing among the competent decides.
    ExpGuard {
        /// As for `median`.
        #[serde(default = "competence")]
        competence_millibits: u32,
        /// eta in thousandths, 20000 by default.
        eta_permille: u32,
        /// A further factor exp(-sharpness x bits per byte) of the weights, as in `softmax`: of sources that are trusted alike the
        /// one that knows the item better is heard more. 0 to 1000; 0, the paper's rule, by default. Above 0, and where the
        /// reference set declares no unlabeled span, each position is weighed by the labelled bytes before it, as in `causal`.
        #[serde(default)]
        sharpness: u32,
    },
}

const fn competence() -> u32 {
    500
}

impl Default for FusionRule {
    /// `guarded_softmax` with its default parameters.
    fn default() -> Self {
        Self::ExpGuard {
            competence_millibits: competence(),
            eta_permille: 40_000,
            sharpness: 20,
        }
    }
}

impl FusionRule {
    /// The rule of a name with its default parameters.
    #[must_use]
    pub fn named(name: &str) -> Option<Self> {
        let sharpness = 20;
        let competence_millibits = competence();
        Some(match name {
            "softmax" => Self::Softmax { sharpness },
            "min_ce" => Self::MinCe,
            "causal" => Self::Causal { sharpness },
            "confidence" => Self::Confidence {
                sharpness,
                entropy_permille: 2000,
            },
            "uniform" => Self::Uniform,
            "log_average" => Self::LogAverage { sharpness },
            "median" => Self::Median {
                competence_millibits,
            },
            "trimmed_mean" => Self::TrimmedMean {
                competence_millibits,
                trim_permille: 250,
            },
            "exp_guard" => Self::ExpGuard {
                competence_millibits,
                eta_permille: 20_000,
                sharpness: 0,
            },
            "guarded_softmax" => Self::default(),
            _ => return None,
        })
    }

    /// Checks the ranges, and that the rule means something for so many members.
    pub(super) fn check(&self, members: usize) -> Result<(), String> {
        let (name, wanted, least) = match *self {
            Self::MinCe | Self::Uniform => return Ok(()),
            Self::Softmax { sharpness }
            | Self::Causal { sharpness }
            | Self::LogAverage { sharpness } => return sharp(sharpness),
            Self::Confidence {
                sharpness,
                entropy_permille,
            } => {
                sharp(sharpness)?;
                return within("entropy_permille", entropy_permille, 1, 100_000);
            }
            Self::Median {
                competence_millibits,
            } => ("median", competence_millibits, 3),
            Self::TrimmedMean {
                competence_millibits,
                trim_permille,
            } => {
                within("trim_permille", trim_permille, 1, 499)?;
                let permille = usize::try_from(trim_permille).unwrap_or(usize::MAX);
                let dropped = members.saturating_mul(permille) / 1000;
                if members >= 4 && dropped == 0 {
                    return Err(format!(
                        "trim_permille {trim_permille} of {members} members drops nobody; it takes at least {}",
                        1000_usize.div_ceil(members)
                    ));
                }
                ("trimmed_mean", competence_millibits, 4)
            }
            Self::ExpGuard {
                competence_millibits,
                eta_permille,
                sharpness,
            } => {
                within("eta_permille", eta_permille, 1, 1_000_000)?;
                within("sharpness", sharpness, 0, 1000)?;
                let least = if sharpness == 0 { 3 } else { 1 };
                ("exp_guard", competence_millibits, least)
            }
        };
        within("competence_millibits", wanted, 1, 8000)?;
        if members < least {
            let instead = if members == 3 {
                "with three, what a trim leaves is the median: use median, or a rule without a majority (softmax, min_ce, causal)"
            } else {
                "use a rule without a majority: softmax, min_ce or causal"
            };
            return Err(format!(
                "fusion rule {name} needs a majority, so at least {least} members, and there are {members}; {instead}"
            ));
        }
        Ok(())
    }
}

fn sharp(sharpness: u32) -> Result<(), String> {
    within("sharpness", sharpness, 1, 1000)
}

fn within(name: &str, value: u32, least: u32, most: u32) -> Result<(), String> {
    if (least..=most).contains(&value) {
        Ok(())
    } else {
        Err(format!("{name} is {value}, expected {least} to {most}"))
    }
}

/// What becomes of a fused record before it is sent back as a target.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TargetForm {
    /// Symbol slots of a target, 1 to 256. By default twice a record's, because a mixture of records of 8 symbols has up to 8 of
    /// each source, and one more for a label. Fewer are top-k.
    pub symbols: Option<u16>,
    /// What becomes of the mass of everything that is not listed.
    pub tail: TargetTail,
    /// Draws of random-sampling distillation (arXiv 2503.16870): the target is how often each symbol was drawn. 50 give
    /// about 12 different tokens. 0 for none.
    pub draws: u32,
}

/// What becomes of the mass that a target does not list.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum TargetTail {
    /// It goes to what was observed, where that is a label and not listed, and is a ghost symbol elsewhere: a label is a draw from
    /// what the tail stands for. At most the tail's mass, so a wrong label can do little where the sources are certain.
    #[default]
    Label,
    /// It is one ghost symbol for all that is not listed (arXiv 2503.16870).
    Ghost,
    /// It is dropped, so that what is listed sums to one: plain top-k.
    Dropped,
}

impl TargetForm {
    /// Slots of a target, for records of `symbols` slots.
    #[must_use]
    pub fn slots(&self, symbols: u16) -> u16 {
        let all = symbols.saturating_mul(2).saturating_add(1);
        let all = all.min(limits::SYMBOLS);
        self.symbols.unwrap_or(all)
    }

    pub(super) fn is_plain(&self) -> bool {
        *self == Self::default()
    }

    pub(super) fn check(&self, distillation: Distillation) -> Result<(), String> {
        if distillation == Distillation::DualTrie && self.tail == TargetTail::Label {
            return Err(
                "distillation dual_trie compares the bits of a target and of the pivot, and targets.tail label takes bits \
                 off the target alone; set targets.tail=ghost"
                    .to_owned(),
            );
        }
        if let Some(wanted) = self.symbols {
            within("targets.symbols", wanted.into(), 1, limits::SYMBOLS.into())?;
        }
        within("targets.draws", self.draws, 0, 4096)
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
    /// Divergence from records of bytes on the pivot's own token trie; unlisted bytes are one bucket at the root. In token
    /// space, cross-entropy to the records over the pivot's own tokens, of which the unlisted are one.
    Trie,
    /// As `trie`, but what is not listed is dropped: the listed symbols are the whole target. A baseline; it makes the
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_rule_without_a_majority_to_speak_of_is_refused_with_what_to_do() {
        let named = |name: &str| FusionRule::named(name).unwrap();
        for name in [
            "guarded_softmax",
            "softmax",
            "min_ce",
            "causal",
            "confidence",
            "uniform",
            "log_average",
        ] {
            assert_eq!(named(name).check(1), Ok(()), "{name}");
        }
        for (name, members) in [("median", 3), ("exp_guard", 3), ("trimmed_mean", 4)] {
            assert_eq!(named(name).check(members), Ok(()), "{name}");
            let error = named(name).check(members - 1).unwrap_err();
            let (needs, use_instead) = (format!("at least {members}"), "use ");
            assert!(
                error.contains(name) && error.contains(&needs) && error.contains(use_instead),
                "{error}"
            );
        }
        let thin = FusionRule::TrimmedMean {
            competence_millibits: 500,
            trim_permille: 100,
        };
        assert!(thin.check(9).unwrap_err().contains("112"));
        assert_eq!(thin.check(10), Ok(()));
    }

    #[test]
    fn rules_read_without_the_parameters_that_have_defaults() {
        let rule = |text: &str| serde_json::from_str::<FusionRule>(text);
        let trimmed = rule(r#"{"rule":"trimmed_mean","trim_permille":250}"#).unwrap();
        assert_eq!(trimmed, FusionRule::named("trimmed_mean").unwrap());
        assert!(rule(r#"{"rule":"median","trim_permille":250}"#).is_err());
        assert!(rule(r#"{"rule":"best"}"#).is_err());
        assert_eq!(FusionRule::named("best"), None);
    }

    #[test]
    fn slots_and_draws_of_a_target_have_a_range() {
        let form = |symbols, draws| TargetForm {
            symbols,
            tail: TargetTail::Ghost,
            draws,
        };
        let check = |symbols, draws| form(symbols, draws).check(Distillation::Trie);
        assert_eq!(check(Some(8), 50), Ok(()));
        assert!(check(Some(257), 0).is_err());
        assert!(check(Some(0), 0).is_err());
        assert!(check(None, 5000).is_err());
        assert_eq!(form(None, 0).slots(16), 33);
        assert_eq!(form(None, 0).slots(200), 256);
        assert_eq!(form(Some(8), 0).slots(16), 8);
        assert_eq!(form(None, 0).check(Distillation::DualTrie), Ok(()));
        let refused = TargetForm::default().check(Distillation::DualTrie);
        assert!(refused.unwrap_err().contains("targets.tail=ghost"));
    }
}
