//! Entries of the log: what happened, in canonical JSON of digests. The state of a round is a replay of its entries.

use serde::{Deserialize, Serialize};

use crate::artefact::Kind;
use crate::ids::{ConsortiumId, Digest, InstitutionId, RoundId};
use crate::limits;
use crate::manifest::canonical_json;
use crate::reject::RejectCode;
use crate::time::UnixMillis;

/// One entry of the log.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Entry {
    /// Version of this format, 1.
    pub version: u32,
    /// The consortium.
    pub consortium: ConsortiumId,
    /// The round.
    pub round: RoundId,
    /// When the aggregator took note of it.
    pub at: UnixMillis,
    /// What happened.
    pub event: Event,
}

/// A step of a round.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case", deny_unknown_fields)]
pub enum Event {
    /// The round is open.
    Opened {
        /// The signed manifest.
        manifest: Digest,
        /// The adapter that the first inner round starts from.
        start: Digest,
    },
    /// A member's node is here, or its capacity changed.
    Joined {
        /// Who.
        institution: InstitutionId,
        /// Relative training speed; 0 for records only.
        capacity: u32,
    },
    /// A contribution is stored and counts.
    Accepted {
        /// Who handed it over.
        institution: InstitutionId,
        /// What it is.
        kind: Kind,
        /// Its slot.
        sequence: u32,
        /// Its digest.
        artefact: Digest,
        /// Signature over the statement, hexadecimal.
        signature: String,
        /// Head of the sender's ledger when it was sent.
        ledger: Digest,
    },
    /// A contribution was refused after it had been read.
    Refused {
        /// Who handed it over.
        institution: InstitutionId,
        /// What it is.
        kind: Kind,
        /// Its slot.
        sequence: u32,
        /// Its digest.
        artefact: Digest,
        /// What the sender was told.
        code: RejectCode,
    },
    /// A phase takes no more contributions.
    Closed {
        /// Phase that ends.
        phase: Phase,
        /// Members whose contributions to it are complete, ascending.
        members: Vec<InstitutionId>,
    },
    /// The records were fused.
    Fused {
        /// Index of the target shards, see [`TargetIndex`].
        targets: Digest,
        /// Routing document.
        routing: Digest,
        /// What screening and accounting found; none in old logs.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        report: Option<Digest>,
    },
    /// An inner round was merged.
    Merged {
        /// Inner round, from 0.
        inner: u32,
        /// The merged adapter.
        adapter: Digest,
        /// Outer optimiser state.
        momentum: Digest,
        /// Relative truncation error of the recompression, mean over the matrices, in millionths.
        truncation_ppm: u32,
    },
    /// The candidate passed the gate and is published.
    Released {
        /// Folder digest of the release.
        release: Digest,
        /// Its report.
        report: Digest,
    },
    /// The round ended without a release.
    Rejected {
        /// Why, in a few words of a fixed list.
        reason: Reason,
        /// Members whose records the reason lies in: those kept out, or the one without which the fusion is better.
        #[serde(default, skip_serializing_if = "Vec::is_empty")]
        blamed: Vec<InstitutionId>,
        /// What screening and accounting found, where the reason is theirs.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        report: Option<Digest>,
    },
}

/// A stretch of a round that ends by an entry in the log.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(tag = "name", rename_all = "snake_case", deny_unknown_fields)]
pub enum Phase {
    /// Records are coming in.
    Contribute,
    /// Adapters of one inner round are coming in.
    Distil {
        /// Inner round, from 0.
        inner: u32,
    },
    /// Evaluations are coming in.
    Evaluate,
}

/// Why a round ended without a release.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Reason {
    /// Too few members before a deadline.
    Quorum,
    /// A site would fare worse than the charter allows.
    Gate,
    /// No better than the pivot or the last release on the mean.
    NoGain,
    /// The operator ended it.
    Operator,
    /// Screening keeps so many sources out that the quorum is missed.
    Screening,
    /// On the public holdout the fusion of all is worse than without one member by more than the manifest allows.
    PublicGate,
}

/// The fused targets of a round: digests of the shards in order.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TargetIndex {
    /// Shard `i` covers the items that [`crate::manifest::Manifest::shard_range`] says.
    pub shards: Vec<Digest>,
    /// Items that no node trains on, ascending: decoys and the holdout.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub withheld: Vec<u64>,
    /// The key of the decoys, which the manifest committed to.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub key: Option<Digest>,
}

/// Why bytes are no entry.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("log entry: {0}")]
pub struct EntryError(String);

impl Entry {
    /// The entry as canonical JSON.
    ///
    /// # Errors
    /// Longer than a log entry may be.
    pub fn to_bytes(&self) -> Result<Vec<u8>, EntryError> {
        let json = canonical_json(self).map_err(|error| EntryError(error.to_string()))?;
        if json.len() > limits::LOG_ENTRY {
            return Err(EntryError(format!("{} bytes are too many", json.len())));
        }
        Ok(json.into_bytes())
    }

    /// Parses an entry; only the canonical form is accepted, so that one event has one leaf.
    ///
    /// # Errors
    /// Not an entry, or not in canonical form.
    pub fn parse(bytes: &[u8]) -> Result<Self, EntryError> {
        let entry: Self =
            serde_json::from_slice(bytes).map_err(|error| EntryError(error.to_string()))?;
        if entry.version != 1 {
            return Err(EntryError(format!(
                "version {} is not supported",
                entry.version
            )));
        }
        if entry.to_bytes()? != bytes {
            return Err(EntryError("not in canonical form".to_owned()));
        }
        Ok(entry)
    }
}
