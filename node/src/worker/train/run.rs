//! A stage of a run: steps, measurements on held-out items, checkpoints, and going on after a process was killed.

use std::fs::{File, TryLockError};
use std::path::{Path, PathBuf};
use std::time::Duration;

use consilium_protocol::Clock;
use consilium_protocol::time::UnixMillis;

use super::checkpoint::{self, Best, Place, RunPlace};
use super::{Progress, TrainError, Trainer, held_out};
use crate::worker::data::{Counts, Items};
use crate::worker::error::WorkError;

/// What happens in a run, for those who watch it. Counts and means, never text.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Event<'a> {
    /// Data of a stage are being read, or were read.
    Data {
        /// Stage, from 0.
        stage: u64,
        /// What was found so far.
        counts: &'a Counts,
        /// Bytes of all files of the stage.
        of_bytes: u64,
        /// Whether that is all.
        done: bool,
    },
    /// The run goes on from a checkpoint.
    Resumed {
        /// Steps that were taken before.
        step: u64,
    },
    /// A step was taken.
    Step(&'a StepReport),
    /// The loss on held-out items was measured.
    Evaluated {
        /// Steps of the run.
        step: u64,
        /// Mean loss of a label, in nats.
        loss: f64,
        /// Whether it is the lowest so far.
        is_best: bool,
    },
    /// A checkpoint is on disk.
    Checkpoint {
        /// Steps of the run.
        step: u64,
        /// File.
        path: &'a Path,
    },
}

/// One step of a run.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct StepReport {
    /// Steps of the run, this one included.
    pub step: u64,
    /// Steps of the whole run, as far as they are known.
    pub steps: u64,
    /// Mean loss of a label, in nats.
    pub loss: f64,
    /// Norm of the gradient before clipping.
    pub norm: f64,
    /// Learning rate.
    pub rate: f64,
    /// Tokens that went through the model.
    pub tokens: u64,
    /// Mean over this process's steps.
    pub tokens_per_second: f64,
    /// Time that the rest will take at that pace.
    pub left: Duration,
    /// Wall-clock time.
    pub now: UnixMillis,
}

/// Watches a run.
pub trait Watch {
    /// Something happened.
    ///
    /// # Errors
    /// It cannot be written down, or the run is to end here.
    fn event(&mut self, event: Event<'_>) -> Result<(), WorkError>;
}

/// Nobody watches.
impl Watch for () {
    fn event(&mut self, _: Event<'_>) -> Result<(), WorkError> {
        Ok(())
    }
}

/// Files of a run, which one process has at a time.
#[derive(Debug)]
pub struct RunFolder {
    path: PathBuf,
    /// The kernel opens the lock when the process ends, however it ends.
    _lock: File,
}

impl RunFolder {
    /// Makes the folder and locks it.
    ///
    /// # Errors
    /// It cannot be made, or another process trains in it.
    pub fn create(path: PathBuf) -> Result<Self, WorkError> {
        let failed = |source| WorkError::Write {
            path: path.clone(),
            source,
        };
        std::fs::create_dir_all(&path).map_err(failed)?;
        let lock = File::create(path.join("lock")).map_err(failed)?;
        match lock.try_lock() {
            Ok(()) => Ok(Self { path, _lock: lock }),
            Err(TryLockError::WouldBlock) => Err(WorkError::File {
                path,
                problem:
                    "another process trains in this folder; wait for it, or name another with `run`"
                        .to_owned(),
            }),
            Err(TryLockError::Error(source)) => Err(failed(source)),
        }
    }

    /// The folder.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The last checkpoint.
    #[must_use]
    pub fn checkpoint(&self) -> PathBuf {
        self.path.join("checkpoint.safetensors")
    }

    /// Weights of a stage's lowest loss on held-out items. Every stage has its own: after a kill an earlier one may have
    /// to be ended again.
    #[must_use]
    pub fn best(&self, stage: u64) -> PathBuf {
        self.path
            .join(format!("best-stage-{}.safetensors", stage + 1))
    }

    /// Where the run was when its process ended; none if it starts here.
    ///
    /// # Errors
    /// The checkpoint is unreadable or of other settings.
    pub fn place(&self, settings: &str) -> Result<Option<(Place, RunPlace)>, TrainError> {
        let path = self.checkpoint();
        if path.symlink_metadata().is_err() {
            return Ok(None);
        }
        let place = checkpoint::place(&path)?;
        match place.run.clone() {
            Some(run) if run.settings == settings => Ok(Some((place, run))),
            Some(_) => Err(other_run(
                path,
                "other settings, or another model to start from",
            )),
            None => Err(other_run(path, "of another kind")),
        }
    }

    /// Ends the run: the checkpoint has no more use, the best weights stay.
    ///
    /// # Errors
    /// The file cannot be removed.
    pub fn finish(&self) -> Result<(), WorkError> {
        let path = self.checkpoint();
        match std::fs::remove_file(&path) {
            Err(source) if source.kind() != std::io::ErrorKind::NotFound => {
                Err(WorkError::Write { path, source })
            }
            _ => Ok(()),
        }
    }
}

fn other_run(path: PathBuf, what: &'static str) -> TrainError {
    TrainError::OtherRun { path, what }
}

/// How a stage is run.
#[derive(Debug)]
pub struct StagePlan<'a> {
    /// Files of the run.
    pub folder: &'a RunFolder,
    /// Digest of the run's settings.
    pub settings: &'a str,
    /// Digest of the stage's data.
    pub data: String,
    /// When the run started.
    pub started: UnixMillis,
    /// Stage, from 0.
    pub stage: u64,
    /// Steps of earlier stages.
    pub before: u64,
    /// Steps of the whole run; those of a later stage that is measured in epochs are not known yet.
    pub steps: u64,
    /// Items held out; none are measured where it is empty.
    pub held_out: Items,
    /// The token that starts records.
    pub start: u32,
    /// Steps between measurements.
    pub evaluate_every: u64,
    /// Steps between checkpoints.
    pub checkpoint_every: u64,
}

/// What a process knows while it runs.
pub struct Shell<'a> {
    /// Reads the time.
    pub clock: &'a dyn Clock,
    /// Whether the process was asked to end.
    pub stop: &'a dyn Fn() -> bool,
    /// Sees what happens.
    pub watch: &'a mut dyn Watch,
}

impl std::fmt::Debug for Shell<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Shell").finish_non_exhaustive()
    }
}

/// How a stage ended.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct StageEnd {
    /// Mean loss of the last step, in nats; none if an earlier process took it.
    pub loss: Option<f64>,
    /// The lowest loss on held-out items.
    pub best: Option<Best>,
}

impl StagePlan<'_> {
    /// Takes the steps of a stage that are left, from `place` on if there is one. With held-out items the trainer then has
    /// the weights that did best on them.
    ///
    /// # Errors
    /// Training diverges, files cannot be written, or [`WorkError::Stopped`]: then a checkpoint was written before.
    pub fn run(
        &self,
        trainer: &mut Trainer<'_>,
        place: Option<&RunPlace>,
        shell: &mut Shell<'_>,
    ) -> Result<StageEnd, WorkError> {
        let path = self.folder.checkpoint();
        let mut best = None;
        if let Some(place) = place {
            if place.data != self.data {
                return Err(other_run(path, "other data").into());
            }
            trainer.resume(&path)?;
            best = place.best;
            shell.watch.event(Event::Resumed { step: place.step })?;
        }
        let mut pace = Pace::new(shell.clock.now());
        let mut loss = None;
        while !trainer.is_done() {
            let progress = trainer.step()?;
            loss = Some(progress.loss);
            let report = self.report(&progress, pace.step(&progress, shell.clock.now()));
            shell.watch.event(Event::Step(&report))?;
            let (at, is_last) = (report.step, trainer.is_done());
            if !self.held_out.is_empty() && (progress.step % self.evaluate_every == 0 || is_last) {
                self.evaluate(trainer, at, &mut best, shell)?;
            }
            let stopped = (shell.stop)() && !is_last;
            if progress.step % self.checkpoint_every == 0 || is_last || stopped {
                trainer.checkpoint_of(&path, Some(self.place(at, best)))?;
                shell.watch.event(Event::Checkpoint {
                    step: at,
                    path: &path,
                })?;
            }
            if stopped {
                return Err(WorkError::Stopped);
            }
        }
        if best.is_some() {
            trainer.take_weights(&self.folder.best(self.stage))?;
        }
        Ok(StageEnd { loss, best })
    }

    /// Measures the loss on what is held out and keeps the weights if it is the lowest of the stage.
    fn evaluate(
        &self,
        trainer: &Trainer<'_>,
        step: u64,
        best: &mut Option<Best>,
        shell: &mut Shell<'_>,
    ) -> Result<(), WorkError> {
        let loss =
            held_out::mean_loss(trainer.model(), trainer.vocab(), &self.held_out, self.start)?;
        let is_best = best.is_none_or(|best| loss < best.loss);
        if is_best {
            *best = Some(Best { step, loss });
            let place = self.place(step, *best);
            trainer.checkpoint_of(&self.folder.best(self.stage), Some(place))?;
        }
        shell.watch.event(Event::Evaluated {
            step,
            loss,
            is_best,
        })
    }

    fn place(&self, step: u64, best: Option<Best>) -> RunPlace {
        RunPlace {
            settings: self.settings.to_owned(),
            data: self.data.clone(),
            started: self.started,
            stage: self.stage,
            step,
            best,
        }
    }

    fn report(
        &self,
        progress: &Progress,
        (tokens_per_second, now, step_seconds): (f64, UnixMillis, f64),
    ) -> StepReport {
        let step = self.before + progress.step;
        let left = self.steps.saturating_sub(step) as f64 * step_seconds;
        StepReport {
            step,
            steps: self.steps,
            loss: progress.loss,
            norm: progress.norm,
            rate: progress.rate,
            tokens: progress.tokens as u64,
            tokens_per_second,
            left: Duration::try_from_secs_f64(left).unwrap_or(Duration::MAX),
            now,
        }
    }
}

/// How fast a process goes.
struct Pace {
    start: UnixMillis,
    steps: u64,
    tokens: u64,
}

impl Pace {
    const fn new(start: UnixMillis) -> Self {
        Self {
            start,
            steps: 0,
            tokens: 0,
        }
    }

    /// Tokens a second, the time, and seconds a step.
    fn step(&mut self, progress: &Progress, now: UnixMillis) -> (f64, UnixMillis, f64) {
        self.steps += 1;
        self.tokens += progress.tokens as u64;
        // The clock has milliseconds; a wall clock may also be set back.
        let seconds = now.since(self.start).as_secs_f64().max(1e-3);
        (
            self.tokens as f64 / seconds,
            now,
            seconds / self.steps as f64,
        )
    }
}
