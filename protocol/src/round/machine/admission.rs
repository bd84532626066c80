//! What may come in, and when a phase has all that it waits for.

use std::collections::BTreeMap;

use super::Round;
use crate::artefact::Kind;
use crate::contribution::Statement;
use crate::ids::{Digest, InstitutionId};
use crate::reject::RejectCode;
use crate::round::effect::{Admission, RoundPhase};

impl Round {
    /// Whether a verified contribution may come in. A repeat of what was accepted is welcome in every later phase.
    ///
    /// # Errors
    /// What the sender is told.
    pub fn admit(&self, statement: &Statement) -> Result<Admission, RejectCode> {
        self.admission(
            &statement.institution,
            statement.kind,
            statement.sequence,
            statement.artefact,
        )
    }

    pub(super) fn admission(
        &self,
        who: &InstitutionId,
        kind: Kind,
        sequence: u32,
        artefact: Digest,
    ) -> Result<Admission, RejectCode> {
        if !self.is_member(who) {
            return Err(RejectCode::NotMember);
        }
        let slots = match kind {
            Kind::Records if self.shares_records() => self.manifest.shards(),
            Kind::Records => 0,
            Kind::Adapter => self.manifest.training.inner_rounds,
            Kind::Evaluation => 1,
        };
        if sequence >= slots {
            return Err(RejectCode::Content);
        }
        match self.slot(who, kind, sequence) {
            Some(held) if held == artefact => return Ok(Admission::Repeat),
            Some(_) => return Err(RejectCode::Equivocation),
            None => {}
        }
        let open = match (kind, self.phase) {
            (Kind::Records, RoundPhase::Contribute) | (Kind::Evaluation, RoundPhase::Evaluate) => {
                true
            }
            (Kind::Adapter, RoundPhase::Distil { inner }) => {
                inner == sequence && self.expected.contains(who)
            }
            _ => false,
        };
        if open {
            Ok(Admission::New)
        } else {
            Err(RejectCode::WrongPhase)
        }
    }

    /// Members whose contributions to the current phase are all here, ascending; in `Evaluate` also those that joined
    /// after it began.
    pub(super) fn complete(&self) -> Vec<InstitutionId> {
        let is_complete = |who: &InstitutionId| match self.phase {
            RoundPhase::Contribute => {
                let slots = self.slots.get(&(Kind::Records, who.clone()));
                slots.map_or(0, BTreeMap::len)
                    >= usize::try_from(self.manifest.shards()).unwrap_or(usize::MAX)
            }
            RoundPhase::Distil { inner } => self.slot(who, Kind::Adapter, inner).is_some(),
            RoundPhase::Evaluate => self.slot(who, Kind::Evaluation, 0).is_some(),
            _ => false,
        };
        let members = self.manifest.members.iter();
        members.filter(|who| is_complete(who)).cloned().collect()
    }

    pub(super) fn is_complete(&self, complete: &[InstitutionId]) -> bool {
        complete.len() >= self.quorum()
            && self
                .expected
                .iter()
                .all(|who| complete.binary_search(who).is_ok())
    }

    pub(super) fn quorum(&self) -> usize {
        usize::try_from(self.manifest.quorum)
            .unwrap_or(usize::MAX)
            .min(self.expected.len())
            .max(1)
    }

    pub(super) fn is_member(&self, who: &InstitutionId) -> bool {
        self.manifest.members.binary_search(who).is_ok()
    }
}
