//! Jobs and how they end.

use std::collections::BTreeMap;
use std::fmt;
use std::ops::Range;

use consilium_protocol::manifest::{SymbolSpace, Training};
use consilium_protocol::message::Part;
use consilium_protocol::{Digest, RoundId};
use serde::{Deserialize, Serialize};

/// Name of a job, which follows from its content.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct JobId(String);

impl JobId {
    /// The name as text: `r<round>-<kind>-<sequence>-<digest of the content, shortened>`.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for JobId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Debug for JobId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// Work for the worker.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
#[expect(
    clippy::large_enum_variant,
    reason = "a job is read from its file and done, one at a time"
)]
pub enum Job {
    /// Score one shard of the reference set with the source; the artefact is a shard of records.
    Score(ScoreJob),
    /// Train the pivot's adapter for one inner round; the artefact is a PEFT adapter file.
    Distil(DistilJob),
    /// Measure a candidate on the private holdout; the artefact is an evaluation document.
    Evaluate(EvaluateJob),
}

/// One shard to score.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ScoreJob {
    /// Round it is for.
    pub round: RoundId,
    /// Index of the shard.
    pub shard: u32,
    /// Items of the reference set that the shard covers, the end excluded.
    pub items: Range<u64>,
    /// The reference set, a blob.
    pub reference: Digest,
    /// Alphabet of the records.
    #[serde(default, skip_serializing_if = "SymbolSpace::is_bytes")]
    pub symbol_space: SymbolSpace,
    /// Symbol slots of one position (K).
    pub symbols: u16,
    /// Mass that the slots hold before the rest goes to the tail, in thousandths.
    pub fill_permille: u16,
}

/// One inner round of training.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DistilJob {
    /// Round it is for.
    pub round: RoundId,
    /// Manifest of the round; with another one the optimiser starts afresh.
    pub manifest: Digest,
    /// Inner round, from 0.
    pub inner: u32,
    /// Adapter to start from, a blob.
    pub start: Digest,
    /// What to learn from.
    pub lesson: Lesson,
    /// How to train.
    pub training: Training,
    /// Seed of the round.
    pub seed: u64,
}

/// What an inner round learns from.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Lesson {
    /// Fused records of a part of the reference set (mode `unified`).
    Fused {
        /// The records.
        records: RecordFiles,
        /// The node's part.
        part: Part,
        /// The pivot that competes with the records, if it does.
        rival: Option<Rival>,
    },
    /// The site's own records of the whole reference set, which never leave it (mode `pairwise`). Items that the pivot
    /// predicts better are learned from their labels.
    Own {
        /// The records.
        records: RecordFiles,
        /// The pivot that competes with them.
        rival: Rival,
    },
    /// The labels of the whole reference set.
    Public {
        /// The reference set, without records.
        records: RecordFiles,
    },
    /// The site's private text, which the worker's configuration names (mode `adapters`).
    Private,
}

/// A reference set and shards of records of it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RecordFiles {
    /// The reference set, a blob.
    pub reference: Digest,
    /// Its items.
    pub items: u64,
    /// Shards in order, blobs.
    pub shards: Vec<Digest>,
    /// Items of one shard.
    pub shard_items: u32,
    /// Alphabet of the records.
    #[serde(default, skip_serializing_if = "SymbolSpace::is_bytes")]
    pub symbol_space: SymbolSpace,
    /// Items that nobody trains on, ascending: decoys and the public holdout.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub withheld: Vec<u64>,
}

/// The pivot as it was before the round, and how its records are made.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Rival {
    /// Adapter that the first inner round starts from, a blob.
    pub adapter: Digest,
    /// Symbol slots of one position (K).
    pub symbols: u16,
    /// Mass that the slots hold, in thousandths.
    pub fill_permille: u16,
}

/// Measurement of the candidate.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct EvaluateJob {
    /// Round it is for.
    pub round: RoundId,
    /// The merged adapter, a blob.
    pub candidate: Digest,
    /// Rank, alpha and modules of the adapter.
    pub training: Training,
}

impl Job {
    /// The name that follows from the content.
    #[must_use]
    pub fn id(&self) -> JobId {
        let (round, slot) = match self {
            Self::Score(job) => (job.round, format!("score-{:04}", job.shard)),
            Self::Distil(job) => (job.round, format!("distil-{:02}", job.inner)),
            Self::Evaluate(job) => (job.round, "evaluate".to_owned()),
        };
        // A job holds integers, digests and plain text, which JSON always carries.
        let content = Digest::of(&serde_json::to_vec(self).unwrap_or_default()).to_string();
        let content: String = content.chars().take(16).collect();
        JobId(format!("r{round}-{slot}-{content}"))
    }

    /// The round it is for.
    #[must_use]
    pub const fn round(&self) -> RoundId {
        match self {
            Self::Score(job) => job.round,
            Self::Distil(job) => job.round,
            Self::Evaluate(job) => job.round,
        }
    }

    /// Order in which jobs are done: by round, then as the phases of a round follow each other.
    pub(super) const fn order(&self) -> (RoundId, u8, u32) {
        match self {
            Self::Score(job) => (job.round, 0, job.shard),
            Self::Distil(job) => (job.round, 1, job.inner),
            Self::Evaluate(job) => (job.round, 2, 0),
        }
    }
}

/// How a job ended.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Outcome {
    /// The artefact is a blob.
    Done {
        /// Its digest.
        artefact: Digest,
        /// Time that it took.
        seconds: f64,
        /// Numbers worth logging, by name; they stay at the site.
        notes: BTreeMap<String, f64>,
    },
    /// It cannot be done as things are.
    Failed {
        /// Why, with the fix where there is one; stays at the site.
        problem: String,
    },
}
