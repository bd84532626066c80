//! One matrix of a merge, by any rule: factors in, factors out, never the product.
//!
//! With `c_m` the coefficient of a member (share x scale x the rule's own scale) a linear rule gives
//! `M = theta_0 + sum c_m (theta_m - theta_0)`, a rule on entries some low-rank M. The outer step takes M for the mean (DiLoCo, arXiv 2311.08105):
//!
//! ```text
//! g  = theta_0 - M
//! v' = mu v + g
//! theta' = theta_0 - eta (g + mu v')
//! ```
//!
//! theta' is a stack of known factors, truncated to the rank of the adapter and rotated onto the previous A; v' is kept as
//! factors of at most four times that rank.

use consilium_protocol::manifest::{MergeRule, Training};

use super::blocks::{MatrixUpdates, MergedBlocks};
use super::defence::Votes;
use super::entries::{EntryRule, Names, Updates};
use super::lowrank::{Factors, Stack, align};
use super::outer::{Outer, total};
use super::round::{MatrixInputs, Round};
use super::sketch::sketch;
use crate::fusion::error::FusionError;

/// Rank of the outer momentum in units of the adapter's rank.
pub(super) const VELOCITY_RANK: usize = 4;
/// Rank of what a rule on entries gives, in units of the adapter's rank.
const SKETCH_RANK: usize = 2;

/// Everything about a merge but the tensors.
pub(super) struct Merger<'a> {
    pub(super) round: &'a Round,
    pub(super) rule: MergeRule,
    /// Members that count, with their shares and scales.
    pub(super) voters: Vec<usize>,
    pub(super) shares: Vec<f64>,
    pub(super) scales: Vec<f64>,
    pub(super) names: Vec<&'a str>,
    pub(super) trimmed: usize,
    pub(super) outer: Outer,
    pub(super) seed: u64,
}

/// One matrix after the step.
pub(super) struct MergedMatrix {
    pub(super) new: Factors,
    pub(super) velocity: Factors,
    /// Truncation error of the product and of the momentum.
    pub(super) lost: [f64; 2],
    /// Norms of what averaging the factors got wrong, and of what was to be averaged.
    pub(super) bias: Option<[f64; 2]>,
}

impl<'a> Merger<'a> {
    pub(super) fn new(round: &'a Round, training: &Training, votes: &Votes, seed: u64) -> Self {
        let counted = votes.votes.iter().enumerate();
        let counted = counted.filter(|(_, vote)| vote.excluded.is_none() && vote.share > 0.0);
        let voters: Vec<usize> = counted.clone().map(|(index, _)| index).collect();
        let name = |&index: &usize| round.members.get(index).map(|m| m.institution.as_str());
        Self {
            round,
            rule: training.merge,
            shares: counted.clone().map(|(_, vote)| vote.share).collect(),
            scales: counted.map(|(_, vote)| vote.scale).collect(),
            names: voters.iter().filter_map(name).collect(),
            voters,
            trimmed: votes.trimmed,
            outer: Outer::of(training),
            seed,
        }
    }

    /// The rule on entries that is in force, if any.
    pub(super) fn entry_rule(&self) -> Option<EntryRule> {
        match self.rule {
            MergeRule::Ties {
                density_permille, ..
            } => Some(EntryRule::Ties { density_permille }),
            MergeRule::Dare {
                density_permille, ..
            } => Some(EntryRule::Dare { density_permille }),
            MergeRule::Sce { select_permille } => Some(EntryRule::Sce { select_permille }),
            MergeRule::Product if self.trimmed > 0 => Some(EntryRule::TrimmedMean {
                dropped: self.trimmed,
            }),
            MergeRule::Product
            | MergeRule::Factors
            | MergeRule::Ffa
            | MergeRule::Stack
            | MergeRule::Residual
            | MergeRule::TaskArithmetic { .. } => None,
        }
    }

    /// What the rule multiplies the shares by: its scale, and the number of members where it is a sum.
    fn gain(&self) -> f64 {
        match self.rule {
            MergeRule::TaskArithmetic { scale_permille }
            | MergeRule::Dare { scale_permille, .. } => {
                f64::from(scale_permille) / 1000.0 * self.voters.len() as f64
            }
            MergeRule::Ties { scale_permille, .. } => f64::from(scale_permille) / 1000.0,
            MergeRule::Product
            | MergeRule::Factors
            | MergeRule::Ffa
            | MergeRule::Stack
            | MergeRule::Residual
            | MergeRule::Sce { .. } => 1.0,
        }
    }

    /// Of every voter, how much of its update is in M.
    pub(super) fn coefficients(&self) -> Vec<f64> {
        let gain = self.gain();
        let counted = self.shares.iter().zip(&self.scales);
        counted.map(|(share, scale)| gain * share * scale).collect()
    }

    /// Coefficients of the start and of the members in M.
    fn of_mean(&self) -> Vec<f64> {
        let members = self.coefficients();
        std::iter::once(1.0 - total(&members))
            .chain(members)
            .collect()
    }

    /// Rank of the merged adapter.
    pub(super) fn rank(&self) -> usize {
        let rank = self.round.layout.rank;
        let ranks = || {
            self.voters
                .iter()
                .filter_map(|&i| self.round.members.get(i))
                .map(|m| m.rank)
        };
        let in_mean = usize::from(self.of_mean().first().is_some_and(|c| c.abs() > 0.0)) * rank;
        match self.rule {
            MergeRule::Stack => ranks().sum::<usize>() + in_mean,
            MergeRule::Residual => {
                ranks().max().unwrap_or(0).max(in_mean) + ranks().sum::<usize>() + in_mean
            }
            _ => rank,
        }
    }

    pub(super) fn matrix(
        &self,
        layer: &str,
        shape: [usize; 2],
    ) -> Result<MergedMatrix, FusionError> {
        let inputs = self.round.matrix(layer, shape, &self.voters)?;
        match self.rule {
            MergeRule::Stack => Ok(self.stacked(&inputs, shape)),
            MergeRule::Residual => self.residual(layer, &inputs, shape),
            MergeRule::Factors | MergeRule::Ffa => Ok(self.factors(inputs, shape)),
            MergeRule::Product
            | MergeRule::TaskArithmetic { .. }
            | MergeRule::Ties { .. }
            | MergeRule::Dare { .. }
            | MergeRule::Sce { .. } => match self.entry_rule() {
                Some(rule) => self.entries(rule, layer, &inputs, shape),
                None => {
                    let c = self.coefficients();
                    let [theta, velocity] = [self.outer.theta(&c), self.outer.velocity(&c)];
                    let mut terms = vec![&inputs.previous];
                    terms.extend(&inputs.members);
                    terms.push(&inputs.velocity);
                    self.recompressed(layer, &terms, [&theta, &velocity], 0.0)
                }
            },
        }
    }

    /// Sums of products back at the adapter's rank, with the start's factors first among the terms. `beyond` is the norm of what
    /// the product lacks already.
    fn recompressed(
        &self,
        layer: &str,
        terms: &[&Factors],
        [theta, velocity]: [&[f64]; 2],
        beyond: f64,
    ) -> Result<MergedMatrix, FusionError> {
        let rank = self.round.layout.rank;
        let diverged = || FusionError::Diverged(layer.to_owned());
        let stack = Stack::new(terms);
        let product = stack.weighted_sum(theta, rank).ok_or_else(diverged)?;
        let moved = stack
            .weighted_sum(velocity, VELOCITY_RANK * rank)
            .ok_or_else(diverged)?;
        let previous = terms.first().ok_or_else(diverged)?;
        let cut = product.error * product.norm;
        let norm = product.norm.hypot(beyond);
        Ok(MergedMatrix {
            new: align(&product, previous.at.as_ref()).ok_or_else(diverged)?,
            lost: [
                if norm > 0.0 {
                    cut.hypot(beyond) / norm
                } else {
                    0.0
                },
                moved.error,
            ],
            velocity: Factors {
                b: moved.us,
                at: moved.v,
            },
            bias: None,
        })
    }

    /// The outer step on A and on B, each by itself; A stays under FFA.
    fn factors(&self, inputs: MatrixInputs, shape: [usize; 2]) -> MergedMatrix {
        let c = self.coefficients();
        let terms = |coefficients: Vec<f64>| -> Factors {
            let all = std::iter::once(&inputs.previous).chain(&inputs.members);
            let all: Vec<_> = coefficients
                .into_iter()
                .zip(all.chain([&inputs.velocity]))
                .collect();
            Factors::means(&all, shape)
        };
        let mut new = terms(self.outer.theta(&c));
        let mut velocity = terms(self.outer.velocity(&c));
        let bias = if self.rule.freezes_a() {
            // The momentum of B alone: as a product with the A that all share.
            new.at = inputs.previous.at.clone();
            velocity.at = inputs.previous.at;
            None
        } else {
            Some(self.bias(&inputs, shape).1)
        };
        MergedMatrix {
            new,
            velocity,
            lost: [0.0; 2],
            bias,
        }
    }

    /// The means of the factors, and how far their product is from the mean of the products.
    fn bias(&self, inputs: &MatrixInputs, shape: [usize; 2]) -> (Factors, [f64; 2]) {
        let mut coefficients = self.of_mean();
        let mut terms = vec![&inputs.previous];
        terms.extend(&inputs.members);
        let weighted: Vec<_> = coefficients
            .iter()
            .copied()
            .zip(terms.iter().copied())
            .collect();
        let mean = Factors::means(&in_use(weighted), shape);
        let all = Stack::new(&terms).norm(&coefficients);
        terms.push(&mean);
        coefficients.push(-1.0);
        let difference = Stack::new(&terms).norm(&coefficients);
        (mean, [difference, all])
    }

    /// All factors beside each other.
    fn stacked(&self, inputs: &MatrixInputs, shape: [usize; 2]) -> MergedMatrix {
        let terms = std::iter::once(&inputs.previous).chain(&inputs.members);
        let terms = in_use(self.of_mean().into_iter().zip(terms).collect());
        MergedMatrix {
            new: Factors::beside(&terms, shape, self.rank()),
            velocity: Factors::zero(shape, 0),
            lost: [0.0; 2],
            bias: None,
        }
    }

    /// The means of the factors and beside them what these lack.
    fn residual(
        &self,
        layer: &str,
        inputs: &MatrixInputs,
        shape: [usize; 2],
    ) -> Result<MergedMatrix, FusionError> {
        let (mean, bias) = self.bias(inputs, shape);
        let mut coefficients = self.of_mean();
        coefficients.push(-1.0);
        let mut terms = vec![&inputs.previous];
        terms.extend(&inputs.members);
        terms.push(&mean);
        let most = self.rank() - mean.rank();
        let rest = Stack::new(&terms)
            .weighted_sum(&coefficients, most)
            .ok_or_else(|| FusionError::Diverged(layer.to_owned()))?;
        let lost = rest.error * rest.norm;
        let rest = Factors {
            b: rest.us,
            at: rest.v,
        };
        Ok(MergedMatrix {
            new: Factors::beside(&[(1.0, &mean), (1.0, &rest)], shape, self.rank()),
            velocity: Factors::zero(shape, 0),
            lost: [if bias[1] > 0.0 { lost / bias[1] } else { 0.0 }, 0.0],
            bias: Some(bias),
        })
    }

    /// A rule on entries: its result block by block, then in low-rank form, then the outer step as for one adapter.
    fn entries(
        &self,
        rule: EntryRule,
        layer: &str,
        inputs: &MatrixInputs,
        shape: [usize; 2],
    ) -> Result<MergedMatrix, FusionError> {
        let updates = MatrixUpdates::new(inputs, &self.scales, shape);
        let ready = rule.prepare(&self.entry_weights(), &self.entry_names(layer), &updates)?;
        let merge = |index: usize| {
            let (start, chunk) = updates.chunk(index)?;
            Ok((start, ready.merge(start, chunk, layer)?))
        };
        let merged = MergedBlocks {
            shape,
            blocks: updates.chunks(),
            merge: &merge,
        };
        let wanted = SKETCH_RANK * self.round.layout.rank;
        let mut update = sketch(&merged, wanted, layer)?;
        let gain = self.entry_gain();
        update.factors.b *= faer::Scale(gain);
        let [theta, velocity] = self.outer.of_update();
        let terms = [&inputs.previous, &update.factors, &inputs.velocity];
        let beyond = self.outer.pull() * gain * update.lost;
        self.recompressed(layer, &terms, [&theta, &velocity], beyond)
    }

    /// Weights of the voters under a rule on entries.
    pub(super) fn entry_weights(&self) -> Vec<f64> {
        let gain = if matches!(self.rule, MergeRule::Dare { .. }) {
            self.gain()
        } else {
            1.0
        };
        self.shares.iter().map(|share| gain * share).collect()
    }

    /// What the result of a rule on entries is multiplied by.
    pub(super) fn entry_gain(&self) -> f64 {
        if matches!(self.rule, MergeRule::Ties { .. }) {
            self.gain()
        } else {
            1.0
        }
    }

    pub(super) fn entry_names<'n>(&'n self, tensor: &'n str) -> Names<'n> {
        Names {
            tensor,
            members: &self.names,
            seed: self.seed,
        }
    }
}

/// Terms whose coefficient is not zero.
fn in_use(terms: Vec<(f64, &Factors)>) -> Vec<(f64, &Factors)> {
    terms.into_iter().filter(|(c, _)| c.abs() > 0.0).collect()
}
