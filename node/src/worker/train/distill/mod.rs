//! Distillation of fused records into the pivot's adapter, or plain training of the same adapter.
//!
//! A node keeps its optimiser over all inner rounds while the adapter itself is replaced by the merged one before each
//! of them; the learning rate follows one schedule over all inner rounds.

use std::collections::BTreeSet;
use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

use consilium_kernels::loss::{ItemLoss, NO_LABEL, Term};
use consilium_protocol::manifest::Training;
use consilium_protocol::reference;
use rand::Rng as _;
use rayon::prelude::*;

use super::targets::Targets;
use super::{AdamW, AdamWConfig, Decay, Schedule, TrainError, checkpoint};
use crate::worker::data::{Batch, Batches, Cursor, Item};
use crate::worker::error::WorkError;
use crate::worker::model::{AdapterConfig, Gradients, tensors};
use crate::worker::monitor::Monitor;
use crate::worker::part::generator;
use crate::worker::peft;
use crate::worker::source::LoadedModel;

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
        let limit = self.student.model.config().max_positions;
        let limit = limit.min(self.settings.row_tokens);
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
        let mut sum = 0.0;
        for step in 0..plan.steps {
            let rate = self.settings.schedule.at(before + step);
            let batch = &batches.next_batch().map_err(TrainError::from)?;
            let loss = self.step(&Step { plan, items, batch }, objective, rate)?;
            sum += loss;
            monitor.advance(step + 1, plan.steps, Some(loss))?;
        }
        Ok(sum / plan.steps.max(1) as f64)
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

    fn step(
        &mut self,
        step: &Step<'_>,
        objective: Objective<'_>,
        rate: f64,
    ) -> Result<f64, WorkError> {
        let (loss, gradients) = self.gradients(step, objective)?;
        let steps = self.optimiser.steps();
        if !loss.is_finite() {
            let what = "loss";
            return Err(TrainError::NotFinite { step: steps, what }.into());
        }
        self.optimiser
            .step(&mut self.student.model, &gradients, rate)?;
        Ok(loss)
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
        let (trie, plain) = match objective {
            Objective::CrossEntropy => (None, 1.0),
            Objective::Trie {
                targets,
                cross_entropy,
            } => (Some(targets), cross_entropy),
        };
        let labelled = labels.iter().filter(|&&label| label != NO_LABEL).count();
        let goals = step.goals(
            &self.student,
            &labels,
            plain / labelled.max(1) as f32,
            trie.map(|targets| (targets, (1.0 - plain) / batch.rows.len() as f32)),
        )?;
        let items: Vec<ItemLoss<'_>> = goals.iter().map(Goal::loss).collect();
        pass.backward(&self.student.vocab, &items)
    }
}

/// One batch and where its items come from.
struct Step<'a> {
    plan: &'a Plan,
    items: &'a [reference::Item],
    batch: &'a Batch,
}

impl Step<'_> {
    /// Ranks to predict at the batch's rows; [`NO_LABEL`] where a token touches a byte that is no label.
    fn labels(&self, student: &LoadedModel, all: bool) -> Result<Vec<u32>, WorkError> {
        let mut labels = Vec::with_capacity(self.batch.rows.len());
        for packed in &self.batch.items {
            let unlabeled = &item_at(self.items, self.plan.indices[packed.item])?.unlabeled;
            let ranks = student.ranks(&self.plan.tokens[packed.item].target);
            let mut start = 0;
            for rank in ranks {
                let bytes = start..start + student.vocab.token_bytes(rank).len();
                start = bytes.end;
                let is_label = all || !unlabeled.iter().any(|span| overlap(span, &bytes));
                labels.push(if is_label { rank } else { NO_LABEL });
            }
            labels.push(student.vocab.end_ranks().start);
        }
        Ok(labels)
    }

    /// What the rows of each item learn: their `labels`, and where there are fused records, these.
    fn goals<'t>(
        &self,
        student: &LoadedModel,
        labels: &'t [u32],
        weight: f32,
        trie: Option<(&'t Targets, f32)>,
    ) -> Result<Vec<Goal<'t>>, WorkError> {
        self.batch
            .items
            .iter()
            .map(|packed| {
                let index = self.plan.indices[packed.item];
                let mut terms = Vec::with_capacity(2);
                if let Some((targets, weight)) = trie {
                    let target = targets
                        .of(index)
                        .ok_or_else(|| WorkError::Targets(format!("none for item {index}")))?;
                    terms.push(Term::Trie { target, weight });
                }
                let labels = &labels[packed.logits.clone()];
                terms.push(Term::Labels { labels, weight });
                let tokens = student.ranks(&self.plan.tokens[packed.item].target);
                Ok(Goal { tokens, terms })
            })
            .collect()
    }
}

/// What one item's rows learn.
struct Goal<'t> {
    tokens: Vec<u32>,
    terms: Vec<Term<'t>>,
}

impl Goal<'_> {
    fn loss(&self) -> ItemLoss<'_> {
        ItemLoss {
            tokens: &self.tokens,
            terms: &self.terms,
        }
    }
}

fn item_at(items: &[reference::Item], index: u64) -> Result<&reference::Item, WorkError> {
    usize::try_from(index)
        .ok()
        .and_then(|index| items.get(index))
        .ok_or(WorkError::Items {
            first: index,
            last: index.saturating_add(1),
            items: items.len(),
        })
}

fn overlap(a: &Range<usize>, b: &Range<usize>) -> bool {
    a.start < b.end && b.start < a.end
}

#[cfg(test)]
mod tests;
