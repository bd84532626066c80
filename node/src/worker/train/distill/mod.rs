//! Distillation of fused records into the pivot's adapter, or plain training of the same adapter.
//!
//! A node keeps its optimiser over all inner rounds while the adapter itself is replaced by the merged one before each
//! of them; the learning rate follows one schedule over all inner rounds.

mod ownership;
mod sorted;
mod step;
mod tokens;

use std::collections::BTreeSet;
use std::path::Path;
use std::sync::Arc;

use consilium_kernels::loss::{ItemLoss, Tail, Term};
use consilium_protocol::manifest::Training;
use consilium_protocol::reference;
use rand::Rng as _;
use rayon::prelude::*;

use super::language_model::ranks;
use super::targets::Targets;
use super::{AdamW, AdamWConfig, Decay, Schedule, TrainError, checkpoint};
use crate::worker::data::{Batch, Batches, Cursor, Item, Items};
use crate::worker::error::WorkError;
use crate::worker::model::{AdapterConfig, FurtherLoss, Gradients, tensors};
use crate::worker::monitor::Monitor;
use crate::worker::part::generator;
use crate::worker::peft;
use crate::worker::source::LoadedModel;
use step::{Goal, Step, item_at};

pub use ownership::ownership;
pub(crate) use ownership::token_ownership;
pub use sorted::{AlignedLogits, SortedLoss, Teacher};
pub use tokens::TokenTargets;

/// How an adapter is trained.
#[derive(Debug, Clone, PartialEq)]
pub struct Settings {
    /// Rows of one step.
    pub rows: usize,
    /// Tokens of one row. Items whose target alone has more take no part.
    pub row_tokens: usize,
    /// Steps of one inner round.
    pub local_steps: u64,
    /// Learning rate over all inner rounds.
    pub schedule: Schedule,
    /// Shape of the adapter.
    pub lora: AdapterConfig,
    /// Constants of the optimiser.
    pub optimiser: AdamWConfig,
    /// Seed of the data's order and of a fresh adapter.
    pub seed: u64,
    /// Whether cross-entropy takes bytes that are declared to be no label for labels.
    pub label_unlabeled: bool,
    /// Whether A stays as it was at the start of an inner round (FFA-LoRA, arXiv 2403.12313).
    pub freeze_a: bool,
}

/// What is minimised.
#[derive(Debug, Clone, Copy)]
pub enum Objective<'a> {
    /// `(1 - cross_entropy)` of the trie loss, and `cross_entropy` of that of the observed tokens.
    Trie {
        /// Fused records of the items.
        targets: &'a Targets,
        /// 0 to 1.
        cross_entropy: f32,
    },
    /// Cross-entropy of the observed tokens.
    CrossEntropy,
    /// As `Trie` for some items, and cross-entropy alone for the others.
    OwnedTrie {
        /// Records of the items at least.
        targets: &'a Targets,
        /// Items that are learned from their records.
        owned: &'a BTreeSet<u64>,
        /// 0 to 1.
        cross_entropy: f32,
    },
    /// `(1 - cross_entropy)` of a loss on the largest logits of one or more teachers, summed over these, and
    /// `cross_entropy` of that of the observed tokens; the latter alone where no teacher speaks of an item.
    Sorted {
        /// Their logits at the pivot's rows.
        teachers: &'a [Teacher<'a>],
        /// What is compared.
        loss: SortedLoss,
        /// 0 to 1.
        cross_entropy: f32,
    },
    /// `(1 - cross_entropy)` of cross-entropy to distributions over the pivot's own tokens, the mean over the rows that have
    /// one, and `cross_entropy` of that of the observed tokens; the latter alone for items without targets.
    Tokens {
        /// Distributions at the pivot's rows.
        targets: &'a TokenTargets,
        /// What becomes of the mass that they do not list.
        tail: Tail,
        /// 0 to 1.
        cross_entropy: f32,
    },
}

impl Objective<'_> {
    /// Weight of cross-entropy on items that something else is learned from as well.
    const fn cross_entropy(&self) -> f32 {
        match *self {
            Self::CrossEntropy => 1.0,
            Self::Trie { cross_entropy, .. }
            | Self::OwnedTrie { cross_entropy, .. }
            | Self::Sorted { cross_entropy, .. }
            | Self::Tokens { cross_entropy, .. } => cross_entropy,
        }
    }
}

/// The items of one inner round and their order. Batches are drawn from it as they are needed.
#[derive(Debug)]
pub struct Plan {
    inner: u32,
    steps: u64,
    /// Index of each tokenised item in the reference set.
    indices: Vec<u64>,
    tokens: Arc<[Item]>,
    order: Order,
}

/// What the batches follow from.
#[derive(Debug, Clone, Copy)]
struct Order {
    end_of_record: u32,
    rows: usize,
    row_tokens: usize,
    seed: u64,
}

/// A pivot with an adapter in training.
#[derive(Debug)]
pub struct Distiller {
    student: LoadedModel,
    optimiser: AdamW,
    settings: Settings,
}

impl Settings {
    /// What a manifest says.
    ///
    /// # Errors
    /// Modules that this version cannot train.
    pub fn of(training: &Training, seed: u64) -> Result<Self, WorkError> {
        let lora = peft::shape(
            training.rank as usize,
            f64::from(training.alpha),
            &training.target_modules,
            &training.modules_to_save,
        )?;
        let share = |permille: u32| f64::from(permille) / 1000.0;
        Ok(Self {
            rows: training.rows as usize,
            row_tokens: training.row_tokens as usize,
            local_steps: training.local_steps.into(),
            schedule: Schedule {
                rate: f64::from(training.learning_rate_micros) / 1e6,
                warmup: share(training.warmup_permille),
                decay: Decay::Linear,
                floor: share(training.final_permille),
                steps: u64::from(training.inner_rounds) * u64::from(training.local_steps),
            },
            lora,
            optimiser: AdamWConfig::default(),
            seed,
            label_unlabeled: false,
            freeze_a: training.merge.freezes_a(),
        })
    }
}

impl Plan {
    /// Items that the batches visit, ascending.
    ///
    /// # Errors
    /// The rows have no tokens.
    pub fn visited(&self) -> Result<Vec<u64>, WorkError> {
        let mut batches = self.batches()?;
        let mut visited = BTreeSet::new();
        for _ in 0..self.steps {
            if batches.cursor().epoch > 0 {
                visited.extend(&self.indices);
                break;
            }
            let batch = batches.next_batch().map_err(TrainError::from)?;
            visited.extend(batch.items.iter().map(|packed| self.indices[packed.item]));
        }
        Ok(visited.into_iter().collect())
    }

    /// Items of the part that fit a row.
    #[must_use]
    pub fn usable(&self) -> usize {
        self.indices.len()
    }

    fn batches(&self) -> Result<Batches, WorkError> {
        let Order {
            end_of_record,
            rows,
            row_tokens,
            seed,
        } = self.order;
        let tokens = Arc::clone(&self.tokens);
        let batches = Batches::new(tokens, end_of_record, rows, row_tokens, seed);
        Ok(batches.map_err(TrainError::from)?)
    }
}

impl Distiller {
    /// Attaches a fresh adapter to the pivot and begins with a fresh optimiser.
    ///
    /// # Errors
    /// The adapter's shape is impossible.
    pub fn new(mut pivot: LoadedModel, settings: Settings) -> Result<Self, WorkError> {
        pivot
            .model
            .attach_lora(settings.lora.clone(), settings.seed)?;
        let optimiser = AdamW::new(&pivot.model, settings.optimiser)?;
        Ok(Self {
            student: pivot,
            optimiser,
            settings,
        })
    }

    /// The pivot with the adapter as it is now.
    #[must_use]
    pub fn student(&self) -> &LoadedModel {
        &self.student
    }

    /// Ends the training and keeps the pivot with its adapter.
    #[must_use]
    pub fn into_student(self) -> LoadedModel {
        self.student
    }

    /// How it trains.
    #[must_use]
    pub fn settings(&self) -> &Settings {
        &self.settings
    }

    /// Replaces the adapter by the bytes of a PEFT file; the optimiser goes on.
    ///
    /// # Errors
    /// The bytes are no adapter of this pivot and shape.
    pub fn set_start(&mut self, adapter: &[u8]) -> Result<(), WorkError> {
        let tensors = tensors::decode("the adapter to start from", adapter)?;
        Ok(self.student.model.set_adapter(&tensors)?)
    }

    /// The adapter as a PEFT file, `adapter_model.safetensors`.
    ///
    /// # Errors
    /// The weights cannot be read.
    pub fn adapter_bytes(&self) -> Result<Vec<u8>, WorkError> {
        Ok(tensors::encode(&self.student.model.adapter()?)?)
    }

    /// Draws the batches of an inner round from the `part` of `items`: whole items packed into rows, in an order that
    /// the seed and the number of the inner round decide, all of them before any comes again.
    ///
    /// # Errors
    /// No item fits a row, one cannot be tokenised, or the part names items that are not there.
    pub fn plan(
        &self,
        items: &[reference::Item],
        part: &[u64],
        inner: u32,
    ) -> Result<Plan, WorkError> {
        let limit = self.row_tokens();
        let tokenised = part
            .par_iter()
            .map(|&index| {
                let item = item_at(items, index)?;
                let tokens = self.student.item(&item.context, &item.target, limit)?;
                Ok(tokens.map(|tokens| (index, tokens)))
            })
            .collect::<Result<Vec<_>, WorkError>>()?;
        let (indices, tokens): (Vec<u64>, Vec<Item>) = tokenised.into_iter().flatten().unzip();
        if tokens.is_empty() {
            return Err(WorkError::NothingToTrain);
        }
        if tokens.len() < part.len() {
            let left_out = part.len() - tokens.len();
            tracing::warn!(
                left_out,
                "items have more tokens than a row and take no part"
            );
        }
        let seed = generator(&[self.settings.seed, u64::from(inner)]).next_u64();
        Ok(Plan {
            inner,
            steps: self.settings.local_steps,
            indices,
            tokens: tokens.into(),
            order: Order {
                end_of_record: self.student.tokenizer.start_of_record(),
                rows: self.settings.rows,
                row_tokens: limit,
                seed,
            },
        })
    }

    /// Trains one inner round and returns the mean loss of its steps in nats per predicted token.
    ///
    /// # Errors
    /// Targets that do not fit the items, numbers that are not finite, or a monitor that says stop. The adapter and the
    /// optimiser are then somewhere inside of the round.
    pub fn run(
        &mut self,
        plan: &Plan,
        items: &[reference::Item],
        objective: Objective<'_>,
        monitor: &mut dyn Monitor,
    ) -> Result<f64, WorkError> {
        let before = u64::from(plan.inner) * plan.steps;
        let mut batches = plan.batches()?;
        let frozen = self.frozen_a()?;
        let mut sum = 0.0;
        for step in 0..plan.steps {
            let rate = self.settings.schedule.at(before + step);
            let batch = &batches.next_batch().map_err(TrainError::from)?;
            let found = self.gradients(&Step { plan, items, batch }, objective)?;
            let loss = self.step(found, rate, frozen.as_deref())?;
            sum += loss;
            monitor.advance(step + 1, plan.steps, Some(loss))?;
        }
        Ok(sum / plan.steps.max(1) as f64)
    }

    /// Trains one inner round on items of text by cross-entropy and returns the mean loss of its steps in nats per learned
    /// token. The order follows from the seed and the number of the inner round.
    ///
    /// # Errors
    /// No items, one that does not fit a row, numbers that are not finite, or a monitor that says stop.
    pub fn run_text(
        &mut self,
        items: impl Into<Items>,
        inner: u32,
        monitor: &mut dyn Monitor,
    ) -> Result<f64, WorkError> {
        let Settings {
            rows, local_steps, ..
        } = self.settings;
        let seed = generator(&[self.settings.seed, u64::from(inner)]).next_u64();
        let start = self.student.tokenizer.start_of_record();
        let batches = Batches::new(items, start, rows, self.row_tokens(), seed);
        let mut batches = batches.map_err(TrainError::from)?;
        let before = u64::from(inner) * local_steps;
        let frozen = self.frozen_a()?;
        let mut sum = 0.0;
        for step in 0..local_steps {
            let rate = self.settings.schedule.at(before + step);
            let batch = batches.next_batch().map_err(TrainError::from)?;
            let found = self.text_gradients(&batch)?;
            let loss = self.step(found, rate, frozen.as_deref())?;
            sum += loss;
            monitor.advance(step + 1, local_steps, Some(loss))?;
        }
        Ok(sum / local_steps.max(1) as f64)
    }

    /// Longest row.
    #[must_use]
    pub fn row_tokens(&self) -> usize {
        let limit = self.student.model.config().max_positions;
        limit.min(self.settings.row_tokens)
    }

    /// Writes what a later process needs to continue: the optimiser's state.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn save_state(&self, path: &Path) -> Result<(), WorkError> {
        let (model, seed) = (&self.student.model, self.settings.seed);
        checkpoint::save(path, model, &self.optimiser, Cursor::default(), seed)?;
        Ok(())
    }

    /// Continues from what [`save_state`](Self::save_state) wrote for the same pivot and settings.
    ///
    /// # Errors
    /// The file is unusable; nothing has changed then.
    pub fn restore_state(&mut self, path: &Path) -> Result<(), WorkError> {
        checkpoint::restore(path, &mut self.student.model, &mut self.optimiser)?;
        Ok(())
    }

    /// A as the inner round finds it, where it must stay so.
    fn frozen_a(&self) -> Result<Option<Vec<f32>>, WorkError> {
        let frozen = self.settings.freeze_a;
        Ok(frozen.then(|| self.student.model.copy_of_a()).transpose()?)
    }

    fn step(
        &mut self,
        found: (f64, Gradients),
        rate: f64,
        frozen: Option<&[f32]>,
    ) -> Result<f64, WorkError> {
        let (loss, gradients) = found;
        let steps = self.optimiser.steps();
        if !loss.is_finite() {
            let what = "loss";
            return Err(TrainError::NotFinite { step: steps, what }.into());
        }
        self.optimiser
            .step(&mut self.student.model, &gradients, rate)?;
        if let Some(a) = frozen {
            self.student.model.restore_a(a)?;
        }
        Ok(loss)
    }

    fn text_gradients(&self, batch: &Batch) -> Result<(f64, Gradients), WorkError> {
        let model = &self.student.model;
        let labels = ranks(model, &self.student.vocab, batch);
        let pass = model.forward(&batch.packed, batch.rows.clone())?;
        let terms = [Term::Labels {
            labels: &labels,
            weight: 1.0 / labels.len().max(1) as f32,
        }];
        let rows = ItemLoss {
            tokens: &[],
            terms: &terms,
        };
        pass.backward(&self.student.vocab, &[rows])
    }

    fn gradients(
        &self,
        step: &Step<'_>,
        objective: Objective<'_>,
    ) -> Result<(f64, Gradients), WorkError> {
        let batch = step.batch;
        let labels = step.labels(&self.student, self.settings.label_unlabeled)?;
        let pass = self
            .student
            .model
            .forward(&batch.packed, batch.rows.clone())?;
        let goals = step.goals(&self.student, &labels, objective)?;
        let items: Vec<ItemLoss<'_>> = goals.iter().map(Goal::loss).collect();
        let graphs = sorted::graphs(step, objective);
        let more: &FurtherLoss<'_> = &|head, hidden, by_hidden, mut by_head| {
            graphs.iter().try_fold(0.0, |sum, (k, items)| {
                let by_head = by_head.as_deref_mut();
                Ok(sum + head.graph(hidden, *k, items, by_hidden, by_head)?)
            })
        };
        let more = (!graphs.is_empty()).then_some(more);
        pass.backward_with(&self.student.vocab, &items, more)
    }
}

#[cfg(test)]
mod tests;
