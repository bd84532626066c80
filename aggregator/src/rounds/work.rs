//! What a round asks of the aggregator between phases: artefacts in, artefacts and one event out. Blocking and pure but
//! for the blob store, so that a restarted aggregator does the same again.

use std::path::PathBuf;

use consilium_protocol::artefact::Kind;
use consilium_protocol::charter::Charter;
use consilium_protocol::decoys::DecoyKey;
use consilium_protocol::evaluation::Evaluation;
use consilium_protocol::event::{Event, Reason, TargetIndex};
use consilium_protocol::limits;
use consilium_protocol::manifest::Manifest;
use consilium_protocol::reference::ReferenceSet;
use consilium_protocol::round::{Round, Work};
use consilium_protocol::shard::Shard;
use consilium_protocol::{Digest, InstitutionId};
use serde::{Deserialize, Serialize};

use crate::config::ReleaseConfig;
use crate::fusion::{
    self, Accountant, Accounts, Content, MergeInput, MergeOutput, Screen, Screened, ShardRouting,
};
use crate::release::{self, Artefact, ReleaseInput, ReleaseKey, Verdict};
use crate::store::Blobs;

/// Everything that work needs and that does not change during a round.
#[derive(Debug)]
pub struct Bench {
    /// The blob store.
    pub blobs: Blobs,
    /// The charter.
    pub charter: Charter,
    /// The reference set.
    pub reference: ReferenceSet,
    /// Folder of all releases.
    pub releases: PathBuf,
    /// What releases say about themselves.
    pub release: ReleaseConfig,
    /// The key that signs them.
    pub release_key: ReleaseKey,
}

/// What the log says of the round beside its state.
#[derive(Debug, Clone, Default)]
pub struct SoFar {
    /// Index of the fused targets.
    pub targets: Option<Digest>,
    /// What screening and accounting found.
    pub records: Option<Digest>,
    /// Truncation error of each merge, in millionths.
    pub truncation_ppm: Vec<u32>,
    /// Evaluations of the release that the manifest names as the previous one.
    pub last_release: Vec<(InstitutionId, Digest)>,
}

/// What the records of a round showed: the artefact that `Fused` and `Rejected` name as their report.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RecordsReport {
    /// Flags and who was kept out.
    pub screening: Screened,
    /// What each institution's records are worth; none where nothing was measured.
    pub accounts: Option<Accounts>,
}

/// What failed, in words for the operator's log.
#[derive(Debug, thiserror::Error)]
#[error("{step}: {source}")]
pub struct WorkError {
    step: &'static str,
    source: Box<dyn std::error::Error + Send + Sync>,
}

impl WorkError {
    /// The thread of the work did not come to an end.
    pub(super) fn ended(error: tokio::task::JoinError) -> Self {
        failed("working")(error)
    }
}

fn failed<E>(step: &'static str) -> impl FnOnce(E) -> WorkError
where
    E: Into<Box<dyn std::error::Error + Send + Sync>>,
{
    move |source| WorkError {
        step,
        source: source.into(),
    }
}

impl Bench {
    /// Does one piece of work of `round` and says what happened.
    ///
    /// # Errors
    /// An artefact is missing or damaged, or the disk fails. The work may be tried again.
    pub fn perform(&self, round: &Round, work: &Work, so_far: &SoFar) -> Result<Event, WorkError> {
        match work {
            Work::Fuse { members } => self.fuse(round, members),
            Work::Merge {
                inner,
                start,
                momentum,
                adapters,
            } => self.merge(round.manifest(), *inner, *start, *momentum, adapters),
            Work::Judge {
                candidate,
                evaluations,
            } => self.judge(round, *candidate, evaluations, so_far),
        }
    }

    fn fuse(&self, round: &Round, members: &[InstitutionId]) -> Result<Event, WorkError> {
        let manifest = round.manifest();
        let key = self.decoy_key(manifest)?;
        let screening = self.screen(round, members, key.as_ref())?;
        let kept: Vec<InstitutionId> = members
            .iter()
            .filter(|who| screening.excluded.binary_search(who).is_err())
            .cloned()
            .collect();
        for flag in &screening.flags {
            tracing::warn!(institution = %flag.institution, finding = ?flag.finding, measured = flag.measured,
                bound = flag.bound, "records give their source away");
        }
        let quorum = usize::try_from(manifest.quorum).unwrap_or(usize::MAX);
        let excluded = screening.excluded.clone();
        if kept.len() < quorum.min(members.len()) && !excluded.is_empty() {
            let report = self.report(&RecordsReport {
                screening,
                accounts: None,
            })?;
            return Ok(Event::Rejected {
                reason: Reason::Screening,
                blamed: excluded,
                report: Some(report),
            });
        }
        let mut shards = Vec::new();
        let mut routing: Vec<ShardRouting> = Vec::new();
        let items = fusion::holdout(manifest, &self.reference, key.as_ref());
        let mut accountant = Accountant::new(manifest, &self.reference, &kept, items);
        for index in 0..manifest.shards() {
            let sources = self.sources(round, index, &kept)?;
            let fused = fusion::fuse_shard(manifest, &self.reference, index, &sources)
                .map_err(failed("fusing records"))?;
            accountant
                .add(index, &sources)
                .map_err(failed("measuring contributions"))?;
            let bytes = fused
                .targets
                .to_bytes()
                .map_err(failed("writing targets"))?;
            shards.push(self.put(&bytes)?);
            routing.push(fused.routing);
        }
        let accounts = accountant.finish();
        let gate = manifest.screening.gate_permille;
        let blamed = accounts
            .as_ref()
            .and_then(|accounts| accounts.blamed(gate))
            .filter(|_| gate > 0)
            .cloned();
        let report = Some(self.report(&RecordsReport {
            screening,
            accounts,
        })?);
        if let Some(blamed) = blamed {
            tracing::warn!(institution = %blamed, "the fusion is better without one member");
            return Ok(Event::Rejected {
                reason: Reason::PublicGate,
                blamed: vec![blamed],
                report,
            });
        }
        let json = |value: serde_json::Result<Vec<u8>>| value.map_err(failed("writing JSON"));
        let index = TargetIndex {
            shards,
            withheld: key.as_ref().map(DecoyKey::withheld).unwrap_or_default(),
            key: manifest.screening.decoys,
        };
        let targets = self.put(&json(serde_json::to_vec(&index))?)?;
        let routing = self.put(&json(serde_json::to_vec(&routing))?)?;
        Ok(Event::Fused {
            targets,
            routing,
            report,
        })
    }

    fn screen(
        &self,
        round: &Round,
        members: &[InstitutionId],
        key: Option<&DecoyKey>,
    ) -> Result<Screened, WorkError> {
        let mut screen = Screen::new(round.manifest(), &self.reference, key);
        for index in 0..round.manifest().shards() {
            let sources = self.sources(round, index, members)?;
            screen
                .add(index, &sources)
                .map_err(failed("screening records"))?;
        }
        Ok(screen.finish())
    }

    /// Shard `index` of these members.
    fn sources(
        &self,
        round: &Round,
        index: u32,
        members: &[InstitutionId],
    ) -> Result<Vec<(InstitutionId, Shard)>, WorkError> {
        round
            .contributions(Kind::Records)
            .iter()
            .filter(|(who, sequence, _)| *sequence == index && members.contains(who))
            .map(|(who, _, digest)| Ok((who.clone(), self.shard(*digest)?)))
            .collect()
    }

    fn decoy_key(&self, manifest: &Manifest) -> Result<Option<DecoyKey>, WorkError> {
        let Some(digest) = manifest.screening.decoys else {
            return Ok(None);
        };
        let bytes = self.read(digest)?;
        DecoyKey::parse(&bytes, &self.reference)
            .map(Some)
            .map_err(failed("reading the key of the decoys"))
    }

    fn report(&self, report: &RecordsReport) -> Result<Digest, WorkError> {
        let bytes = serde_json::to_vec(report).map_err(failed("writing JSON"))?;
        self.put(&bytes)
    }

    fn merge(
        &self,
        manifest: &Manifest,
        inner: u32,
        start: Digest,
        momentum: Option<Digest>,
        adapters: &[(InstitutionId, Digest, u32)],
    ) -> Result<Event, WorkError> {
        let start = self.verified(start)?;
        let momentum = momentum.map(|digest| self.verified(digest)).transpose()?;
        let paths = adapters
            .iter()
            .map(|(_, digest, _)| self.verified(*digest))
            .collect::<Result<Vec<_>, WorkError>>()?;
        let adapters: Vec<_> = adapters
            .iter()
            .zip(&paths)
            .map(|((who, _, weight), path)| (who.clone(), Content::File(path), *weight))
            .collect();
        let draft = || self.blobs.draft().map_err(failed("storing an artefact"));
        let (adapter, velocity) = (draft()?, draft()?);
        let report = fusion::merge(
            MergeInput {
                training: &manifest.training,
                seed: manifest.seed.wrapping_add(u64::from(inner) << 32),
                start: Content::File(&start),
                momentum: momentum.as_deref().map(Content::File),
                adapters: &adapters,
            },
            MergeOutput {
                adapter: adapter.file(),
                momentum: velocity.file(),
            },
        )
        .map_err(failed("merging adapters"))?;
        for member in &report.members {
            tracing::info!(inner, institution = %member.institution, rank = member.rank, part = member.part,
                share = member.share, scale = member.scale, norm = member.norm, flag = member.flag,
                excluded = member.excluded, "adapter is merged");
        }
        let (rule, defence) = (report.rule, report.defence);
        let (mean, worst) = (report.truncation.mean, report.truncation.worst);
        tracing::info!(
            inner,
            rule,
            defence,
            bias = report.bias,
            truncation_mean = mean,
            truncation_worst = worst,
            "adapters are merged"
        );
        let keep = |draft| {
            self.blobs
                .keep(draft)
                .map_err(failed("storing an artefact"))
        };
        Ok(Event::Merged {
            inner,
            adapter: keep(adapter)?,
            momentum: keep(velocity)?,
            truncation_ppm: report.truncation.ppm(),
        })
    }

    fn judge(
        &self,
        round: &Round,
        candidate: Digest,
        evaluations: &[(InstitutionId, Digest)],
        so_far: &SoFar,
    ) -> Result<Event, WorkError> {
        let evaluations = self.evaluations(evaluations)?;
        let before = self.evaluations(&so_far.last_release)?;
        let verdict: Verdict = release::judge(&self.charter, &evaluations, &before);
        if let Some(reason) = verdict.rejected {
            return Ok(Event::Rejected {
                reason,
                blamed: Vec::new(),
                report: None,
            });
        }
        let contributions: Vec<_> = [Kind::Records, Kind::Adapter, Kind::Evaluation]
            .into_iter()
            .flat_map(|kind| {
                round.contributions(kind).into_iter().map(
                    move |(institution, sequence, artefact)| Artefact {
                        institution,
                        kind,
                        sequence,
                        artefact,
                    },
                )
            })
            .collect();
        let adapter = self.verified(candidate)?;
        let rank = fusion::adapter_rank(&adapter).map_err(failed("reading the candidate"))?;
        let own = usize::try_from(round.manifest().training.rank).unwrap_or(usize::MAX);
        let rank = rank.unwrap_or(own);
        let records: Option<RecordsReport> = so_far
            .records
            .map(|digest| {
                serde_json::from_slice(&self.read(digest)?).map_err(failed("reading a report"))
            })
            .transpose()?;
        let published = release::publish(ReleaseInput {
            releases: &self.releases,
            manifest: round.manifest(),
            manifest_digest: round.digest(),
            targets: so_far.targets,
            records: records.as_ref(),
            contributions: &contributions,
            truncation_ppm: &so_far.truncation_ppm,
            verdict: &verdict,
            adapter: &adapter,
            adapter_digest: candidate,
            rank,
            base_model: &self.release.base_model,
            license: &self.release.license,
            key: &self.release_key,
        })
        .map_err(failed("publishing the release"))?;
        Ok(Event::Released {
            release: published.digest,
            report: published.report,
        })
    }

    fn evaluations(
        &self,
        digests: &[(InstitutionId, Digest)],
    ) -> Result<Vec<(InstitutionId, Evaluation)>, WorkError> {
        digests
            .iter()
            .map(|(who, digest)| {
                let bytes = self.read(*digest)?;
                let parsed = Evaluation::parse(&bytes).map_err(failed("reading an evaluation"))?;
                Ok((who.clone(), parsed))
            })
            .collect()
    }

    fn shard(&self, digest: Digest) -> Result<Shard, WorkError> {
        Shard::parse(&self.read(digest)?).map_err(failed("reading a shard"))
    }

    fn read(&self, digest: Digest) -> Result<Vec<u8>, WorkError> {
        self.blobs
            .read(&digest, limits::ARTEFACT)
            .map_err(failed("reading an artefact"))
    }

    fn verified(&self, digest: Digest) -> Result<PathBuf, WorkError> {
        self.blobs
            .verified(&digest)
            .map_err(failed("reading an artefact"))
    }

    fn put(&self, bytes: &[u8]) -> Result<Digest, WorkError> {
        self.blobs
            .put_bytes(bytes)
            .map_err(failed("storing an artefact"))
    }
}
