//! The jobs of the spool, one at a time.

mod distil;
mod lesson;

use std::collections::BTreeMap;
use std::fmt;
use std::path::PathBuf;

use consilium_kernels::RecordShape;
use consilium_protocol::evaluation::Evaluation;
use consilium_protocol::manifest::SymbolSpace;
use consilium_protocol::time::SystemClock;
use consilium_protocol::{Clock as _, Digest, limits};

use crate::config::{Config, Memory};
use crate::error::with_causes;
use crate::hub::ModelPlace;
use crate::spool::{EvaluateJob, Job, JobId, Outcome, ScoreJob, Spool};
use crate::worker::error::WorkError;
use crate::worker::evaluate::evaluate;
use crate::worker::holdout;
use crate::worker::monitor::Monitor;
use crate::worker::progress::Terminal;
use crate::worker::reference::ReferenceCache;
use crate::worker::score::{score_shard, score_token_shard};
use crate::worker::source::LoadedModel;
use crate::worker::train::distill::Settings;
use distil::Running;

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
    /// Files or folders of private text that rounds of mode `adapters` train on; may be empty.
    pub train_data: Vec<PathBuf>,
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
            train_data: config.train_data.clone(),
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
    reference: ReferenceCache,
    source: Option<LoadedModel>,
    distiller: Option<Running>,
    memory: Memory,
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
            reference: ReferenceCache::default(),
            source: None,
            distiller: None,
            memory: Memory::default(),
        })
    }

    /// Computes elsewhere, and holds the pivot in another way while an adapter of it is trained.
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
        let reference = self.reference.read(&self.spool, &job.reference)?;
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
        let (items, space) = (job.items.clone(), job.symbol_space);
        let scored = match space {
            SymbolSpace::Bytes => score_shard(source, &reference, items, &shape, &mut watch)?,
            SymbolSpace::Tokens { .. } => {
                score_token_shard(source, &reference, items, space, &shape, &mut watch)?
            }
        };
        let artefact = self.spool.put_blob(&scored.shard.to_bytes()?)?;
        let notes = notes([
            ("bits_per_byte", scored.stats.bits_per_byte()),
            ("tokens", scored.stats.tokens as f64),
            ("branches_per_token", scored.stats.branches_per_token()),
        ]);
        Ok((artefact, notes))
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
        let pivot = LoadedModel::load_on(&self.folders.pivot.resolve()?, self.memory.device)?;
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
        let mut source = LoadedModel::load_on(&folder, self.memory.device)?;
        if self.folders.source_chat_template {
            source.use_chat_template(&folder)?;
        }
        Ok(Some(source))
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

fn notes<const N: usize>(numbers: [(&str, f64); N]) -> BTreeMap<String, f64> {
    numbers
        .into_iter()
        .map(|(name, number)| (name.to_owned(), number))
        .collect()
}
