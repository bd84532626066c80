//! What an inner round of a manifest's mode learns from, and the work that is done for it at home.
//!
//! In mode `pairwise` the site's records of the reference set are made here by the same jobs that make them in mode
//! `unified`, also where the source is behind a server. Their shards are named in the job of the training and in nothing
//! else: the gate lets no records leave in that mode.

use consilium_protocol::artefact::Kind;
use consilium_protocol::event::{Event, TargetIndex};
use consilium_protocol::manifest::{Distillation, Manifest, Mode};
use consilium_protocol::message::{Logged, Part};
use consilium_protocol::{Digest, limits};

use super::round::OpenRound;
use super::session::{Ended, Next, POLL, Session};
use super::tasks::{PlannedJob, score_job};
use super::trust::TrustError;
use crate::spool::{DistilJob, Job, Lesson, Outcome, RecordFiles, Rival, ScoreJob, SpoolError};

/// Longest index of targets, in bytes: digests of a hundred thousand shards.
const INDEX: u64 = 8 << 20;

/// Records that are made at home, and the training that waits for them.
#[derive(Debug, Clone)]
pub(super) struct HomeWork {
    pub(super) scores: Vec<PlannedJob>,
    then: DistilJob,
}

impl Session<'_> {
    /// One inner round's job; the adapter to start from is proved by its log entry and fetched.
    pub(super) async fn distil_job(
        &self,
        round: &OpenRound,
        inner: u32,
        start: &Logged,
        lesson: Lesson,
    ) -> Result<DistilJob, Ended> {
        let start = self.start(round, inner, start)?;
        self.fetch(&start, limits::ARTEFACT).await?;
        let manifest = &round.manifest;
        Ok(DistilJob {
            round: manifest.round,
            manifest: round.digest,
            inner,
            start,
            lesson,
            training: manifest.training.clone(),
            seed: manifest.seed,
        })
    }

    /// Fused records, by the entry that names their index.
    pub(super) async fn fused_lesson(
        &self,
        round: &OpenRound,
        targets: &Logged,
        part: Part,
    ) -> Result<Lesson, Ended> {
        let manifest = &round.manifest;
        let entry = self.agent.trust.entry(targets)?;
        let Event::Fused { targets: index, .. } = entry.event else {
            return Err(TrustError::Unexpected("the fusion of the records").into());
        };
        if entry.round != manifest.round {
            return Err(TrustError::Unexpected("of this round: the fusion").into());
        }
        self.fetch(&index, INDEX).await?;
        let bytes = self.agent.spool.read_blob(&index, INDEX)?;
        // What the manifest committed to before the records came in, and nothing chosen after them.
        let is_of_round = |index: &TargetIndex| {
            u32::try_from(index.shards.len()) == Ok(manifest.shards())
                && index.key == manifest.screening.decoys
                && index.withheld.is_sorted_by(|a, b| a < b)
                && (index.key.is_some() || index.withheld.is_empty())
        };
        let TargetIndex {
            shards, withheld, ..
        } = serde_json::from_slice::<TargetIndex>(&bytes)
            .ok()
            .filter(is_of_round)
            .ok_or(TrustError::Unexpected("an index of this round's targets"))?;
        for shard in &shards {
            self.fetch(shard, limits::SHARD).await?;
        }
        let competes = manifest.training.distillation == Distillation::DualTrie;
        let rival = if competes {
            Some(self.rival(round).await?)
        } else {
            None
        };
        Ok(Lesson::Fused {
            records: RecordFiles {
                withheld,
                ..record_files(manifest, shards)
            },
            part,
            rival,
        })
    }

    /// What lies at the site, and the records that have to be made for it.
    pub(super) async fn home_lesson(
        &self,
        round: &OpenRound,
    ) -> Result<(Vec<ScoreJob>, Lesson), Ended> {
        let manifest = &round.manifest;
        if manifest.mode == Mode::Adapters {
            return Ok((Vec::new(), Lesson::Private));
        }
        let records = record_files(manifest, Vec::new());
        if manifest.training.distillation == Distillation::Labels {
            return Ok((Vec::new(), Lesson::Public { records }));
        }
        let rival = self.rival(round).await?;
        let scores = (0..manifest.shards()).map(|shard| score_job(manifest, shard));
        Ok((scores.collect(), Lesson::Own { records, rival }))
    }

    async fn rival(&self, round: &OpenRound) -> Result<Rival, Ended> {
        self.fetch(&round.start, limits::ARTEFACT).await?;
        Ok(Rival {
            adapter: round.start,
            symbols: round.manifest.symbols,
            fill_permille: round.manifest.fill_permille,
        })
    }

    /// Submits the jobs whose artefacts stay here.
    pub(super) fn begin_at_home(
        &self,
        scores: Vec<ScoreJob>,
        then: DistilJob,
    ) -> Result<HomeWork, SpoolError> {
        let planned = scores.into_iter().map(|job| {
            let sequence = job.shard;
            Ok(PlannedJob {
                id: self.agent.spool.submit(&Job::Score(job))?,
                kind: Kind::Records,
                sequence,
                receipt_only: false,
            })
        });
        Ok(HomeWork {
            scores: planned.collect::<Result<_, SpoolError>>()?,
            then,
        })
    }

    /// Looks for the records that are made at home; once all are there the training is submitted.
    pub(super) fn work_at_home(
        &mut self,
        round: &OpenRound,
        home: &HomeWork,
    ) -> Result<Next, Ended> {
        let mut shards = Vec::with_capacity(home.scores.len());
        for job in &home.scores {
            match self.agent.spool.outcome(&job.id)? {
                Some(Outcome::Done { artefact, .. }) if self.agent.spool.has_blob(&artefact) => {
                    shards.push(artefact);
                }
                Some(Outcome::Done { .. }) => {
                    tracing::warn!(job = %job.id, "its records are gone; made again");
                    self.agent.spool.reset(&job.id)?;
                    return Ok(Next::After(POLL));
                }
                Some(Outcome::Failed { .. }) if self.is_settled(round, job) => {
                    return Ok(Next::Idle);
                }
                Some(Outcome::Failed { problem }) => {
                    let again = self.failed(round, job, &problem)?;
                    return Ok(if again { Next::After(POLL) } else { Next::Idle });
                }
                None => return Ok(Next::After(POLL)),
            }
        }
        let mut job = home.then.clone();
        if let Lesson::Own { records, .. } = &mut job.lesson {
            records.shards = shards;
        }
        let sequence = job.inner;
        let planned = PlannedJob {
            id: self.agent.spool.submit(&Job::Distil(job))?,
            kind: Kind::Adapter,
            sequence,
            receipt_only: false,
        };
        if let Some(plan) = &mut self.plan {
            plan.jobs.push(planned);
            plan.home = None;
        }
        Ok(Next::Again)
    }
}

fn record_files(manifest: &Manifest, shards: Vec<Digest>) -> RecordFiles {
    RecordFiles {
        reference: manifest.reference,
        items: manifest.items,
        shards,
        shard_items: manifest.shard_items,
        symbol_space: manifest.symbol_space,
        withheld: Vec::new(),
    }
}
