//! The aggregator's durable state and the steps it takes. Blocking; owned by the driver alone.
//!
//! Order of durability: artefact fsynced, index flushed, entry logged (fsynced, checkpoint renamed), round stepped, and
//! only then the answer. After a restart the round is a replay of the log.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;

use consilium_protocol::contribution::{Statement, Verified};
use consilium_protocol::event::{Entry, Event, Reason, TargetIndex};
use consilium_protocol::manifest::{self, Manifest, Training};
use consilium_protocol::message::Logged;
use consilium_protocol::quic::chunk::Stride;
use consilium_protocol::round::{Admission, Round, RoundPhase, Work};
use consilium_protocol::transcript::key::NoteSigner;
use consilium_protocol::transcript::note::SignedNote;
use consilium_protocol::{Digest, InstitutionId, RejectCode, RoundId, UnixMillis, limits};

use super::work::{Bench, SoFar, WorkError};
use crate::log::Log;
use crate::release;
use crate::store::{Index, IndexedSlot, Slot};

/// Whether a contribution may come in.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Admitted {
    /// Its slot is free.
    New,
    /// The same bytes fill the slot already; this is their receipt.
    Repeat(Logged),
}

/// Why a step could not be taken.
#[derive(Debug, thiserror::Error)]
pub enum StateError {
    /// The log refuses.
    #[error(transparent)]
    Log(#[from] crate::log::LogError),
    /// The store refuses.
    #[error(transparent)]
    Store(#[from] crate::store::StoreError),
    /// The event does not fit the round.
    #[error(transparent)]
    Round(#[from] consilium_protocol::round::RoundError),
    /// A file cannot be written.
    #[error("{}: {source}", path.display())]
    File {
        /// Which.
        path: PathBuf,
        /// The system's reason.
        source: std::io::Error,
    },
    /// A logged artefact is missing or is not what it should be.
    #[error("artefact {digest}: {problem}")]
    Artefact {
        /// Which.
        digest: Digest,
        /// What is wrong.
        problem: String,
    },
}

/// Everything fixed at the start of the server.
#[derive(Debug)]
pub struct Setup {
    /// Folder of everything.
    pub data_dir: PathBuf,
    /// Folder of the pivot.
    pub pivot: PathBuf,
    /// Its folder digest.
    pub pivot_digest: Digest,
    /// Digest of the signed charter.
    pub charter_digest: Digest,
    /// Signs manifests; the log has its own copy of the same key.
    pub signer: NoteSigner,
    /// Address that nodes dial.
    pub listening: String,
}

/// An open or ended round with the places of its entries in the log.
#[derive(Debug)]
pub(super) struct Active {
    pub(super) round: Round,
    pub(super) opened: u64,
    pub(super) fused: Option<u64>,
    pub(super) merged: Vec<u64>,
    pub(super) outcome: Option<u64>,
    pub(super) truncation_ppm: Vec<u32>,
    pub(super) routing: Option<Digest>,
    pub(super) records: Option<Digest>,
    pub(super) targets: Option<Digest>,
    pub(super) adapter: Option<Digest>,
    pub(super) release: Option<Digest>,
    pub(super) rejected: Option<String>,
}

/// The newest release, as far as the next round builds on it.
#[derive(Debug, Clone)]
pub(super) struct LastRelease {
    pub(super) release: Digest,
    pub(super) adapter: Digest,
    pub(super) pivot: Digest,
    pub(super) training: Training,
    /// What each site had measured, in institution order.
    pub(super) evaluations: Vec<(InstitutionId, Digest)>,
}

/// Durable state; see the module.
#[derive(Debug)]
pub struct State {
    pub(super) setup: Setup,
    pub(super) bench: Arc<Bench>,
    pub(super) log: Log,
    index: Index,
    pub(super) active: Option<Active>,
    pub(super) last_release: Option<LastRelease>,
    pub(super) rounds: u64,
    pub(super) public: BTreeMap<Digest, Stride>,
}

impl State {
    /// Replays the log. `always_public` are artefacts outside of the log that members may fetch.
    ///
    /// # Errors
    /// An entry does not fit, or an artefact that it names is missing.
    pub fn load(
        setup: Setup,
        bench: Arc<Bench>,
        log: Log,
        index: Index,
        always_public: impl IntoIterator<Item = Digest>,
    ) -> Result<Self, StateError> {
        let mut state = Self {
            setup,
            bench,
            log,
            index,
            active: None,
            last_release: None,
            rounds: 0,
            public: always_public
                .into_iter()
                .map(|digest| (digest, Stride::BYTES))
                .collect(),
        };
        let entries: Vec<_> = state.log.entries().collect();
        for (index, entry) in entries {
            state.apply(index, &entry)?;
        }
        Ok(state)
    }

    /// The newest checkpoint and the proof that it extends the log of size `from`.
    #[must_use]
    pub fn greeting(&self, from: u64) -> (String, Vec<Digest>) {
        (self.log.checkpoint().to_owned(), self.log.consistency(from))
    }

    /// Logs an event, then steps the round.
    ///
    /// # Errors
    /// The event does not fit the round (nothing is logged), or the log fails.
    pub fn record(&mut self, at: UnixMillis, event: &Event) -> Result<u64, StateError> {
        if let Some(active) = &self.active {
            active.round.clone().step(at, event)?;
        }
        let round = self
            .active
            .as_ref()
            .map_or(RoundId(self.rounds), |active| active.round.manifest().round);
        let entry = Entry {
            version: 1,
            consortium: self.bench.charter.consortium.clone(),
            round,
            at,
            event: event.clone(),
        };
        let index = self.log.append(&entry)?;
        tracing::info!(index, round = %round, event = %name(event), "logged");
        self.apply(index, &entry)?;
        Ok(index)
    }

    /// Event that is due by time or completeness.
    #[must_use]
    pub fn due(&self, now: UnixMillis) -> Option<Event> {
        self.active
            .as_ref()
            .and_then(|active| active.round.due(now))
    }

    /// Outstanding work as a closure for the blocking pool.
    #[must_use]
    pub fn job(&self) -> Option<impl FnOnce() -> Result<Event, WorkError> + Send + use<>> {
        let active = self.active.as_ref()?;
        let work: Work = active.round.work()?;
        let (bench, round) = (Arc::clone(&self.bench), active.round.clone());
        let previous = active.round.manifest().previous_release;
        let last = self.last_release.as_ref();
        let so_far = SoFar {
            targets: active.targets,
            records: active.records,
            truncation_ppm: active.truncation_ppm.clone(),
            last_release: last
                .filter(|last| Some(last.release) == previous)
                .map(|last| last.evaluations.clone())
                .unwrap_or_default(),
        };
        Some(move || bench.perform(&round, &work, &so_far))
    }

    /// Whether a node's arrival changes the round.
    #[must_use]
    pub fn wants_join(&self, institution: &InstitutionId, capacity: u32) -> bool {
        self.active.as_ref().is_some_and(|active| {
            !is_over(active.round.phase())
                && active.round.manifest().members.contains(institution)
                && active.round.capacity(institution) != Some(capacity)
        })
    }

    /// Whether a contribution may come in now.
    ///
    /// # Errors
    /// The code for the peer.
    pub fn admit(&self, statement: &Statement) -> Result<Admitted, RejectCode> {
        let active = self.active.as_ref().ok_or(RejectCode::WrongRound)?;
        match active.round.admit(statement)? {
            Admission::New => Ok(Admitted::New),
            Admission::Repeat => {
                let slot = Slot::of(statement);
                let IndexedSlot { entry, .. } = self
                    .index
                    .slot(&slot)
                    .ok()
                    .flatten()
                    .ok_or(RejectCode::Internal)?;
                self.log
                    .logged(entry)
                    .map(Admitted::Repeat)
                    .map_err(|_| RejectCode::Internal)
            }
        }
    }

    /// Takes a contribution whose blob is stored; the answer is its receipt.
    ///
    /// # Errors
    /// The code for the peer.
    pub fn accept(
        &mut self,
        at: UnixMillis,
        statement: &Verified<Statement>,
        ledger: Digest,
        length: u64,
    ) -> Result<Logged, RejectCode> {
        let body = statement.body();
        if let Admitted::Repeat(receipt) = self.admit(body)? {
            return Ok(receipt);
        }
        let internal = |error: StateError| {
            tracing::error!(%error, "a contribution could not be taken");
            match error {
                StateError::Store(_) | StateError::Log(_) | StateError::File { .. } => {
                    RejectCode::Storage
                }
                StateError::Round(_) | StateError::Artefact { .. } => RejectCode::Internal,
            }
        };
        let entry = self.log.size();
        self.index
            .insert(
                &Slot::of(body),
                &IndexedSlot {
                    digest: body.artefact,
                    entry,
                    length,
                },
            )
            .map_err(|error| internal(error.into()))?;
        let event = Event::Accepted {
            institution: body.institution.clone(),
            kind: body.kind,
            sequence: body.sequence,
            artefact: body.artefact,
            signature: hex::encode(statement.signature()),
            ledger,
        };
        let index = self.record(at, &event).map_err(internal)?;
        self.log
            .logged(index)
            .map_err(|error| internal(error.into()))
    }

    /// Notes a refused contribution.
    pub fn refuse(&mut self, at: UnixMillis, statement: &Statement, code: RejectCode) {
        let event = Event::Refused {
            institution: statement.institution.clone(),
            kind: statement.kind,
            sequence: statement.sequence,
            artefact: statement.artefact,
            code,
        };
        if let Err(error) = self.record(at, &event) {
            tracing::warn!(%error, "a refusal could not be logged");
        }
    }

    fn apply(&mut self, index: u64, entry: &Entry) -> Result<(), StateError> {
        if let Event::Opened { manifest, start } = entry.event {
            let text = self.bench.blobs.read(&manifest, limits::DOCUMENT as u64)?;
            let round = Round::open(self.parse(manifest, &text)?, manifest);
            self.public
                .extend([(manifest, Stride::BYTES), (start, Stride::FLOATS)]);
            self.rounds = entry.round.0;
            self.active = Some(Active {
                round,
                opened: index,
                fused: None,
                merged: Vec::new(),
                outcome: None,
                truncation_ppm: Vec::new(),
                routing: None,
                records: None,
                targets: None,
                adapter: Some(start),
                release: None,
                rejected: None,
            });
        }
        let Some(active) = &mut self.active else {
            return Ok(());
        };
        let work = active.round.work();
        active.round.step(entry.at, &entry.event)?;
        match &entry.event {
            Event::Fused {
                targets,
                routing,
                report,
            } => {
                active.records = *report;
                active.fused = Some(index);
                active.targets = Some(*targets);
                active.routing = Some(*routing);
                let problem = |problem: String| StateError::Artefact {
                    digest: *targets,
                    problem,
                };
                let bytes = self.bench.blobs.read(targets, limits::ARTEFACT)?;
                let shards: TargetIndex =
                    serde_json::from_slice(&bytes).map_err(|error| problem(error.to_string()))?;
                self.public.insert(*targets, Stride::BYTES);
                let documents = shards.key.into_iter().chain(*report);
                self.public
                    .extend(documents.map(|digest| (digest, Stride::BYTES)));
                let shards = shards.shards.into_iter();
                self.public
                    .extend(shards.map(|shard| (shard, Stride::BYTES)));
            }
            Event::Merged {
                adapter,
                truncation_ppm,
                ..
            } => {
                active.merged.push(index);
                active.truncation_ppm.push(*truncation_ppm);
                active.adapter = Some(*adapter);
                self.public.insert(*adapter, Stride::FLOATS);
            }
            Event::Released { release, .. } => {
                active.outcome = Some(index);
                active.release = Some(*release);
                if let Some(Work::Judge {
                    candidate,
                    evaluations,
                }) = work
                {
                    let manifest = active.round.manifest();
                    self.last_release = Some(LastRelease {
                        release: *release,
                        adapter: candidate,
                        pivot: manifest.pivot,
                        training: manifest.training.clone(),
                        evaluations,
                    });
                }
                // The entry is logged, so the round is over whatever the disk says; the next start writes the proof.
                if let Err(error) = self.write_release_proof(index, entry.round) {
                    tracing::error!(%error, "the proof of the release could not be written");
                }
            }
            Event::Rejected {
                reason,
                blamed,
                report,
            } => {
                active.records = active.records.or(*report);
                let report = report.iter().map(|digest| (*digest, Stride::BYTES));
                self.public.extend(report);
                active.outcome = Some(index);
                active.rejected = Some(verdict(*reason, blamed));
            }
            Event::Opened { .. }
            | Event::Joined { .. }
            | Event::Accepted { .. }
            | Event::Refused { .. }
            | Event::Closed { .. } => {}
        }
        Ok(())
    }

    fn parse(&self, digest: Digest, bytes: &[u8]) -> Result<Manifest, StateError> {
        let problem = |problem: String| StateError::Artefact { digest, problem };
        let note = SignedNote::parse(bytes).map_err(|error| problem(error.to_string()))?;
        let note = note
            .verify(std::slice::from_ref(self.setup.signer.verifier()))
            .map_err(|error| problem(error.to_string()))?;
        note.body(manifest::FIRST_LINE)
            .map_err(|error| problem(error.to_string()))?;
        Manifest::parse(note.text()).map_err(|error| problem(error.to_string()))
    }

    fn write_release_proof(&self, index: u64, round: RoundId) -> Result<(), StateError> {
        let folder = self.bench.releases.join(format!("round-{round}"));
        let logged = self.log.logged(index)?;
        if folder.is_dir() {
            let path = folder.join(release::PROOF);
            std::fs::write(&path, logged.proof)
                .map_err(|source| StateError::File { path, source })?;
        }
        Ok(())
    }
}

pub(super) fn is_over(phase: RoundPhase) -> bool {
    matches!(
        phase,
        RoundPhase::Released { .. } | RoundPhase::Rejected { .. }
    )
}

fn name(event: &Event) -> String {
    serde_json::to_value(event)
        .ok()
        .and_then(|value| Some(value.get("type")?.as_str()?.to_owned()))
        .unwrap_or_default()
}
/// Why a round ended without a release, and through whom.
fn verdict(reason: Reason, blamed: &[InstitutionId]) -> String {
    let names: Vec<&str> = blamed.iter().map(InstitutionId::as_str).collect();
    if names.is_empty() {
        format!("{reason:?}")
    } else {
        format!("{reason:?}: {}", names.join(", "))
    }
}
