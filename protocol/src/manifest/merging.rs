//! How the adapters of an inner round become one, and what protects that. Each rule is data; `theta_m` is the product
//! `B A` of member m, `theta_0` that of the start, `tau_m = theta_m - theta_0`, `p_m` the member's share of the items.

use serde::{Deserialize, Serialize};

use super::Training;

/// How the adapters of an inner round become one.
///
/// A rule says what takes the place of the mean in the outer step (DiLoCo, arXiv 2311.08105): the pseudo-gradient is the start
/// minus what the rule gives. With an outer rate of 1000 and no momentum the result is what the rule gives.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "rule", rename_all = "snake_case", deny_unknown_fields)]
pub enum MergeRule {
    /// Weighted mean of the products, outer Nesterov step, QR and SVD back to the rank (FlexLoRA, arXiv 2402.11505, without the
    /// dense product), rotation onto the previous A. Takes any rank.
    Product,
    /// Means of A and of B, each with an outer Nesterov step (FedIT, arXiv 2305.05644). Biased: the product of the means is not
    /// the mean of the products. A baseline; the merge reports its bias.
    Factors,
    /// A stays that of the start, B is averaged (FFA-LoRA, arXiv 2403.12313): exact, because all share A. An adapter whose A
    /// moved is refused.
    Ffa,
    /// Factors beside each other, the rank is the sum of the ranks (FLoRA, arXiv 2409.05976): exact. Takes any rank. The sum of
    /// ranks is the release's rank, so one inner round only, without an outer step.
    Stack,
    /// Means of the factors and, as further columns, the factored residual that makes them exact (FedEx-LoRA, arXiv
    /// 2410.09432). Takes any rank. One inner round only, without an outer step.
    Residual,
    /// `theta_0 + scale sum of n p_m tau_m` (arXiv 2212.04089): a sum, where all parts are equal. Takes any rank.
    TaskArithmetic {
        /// Scale in thousandths, 1 to 4000; 1000 / n is the mean of n adapters.
        scale_permille: u32,
    },
    /// TIES on the entries of `tau_m` (arXiv 2306.01708): of every matrix and member the largest, elect signs, mean of those who
    /// have them, times scale. Takes any rank.
    Ties {
        /// Share of the entries that count, in thousandths, 1 to 1000; 200 in the paper.
        density_permille: u32,
        /// Scale in thousandths, 1 to 4000; 1000 in the paper's default.
        scale_permille: u32,
    },
    /// DARE on the entries of `tau_m` (arXiv 2311.03099): each is dropped at random, those left are divided by the density, then
    /// task arithmetic. Draws follow from the round's seed. Takes any rank.
    Dare {
        /// Probability to stay, in thousandths, 1 to 1000; 100 to 500 in the paper.
        density_permille: u32,
        /// Scale in thousandths, 1 to 4000, as in task arithmetic.
        scale_permille: u32,
    },
    /// SCE on the entries of `tau_m` (FuseChat, arXiv 2408.07990): weights by squares where members differ most, then entries
    /// against the sign of the sum are erased. The shares p are not used. Takes any rank.
    Sce {
        /// Share of the entries that decide on the weights, in thousandths, 1 to 1000; 100 in the paper.
        select_permille: u32,
    },
}

impl MergeRule {
    /// Whether the merged adapter has the manifest's rank, so that a next inner round can start from it.
    #[must_use]
    pub const fn keeps_rank(&self) -> bool {
        !matches!(self, Self::Stack | Self::Residual)
    }

    /// Whether adapters of other ranks than the manifest's can be merged. Their scale is the manifest's alpha / rank as well.
    #[must_use]
    pub const fn takes_any_rank(&self) -> bool {
        !matches!(self, Self::Factors | Self::Ffa)
    }

    /// Whether members leave A as it was in the start.
    #[must_use]
    pub const fn freezes_a(&self) -> bool {
        matches!(self, Self::Ffa)
    }

    /// Whether the rule decides entry by entry of the product.
    #[must_use]
    pub const fn is_entrywise(&self) -> bool {
        matches!(
            self,
            Self::Ties { .. } | Self::Dare { .. } | Self::Sce { .. }
        )
    }

    /// Its name in the manifest.
    #[must_use]
    pub const fn name(&self) -> &'static str {
        match self {
            Self::Product => "product",
            Self::Factors => "factors",
            Self::Ffa => "ffa",
            Self::Stack => "stack",
            Self::Residual => "residual",
            Self::TaskArithmetic { .. } => "task_arithmetic",
            Self::Ties { .. } => "ties",
            Self::Dare { .. } => "dare",
            Self::Sce { .. } => "sce",
        }
    }

    pub(super) fn check(&self, training: &Training) -> Result<(), String> {
        let (density, scale) = match *self {
            Self::TaskArithmetic { scale_permille } => (None, Some(scale_permille)),
            Self::Ties {
                density_permille,
                scale_permille,
            }
            | Self::Dare {
                density_permille,
                scale_permille,
            } => (
                Some(("density_permille", density_permille)),
                Some(scale_permille),
            ),
            Self::Sce { select_permille } => (Some(("select_permille", select_permille)), None),
            Self::Product | Self::Factors | Self::Ffa | Self::Stack | Self::Residual => {
                (None, None)
            }
        };
        let name = self.name();
        if let Some((field, value)) = density {
            within(name, field, value, 1, 1000)?;
        }
        if let Some(value) = scale {
            within(name, "scale_permille", value, 1, 4000)?;
        }
        if self.keeps_rank() {
            return Ok(());
        }
        for (field, value, only) in [
            ("inner_rounds", training.inner_rounds, 1),
            ("outer_rate_permille", training.outer_rate_permille, 1000),
            (
                "outer_momentum_permille",
                training.outer_momentum_permille,
                0,
            ),
        ] {
            if value != only {
                return Err(format!(
                    "{field} is {value}, but merge rule {name} changes the rank and ends the round: set it to {only}, or choose \
                     product"
                ));
            }
        }
        Ok(())
    }
}

/// What protects the merge from adapters that harm.
///
/// All judge whole updates `tau_m`, modules trained whole included, by their inner products. Any but `none` leaves out members
/// without an update and copies of another member's, and lets up to f + 1 members, f = (n - 1) / 4, whose updates alone have
/// nearly one direction share a vote; the report says so.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "rule", rename_all = "snake_case", deny_unknown_fields)]
pub enum Defence {
    /// Nothing: every adapter counts as its part says.
    None,
    /// With five members and more and merge rule `product`: updates clipped to the median norm, then the trimmed mean of every
    /// entry with f = (n - 1) / 4. Else clipped, then the geometric median, because f is 0 or the rule says itself what becomes of
    /// entries. Of two members neither can be told to be wrong: nothing is done.
    Standard,
    /// Updates longer than the median norm are scaled down to it. The default. Of two members neither can be told to be wrong:
    /// nothing is done.
    ClipNorm,
    /// `v += sum p_m (tau_m - v) min(1, radius / |tau_m - v|)` from v = 0 (arXiv 2012.10333, without the history). From four
    /// members.
    CentredClipping {
        /// Radius in thousandths of the median norm, 1 to 10,000.
        radius_permille: u32,
        /// 1 to 100; 1 to 3 in the paper.
        iterations: u32,
    },
    /// Geometric median by smoothed Weiszfeld steps (RFA, arXiv 1912.13445). From three members.
    GeometricMedian {
        /// 1 to 100; 3 to 8 in the paper.
        iterations: u32,
    },
    /// The mean of the `keep` members that lie closest to their neighbours (arXiv 1703.02757). From `2 byzantine + 3` members.
    MultiKrum {
        /// Members f that may lie, from 1.
        byzantine: u32,
        /// Members that count, 1 to n - f - 2.
        keep: u32,
    },
    /// Updates clipped to the median norm, then of every entry the mean without the f smallest and largest (arXiv 1803.01498).
    /// From `4 byzantine + 1` members, with merge rule `product`; shares are not used.
    TrimmedMean {
        /// Members f that may lie, from 1.
        byzantine: u32,
    },
}

impl Defence {
    /// Its name in the manifest.
    #[must_use]
    pub const fn name(&self) -> &'static str {
        match self {
            Self::None => "none",
            Self::Standard => "standard",
            Self::ClipNorm => "clip_norm",
            Self::CentredClipping { .. } => "centred_clipping",
            Self::GeometricMedian { .. } => "geometric_median",
            Self::MultiKrum { .. } => "multi_krum",
            Self::TrimmedMean { .. } => "trimmed_mean",
        }
    }

    /// Members from which it means something.
    #[must_use]
    pub const fn least_members(&self) -> u64 {
        match *self {
            Self::None | Self::Standard | Self::ClipNorm => 1,
            Self::GeometricMedian { .. } => 3,
            Self::CentredClipping { .. } => 4,
            Self::MultiKrum { byzantine, .. } => 2 * byzantine as u64 + 3,
            Self::TrimmedMean { byzantine } => 4 * byzantine as u64 + 1,
        }
    }

    /// `quorum` are the members that a merge may have to do with.
    pub(super) fn check(&self, training: &Training, quorum: u32) -> Result<(), String> {
        let name = self.name();
        match *self {
            Self::None | Self::Standard | Self::ClipNorm => {}
            Self::CentredClipping {
                radius_permille,
                iterations,
            } => {
                within(name, "radius_permille", radius_permille, 1, 10_000)?;
                within(name, "iterations", iterations, 1, 100)?;
            }
            Self::GeometricMedian { iterations } => {
                within(name, "iterations", iterations, 1, 100)?;
            }
            Self::MultiKrum { byzantine, .. } | Self::TrimmedMean { byzantine } => {
                within(name, "byzantine", byzantine, 1, 1024)?;
            }
        }
        let least = self.least_members();
        if u64::from(quorum) < least {
            return Err(format!(
                "defence {name} means nothing for a quorum of {quorum}, expected at least {least}: with three members only \
                 clip_norm, geometric_median and standard do, with fewer none"
            ));
        }
        if let Self::MultiKrum { byzantine, keep } = *self {
            within(name, "keep", keep, 1, quorum - byzantine - 2)?;
        }
        if matches!(
            (self, training.merge),
            (Self::GeometricMedian { .. }, MergeRule::Sce { .. })
        ) {
            return Err(format!(
                "defence {name} gives weights, merge rule sce has its own: choose clip_norm or multi_krum, or another rule"
            ));
        }
        if matches!(self, Self::TrimmedMean { .. }) && training.merge != MergeRule::Product {
            return Err(format!(
                "defence {name} averages the entries of the product itself: merge is {}, expected product",
                training.merge.name()
            ));
        }
        Ok(())
    }
}

fn within(rule: &str, field: &str, value: u32, least: u32, most: u32) -> Result<(), String> {
    if (least..=most).contains(&value) {
        Ok(())
    } else {
        Err(format!(
            "{field} of {rule} is {value}, expected {least} to {most}"
        ))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::manifest::Distillation;

    fn training(merge: MergeRule) -> Training {
        Training {
            inner_rounds: 8,
            local_steps: 1,
            rows: 1,
            row_tokens: 8,
            learning_rate_micros: 1,
            warmup_permille: 0,
            final_permille: 0,
            cross_entropy_permille: 0,
            rank: 4,
            alpha: 8,
            target_modules: Vec::new(),
            modules_to_save: Vec::new(),
            outer_rate_permille: 700,
            outer_momentum_permille: 700,
            distillation: Distillation::Trie,
            merge,
            defence: Defence::None,
        }
    }

    #[test]
    fn rules_that_change_the_rank_say_what_to_set() {
        for merge in [MergeRule::Stack, MergeRule::Residual] {
            let mut t = training(merge);
            for (field, only) in [
                ("inner_rounds", 1),
                ("outer_rate_permille", 1000),
                ("outer_momentum_permille", 0),
            ] {
                let problem = merge.check(&t).unwrap_err();
                let wanted = format!("merge rule {}", merge.name());
                assert!(
                    problem.starts_with(field) && problem.contains(&wanted),
                    "{problem}"
                );
                match field {
                    "inner_rounds" => t.inner_rounds = only,
                    "outer_rate_permille" => t.outer_rate_permille = only,
                    _ => t.outer_momentum_permille = only,
                }
            }
            assert_eq!(merge.check(&t), Ok(()));
        }
    }

    #[test]
    fn parameters_have_ranges() {
        for (text, field) in [
            (
                r#"{"rule":"task_arithmetic","scale_permille":0}"#,
                "scale_permille",
            ),
            (
                r#"{"rule":"ties","density_permille":0,"scale_permille":1000}"#,
                "density_permille",
            ),
            (
                r#"{"rule":"dare","density_permille":1001,"scale_permille":1000}"#,
                "density_permille",
            ),
            (r#"{"rule":"sce","select_permille":0}"#, "select_permille"),
        ] {
            let merge: MergeRule = serde_json::from_str(text).unwrap();
            let problem = merge.check(&training(merge)).unwrap_err();
            assert!(
                problem.starts_with(&format!("{field} of {}", merge.name())),
                "{problem}"
            );
        }
        assert!(serde_json::from_str::<MergeRule>(r#"{"rule":"ties"}"#).is_err());
    }

    #[test]
    fn a_quorum_of_three_takes_only_what_is_meaningful_for_three() {
        let t = training(MergeRule::Product);
        let krum = Defence::MultiKrum {
            byzantine: 1,
            keep: 2,
        };
        let trimmed = Defence::TrimmedMean { byzantine: 1 };
        let centred = Defence::CentredClipping {
            radius_permille: 1000,
            iterations: 3,
        };
        let median = Defence::GeometricMedian { iterations: 8 };
        for defence in [krum, trimmed, centred] {
            let problem = defence.check(&t, 3).unwrap_err();
            assert!(problem.contains(defence.name()), "{problem}");
            assert!(
                problem.contains("clip_norm, geometric_median and standard"),
                "{problem}"
            );
            assert_eq!(defence.check(&t, 5), Ok(()));
        }
        for defence in [Defence::None, Defence::Standard, Defence::ClipNorm, median] {
            assert_eq!(defence.check(&t, 3), Ok(()));
        }
        assert!(median.check(&t, 2).is_err());
        assert_eq!(Defence::ClipNorm.check(&t, 2), Ok(()));
        let greedy = Defence::MultiKrum {
            byzantine: 1,
            keep: 3,
        };
        assert!(
            greedy
                .check(&t, 5)
                .unwrap_err()
                .starts_with("keep of multi_krum")
        );
        let of_ties = training(MergeRule::Sce {
            select_permille: 100,
        });
        assert!(
            trimmed
                .check(&of_ties, 5)
                .unwrap_err()
                .contains("merge is sce")
        );
        assert!(
            median
                .check(&of_ties, 5)
                .unwrap_err()
                .contains("merge rule sce")
        );
    }
}
