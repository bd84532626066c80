//! What the state machine tells its shell.

use crate::artefact::Kind;
use crate::event::{Phase, Reason};
use crate::ids::{Digest, InstitutionId};
use crate::message::Part;
use crate::reject::RejectCode;
use crate::time::UnixMillis;

/// What to do after an event was applied.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Effect {
    /// Start this; its outcome is logged as the next event.
    Run(Work),
    /// Tasks of members may have changed.
    Publish,
    /// Ask [`crate::round::Round::due`] again at this instant.
    WakeAt(UnixMillis),
    /// The round has ended.
    Finished,
}

/// Work of the aggregator.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Work {
    /// Fuse the records of these members, ascending. Answered by `Fused` or `Rejected`.
    Fuse {
        /// Members whose shards are all here.
        members: Vec<InstitutionId>,
    },
    /// Merge the adapters of an inner round. Answered by `Merged`.
    Merge {
        /// Inner round, from 0.
        inner: u32,
        /// Adapter that all of them started from.
        start: Digest,
        /// Outer optimiser state; none in the first inner round.
        momentum: Option<Digest>,
        /// Adapter and weight of each member, in institution order. Weights are at least 1: in mode `unified` items of the
        /// member's part; in `adapters` its capacity, as far as the manifest lets it count; else 1.
        adapters: Vec<(InstitutionId, Digest, u32)>,
    },
    /// Decide on the candidate. Answered by `Released` or `Rejected`.
    Judge {
        /// The merged adapter.
        candidate: Digest,
        /// Evaluation of each member, in institution order.
        evaluations: Vec<(InstitutionId, Digest)>,
    },
}

/// What one member should do now.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum RoundTask {
    /// Nothing.
    Wait,
    /// Score shards of the reference set.
    Score {
        /// The first missing shards, ascending; at most [`RoundTask::SHARDS`], the rest follow.
        shards: Vec<u32>,
    },
    /// Train for one inner round on fused records.
    Distil {
        /// Inner round, from 0.
        inner: u32,
        /// Adapter to start from.
        start: Digest,
        /// Index of the target shards.
        targets: Digest,
        /// The member's part of the reference set, not empty.
        part: Part,
    },
    /// Train for one inner round on what lies at the site: the mode has no shared records.
    Train {
        /// Inner round, from 0.
        inner: u32,
        /// Adapter to start from.
        start: Digest,
    },
    /// Measure the candidate.
    Evaluate {
        /// The merged adapter.
        candidate: Digest,
    },
    /// The round has ended.
    Finished,
}

impl RoundTask {
    /// Most shards that one task names: any more might not fit the frame of a status.
    pub const SHARDS: usize = 4096;
}

/// Where a round stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RoundPhase {
    /// `Opened` is not logged yet.
    Opening,
    /// Records are coming in.
    Contribute,
    /// The aggregator fuses.
    Fusing,
    /// Adapters of an inner round are coming in.
    Distil {
        /// Inner round, from 0.
        inner: u32,
    },
    /// The aggregator merges.
    Merging {
        /// Inner round, from 0.
        inner: u32,
    },
    /// Evaluations are coming in.
    Evaluate,
    /// The aggregator decides.
    Judging,
    /// Ended with a release.
    Released {
        /// Folder digest of the release.
        release: Digest,
        /// Its report.
        report: Digest,
    },
    /// Ended without one.
    Rejected {
        /// Why.
        reason: Reason,
    },
}

impl RoundPhase {
    /// The phase that collects contributions, if this is one.
    #[must_use]
    pub const fn collecting(self) -> Option<Phase> {
        match self {
            Self::Contribute => Some(Phase::Contribute),
            Self::Distil { inner } => Some(Phase::Distil { inner }),
            Self::Evaluate => Some(Phase::Evaluate),
            Self::Opening
            | Self::Fusing
            | Self::Merging { .. }
            | Self::Judging
            | Self::Released { .. }
            | Self::Rejected { .. } => None,
        }
    }

    /// Whether the round has ended.
    #[must_use]
    pub const fn is_finished(self) -> bool {
        matches!(self, Self::Released { .. } | Self::Rejected { .. })
    }
}

/// A contribution that may come in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Admission {
    /// Its slot is empty and open.
    New,
    /// The same artefact was accepted before: answer with the same receipt.
    Repeat,
}

/// Why an event does not follow from the state.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum RoundError {
    /// The phase takes no such event.
    #[error("event {event} in phase {phase:?}")]
    Unexpected {
        /// Name of the event.
        event: &'static str,
        /// Where the round stands.
        phase: RoundPhase,
    },
    /// `Opened` names another manifest.
    #[error("opened with manifest {got}, expected {expected}")]
    Manifest {
        /// Manifest in the event.
        got: Digest,
        /// The round's.
        expected: Digest,
    },
    /// The institution is no member of this round.
    #[error("{0} is not a member of the round")]
    NotMember(InstitutionId),
    /// The slot is not open to this contribution.
    #[error("{} {sequence} of {institution}: {code}", kind.name())]
    Slot {
        /// Who.
        institution: InstitutionId,
        /// What.
        kind: Kind,
        /// Its slot.
        sequence: u32,
        /// What a sender would be told.
        code: RejectCode,
    },
    /// The slot holds this very artefact already.
    #[error("{} {sequence} of {institution} was accepted before", kind.name())]
    Repeated {
        /// Who.
        institution: InstitutionId,
        /// What.
        kind: Kind,
        /// Its slot.
        sequence: u32,
    },
    /// Members are missing and the deadline has not passed.
    #[error("phase {phase:?} ended at {} before its deadline {}", at.0, deadline.0)]
    Early {
        /// The phase.
        phase: Phase,
        /// Time of the event.
        at: UnixMillis,
        /// Time the phase waits until.
        deadline: UnixMillis,
    },
    /// Fewer members than the phase needs, or quorum is denied although it is there.
    #[error("phase {phase:?} ended with {got} members, its quorum is {quorum}")]
    Quorum {
        /// The phase.
        phase: Phase,
        /// Members that count.
        got: usize,
        /// Members that it needs.
        quorum: usize,
    },
    /// The list of a `Closed` event is not ascending or names a member that is not complete.
    #[error("phase {phase:?} closed with members that are out of order or incomplete")]
    Members {
        /// The phase.
        phase: Phase,
    },
}
