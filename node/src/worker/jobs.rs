//! The jobs of the spool, one at a time.

use std::collections::BTreeMap;
use std::fmt;
use std::path::PathBuf;
use std::sync::Arc;

use consilium_kernels::RecordShape;
use consilium_kernels::quant::Format;
use consilium_protocol::evaluation::Evaluation;
use consilium_protocol::reference::ReferenceSet;
use consilium_protocol::time::SystemClock;
use consilium_protocol::{Clock as _, Digest, limits};

use super::device::DeviceChoice;
use super::error::WorkError;
use super::evaluate::evaluate;
use super::holdout;
use super::model::{BaseStorage, OffloadFile};
use super::monitor::Monitor;
use super::part::items_of;
use super::progress::Terminal;
use super::score::score_shard;
use super::source::LoadedModel;
use super::train::distill::{Distiller, Objective, Settings};
use super::train::targets::Targets;
use crate::config::{Config, Memory};
use crate::error::with_causes;
use crate::hub::ModelPlace;
use crate::spool::{DistilJob, EvaluateJob, Job, JobId, Outcome, ScoreJob, Spool};

/// Begins the name of every state of an optimiser.
const STATE: &str = "optimiser-";

/// What the worker reads.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Folders {
    /// The spool that agent and worker share.
    pub spool: PathBuf,
    /// The pivot.
    pub pivot: ModelPlace,
    /// The institution's own model; none where it is behind a server, whose scores the scorer asks for.
    pub source: Option<ModelPlace>,
    /// Whether the source's chat template wraps the contexts of items.
    pub source_chat_template: bool,
    /// Private items for the evaluation, JSON lines.
    pub holdout: PathBuf,
}

impl From<&Config> for Folders {
    fn from(config: &Config) -> Self {
        Self {
            spool: config.spool.clone(),
            pivot: config.pivot.clone(),
            source: config
                .source_server
                .is_none()
                .then(|| config.source.clone()),
            source_chat_template: config.source_chat_template,
            holdout: config.holdout.clone(),
        }
    }
}

/// A job's artefact and the numbers that go with it.
type Done = (Digest, BTreeMap<String, f64>);

/// Does jobs and keeps what the next one is likely to need: one model, and the optimiser of the running round.
pub struct Worker<'a> {
    folders: Folders,
    spool: Spool,
    stop: &'a dyn Fn() -> bool,
    reference: Option<Arc<ReferenceSet>>,
    source: Option<LoadedModel>,
    distiller: Option<Running>,
    memory: Memory,
    device: DeviceChoice,
}

/// A distiller and where it is.
#[derive(Debug)]
struct Running {
    distiller: Distiller,
    manifest: Digest,
    /// Last inner round that it has seen the end of.
    after: Option<u32>,
}

impl<'a> Worker<'a> {
    /// A worker without a model yet. It ends after the current step once `stop` says so.
    ///
    /// # Errors
    /// The spool cannot be opened.
    pub fn new(folders: Folders, stop: &'a dyn Fn() -> bool) -> Result<Self, WorkError> {
        Ok(Self {
            spool: Spool::open(&folders.spool)?,
            folders,
            stop,
            reference: None,
            source: None,
            distiller: None,
            memory: Memory::default(),
            device: DeviceChoice::Cpu,
        })
    }

    /// Computes elsewhere than on the processors.
    #[must_use]
    pub fn on(self, device: DeviceChoice) -> Self {
        Self { device, ..self }
    }

    /// Holds the pivot in another way while an adapter of it is trained.
    #[must_use]
    pub fn with_memory(self, memory: Memory) -> Self {
        Self { memory, ..self }
    }

    /// The spool.
    #[must_use]
    pub fn spool(&self) -> &Spool {
        &self.spool
    }

    /// Does the next pending job, if there is one, and says whether there was. A job that cannot be done gets a result
    /// that says so; one that was stopped or withdrawn gets none.
    ///
    /// # Errors
    /// The spool cannot be read or written.
    pub fn work(&mut self) -> Result<bool, WorkError> {
        let scores = self.folders.source.is_some();
        let own = |job: &Job| scores || !matches!(job, Job::Score(_));
        let Some((id, job)) = self.spool.next_job_of(own)? else {
            return Ok(false);
        };
        let started = SystemClock.now();
        tracing::info!(job = %id, "begins");
        let result = self.execute(&id, &job);
        let seconds = SystemClock.now().since(started).as_secs_f64();
        let outcome = match result {
            Ok((artefact, notes)) => {
                tracing::info!(job = %id, seconds, %artefact, "done");
                Outcome::Done {
                    artefact,
                    seconds,
                    notes,
                }
            }
            Err(WorkError::Stopped) => {
                tracing::info!(job = %id, "stopped");
                return Ok(true);
            }
            Err(error) => {
                let problem = with_causes(&error);
                tracing::warn!(job = %id, problem, "failed");
                Outcome::Failed { problem }
            }
        };
        if self.spool.is_wanted(&id) {
            self.spool.finish(&id, &outcome)?;
        }
        Ok(true)
    }

    fn execute(&mut self, id: &JobId, job: &Job) -> Result<Done, WorkError> {
        match job {
            Job::Score(job) => self.score(id, job),
            Job::Distil(job) => self.distil(id, job),
            Job::Evaluate(job) => self.evaluate(id, job),
        }
    }

    fn score(&mut self, id: &JobId, job: &ScoreJob) -> Result<Done, WorkError> {
        let reference = self.reference(&job.reference)?;
        self.distiller = None;
        let source = self.take_source()?.ok_or_else(|| WorkError::Setting {
            field: "source",
            problem: "the source is behind a server; the scorer does this job".to_owned(),
        })?;
        let source = &*self.source.insert(source);
        check_symbols(job.symbols, source.model.config().hidden_size)?;
        let shape = RecordShape {
            k: job.symbols.into(),
            fill_permille: job.fill_permille.into(),
        };
        let mut watch = Watch::new(&self.spool, self.stop, id, "items");
        let scored = score_shard(source, &reference, job.items.clone(), &shape, &mut watch)?;
        let artefact = self.spool.put_blob(&scored.shard.to_bytes()?)?;
        let notes = notes([
            ("bits_per_byte", scored.stats.bits_per_byte()),
            ("tokens", scored.stats.tokens as f64),
            ("branches_per_token", scored.stats.branches_per_token()),
        ]);
        Ok((artefact, notes))
    }

    fn distil(&mut self, id: &JobId, job: &DistilJob) -> Result<Done, WorkError> {
        self.source = None;
        let reference = self.reference(&job.reference)?;
        let mut running = self.resume(job)?;
        let result = self.inner_round(id, job, &reference, &mut running.distiller);
        // After an error the optimiser is somewhere inside of the round; the next job reads it back from disk.
        if result.is_ok() {
            running.after = Some(job.inner);
            self.distiller = Some(running);
        }
        result
    }

    fn inner_round(
        &self,
        id: &JobId,
        job: &DistilJob,
        reference: &ReferenceSet,
        distiller: &mut Distiller,
    ) -> Result<Done, WorkError> {
        let items = reference.items();
        if items.len() as u64 != job.items {
            return Err(WorkError::Setting {
                field: "items",
                problem: format!("{}, but the reference set has {}", job.items, items.len()),
            });
        }
        let start = self.spool.read_blob(&job.start, limits::ARTEFACT)?;
        distiller.set_start(&start)?;
        let part = items_of(&job.part, job.items)?;
        let plan = distiller.plan(items, &part, job.inner)?;
        let visited = plan.visited()?;
        let targets = Targets::gather(reference, &visited, job.shard_items, |index| {
            let digest = usize::try_from(index)
                .ok()
                .and_then(|index| job.targets.get(index))
                .ok_or_else(|| WorkError::Targets(format!("the job names no shard {index}")))?;
            Ok(self.spool.read_blob(digest, limits::SHARD)?)
        })?;
        let objective = Objective::Trie {
            targets: &targets,
            cross_entropy: job.training.cross_entropy_permille as f32 / 1000.0,
        };
        let mut watch = Watch::new(&self.spool, self.stop, id, "steps");
        let loss = distiller.run(&plan, items, objective, &mut watch)?;
        let artefact = self.spool.put_blob(&distiller.adapter_bytes()?)?;
        self.keep_state(job, distiller)?;
        let notes = notes([("loss", loss), ("usable_items", plan.usable() as f64)]);
        Ok((artefact, notes))
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
        let mut pivot = LoadedModel::load_as(&folder, &self.storage(&settings)?)?;
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
        })
    }

    /// How the pivot is stored while its adapter is trained.
    fn storage(&self, settings: &Settings) -> Result<BaseStorage, WorkError> {
        let placement = self.device.placement(self.memory.offload)?;
        let offload = if self.memory.offload && placement.is_none() {
            Some(Arc::new(OffloadFile::create(&self.spool.state_path(""))?))
        } else {
            None
        };
        // On a device the base has the placement's type, unless it is stored in fewer bits than that.
        let format = match self.memory.base {
            Format::Bf16 if placement.is_some() => Format::F32,
            format => format,
        };
        Ok(BaseStorage {
            format,
            tables: !(settings.lora.saves_embedding || settings.lora.saves_head),
            offload,
            placement,
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

    fn evaluate(&mut self, id: &JobId, job: &EvaluateJob) -> Result<Done, WorkError> {
        self.distiller = None;
        let items = holdout::read(&self.folders.holdout)?;
        // A source behind a server is not measured: the holdout is private, and no process that has it opens a socket.
        let source = self.take_source()?;
        let mut watch = Watch::new(&self.spool, self.stop, id, "texts");
        let shape = Settings::of(&job.training, 0)?.lora;
        let adapter = self.spool.read_blob(&job.candidate, limits::ARTEFACT)?;

        let source_score = source
            .map(|source| evaluate(&source, &items, &mut watch))
            .transpose()?;
        let pivot = LoadedModel::load_on(&self.folders.pivot.resolve()?, self.device)?;
        let pivot_score = evaluate(&pivot, &items, &mut watch)?;
        let mut candidate = pivot;
        candidate.apply_adapter(shape, &adapter)?;
        let candidate_score = evaluate(&candidate, &items, &mut watch)?;

        let evaluation = Evaluation {
            candidate: candidate_score,
            pivot: pivot_score,
            source: source_score,
        };
        let artefact = self.spool.put_blob(&evaluation.to_bytes()?)?;
        let mut notes = notes([
            ("candidate_bits_per_byte", candidate_score.bits_per_byte),
            ("pivot_bits_per_byte", pivot_score.bits_per_byte),
        ]);
        if let Some(score) = source_score {
            notes.insert("source_bits_per_byte".to_owned(), score.bits_per_byte);
        }
        Ok((artefact, notes))
    }

    /// The source that is in memory, else the one of the folder; none where it is behind a server.
    fn take_source(&mut self) -> Result<Option<LoadedModel>, WorkError> {
        let place = match (self.source.take(), &self.folders.source) {
            (Some(source), _) => return Ok(Some(source)),
            (None, Some(place)) => place,
            (None, None) => return Ok(None),
        };
        let folder = place.resolve()?;
        let mut source = LoadedModel::load_on(&folder, self.device)?;
        if self.folders.source_chat_template {
            source.use_chat_template(&folder)?;
        }
        Ok(Some(source))
    }

    fn reference(&mut self, digest: &Digest) -> Result<Arc<ReferenceSet>, WorkError> {
        if let Some(reference) = &self.reference
            && reference.digest() == *digest
        {
            return Ok(Arc::clone(reference));
        }
        let bytes = self.spool.read_blob(digest, limits::ARTEFACT)?;
        let reference = Arc::new(ReferenceSet::parse(&bytes)?);
        self.reference = Some(Arc::clone(&reference));
        Ok(reference)
    }
}

impl fmt::Debug for Worker<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Worker")
            .field("folders", &self.folders)
            .finish_non_exhaustive()
    }
}

/// Shows a job and ends it where the process is to stop or the job was withdrawn.
struct Watch<'a> {
    spool: &'a Spool,
    stop: &'a dyn Fn() -> bool,
    id: &'a JobId,
    terminal: Terminal,
}

impl<'a> Watch<'a> {
    fn new(
        spool: &'a Spool,
        stop: &'a dyn Fn() -> bool,
        id: &'a JobId,
        what: &'static str,
    ) -> Self {
        Self {
            spool,
            stop,
            id,
            terminal: Terminal::new(what),
        }
    }
}

impl Monitor for Watch<'_> {
    fn advance(&mut self, done: u64, total: u64, value: Option<f64>) -> Result<(), WorkError> {
        if (self.stop)() || !self.spool.is_wanted(self.id) {
            return Err(WorkError::Stopped);
        }
        self.terminal.advance(done, total, value)
    }
}

/// Records of many symbols span the rows of a narrow head, and with them others could rebuild it.
///
/// # Errors
/// More symbols than an eighth of the width.
pub(crate) fn check_symbols(symbols: u16, width: usize) -> Result<(), WorkError> {
    if usize::from(symbols) * 8 <= width {
        return Ok(());
    }
    Err(WorkError::Setting {
        field: "symbols",
        problem: format!(
            "{symbols} per position is more than an eighth of the source's hidden size {width}, which would let others \
             rebuild its head"
        ),
    })
}

fn state_name(manifest: &Digest, inner: u32) -> String {
    format!("{STATE}{manifest}-{inner:04}")
}

fn notes<const N: usize>(numbers: [(&str, f64); N]) -> BTreeMap<String, f64> {
    numbers
        .into_iter()
        .map(|(name, number)| (name.to_owned(), number))
        .collect()
}
