//! The pass lines of the main job.

use serde::Serialize;

use super::{
    Arm, Metric, SeedReport,
    format::{seconds, three},
    recovered,
};
use crate::world::{Domain, RuleSet};

/// Which side of its limit a value must lie on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Sense {
    /// Value >= limit.
    AtLeast,
    /// Value <= limit.
    AtMost,
    /// Value < limit.
    Below,
}

impl Sense {
    /// As an operator.
    pub fn sign(self) -> &'static str {
        match self {
            Self::AtLeast => "≥",
            Self::AtMost => "≤",
            Self::Below => "<",
        }
    }
}

/// A promise and whether a run kept it.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Bar {
    /// What is promised.
    pub name: &'static str,
    /// What was measured; none when it could not be.
    pub value: Option<f64>,
    /// Which side of the limit is good.
    pub sense: Sense,
    /// The limit; none when the arm it comes from is missing.
    pub limit: Option<f64>,
    /// Whether it holds; a value that is missing or not a number does not.
    pub pass: bool,
}

impl Bar {
    fn new(name: &'static str, value: Option<f64>, sense: Sense, limit: Option<f64>) -> Self {
        let pass = match (value, limit) {
            (Some(value), Some(limit)) => match sense {
                Sense::AtLeast => value >= limit,
                Sense::AtMost => value <= limit,
                Sense::Below => value < limit,
            },
            _ => false,
        };
        Self {
            name,
            value,
            sense,
            limit,
            pass,
        }
    }

    /// Fractions and bits take decimals, seconds do not.
    pub(super) fn format(&self) -> fn(f64) -> String {
        if self.limit.is_some_and(|limit| limit >= 10.0) {
            seconds
        } else {
            three
        }
    }
}

/// Every pass line, always the same ones in the same order.
pub fn bars(seed: &SeedReport) -> Vec<Bar> {
    let fused = seed.value(Arm::Fused, Metric::Union);
    let sft = seed.value(Arm::Sft, Metric::Union);
    let gain = fused.zip(sft).map(|(fused, sft)| 1.0 - fused / sft);
    // All three or none: a source that was not measured is not beaten.
    let sources: Option<Vec<f64>> = Domain::ALL
        .into_iter()
        .map(|domain| seed.value(Arm::Source(domain), Metric::Union))
        .collect();
    let best = sources.and_then(|bits| bits.into_iter().reduce(f64::min));
    let facts = seed.value(Arm::Fused, Metric::Facts);
    let unseen = seed.value(Arm::Fused, Metric::Rule(RuleSet::C));
    let control = seed.value(Arm::Permuted, Metric::Facts);
    let recovered = recovered(seed);
    let seconds = Some(seed.seconds).filter(|seconds| seconds.is_finite());
    vec![
        Bar::new(
            "union bits saved against SFT",
            gain,
            Sense::AtLeast,
            Some(0.06),
        ),
        Bar::new(
            "union bits, below the best source",
            fused,
            Sense::Below,
            best,
        ),
        Bar::new("fact accuracy", facts, Sense::AtLeast, Some(0.85)),
        Bar::new(
            "rule accuracy on unseen combinations",
            unseen,
            Sense::AtLeast,
            Some(0.5),
        ),
        Bar::new("recovered bits", recovered.bits, Sense::AtLeast, Some(0.4)),
        Bar::new(
            "recovered facts",
            recovered.facts,
            Sense::AtLeast,
            Some(0.8),
        ),
        Bar::new(
            "fact accuracy of the control",
            control,
            Sense::AtMost,
            Some(0.2),
        ),
        Bar::new("seconds", seconds, Sense::Below, Some(300.0)),
    ]
}
