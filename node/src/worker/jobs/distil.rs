//! Jobs that train the pivot's adapter: the optimiser goes on from one inner round to the next, also in another process.

use consilium_protocol::{Digest, limits};

use super::lesson::Known;
use super::{Done, Watch, Worker, notes};
use crate::spool::{DistilJob, JobId};
use crate::worker::error::WorkError;
use crate::worker::source::LoadedModel;
use crate::worker::train::distill::{Distiller, Settings};

/// Begins the name of every state of an optimiser.
const STATE: &str = "optimiser-";

/// A distiller and where it is.
#[derive(Debug)]
pub(super) struct Running {
    distiller: Distiller,
    manifest: Digest,
    /// Last inner round that it has seen the end of.
    after: Option<u32>,
    /// What was found out for earlier inner rounds.
    known: Known,
}

impl Worker<'_> {
    pub(super) fn distil(&mut self, id: &JobId, job: &DistilJob) -> Result<Done, WorkError> {
        self.source = None;
        let mut running = self.resume(job)?;
        let result = self.inner_round(id, job, &mut running);
        // After an error the optimiser is somewhere inside of the round; the next job reads it back from disk.
        if result.is_ok() {
            running.after = Some(job.inner);
            self.distiller = Some(running);
        }
        result
    }

    fn inner_round(
        &mut self,
        id: &JobId,
        job: &DistilJob,
        running: &mut Running,
    ) -> Result<Done, WorkError> {
        let Running {
            distiller, known, ..
        } = running;
        let start = self.spool.read_blob(&job.start, limits::ARTEFACT)?;
        let learned = self.learn(id, job, distiller, known, &start)?;
        let artefact = self.spool.put_blob(&distiller.adapter_bytes()?)?;
        self.keep_state(job, distiller)?;
        Ok((artefact, notes(learned)))
    }

    pub(super) fn watch<'w>(&'w self, id: &'w JobId, what: &'static str) -> Watch<'w> {
        Watch::new(&self.spool, self.stop, id, what)
    }

    /// The distiller as it was when the inner round before this job's ended, or a new one.
    fn resume(&mut self, job: &DistilJob) -> Result<Running, WorkError> {
        let settings = Settings::of(&job.training, job.seed)?;
        let saved = self.saved_states(&job.manifest)?;
        let before = saved.iter().rev().find(|(inner, _)| *inner < job.inner);
        let after = before.map(|(inner, _)| *inner);
        if let Some(running) = self.distiller.take()
            && running.manifest == job.manifest
            && running.after == after
            && *running.distiller.settings() == settings
        {
            return Ok(running);
        }
        let folder = self.folders.pivot.resolve()?;
        let trains_tables = settings.lora.saves_embedding || settings.lora.saves_head;
        let spool = self.spool.state_path("");
        let storage = self.memory.storage(trains_tables, &spool)?;
        let mut pivot = LoadedModel::load_as(&folder, &storage)?;
        let again = self.memory.checkpoint_activations;
        pivot.model.checkpoint_activations(again);
        let mut distiller = Distiller::new(pivot, settings)?;
        if let Some((inner, name)) = before {
            distiller.restore_state(&self.spool.state_path(name))?;
            tracing::info!(
                inner,
                "continues with the optimiser of an earlier inner round"
            );
        }
        Ok(Running {
            distiller,
            manifest: job.manifest,
            after,
            known: Known::default(),
        })
    }

    /// Writes the optimiser's state and removes those that no job can need: other rounds', and of this round's all but
    /// the one before, because the job may be done again.
    fn keep_state(&self, job: &DistilJob, distiller: &Distiller) -> Result<(), WorkError> {
        let name = state_name(&job.manifest, job.inner);
        distiller.save_state(&self.spool.state_path(&name))?;
        let needed: Vec<String> = self
            .saved_states(&job.manifest)?
            .into_iter()
            .filter(|(inner, _)| *inner <= job.inner)
            .map(|(_, name)| name)
            .rev()
            .take(2)
            .collect();
        for name in self.spool.states_named(STATE)? {
            if !needed.contains(&name) {
                self.spool.remove_state(&name)?;
            }
        }
        Ok(())
    }

    /// States of a round by inner round, ascending.
    fn saved_states(&self, manifest: &Digest) -> Result<Vec<(u32, String)>, WorkError> {
        let mut found: Vec<(u32, String)> = self
            .spool
            .states_named(STATE)?
            .into_iter()
            .filter_map(|name| {
                let inner = name.rsplit_once('-')?.1.parse().ok()?;
                (name == state_name(manifest, inner)).then_some((inner, name))
            })
            .collect();
        found.sort_unstable();
        Ok(found)
    }
}

fn state_name(manifest: &Digest, inner: u32) -> String {
    format!("{STATE}{manifest}-{inner:04}")
}
