//! From the aggregator's status to jobs of the spool: everything that a task refers to is proved by the log, fetched by
//! digest, and laid out for the worker before the job appears.

use std::collections::BTreeSet;
use std::sync::Arc;

use consilium_protocol::artefact::Kind;
use consilium_protocol::event::Event;
use consilium_protocol::manifest::Manifest;
use consilium_protocol::message::{Logged, Status, Task};
use consilium_protocol::quic::download;
use consilium_protocol::{Digest, limits};

use super::lessons::HomeWork;
use super::round::{self, OpenRound, REFERENCE, RefusedRound};
use super::session::{Ended, Session};
use super::trust::TrustError;
use super::{AgentError, LAST_OUTCOME, blocking};
use crate::spool::{DistilJob, EvaluateJob, Job, JobId, Outcome, ScoreJob, SpoolError};

/// Jobs of one status.
#[derive(Debug)]
pub(super) struct Plan {
    status: Status,
    /// None if there is nothing to hand over.
    pub(super) round: Option<Arc<OpenRound>>,
    pub(super) jobs: Vec<PlannedJob>,
    /// What is made first and stays here.
    pub(super) home: Option<HomeWork>,
}

/// One job and the slot that its artefact fills.
#[derive(Debug, Clone)]
pub(super) struct PlannedJob {
    pub(super) id: JobId,
    pub(super) kind: Kind,
    pub(super) sequence: u32,
    /// The aggregator may have it already; what is missing is its receipt.
    pub(super) receipt_only: bool,
}

/// Jobs of a task: those whose artefacts are handed over, and what must be made before.
#[derive(Debug, Default)]
pub(super) struct Jobs {
    pub(super) hand_over: Vec<(Job, Kind, u32)>,
    pub(super) home: Option<(Vec<ScoreJob>, DistilJob)>,
}

impl Jobs {
    fn one(job: Job, kind: Kind, sequence: u32) -> Self {
        Self {
            hand_over: vec![(job, kind, sequence)],
            home: None,
        }
    }
}

impl Plan {
    /// Whether this plan serves a later status as well: the same one, or fewer shards of the same task.
    pub(super) fn take_on(&mut self, status: &Status) -> bool {
        if self.status == *status {
            return true;
        }
        let (Task::Score { shards: old }, Task::Score { shards: new }) =
            (&self.status.task, &status.task)
        else {
            return false;
        };
        if self.status.round.as_ref().map(|round| &round.entry)
            != status.round.as_ref().map(|round| &round.entry)
            || !new.iter().all(|shard| old.contains(shard))
        {
            return false;
        }
        self.jobs
            .retain(|job| job.receipt_only || new.contains(&job.sequence));
        self.status = status.clone();
        true
    }
}

impl Session<'_> {
    /// Verifies what a status says, fetches what its task needs, and submits the jobs.
    pub(super) async fn prepare(&mut self, status: &Status) -> Result<Plan, Ended> {
        let mut plan = Plan {
            status: status.clone(),
            round: None,
            jobs: Vec::new(),
            home: None,
        };
        let round = match &status.round {
            Some(logged) => self.open_round(logged).await?,
            None => None,
        };
        match (&status.task, round) {
            (Task::Wait, None) => {}
            (Task::Finished { outcome }, _) => self.finished(outcome)?,
            (_, None) if status.round.is_none() => {
                return Err(TrustError::Unexpected("there: a task without its round").into());
            }
            // The refusal was logged when the round was opened.
            (_, None) => {}
            (task, Some(round)) => {
                let jobs = self.jobs_of(&round, task).await?;
                let planned = self.submit(&jobs.hand_over)?;
                plan.jobs = self.without_receipt(&round, &planned)?;
                plan.jobs.extend(planned);
                let home = jobs
                    .home
                    .map(|(scores, then)| self.begin_at_home(scores, then));
                plan.home = home.transpose()?;
                if !jobs.hand_over.is_empty() || plan.home.is_some() {
                    self.withdraw_others(&plan)?;
                }
                plan.round = Some(round);
            }
        }
        Ok(plan)
    }

    /// The round, or none if the node does not take part; the reason is logged once.
    async fn open_round(&mut self, logged: &Logged) -> Result<Option<Arc<OpenRound>>, Ended> {
        let entry = Digest::of(&logged.entry);
        if let Some((known, round)) = &self.round
            && *known == entry
        {
            return Ok(round.clone());
        }
        let opened = self.agent.trust.entry(logged)?;
        let Event::Opened { manifest, start } = opened.event else {
            return Err(TrustError::Unexpected("the opening of a round").into());
        };
        self.agent.trust.round(opened.round, manifest)?;
        let document = u64::try_from(limits::DOCUMENT).unwrap_or(u64::MAX);
        self.fetch(&manifest, document).await?;
        let note = self.agent.spool.read_blob(&manifest, document)?;
        let institution = self.agent.config.institution.clone();
        let checked = round::check_manifest(&note, opened.round, &self.agent.trust, &institution);
        let open = match checked {
            Ok(checked) => OpenRound {
                manifest: checked,
                digest: manifest,
                start,
            },
            Err(refusal) => return Ok(self.refuse(entry, opened.round, &refusal)),
        };
        match self.check_here(&open).await? {
            Ok(()) => {
                tracing::info!(
                    round = %opened.round,
                    %manifest,
                    symbols = open.manifest.symbols,
                    shards = open.manifest.shards(),
                    "takes part in the round"
                );
                let open = Arc::new(open);
                self.round = Some((entry, Some(Arc::clone(&open))));
                Ok(Some(open))
            }
            Err(refusal) => Ok(self.refuse(entry, opened.round, &refusal)),
        }
    }

    fn refuse(
        &mut self,
        entry: Digest,
        round: consilium_protocol::RoundId,
        refusal: &RefusedRound,
    ) -> Option<Arc<OpenRound>> {
        let reason = refusal as &dyn std::error::Error;
        tracing::error!(%round, reason, "does not take part in the round");
        self.round = Some((entry, None));
        None
    }

    /// Policy, pivot and reference set of this site against the manifest.
    async fn check_here(&self, open: &OpenRound) -> Result<Result<(), RefusedRound>, Ended> {
        let (manifest, digest) = (open.manifest.clone(), open.digest);
        let accepted = self
            .agent
            .with_gate(move |gate| gate.accepts(&manifest, &digest))
            .await?;
        if let Err(error) = accepted {
            return Ok(Err(RefusedRound::Policy(error)));
        }
        if let Err(refusal) = round::check_setup(&open.manifest, &self.agent.config) {
            return Ok(Err(refusal));
        }
        let pivot = self.agent.config.pivot.resolve_or_folder();
        let expected = open.manifest.pivot;
        // A node of capacity 0 contributes records only and may have no pivot.
        if self.agent.config.capacity > 0 || pivot.exists() {
            let checked = blocking(move || round::check_pivot(&pivot, expected)).await?;
            if checked.is_err() {
                return Ok(checked);
            }
        }
        let reference = open.manifest.reference;
        match self.agent.config.reference.clone() {
            Some(path) if !self.agent.spool.has_blob(&reference) => {
                let spool = self.agent.spool.clone();
                let taken =
                    blocking(move || round::take_reference(&path, reference, &spool)).await?;
                if let Err(refusal) = taken? {
                    return Ok(Err(refusal));
                }
            }
            Some(_) => {}
            None => self.fetch(&reference, REFERENCE).await?,
        }
        let (spool, manifest) = (self.agent.spool.clone(), open.manifest.clone());
        let checked = blocking(move || {
            let bytes = spool.read_blob(&reference, REFERENCE)?;
            Ok::<_, SpoolError>(round::check_reference(&manifest, &bytes))
        });
        Ok(checked.await??)
    }

    async fn jobs_of(&self, round: &OpenRound, task: &Task) -> Result<Jobs, Ended> {
        let shares_records = round.manifest.mode.shares_records();
        match task {
            Task::Wait | Task::Finished { .. } => Ok(Jobs::default()),
            Task::Score { .. } | Task::Distil { .. } if !shares_records => {
                Err(TrustError::Unexpected("in keeping with the manifest's mode").into())
            }
            Task::Train { .. } if shares_records => {
                Err(TrustError::Unexpected("in keeping with the manifest's mode").into())
            }
            Task::Score { shards } => Ok(Jobs {
                hand_over: score_jobs(round, shards)?,
                home: None,
            }),
            Task::Distil {
                inner,
                start,
                targets,
                part,
            } => {
                let lesson = self.fused_lesson(round, targets, *part).await?;
                let job = self.distil_job(round, *inner, start, lesson).await?;
                Ok(Jobs::one(Job::Distil(job), Kind::Adapter, *inner))
            }
            Task::Train { inner, start } => {
                let (scores, lesson) = self.home_lesson(round).await?;
                let job = self.distil_job(round, *inner, start, lesson).await?;
                if scores.is_empty() {
                    return Ok(Jobs::one(Job::Distil(job), Kind::Adapter, *inner));
                }
                Ok(Jobs {
                    hand_over: Vec::new(),
                    home: Some((scores, job)),
                })
            }
            Task::Evaluate { candidate } => {
                let last = round.manifest.training.inner_rounds.saturating_sub(1);
                let candidate = self.merged(round, last, candidate)?;
                self.fetch(&candidate, limits::ARTEFACT).await?;
                let job = EvaluateJob {
                    round: round.manifest.round,
                    candidate,
                    training: round.manifest.training.clone(),
                };
                Ok(Jobs::one(Job::Evaluate(job), Kind::Evaluation, 0))
            }
        }
    }

    /// Adapter that an inner round starts from, by its log entry.
    pub(super) fn start(
        &self,
        round: &OpenRound,
        inner: u32,
        start: &Logged,
    ) -> Result<Digest, TrustError> {
        match inner.checked_sub(1) {
            Some(before) => self.merged(round, before, start),
            None => {
                let entry = self.agent.trust.entry(start)?;
                let opened = matches!(entry.event, Event::Opened { manifest, .. } if manifest == round.digest);
                if opened {
                    Ok(round.start)
                } else {
                    Err(TrustError::Unexpected("the opening of this round"))
                }
            }
        }
    }

    /// Adapter that the merge of an inner round gave, by its log entry.
    fn merged(&self, round: &OpenRound, of: u32, logged: &Logged) -> Result<Digest, TrustError> {
        let entry = self.agent.trust.entry(logged)?;
        match entry.event {
            Event::Merged { inner, adapter, .. }
                if inner == of && entry.round == round.manifest.round =>
            {
                Ok(adapter)
            }
            _ => Err(TrustError::Unexpected(
                "the merge that the task starts from",
            )),
        }
    }

    fn submit(&self, jobs: &[(Job, Kind, u32)]) -> Result<Vec<PlannedJob>, SpoolError> {
        let planned = jobs.iter().map(|(job, kind, sequence)| {
            Ok(PlannedJob {
                id: self.agent.spool.submit(job)?,
                kind: *kind,
                sequence: *sequence,
                receipt_only: false,
            })
        });
        planned.collect()
    }

    /// Jobs whose artefact left in this round and whose receipt was lost on the way. Sending the same bytes again is no
    /// second contribution; it brings the receipt.
    fn without_receipt(
        &self,
        round: &OpenRound,
        planned: &[PlannedJob],
    ) -> Result<Vec<PlannedJob>, SpoolError> {
        let mut lost = Vec::new();
        for slot in self.agent.unacknowledged(&round.digest) {
            let is_slot = |job: &Job| match job {
                Job::Score(job) => (Kind::Records, job.shard) == (slot.kind, slot.sequence),
                Job::Distil(job) => (Kind::Adapter, job.inner) == (slot.kind, slot.sequence),
                Job::Evaluate(_) => slot.kind == Kind::Evaluation,
            };
            for (id, job) in self.agent.spool.jobs_in_order()? {
                let known = planned.iter().any(|planned| planned.id == id);
                if job.round() == slot.round && is_slot(&job) && !known {
                    lost.push(PlannedJob {
                        id,
                        kind: slot.kind,
                        sequence: slot.sequence,
                        receipt_only: true,
                    });
                }
            }
        }
        Ok(lost)
    }

    /// Withdraws jobs that nobody waits for any more. Results stay until the round ends: a restarted aggregator may ask
    /// again.
    fn withdraw_others(&self, plan: &Plan) -> Result<(), SpoolError> {
        let at_home = plan.home.iter().flat_map(|home| &home.scores);
        let wanted: BTreeSet<&JobId> = plan.jobs.iter().chain(at_home).map(|job| &job.id).collect();
        let spool = &self.agent.spool;
        for (id, _) in spool.jobs_in_order()? {
            if !wanted.contains(&id) && !matches!(spool.outcome(&id)?, Some(Outcome::Done { .. })) {
                tracing::info!(job = %id, "withdrawn");
                spool.withdraw(&id)?;
            }
        }
        Ok(())
    }

    /// Notes how a round ended and clears the spool of it.
    fn finished(&self, outcome: &Logged) -> Result<(), Ended> {
        let entry = self.agent.trust.entry(outcome)?;
        match &entry.event {
            Event::Released { release, .. } => {
                tracing::info!(round = %entry.round, %release, "the round ended with a release");
            }
            Event::Rejected { reason, .. } => {
                tracing::warn!(round = %entry.round, ?reason, "the round ended without a release");
            }
            _ => return Err(TrustError::Unexpected("the end of a round").into()),
        }
        let spool = &self.agent.spool;
        spool.write_state(LAST_OUTCOME, &outcome.entry)?;
        for (id, job) in spool.jobs_in_order()? {
            if job.round() <= entry.round {
                spool.withdraw(&id)?;
            }
        }
        let reference = self
            .round
            .as_ref()
            .and_then(|(_, round)| round.as_ref())
            .map(|round| round.manifest.reference);
        spool.keep_blobs(&reference.into_iter().collect())?;
        Ok(())
    }

    /// Makes a blob of an artefact of the aggregator, unless it is one.
    pub(super) async fn fetch(&self, digest: &Digest, limit: u64) -> Result<(), Ended> {
        if self.agent.spool.has_blob(digest) {
            return Ok(());
        }
        let into = self.agent.spool.blob_path(digest);
        let mut progress = |received: u64| tracing::debug!(%digest, received, "receiving");
        let length = download(
            &self.connection,
            *digest,
            &into,
            limit,
            &self.pace,
            &mut progress,
        )
        .await?;
        tracing::info!(%digest, bytes = length, "fetched");
        Ok(())
    }
}

fn score_jobs(round: &OpenRound, shards: &[u32]) -> Result<Vec<(Job, Kind, u32)>, Ended> {
    let job = |shard: u32| {
        if shard >= round.manifest.shards() {
            return Err(AgentError::from(TrustError::Unexpected(
                "in keeping with the manifest: a shard beyond the last",
            )));
        }
        Ok((
            Job::Score(score_job(&round.manifest, shard)),
            Kind::Records,
            shard,
        ))
    };
    let jobs: Result<_, AgentError> = shards.iter().map(|shard| job(*shard)).collect();
    Ok(jobs?)
}

/// The job of one shard that the manifest has.
pub(super) fn score_job(manifest: &Manifest, shard: u32) -> ScoreJob {
    ScoreJob {
        round: manifest.round,
        shard,
        items: manifest.shard_range(shard),
        reference: manifest.reference,
        symbol_space: manifest.symbol_space,
        symbols: manifest.symbols,
        fill_permille: manifest.fill_permille,
    }
}
