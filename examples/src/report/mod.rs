//! What a run of the consortium measured, as a terminal table, as JSON and as one page of HTML.
//!
//! All three show the same numbers from the same values; derived ones (union, recovered fractions, bars) are
//! computed here and nowhere else.

mod bars;
mod figures;
mod format;
mod html;
mod json;
mod metrics;
mod svg;
#[cfg(test)]
mod tests;
mod text;

use std::{fs, io, path::Path};

use serde::{Deserialize, Serialize, Serializer};

use crate::world::Domain;

pub use bars::{Bar, Sense, bars};
pub use metrics::{Metric, Recovered, Spread, recovered};

/// A model that all questions were put to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Arm {
    /// One institution's own model.
    Source(Domain),
    /// The pivot as the round finds it.
    PivotBefore,
    /// The pivot trained on the labels of the same public text.
    Sft,
    /// The pivot after the round.
    Fused,
    /// The pivot trained on all private text in one place.
    Centralised,
    /// The pivot after a round whose records were permuted over the items.
    Permuted,
}

impl Arm {
    /// Every arm, in the order of all tables.
    pub const ALL: [Self; 8] = [
        Self::Source(Domain::Clinic),
        Self::Source(Domain::Bank),
        Self::Source(Domain::Insurer),
        Self::PivotBefore,
        Self::Sft,
        Self::Fused,
        Self::Centralised,
        Self::Permuted,
    ];

    /// Name in tables.
    pub fn label(self) -> &'static str {
        match self {
            Self::Source(Domain::Clinic) => "clinic alone",
            Self::Source(Domain::Bank) => "bank alone",
            Self::Source(Domain::Insurer) => "insurer alone",
            Self::PivotBefore => "pivot before",
            Self::Sft => "SFT, same public text",
            Self::Fused => "fused",
            Self::Centralised => "centralised (bound)",
            Self::Permuted => "permuted (control)",
        }
    }

    /// Name in JSON.
    pub fn id(self) -> &'static str {
        match self {
            Self::Source(domain) => domain.name(),
            Self::PivotBefore => "pivot_before",
            Self::Sft => "sft",
            Self::Fused => "fused",
            Self::Centralised => "centralised",
            Self::Permuted => "permuted",
        }
    }
}

impl Serialize for Arm {
    fn serialize<S: Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        to.serialize_str(self.id())
    }
}

/// Questions answered.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Tally {
    /// How many rightly.
    pub right: u32,
    /// How many were asked.
    pub asked: u32,
}

impl Tally {
    /// Counts one more question.
    pub fn count(&mut self, right: bool) {
        self.right += u32::from(right);
        self.asked += 1;
    }

    /// Accuracy, 0 to 1; none when nothing was asked.
    pub fn rate(self) -> Option<f64> {
        (self.asked > 0).then(|| f64::from(self.right) / f64::from(self.asked))
    }

    /// Both together.
    #[must_use]
    pub fn and(self, other: Self) -> Self {
        Self {
            right: self.right + other.right,
            asked: self.asked + other.asked,
        }
    }
}

/// What one arm scored.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct ArmResult {
    /// The arm.
    pub arm: Arm,
    /// Its answers.
    #[serde(flatten)]
    pub scores: Scores,
}

/// What a model scored on the test sets of a world.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Scores {
    /// Bits per byte on the test lines of each domain, in the order of [`Domain::ALL`].
    pub bits: [f64; 3],
    /// Facts that one institution knows.
    pub one_owner: Tally,
    /// Facts that two institutions know.
    pub two_owners: Tally,
    /// Rule questions on combination sets A, B and C.
    pub rules: [Tally; 3],
}

impl Scores {
    /// Bits per byte on the union: the mean of the domains.
    pub fn union(&self) -> f64 {
        self.bits.iter().sum::<f64>() / 3.0
    }

    /// All fact questions.
    pub fn facts(&self) -> Tally {
        self.one_owner.and(self.two_owners)
    }
}

/// Content that one node put on the wire, packed as it was sent, by kind, and what dense logits would have cost.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Traffic {
    /// Whose node.
    pub node: Domain,
    /// Shards of records.
    pub records: u64,
    /// Adapters of all inner rounds.
    pub adapters: u64,
    /// Evaluations of the candidate.
    pub evaluation: u64,
    /// f16 logits over the source's whole vocabulary at the same token positions; not sent.
    pub dense: u64,
}

impl Traffic {
    /// Everything sent.
    pub fn sent(&self) -> u64 {
        self.records + self.adapters + self.evaluation
    }
}

/// Mean routing weights over reference items of one sort.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct RoutingRow {
    /// Which items, for example `clinic facts, one owner`.
    pub about: String,
    /// How many.
    pub items: u64,
    /// Mean weight of each institution, in the order of [`Domain::ALL`]; sums to 1.
    pub weights: [f64; 3],
    /// Mean weight of those who know the answer, 0 to 1.
    pub owners: f64,
    /// Share of items whose largest weight is below 0.9.
    pub mixed: f64,
}

/// Why the bound of bits and facts is none of rules: what the texts of [`crate::world`] hold.
pub const RULE_NOTE: &str = "Centralised training bounds bits and facts, not rules: private text shows a rule on set A \
    alone, in one line of five, while public text asks for sets A and B in two lines of five and \
    the sources' records answer there.";

/// Wall-clock time of a part of the run.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Phase {
    /// What was done.
    pub name: String,
    /// How long it took; phases may overlap.
    pub seconds: f64,
}

/// One run.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct SeedReport {
    /// The seed of data, models and order.
    pub seed: u64,
    /// Why nothing was released, in a sentence; none after a release. The fused arm is then the rejected candidate, or missing.
    pub rejected: Option<String>,
    /// Arms, in any order; one that is missing fails the bars that need it.
    pub arms: Vec<ArmResult>,
    /// One entry per node.
    pub traffic: Vec<Traffic>,
    /// Routing, one entry per sort of item.
    pub routing: Vec<RoutingRow>,
    /// Relative truncation error of the merged product, per inner round.
    pub truncation: Vec<f64>,
    /// Where the time went.
    pub phases: Vec<Phase>,
    /// Wall-clock time of the whole run.
    pub seconds: f64,
}

impl SeedReport {
    /// Name of an arm in this run's tables.
    pub fn label(&self, arm: Arm) -> &'static str {
        match (arm, &self.rejected) {
            (Arm::Fused, Some(_)) => "fused, rejected",
            _ => arm.label(),
        }
    }

    /// What a reader is told of a run without a release.
    pub fn notice(&self) -> Option<String> {
        let why = self.rejected.as_ref()?;
        let row = match self.arm(Arm::Fused) {
            Some(_) => "the row of the fused arm is the candidate that was turned down",
            None => "there was no candidate to measure",
        };
        Some(format!("Nothing was released: {why}; {row}."))
    }

    /// The result of an arm.
    pub fn arm(&self, arm: Arm) -> Option<&ArmResult> {
        self.arms.iter().find(|result| result.arm == arm)
    }

    /// A metric of an arm; none when it is missing or not a number.
    pub fn value(&self, arm: Arm, metric: Metric) -> Option<f64> {
        self.arm(arm)
            .and_then(|result| metric.of(&result.scores))
            .filter(|value| value.is_finite())
    }
}

/// All runs of one command.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Report {
    /// The command that makes these numbers.
    pub command: String,
    /// How the arms beside the fused one were trained, in a sentence or two.
    pub training: String,
    /// Runs, one per seed.
    pub seeds: Vec<SeedReport>,
}

impl Report {
    /// Whether every bar holds on every seed, and every seed ended with a release; false when there is no seed.
    pub fn passed(&self) -> bool {
        self.released()
            && self
                .seeds
                .iter()
                .all(|seed| bars(seed).iter().all(|bar| bar.pass))
    }

    /// Whether every seed ended with a release; false when there is no seed.
    pub fn released(&self) -> bool {
        !self.seeds.is_empty() && self.seeds.iter().all(|seed| seed.rejected.is_none())
    }

    /// The table for a terminal, with or without escape sequences for emphasis.
    pub fn text(&self, colour: bool) -> String {
        text::render(self, colour)
    }

    /// One JSON object, derived numbers included.
    pub fn json(&self) -> serde_json::Result<String> {
        json::render(self)
    }

    /// One page that needs no network and no script.
    pub fn html(&self) -> String {
        html::render(self)
    }

    /// Writes `report.json` and `report.html` into a folder, which is made when it is missing.
    pub fn write_files(&self, folder: &Path) -> io::Result<()> {
        fs::create_dir_all(folder)?;
        fs::write(folder.join("report.json"), self.json()?)?;
        fs::write(folder.join("report.html"), self.html())
    }
}
