//! What others see of the state: sessions a board, the operator an overview.

use std::collections::BTreeMap;
use std::sync::Arc;

use consilium_protocol::InstitutionId;
use consilium_protocol::artefact::Kind;
use consilium_protocol::message::{Status, Task};
use consilium_protocol::round::RoundTask;

use super::board::{Board, MemberOverview, Overview, RoundOverview};
use super::driver::overview_path;
use super::request;
use super::state::{Active, State, is_over};
use crate::server::validate::Checks;

impl State {
    /// What sessions may see.
    #[must_use]
    pub fn board(&self) -> Board {
        let public = Arc::new(self.public.clone());
        let Some(active) = &self.active else {
            return Board {
                public,
                ..Board::default()
            };
        };
        let round = &active.round;
        let statuses = round
            .manifest()
            .members
            .iter()
            .filter_map(|who| Some((who.clone(), self.status(active, who)?)))
            .collect();
        let binding = (!is_over(round.phase())).then(|| round.manifest().binding(round.digest()));
        let checks = active.adapter.map(|start| Checks {
            manifest: Arc::new(round.manifest().clone()),
            start,
        });
        Board {
            statuses,
            binding,
            checks,
            public,
        }
    }

    fn status(&self, active: &Active, who: &InstitutionId) -> Option<Status> {
        let logged = |index: u64| self.log.logged(index).ok();
        let task = match active.round.task(who) {
            RoundTask::Wait => Task::Wait,
            RoundTask::Score { shards } => Task::Score { shards },
            RoundTask::Distil { inner, part, .. } => Task::Distil {
                inner,
                start: logged(*active.merged.last().unwrap_or(&active.opened))?,
                targets: logged(active.fused?)?,
                part,
            },
            RoundTask::Train { inner, .. } => Task::Train {
                inner,
                start: logged(*active.merged.last().unwrap_or(&active.opened))?,
            },
            RoundTask::Evaluate { .. } => Task::Evaluate {
                candidate: logged(*active.merged.last()?)?,
            },
            RoundTask::Finished => Task::Finished {
                outcome: logged(active.outcome?)?,
            },
        };
        Some(Status {
            round: Some(logged(active.opened)?),
            task,
        })
    }

    /// Writes what the operator sees.
    ///
    /// # Errors
    /// The file system's reason.
    pub fn write_overview(
        &self,
        connections: &BTreeMap<InstitutionId, usize>,
    ) -> std::io::Result<()> {
        let overview = Overview {
            consortium: self.bench.charter.consortium.to_string(),
            listening: self.setup.listening.clone(),
            log_size: self.log.size(),
            round: self
                .active
                .as_ref()
                .map(|active| overview(active, connections)),
        };
        request::write_atomically(&overview_path(&self.setup.data_dir), &overview)
    }
}

fn overview(active: &Active, connections: &BTreeMap<InstitutionId, usize>) -> RoundOverview {
    let round = &active.round;
    let count = |kind: Kind, who: &InstitutionId| {
        round
            .contributions(kind)
            .iter()
            .filter(|(institution, ..)| institution == who)
            .count()
    };
    RoundOverview {
        round: round.manifest().round.0,
        manifest: round.digest(),
        phase: format!("{:?}", round.phase()),
        merged: u32::try_from(active.merged.len()).unwrap_or(u32::MAX),
        inner_rounds: round.manifest().training.inner_rounds,
        truncation_ppm: active.truncation_ppm.clone(),
        targets: active.targets,
        routing: active.routing,
        records: active.records,
        adapter: active.adapter,
        release: active.release,
        rejected: active.rejected.clone(),
        members: round
            .manifest()
            .members
            .iter()
            .map(|who| MemberOverview {
                institution: who.to_string(),
                connections: connections.get(who).copied().unwrap_or(0),
                capacity: round.capacity(who),
                shards: count(Kind::Records, who),
                adapters: count(Kind::Adapter, who),
                evaluated: count(Kind::Evaluation, who) > 0,
            })
            .collect(),
    }
}
