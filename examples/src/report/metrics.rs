//! The numbers of a table's columns, and the ones derived from several arms or several seeds.

use serde::Serialize;

use super::{Arm, Report, Scores, SeedReport, Tally};
use crate::world::{ANSWERS, Domain, NUMBERS, RuleSet};

/// A column of the table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Metric {
    /// Bits per byte on one domain.
    Bits(Domain),
    /// Mean bits per byte of the domains.
    Union,
    /// Accuracy on all facts.
    Facts,
    /// Accuracy on facts that one institution knows.
    OneOwner,
    /// Accuracy on facts that two institutions know.
    TwoOwners,
    /// Accuracy on a combination set of the rule.
    Rule(RuleSet),
}

impl Metric {
    /// Every column, in order.
    pub const ALL: [Self; 10] = [
        Self::Bits(Domain::Clinic),
        Self::Bits(Domain::Bank),
        Self::Bits(Domain::Insurer),
        Self::Union,
        Self::Facts,
        Self::OneOwner,
        Self::TwoOwners,
        Self::Rule(RuleSet::A),
        Self::Rule(RuleSet::B),
        Self::Rule(RuleSet::C),
    ];

    /// Heading under its group's.
    pub fn label(self) -> &'static str {
        match self {
            Self::Bits(domain) => domain.name(),
            Self::Union => "union",
            Self::Facts => "all",
            Self::OneOwner => "one owner",
            Self::TwoOwners => "two owners",
            Self::Rule(RuleSet::A) => "A",
            Self::Rule(RuleSet::B) => "B",
            Self::Rule(RuleSet::C) => "C",
        }
    }

    /// Value for an arm.
    pub fn of(self, scores: &Scores) -> Option<f64> {
        match self {
            Self::Bits(domain) => Some(scores.bits[domain.index()]),
            Self::Union => Some(scores.union()),
            _ => self.tally(scores).and_then(Tally::rate),
        }
    }

    /// The count behind an accuracy.
    pub(super) fn tally(self, scores: &Scores) -> Option<Tally> {
        match self {
            Self::Bits(_) | Self::Union => None,
            Self::Facts => Some(scores.facts()),
            Self::OneOwner => Some(scores.one_owner),
            Self::TwoOwners => Some(scores.two_owners),
            Self::Rule(set) => Some(scores.rules[RuleSet::ALL.iter().position(|&s| s == set)?]),
        }
    }

    /// Accuracy of a guess; none for bits per byte.
    pub fn chance(self) -> Option<f64> {
        match self {
            Self::Bits(_) | Self::Union => None,
            Self::Facts | Self::OneOwner | Self::TwoOwners => Some(1.0 / ANSWERS as f64),
            Self::Rule(_) => Some(1.0 / NUMBERS.len() as f64),
        }
    }

    pub(super) fn is_bits(self) -> bool {
        matches!(self, Self::Bits(_) | Self::Union)
    }
}

/// How much of the way from SFT to centralised training an arm went: 0 is no better than SFT, 1 is the bound.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Recovered {
    /// Of the gap in union bits per byte.
    pub bits: Option<f64>,
    /// Of the gap in fact accuracy.
    pub facts: Option<f64>,
}

/// Recovered fractions of the fused arm; none where centralised training is no better than SFT.
pub fn recovered(seed: &SeedReport) -> Recovered {
    let fraction = |metric: Metric, sign: f64| {
        let [sft, fused, bound] = [Arm::Sft, Arm::Fused, Arm::Centralised]
            .map(|arm| seed.value(arm, metric).map(|value| sign * value));
        let (sft, fused, bound) = (sft?, fused?, bound?);
        (bound > sft).then(|| (fused - sft) / (bound - sft))
    };
    Recovered {
        bits: fraction(Metric::Union, -1.0),
        facts: fraction(Metric::Facts, 1.0),
    }
}

/// Mean and range over seeds.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Spread {
    /// Mean.
    pub mean: f64,
    /// Smallest.
    pub min: f64,
    /// Largest.
    pub max: f64,
}

impl Spread {
    /// Over all seeds or not at all: a mean that leaves out a seed that has no value would flatter.
    pub fn of(values: impl IntoIterator<Item = Option<f64>>) -> Option<Self> {
        let values: Vec<f64> = values.into_iter().collect::<Option<_>>()?;
        let mean = values.iter().sum::<f64>() / values.len() as f64;
        let min = values.iter().copied().reduce(f64::min)?;
        let max = values.iter().copied().reduce(f64::max)?;
        Some(Self { mean, min, max })
    }
}

impl Report {
    /// Mean and range of a metric over the seeds.
    pub fn spread(&self, arm: Arm, metric: Metric) -> Option<Spread> {
        Spread::of(self.seeds.iter().map(|seed| seed.value(arm, metric)))
    }
}

/// 95 % score interval of a proportion (Wilson 1927).
pub(super) fn wilson(tally: Tally) -> Option<(f64, f64)> {
    const Z: f64 = 1.959_964;
    let rate = tally.rate()?;
    let n = f64::from(tally.asked);
    let middle = (rate + Z * Z / (2.0 * n)) / (1.0 + Z * Z / n);
    let half = Z / (1.0 + Z * Z / n) * (rate * (1.0 - rate) / n + Z * Z / (4.0 * n * n)).sqrt();
    Some(((middle - half).max(0.0), (middle + half).min(1.0)))
}
