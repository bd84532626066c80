//! Cross-entropy training on text, from a new model or from a folder.

use std::path::Path;

use consilium_kernels::Vocab;
use consilium_kernels::loss::{ItemLoss, Term};

use super::adamw::{AdamW, AdamWConfig};
use super::checkpoint::RunPlace;
use super::schedule::Schedule;
use super::{TrainError, checkpoint};
use crate::worker::data::{Batch, Batches, Items};
use crate::worker::model::{Gradients, Model};

/// A run.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct TrainConfig {
    /// Rows of a batch.
    pub rows: usize,
    /// Tokens of a row.
    pub length: usize,
    /// Batches whose gradients are added up for one step, at least 1.
    pub accumulate: usize,
    /// Learning rate, and the number of steps.
    pub schedule: Schedule,
    /// Constants of the optimiser.
    pub optimiser: AdamWConfig,
    /// Seed of the data's order.
    pub seed: u64,
}

impl TrainConfig {
    /// Batches of 12 rows of 96 tokens, linear decay.
    pub fn new(steps: u64, rate: f64, seed: u64) -> Self {
        Self {
            rows: 12,
            length: 96,
            accumulate: 1,
            schedule: Schedule::linear(rate, steps),
            optimiser: AdamWConfig::default(),
            seed,
        }
    }
}

/// What a step did.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Progress {
    /// Steps taken, this one included.
    pub step: u64,
    /// Steps of the whole run.
    pub steps: u64,
    /// Mean loss of a label, in nats.
    pub loss: f64,
    /// Tokens that went through the model.
    pub tokens: usize,
    /// Norm of the gradient before clipping.
    pub norm: f64,
    /// Learning rate.
    pub rate: f64,
}

/// A model in training.
#[derive(Debug)]
pub struct Trainer<'v> {
    model: Model,
    vocab: &'v Vocab,
    optimiser: AdamW,
    pub(super) batches: Batches,
    config: TrainConfig,
}

/// Trains what is trainable in `model` (call `train_all` or `attach_lora` first) on `items` for all steps
/// of the schedule, from the beginning.
pub fn train_language_model(
    model: Model,
    vocab: &Vocab,
    items: impl Into<Items>,
    start: u32,
    config: TrainConfig,
    mut progress: impl FnMut(&Progress),
) -> Result<Model, TrainError> {
    let mut trainer = Trainer::new(model, vocab, items, start, config)?;
    while !trainer.is_done() {
        progress(&trainer.step()?);
    }
    Ok(trainer.into_model())
}

impl<'v> Trainer<'v> {
    /// Begins with step 0. `vocab` must have the model's order; the token `start` stands before every item.
    pub fn new(
        model: Model,
        vocab: &'v Vocab,
        items: impl Into<Items>,
        start: u32,
        config: TrainConfig,
    ) -> Result<Self, TrainError> {
        let batches = Batches::new(items, start, config.rows, config.length, config.seed)?;
        let optimiser = AdamW::new(&model, config.optimiser)?;
        Ok(Self {
            model,
            vocab,
            optimiser,
            batches,
            config,
        })
    }

    /// Whether all steps are taken.
    pub fn is_done(&self) -> bool {
        self.optimiser.steps() >= self.config.schedule.steps
    }

    /// The model as it is now.
    pub fn model(&self) -> &Model {
        &self.model
    }

    /// Its vocabulary.
    pub fn vocab(&self) -> &'v Vocab {
        self.vocab
    }

    /// Ends the run.
    pub fn into_model(self) -> Model {
        self.model
    }

    /// One step of the optimiser.
    pub fn step(&mut self) -> Result<Progress, TrainError> {
        let step = self.optimiser.steps();
        let batches = (0..self.config.accumulate.max(1))
            .map(|_| self.batches.next_batch())
            .collect::<Result<Vec<Batch>, _>>()?;
        let labels: usize = batches.iter().map(|batch| batch.rows.len()).sum();
        let weight = 1.0 / labels as f32;
        let (mut loss, mut tokens) = (0.0, 0);
        let mut sum: Option<Gradients> = None;
        for batch in batches {
            tokens += batch.packed.tokens.len();
            let (value, gradients) = self.gradients(&batch, weight)?;
            loss += value;
            match &mut sum {
                None => sum = Some(gradients),
                Some(sum) => sum.add(&gradients)?,
            }
        }
        if !loss.is_finite() {
            return Err(TrainError::NotFinite { step, what: "loss" });
        }
        let rate = self.config.schedule.at(step);
        let Some(gradients) = sum else {
            return Err(TrainError::OtherModel);
        };
        let norm = self.optimiser.step(&mut self.model, &gradients, rate)?;
        let steps = self.config.schedule.steps;
        Ok(Progress {
            step: step + 1,
            steps,
            loss,
            tokens,
            norm,
            rate,
        })
    }

    /// Loss of a batch, `weight` per label, and its gradients.
    pub fn gradients(&self, batch: &Batch, weight: f32) -> Result<(f64, Gradients), TrainError> {
        let labels = ranks(&self.model, self.vocab, batch);
        let pass = self.model.forward(&batch.packed, batch.rows.clone())?;
        let terms = [Term::Labels {
            labels: &labels,
            weight,
        }];
        let rows = ItemLoss {
            tokens: &[],
            terms: &terms,
        };
        pass.backward(self.vocab, &[rows])
    }

    /// Writes everything that [`resume`](Self::resume) needs.
    pub fn checkpoint(&self, path: &Path) -> Result<(), TrainError> {
        self.checkpoint_of(path, None)
    }

    /// As [`checkpoint`](Self::checkpoint), with the place in a whole run.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn checkpoint_of(&self, path: &Path, run: Option<RunPlace>) -> Result<(), TrainError> {
        let place = (self.batches.cursor(), self.config.seed);
        checkpoint::save_run(path, &self.model, &self.optimiser, place, run)
    }

    /// Takes the weights of a checkpoint of this model; the optimiser's state and the place in the data are not to be used
    /// any more.
    ///
    /// # Errors
    /// The file is no checkpoint of this model.
    pub fn take_weights(&mut self, path: &Path) -> Result<(), TrainError> {
        checkpoint::restore(path, &mut self.model, &mut self.optimiser)?;
        Ok(())
    }

    /// Continues from a checkpoint, bit for bit as if the run had not been interrupted.
    pub fn resume(&mut self, path: &Path) -> Result<(), TrainError> {
        let place = checkpoint::restore(path, &mut self.model, &mut self.optimiser)?;
        if place.seed != self.config.seed {
            return Err(TrainError::Checkpoint {
                path: path.into(),
                reason: format!("seed {}, this run has {}", place.seed, self.config.seed),
            });
        }
        self.batches.seek(place.cursor);
        Ok(())
    }
}

/// Ranks of a batch's labels: of tokens, or of the end of a record.
pub(super) fn ranks(model: &Model, vocab: &Vocab, batch: &Batch) -> Vec<u32> {
    let (ranks, end) = (model.rank_of_id(), vocab.end_ranks().start);
    let rank = |label: &Option<u32>| label.map_or(end, |id| ranks[id as usize]);
    batch.labels.iter().map(rank).collect()
}
