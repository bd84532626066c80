//! The state of a round and the rules that move it.

mod admission;

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use super::effect::{Admission, Effect, RoundError, RoundPhase, RoundTask, Work};
use super::parts::{part_seed, parts};
use crate::artefact::Kind;
use crate::event::{Event, Phase, Reason};
use crate::ids::{Digest, InstitutionId};
use crate::manifest::Manifest;
use crate::message::Part;
use crate::time::UnixMillis;

/// Artefacts of one member and one kind by sequence.
type Slots = BTreeMap<u32, Digest>;

/// One round, as far as its logged events tell.
#[derive(Debug, Clone, PartialEq)]
pub struct Round {
    manifest: Manifest,
    digest: Digest,
    phase: RoundPhase,
    /// When the current collecting phase began.
    since: UnixMillis,
    /// The newest adapter; the candidate in the end.
    adapter: Option<Digest>,
    momentum: Option<Digest>,
    targets: Option<Digest>,
    slots: BTreeMap<(Kind, InstitutionId), Slots>,
    /// Latest capacity of everybody who joined.
    capacities: BTreeMap<InstitutionId, u32>,
    /// Missed the close of an inner round and did not join again since.
    dropped: BTreeSet<InstitutionId>,
    /// Whom the current collecting phase waits for.
    expected: BTreeSet<InstitutionId>,
    /// Parts of the current inner round, of exactly those expected.
    parts: BTreeMap<InstitutionId, Part>,
    /// Members of the latest `Closed`.
    closed: Vec<InstitutionId>,
    /// What their adapters count, where it was an inner round. A capacity that changes later changes nothing.
    weights: BTreeMap<InstitutionId, u32>,
}

impl Round {
    /// A round whose `Opened` event was not applied yet; `digest` is that of the signed manifest.
    #[must_use]
    pub const fn open(manifest: Manifest, digest: Digest) -> Self {
        Self {
            manifest,
            digest,
            phase: RoundPhase::Opening,
            since: UnixMillis(0),
            adapter: None,
            momentum: None,
            targets: None,
            slots: BTreeMap::new(),
            capacities: BTreeMap::new(),
            dropped: BTreeSet::new(),
            expected: BTreeSet::new(),
            parts: BTreeMap::new(),
            closed: Vec::new(),
            weights: BTreeMap::new(),
        }
    }

    /// Applies one logged event and says what to do next. Reads no clock and draws no randomness.
    ///
    /// # Errors
    /// The event does not follow from the state, which stays as it was.
    pub fn step(&mut self, at: UnixMillis, event: &Event) -> Result<Vec<Effect>, RoundError> {
        match (event, self.phase) {
            (Event::Opened { manifest, start }, RoundPhase::Opening) => {
                if *manifest != self.digest {
                    return Err(RoundError::Manifest {
                        got: *manifest,
                        expected: self.digest,
                    });
                }
                self.adapter = Some(*start);
                Ok(self.begin(
                    if self.shares_records() {
                        RoundPhase::Contribute
                    } else {
                        RoundPhase::Distil { inner: 0 }
                    },
                    at,
                ))
            }
            (_, RoundPhase::Opening) => Err(self.unexpected(event)),
            (_, phase) if phase.is_finished() => Err(self.unexpected(event)),
            (
                Event::Joined {
                    institution,
                    capacity,
                },
                _,
            ) => self.join(institution, *capacity),
            (
                Event::Accepted {
                    institution,
                    kind,
                    sequence,
                    artefact,
                    ..
                },
                _,
            ) => self.accept(institution, *kind, *sequence, *artefact),
            (Event::Refused { .. }, _) => Ok(Vec::new()),
            (Event::Closed { phase, members }, now) if now.collecting() == Some(*phase) => {
                self.close(*phase, at, members)
            }
            (Event::Fused { targets, .. }, RoundPhase::Fusing) => {
                self.targets = Some(*targets);
                Ok(self.begin(RoundPhase::Distil { inner: 0 }, at))
            }
            (
                Event::Merged {
                    inner,
                    adapter,
                    momentum,
                    ..
                },
                RoundPhase::Merging { inner: current },
            ) if *inner == current => {
                self.adapter = Some(*adapter);
                self.momentum = Some(*momentum);
                let next = current.saturating_add(1);
                Ok(self.begin(
                    if next < self.manifest.training.inner_rounds {
                        RoundPhase::Distil { inner: next }
                    } else {
                        RoundPhase::Evaluate
                    },
                    at,
                ))
            }
            (Event::Released { release, report }, RoundPhase::Judging) => {
                Ok(self.finish(RoundPhase::Released {
                    release: *release,
                    report: *report,
                }))
            }
            (Event::Rejected { reason, .. }, _) => self.reject(*reason, at, event),
            _ => Err(self.unexpected(event)),
        }
    }

    /// What must be logged now by completeness or by time, if anything: the close of the phase, or the end of the round
    /// for lack of quorum.
    #[must_use]
    pub fn due(&self, now: UnixMillis) -> Option<Event> {
        let phase = self.phase.collecting()?;
        let members = self.complete();
        let late = self.next_deadline().is_some_and(|deadline| now >= deadline);
        if self.is_complete(&members) || (late && members.len() >= self.quorum()) {
            Some(Event::Closed { phase, members })
        } else {
            late.then_some(Event::Rejected {
                reason: Reason::Quorum,
                blamed: Vec::new(),
                report: None,
            })
        }
    }

    /// When the current phase stops waiting for the missing; none while the aggregator works.
    #[must_use]
    pub fn next_deadline(&self) -> Option<UnixMillis> {
        let deadlines = &self.manifest.deadlines;
        let seconds = match self.phase.collecting()? {
            Phase::Contribute => deadlines.contribute_seconds,
            Phase::Distil { .. } => deadlines.distil_seconds,
            Phase::Evaluate => deadlines.evaluate_seconds,
        };
        Some(self.since.after(Duration::from_secs(seconds.into())))
    }

    /// Work of the aggregator that is outstanding, to be taken up again after a replay.
    #[must_use]
    pub fn work(&self) -> Option<Work> {
        match self.phase {
            RoundPhase::Fusing => Some(Work::Fuse {
                members: self.closed.clone(),
            }),
            RoundPhase::Merging { inner } => Some(Work::Merge {
                inner,
                start: self.adapter?,
                momentum: self.momentum,
                adapters: self
                    .closed
                    .iter()
                    .filter_map(|who| {
                        let adapter = self.slot(who, Kind::Adapter, inner)?;
                        Some((who.clone(), adapter, *self.weights.get(who)?))
                    })
                    .collect(),
            }),
            RoundPhase::Judging => Some(Work::Judge {
                candidate: self.adapter?,
                evaluations: self
                    .closed
                    .iter()
                    .filter_map(|who| Some((who.clone(), self.slot(who, Kind::Evaluation, 0)?)))
                    .collect(),
            }),
            RoundPhase::Opening
            | RoundPhase::Contribute
            | RoundPhase::Distil { .. }
            | RoundPhase::Evaluate
            | RoundPhase::Released { .. }
            | RoundPhase::Rejected { .. } => None,
        }
    }

    /// What this member should do now.
    #[must_use]
    pub fn task(&self, who: &InstitutionId) -> RoundTask {
        if self.phase.is_finished() {
            return RoundTask::Finished;
        }
        if !self.is_member(who) {
            return RoundTask::Wait;
        }
        let task = match self.phase.collecting() {
            Some(Phase::Contribute) => {
                let held = self.slots.get(&(Kind::Records, who.clone()));
                let shards: Vec<u32> = (0..self.manifest.shards())
                    .filter(|shard| held.is_none_or(|held| !held.contains_key(shard)))
                    .take(RoundTask::SHARDS)
                    .collect();
                (!shards.is_empty()).then_some(RoundTask::Score { shards })
            }
            Some(Phase::Distil { inner }) if self.slot(who, Kind::Adapter, inner).is_none() => {
                self.training_task(who, inner)
            }
            Some(Phase::Evaluate) if self.slot(who, Kind::Evaluation, 0).is_none() => self
                .adapter
                .map(|candidate| RoundTask::Evaluate { candidate }),
            _ => None,
        };
        task.unwrap_or(RoundTask::Wait)
    }

    /// The round's manifest.
    #[must_use]
    pub const fn manifest(&self) -> &Manifest {
        &self.manifest
    }

    /// Digest of the signed manifest.
    #[must_use]
    pub const fn digest(&self) -> Digest {
        self.digest
    }

    /// Where the round stands.
    #[must_use]
    pub const fn phase(&self) -> RoundPhase {
        self.phase
    }

    /// Everything of one kind that was accepted, by institution and sequence.
    #[must_use]
    pub fn contributions(&self, kind: Kind) -> Vec<(InstitutionId, u32, Digest)> {
        self.slots
            .iter()
            .filter(|((slot_kind, _), _)| *slot_kind == kind)
            .flat_map(|((_, who), slots)| {
                slots
                    .iter()
                    .map(|(sequence, digest)| (who.clone(), *sequence, *digest))
            })
            .collect()
    }

    /// Latest capacity of a member that joined; none while it is dropped, so that its next sign of life is logged.
    #[must_use]
    pub fn capacity(&self, who: &InstitutionId) -> Option<u32> {
        if self.dropped.contains(who) {
            return None;
        }
        self.capacities.get(who).copied()
    }

    fn begin(&mut self, phase: RoundPhase, at: UnixMillis) -> Vec<Effect> {
        self.phase = phase;
        self.since = at;
        self.parts.clear();
        match phase {
            // Nobody has shown itself before: everybody is waited for, as for records.
            RoundPhase::Distil { inner: 0 } if !self.shares_records() => {
                self.expected = self.manifest.members.iter().cloned().collect();
            }
            RoundPhase::Distil { inner } => {
                let able: Vec<(InstitutionId, u32)> = self
                    .capacities
                    .iter()
                    .filter(|(who, _)| !self.dropped.contains(*who))
                    .map(|(who, capacity)| (who.clone(), *capacity))
                    .collect();
                self.share(inner, &able);
            }
            // The dropped too: a site too slow to train still has a say on whether it fares worse.
            RoundPhase::Evaluate => self.expected = self.capacities.keys().cloned().collect(),
            _ => self.expected = self.manifest.members.iter().cloned().collect(),
        }
        let wake = self.next_deadline().map(Effect::WakeAt);
        wake.into_iter().chain([Effect::Publish]).collect()
    }

    /// Members whose part would be empty are not expected: they would merge with weight 0. Where no records are shared
    /// there are no parts, and those of capacity 0 are not expected.
    fn share(&mut self, inner: u32, able: &[(InstitutionId, u32)]) {
        if !self.shares_records() {
            let trains = able.iter().filter(|(_, capacity)| *capacity > 0);
            self.expected = trains.map(|(who, _)| who.clone()).collect();
            return;
        }
        let seed = part_seed(&self.digest, inner);
        self.parts = parts(seed, self.manifest.items, able)
            .into_iter()
            .filter(|(_, part)| !part.range().is_empty())
            .collect();
        self.expected = self.parts.keys().cloned().collect();
    }

    fn join(&mut self, who: &InstitutionId, capacity: u32) -> Result<Vec<Effect>, RoundError> {
        if !self.is_member(who) {
            return Err(RoundError::NotMember(who.clone()));
        }
        self.capacities.insert(who.clone(), capacity);
        self.dropped.remove(who);
        match self.phase {
            RoundPhase::Distil { inner: 0 } if !self.shares_records() => {
                if capacity > 0 {
                    self.expected.insert(who.clone());
                } else if self.slot(who, Kind::Adapter, 0).is_none() {
                    self.expected.remove(who);
                }
            }
            RoundPhase::Distil { inner } if self.expected.is_empty() => {
                self.share(inner, &[(who.clone(), capacity)]);
            }
            _ => {}
        }
        Ok(vec![Effect::Publish])
    }

    /// What a member that is expected trains on.
    fn training_task(&self, who: &InstitutionId, inner: u32) -> Option<RoundTask> {
        let start = self.adapter?;
        if self.shares_records() {
            return Some(RoundTask::Distil {
                inner,
                start,
                targets: self.targets?,
                part: *self.parts.get(who)?,
            });
        }
        let is_expected = self.expected.contains(who);
        is_expected.then_some(RoundTask::Train { inner, start })
    }

    /// What a member's adapter counts in the merge, at least 1.
    fn weight(&self, who: &InstitutionId) -> Option<u32> {
        if self.shares_records() {
            let part = self.parts.get(who)?;
            return Some(u32::try_from(part.to - part.from).unwrap_or(u32::MAX));
        }
        let declared = self.capacities.get(who).copied().unwrap_or(1);
        let most = self.manifest.max_weight.unwrap_or(1);
        Some(declared.min(most).max(1))
    }

    fn accept(
        &mut self,
        who: &InstitutionId,
        kind: Kind,
        sequence: u32,
        artefact: Digest,
    ) -> Result<Vec<Effect>, RoundError> {
        let institution = who.clone();
        match self.admission(who, kind, sequence, artefact) {
            Ok(Admission::New) => {
                let slots = self.slots.entry((kind, institution)).or_default();
                slots.insert(sequence, artefact);
                Ok(vec![Effect::Publish])
            }
            Ok(Admission::Repeat) => Err(RoundError::Repeated {
                institution,
                kind,
                sequence,
            }),
            Err(code) => Err(RoundError::Slot {
                institution,
                kind,
                sequence,
                code,
            }),
        }
    }

    fn close(
        &mut self,
        phase: Phase,
        at: UnixMillis,
        members: &[InstitutionId],
    ) -> Result<Vec<Effect>, RoundError> {
        let complete = self.complete();
        let ascending = members.is_sorted_by(|a, b| a < b);
        if !ascending || members.iter().any(|m| complete.binary_search(m).is_err()) {
            return Err(RoundError::Members { phase });
        }
        if members.len() < self.quorum() {
            return Err(RoundError::Quorum {
                phase,
                got: members.len(),
                quorum: self.quorum(),
            });
        }
        if !self.is_complete(&complete) {
            self.check_late(phase, at)?;
        }
        if let Phase::Distil { .. } = phase {
            let weight = |who: &InstitutionId| Some((who.clone(), self.weight(who)?));
            self.weights = members.iter().filter_map(weight).collect();
        }
        self.phase = match phase {
            Phase::Contribute => RoundPhase::Fusing,
            Phase::Distil { inner } => {
                let missing = self.expected.iter().filter(|m| !complete.contains(m));
                self.dropped.extend(missing.cloned());
                RoundPhase::Merging { inner }
            }
            Phase::Evaluate => RoundPhase::Judging,
        };
        self.closed = members.to_vec();
        self.expected.clear();
        let run = self.work().map(Effect::Run);
        Ok(run.into_iter().chain([Effect::Publish]).collect())
    }

    fn reject(
        &mut self,
        reason: Reason,
        at: UnixMillis,
        event: &Event,
    ) -> Result<Vec<Effect>, RoundError> {
        match (reason, self.phase) {
            (Reason::Operator, _)
            | (Reason::Gate | Reason::NoGain, RoundPhase::Judging)
            | (Reason::Screening | Reason::PublicGate, RoundPhase::Fusing) => {}
            (Reason::Quorum, now) => {
                let phase = now.collecting().ok_or_else(|| self.unexpected(event))?;
                self.check_late(phase, at)?;
                let (got, quorum) = (self.complete().len(), self.quorum());
                if got >= quorum {
                    return Err(RoundError::Quorum { phase, got, quorum });
                }
            }
            (Reason::Gate | Reason::NoGain | Reason::Screening | Reason::PublicGate, _) => {
                return Err(self.unexpected(event));
            }
        }
        Ok(self.finish(RoundPhase::Rejected { reason }))
    }

    fn finish(&mut self, phase: RoundPhase) -> Vec<Effect> {
        self.phase = phase;
        vec![Effect::Publish, Effect::Finished]
    }

    fn check_late(&self, phase: Phase, at: UnixMillis) -> Result<(), RoundError> {
        match self.next_deadline() {
            Some(deadline) if at < deadline => Err(RoundError::Early {
                phase,
                at,
                deadline,
            }),
            _ => Ok(()),
        }
    }

    fn slot(&self, who: &InstitutionId, kind: Kind, sequence: u32) -> Option<Digest> {
        let slots = self.slots.get(&(kind, who.clone()))?;
        slots.get(&sequence).copied()
    }

    const fn shares_records(&self) -> bool {
        self.manifest.mode.shares_records()
    }

    const fn unexpected(&self, event: &Event) -> RoundError {
        RoundError::Unexpected {
            event: match event {
                Event::Opened { .. } => "opened",
                Event::Joined { .. } => "joined",
                Event::Accepted { .. } => "accepted",
                Event::Refused { .. } => "refused",
                Event::Closed { .. } => "closed",
                Event::Fused { .. } => "fused",
                Event::Merged { .. } => "merged",
                Event::Released { .. } => "released",
                Event::Rejected { .. } => "rejected",
            },
            phase: self.phase,
        }
    }
}
