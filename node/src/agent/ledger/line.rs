//! What one line of the ledger says.

use consilium_protocol::artefact::Kind;
use consilium_protocol::manifest::Mode;
use consilium_protocol::{ConsortiumId, Digest, InstitutionId, RejectCode, RoundId, UnixMillis};
use serde::{Deserialize, Serialize};

/// Whose ledger it is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Owner {
    /// The consortium.
    pub consortium: ConsortiumId,
    /// The institution.
    pub institution: InstitutionId,
}

impl std::fmt::Display for Owner {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} in {}", self.institution, self.consortium)
    }
}

/// One slot of one round: a site fills it once.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Slot {
    /// Number of the round.
    pub round: RoundId,
    /// Its manifest.
    pub manifest: Digest,
    /// What fills the slot.
    pub kind: Kind,
    /// Shard, inner round or 0, see [`Kind`].
    pub sequence: u32,
}

impl std::fmt::Display for Slot {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "{} {} of round {}",
            self.kind.name(),
            self.sequence,
            self.round
        )
    }
}

/// What is written down.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case", deny_unknown_fields)]
pub enum Event {
    /// The first line.
    Began {
        /// Whose ledger it is.
        owner: Owner,
    },
    /// These bytes may leave from now on.
    Released {
        /// What for.
        slot: Slot,
        /// Mode of the round.
        mode: Mode,
        /// SHA-256 of the bytes.
        artefact: Digest,
        /// How many they are.
        bytes: u64,
        /// Who receives them, as its certificate says.
        recipient: String,
    },
    /// The aggregator proved that it logged the contribution.
    Acknowledged {
        /// What for.
        slot: Slot,
        /// SHA-256 of the bytes.
        artefact: Digest,
        /// The log entry.
        entry: String,
        /// Its C2SP `tlog-proof@v1`.
        proof: String,
    },
    /// The aggregator refused the contribution.
    Refused {
        /// What for.
        slot: Slot,
        /// SHA-256 of the bytes.
        artefact: Digest,
        /// What it said.
        code: RejectCode,
    },
}

/// One line.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Line {
    /// Version of this format, 1.
    pub version: u32,
    /// SHA-256 of the line before, without its newline; of nothing in the first line.
    pub previous: Digest,
    /// When it was written.
    pub at: UnixMillis,
    /// What happened.
    pub event: Event,
}
