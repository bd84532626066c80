//! What the driver shows to sessions and to the operator: a snapshot, replaced whole.

use std::collections::BTreeMap;
use std::sync::Arc;

use consilium_protocol::contribution::Binding;
use consilium_protocol::message::Status;
use consilium_protocol::quic::chunk::Stride;
use consilium_protocol::{Digest, InstitutionId};
use serde::Serialize;

use crate::server::validate::Checks;

/// State of the open round as others may see it.
#[derive(Debug, Clone, Default)]
pub struct Board {
    /// What each member should do.
    pub statuses: BTreeMap<InstitutionId, Status>,
    /// What signatures must be bound to; none while no round is open.
    pub binding: Option<Binding>,
    /// What contributions are checked against; none while no round is open.
    pub checks: Option<Checks>,
    /// Artefacts that any member may fetch, and the width of the columns that they are sent in.
    pub public: Arc<BTreeMap<Digest, Stride>>,
}

/// `status.json`: what the operator sees.
#[derive(Debug, Clone, Serialize)]
pub struct Overview {
    /// Name of the consortium.
    pub consortium: String,
    /// Address that nodes dial.
    pub listening: String,
    /// Entries of the log.
    pub log_size: u64,
    /// The newest round, open or ended.
    pub round: Option<RoundOverview>,
}

/// One round.
#[derive(Debug, Clone, Serialize)]
pub struct RoundOverview {
    /// Its number.
    pub round: u64,
    /// Its signed manifest.
    pub manifest: Digest,
    /// Phase in words.
    pub phase: String,
    /// Inner rounds merged so far.
    pub merged: u32,
    /// Inner rounds in all.
    pub inner_rounds: u32,
    /// Truncation error of each merge, in millionths.
    pub truncation_ppm: Vec<u32>,
    /// Index of the fused targets.
    pub targets: Option<Digest>,
    /// Routing document.
    pub routing: Option<Digest>,
    /// What screening and accounting found.
    pub records: Option<Digest>,
    /// The last merged adapter.
    pub adapter: Option<Digest>,
    /// Folder digest of the release.
    pub release: Option<Digest>,
    /// Why there is none.
    pub rejected: Option<String>,
    /// Members in order.
    pub members: Vec<MemberOverview>,
}

/// One member of a round.
#[derive(Debug, Clone, Serialize)]
pub struct MemberOverview {
    /// Who.
    pub institution: String,
    /// Live connections.
    pub connections: usize,
    /// Relative training speed, once it has joined.
    pub capacity: Option<u32>,
    /// Shards of records received.
    pub shards: usize,
    /// Adapters received.
    pub adapters: usize,
    /// Whether its evaluation is here.
    pub evaluated: bool,
}
