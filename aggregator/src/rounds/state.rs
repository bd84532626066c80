//! The aggregator's durable state and the steps it takes. Blocking; owned by the driver alone.
//!
//! Order of durability: artefact fsynced, index flushed, entry logged (fsynced, checkpoint renamed), round stepped, and
//! only then the answer. After a restart the round is a replay of the log.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;

use consilium_protocol::artefact::Kind;
use consilium_protocol::contribution::{Statement, Verified};
use consilium_protocol::event::{Entry, Event, TargetIndex};
use consilium_protocol::manifest::{self, Manifest};
use consilium_protocol::message::{Logged, Status, Task};
use consilium_protocol::quic::chunk::Stride;
use consilium_protocol::round::{Admission, Round, RoundPhase, RoundTask, Work};
use consilium_protocol::transcript::key::NoteSigner;
use consilium_protocol::transcript::note::SignedNote;
use consilium_protocol::{Digest, InstitutionId, RejectCode, RoundId, UnixMillis, limits};

use super::board::{Board, MemberOverview, Overview, RoundOverview};
use super::driver::overview_path;
use super::request::{self, Given, OpenRequest, OpenResponse};
use super::work::{Bench, SoFar, WorkError};
use crate::fusion;
use crate::log::Log;
use crate::release;
use crate::server::validate::Checks;
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
struct Active {
    round: Round,
    opened: u64,
    fused: Option<u64>,
    merged: Vec<u64>,
    outcome: Option<u64>,
    truncation_ppm: Vec<u32>,
    routing: Option<Digest>,
    targets: Option<Digest>,
    adapter: Option<Digest>,
    release: Option<Digest>,
    rejected: Option<String>,
}

/// Durable state; see the module.
#[derive(Debug)]
pub struct State {
    setup: Setup,
    bench: Arc<Bench>,
    log: Log,
    index: Index,
    active: Option<Active>,
    previous_release: Option<Digest>,
    rounds: u64,
    public: BTreeMap<Digest, Stride>,
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
            previous_release: None,
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
        let so_far = SoFar {
            targets: active.targets,
            truncation_ppm: active.truncation_ppm.clone(),
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

    /// Opens the rounds that the operator asked for. True if one was opened.
    pub fn open_requested_rounds(&mut self, at: UnixMillis) -> bool {
        let waiting = match request::waiting(&self.setup.data_dir) {
            Ok(waiting) => waiting,
            Err(error) => {
                tracing::warn!(%error, "the folder of requests cannot be read");
                return false;
            }
        };
        let mut opened = false;
        for (path, request) in waiting {
            let response = match request.and_then(|request| self.open(at, request)) {
                Ok((round, manifest)) => {
                    opened = true;
                    OpenResponse::Opened { round, manifest }
                }
                Err(problem) => OpenResponse::Refused { problem },
            };
            let answered = request::write_atomically(&request::response_path(&path), &response)
                .and_then(|()| std::fs::remove_file(&path));
            if let Err(error) = answered {
                tracing::warn!(%error, "a request could not be answered");
            }
        }
        opened
    }

    fn open(&mut self, at: UnixMillis, request: OpenRequest) -> Result<(RoundId, Digest), String> {
        if let Some(active) = &self.active
            && !is_over(active.round.phase())
        {
            return Err(format!(
                "round {} is still open; wait for its end",
                active.round.manifest().round
            ));
        }
        let reference = &self.bench.reference;
        let manifest = request::manifest(
            request,
            Given {
                charter: self.bench.charter.clone(),
                charter_digest: self.setup.charter_digest,
                round: RoundId(self.rounds.saturating_add(1)),
                pivot: self.setup.pivot_digest,
                reference: reference.digest(),
                items: u64::try_from(reference.items().len()).unwrap_or(u64::MAX),
                previous_release: self.previous_release,
            },
        );
        let text = |error: &dyn std::fmt::Display| error.to_string();
        manifest
            .obeys(&self.bench.charter)
            .map_err(|error| text(&error))?;
        let note = SignedNote::sign(
            manifest.to_text().map_err(|error| text(&error))?,
            &self.setup.signer,
        )
        .map_err(|error| text(&error))?;
        let blobs = &self.bench.blobs;
        let digest = blobs
            .put_bytes(note.to_string().as_bytes())
            .map_err(|error| text(&error))?;
        let start = fusion::initial_adapter(&self.setup.pivot, &manifest.training, manifest.seed)
            .map_err(|error| text(&error))?;
        let start = blobs.put_bytes(&start).map_err(|error| text(&error))?;
        let round = manifest.round;
        self.active = None;
        self.rounds = round.0;
        self.record(
            at,
            &Event::Opened {
                manifest: digest,
                start,
            },
        )
        .map_err(|error| text(&error))?;
        Ok((round, digest))
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
                targets: None,
                adapter: Some(start),
                release: None,
                rejected: None,
            });
        }
        let Some(active) = &mut self.active else {
            return Ok(());
        };
        active.round.step(entry.at, &entry.event)?;
        match &entry.event {
            Event::Fused { targets, routing } => {
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
                self.previous_release = Some(*release);
                self.write_release_proof(index, entry.round)?;
            }
            Event::Rejected { reason } => {
                active.outcome = Some(index);
                active.rejected = Some(format!("{reason:?}"));
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

fn is_over(phase: RoundPhase) -> bool {
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
