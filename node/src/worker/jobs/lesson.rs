//! What an inner round learns from: fused records, the site's own, labels, or private text.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use consilium_kernels::RecordShape;
use consilium_kernels::loss::Tail;
use consilium_protocol::manifest::{Distillation, SymbolSpace};
use consilium_protocol::reference::{Item, ReferenceSet};
use consilium_protocol::time::SystemClock;
use consilium_protocol::{Clock, limits};

use super::Worker;
use crate::spool::{DistilJob, JobId, Lesson, RecordFiles, Rival};
use crate::worker::commands::chat_format;
use crate::worker::data::{Encoder, Items, LongItems, Loss, Preparation, Source, prepare};
use crate::worker::error::WorkError;
use crate::worker::part::items_of;
use crate::worker::tokens::check_tokenizer;
use crate::worker::train::TrainError;
use crate::worker::train::distill::{
    AlignedLogits, Distiller, Objective, Plan, SortedLoss, Teacher, TokenTargets, ownership,
    token_ownership,
};
use crate::worker::train::targets::Targets;

/// What was found out about items and text, and stays so for the round.
#[derive(Debug, Default)]
pub(super) struct Known {
    /// Whether the records of an item beat the pivot's own.
    owned: BTreeMap<u64, bool>,
    /// The private text as tokens.
    text: Option<Items>,
}

/// Numbers for the log.
type Learned = [(&'static str, f64); 3];

/// The items that an inner round learns from, and where it starts.
struct Public<'a> {
    records: &'a RecordFiles,
    /// Items of the set that the node learns from.
    part: Vec<u64>,
    rival: Option<&'a Rival>,
    /// Bytes of the adapter.
    start: &'a [u8],
}

/// Records of the items that an inner round visits.
enum Gathered {
    Bytes(Targets),
    Tokens(Targets<u32>, SymbolSpace),
}

/// What these items learn from them.
enum Ready {
    Bytes(Targets),
    Tokens(TokenTargets),
}

impl Worker<'_> {
    /// Trains one inner round from the adapter `start`.
    pub(super) fn learn(
        &mut self,
        id: &JobId,
        job: &DistilJob,
        distiller: &mut Distiller,
        known: &mut Known,
        start: &[u8],
    ) -> Result<Learned, WorkError> {
        let (records, part, rival) = match &job.lesson {
            Lesson::Private => {
                distiller.set_start(start)?;
                return self.learn_text(id, job, distiller, known);
            }
            Lesson::Public { records } => (records, (0..records.items).collect(), None),
            Lesson::Own { records, rival } => (records, (0..records.items).collect(), Some(rival)),
            Lesson::Fused {
                records,
                part,
                rival,
            } => (records, items_of(part, records.items)?, rival.as_ref()),
        };
        let mut part: Vec<u64> = part;
        part.retain(|item| records.withheld.binary_search(item).is_err());
        let public = Public {
            records,
            part,
            rival,
            start,
        };
        self.learn_items(id, job, distiller, known, &public)
    }

    fn learn_items(
        &mut self,
        id: &JobId,
        job: &DistilJob,
        distiller: &mut Distiller,
        known: &mut Known,
        public: &Public<'_>,
    ) -> Result<Learned, WorkError> {
        let reference = self
            .reference
            .read(&self.spool, &public.records.reference)?;
        let items = reference.items();
        if items.len() as u64 != public.records.items {
            return Err(WorkError::Setting {
                field: "items",
                problem: format!(
                    "{}, but the reference set has {}",
                    public.records.items,
                    items.len()
                ),
            });
        }
        let plan = distiller.plan(items, &public.part, job.inner)?;
        let distillation = &job.training.distillation;
        if *distillation == Distillation::Labels {
            distiller.set_start(public.start)?;
            let mut watch = self.watch(id, "steps");
            let loss = distiller.run(&plan, items, Objective::CrossEntropy, &mut watch)?;
            return Ok(learned(loss, plan.usable(), 0));
        }
        let visited = plan.visited()?;
        let targets = self.targets(public.records, &reference, &visited, distiller)?;
        let owned = match public.rival {
            Some(rival) => {
                Some(self.owned(id, rival, distiller, known, (items, &visited, &targets))?)
            }
            None => None,
        };
        let teacher = match distillation.sorted_symbols() {
            Some(symbols) => {
                // Nothing is compared at items that the source does not own.
                let wanted: Vec<u64> = match &owned {
                    Some(owned) => owned.iter().copied().collect(),
                    None => visited,
                };
                Some(self.teacher(id, distiller, &plan, (items, &wanted), symbols)?)
            }
            None => None,
        };
        distiller.set_start(public.start)?;
        let cross_entropy = job.training.cross_entropy_permille as f32 / 1000.0;
        let teachers: Vec<Teacher<'_>> = teacher
            .iter()
            .map(|logits| Teacher {
                logits,
                owned: owned.as_ref(),
            })
            .collect();
        let is_listed = *distillation == Distillation::TrieListed;
        let targets = match targets {
            Gathered::Bytes(targets) if is_listed => Ready::Bytes(targets.without_tail()?),
            Gathered::Bytes(targets) => Ready::Bytes(targets),
            Gathered::Tokens(records, _) => Ready::Tokens(plan.token_targets(
                distiller.student(),
                items,
                &records,
                owned.as_ref(),
            )?),
        };
        let objective = match (SortedLoss::of(distillation), &targets, &owned) {
            (Some(loss), ..) => Objective::Sorted {
                teachers: &teachers,
                loss,
                cross_entropy,
            },
            (None, Ready::Tokens(targets), _) => Objective::Tokens {
                targets,
                tail: if is_listed {
                    Tail::Dropped
                } else {
                    Tail::Ghost
                },
                cross_entropy,
            },
            (None, Ready::Bytes(targets), Some(owned)) => Objective::OwnedTrie {
                targets,
                owned,
                cross_entropy,
            },
            (None, Ready::Bytes(targets), None) => Objective::Trie {
                targets,
                cross_entropy,
            },
        };
        let mut watch = self.watch(id, "steps");
        let loss = distiller.run(&plan, items, objective, &mut watch)?;
        Ok(learned(
            loss,
            plan.usable(),
            owned.map_or(0, |owned| owned.len()),
        ))
    }

    /// The largest logits of the source for the `wanted` items.
    fn teacher(
        &mut self,
        id: &JobId,
        distiller: &Distiller,
        plan: &Plan,
        (items, wanted): (&[Item], &[u64]),
        symbols: u32,
    ) -> Result<AlignedLogits, WorkError> {
        let source = self.take_source()?.ok_or_else(behind_a_server)?;
        let symbols = usize::try_from(symbols).unwrap_or(usize::MAX);
        let mut watch = self.watch(id, "items");
        distiller.align(&source, plan, items, wanted, symbols, &mut watch)
    }

    fn targets(
        &self,
        records: &RecordFiles,
        reference: &ReferenceSet,
        visited: &[u64],
        distiller: &Distiller,
    ) -> Result<Gathered, WorkError> {
        let load = |index| {
            let digest = usize::try_from(index)
                .ok()
                .and_then(|index: usize| records.shards.get(index))
                .ok_or_else(|| WorkError::Targets(format!("the job names no shard {index}")))?;
            Ok(self.spool.read_blob(digest, limits::SHARD)?)
        };
        let (space, size) = (records.symbol_space, records.shard_items);
        check_tokenizer(&distiller.student().tokenizer, "the pivot", space)?;
        Ok(match space {
            SymbolSpace::Bytes => Gathered::Bytes(Targets::gather(reference, visited, size, load)?),
            SymbolSpace::Tokens { .. } => {
                let targets = Targets::gather_tokens(reference, visited, space, size, load)?;
                Gathered::Tokens(targets, space)
            }
        })
    }

    /// Visited items whose records beat those of the pivot before the round.
    fn owned(
        &self,
        id: &JobId,
        rival: &Rival,
        distiller: &mut Distiller,
        known: &mut Known,
        (items, visited, targets): (&[Item], &[u64], &Gathered),
    ) -> Result<BTreeSet<u64>, WorkError> {
        let unknown: Vec<u64> = visited
            .iter()
            .copied()
            .filter(|item| !known.owned.contains_key(item))
            .collect();
        if !unknown.is_empty() {
            let adapter = self.spool.read_blob(&rival.adapter, limits::ARTEFACT)?;
            distiller.set_start(&adapter)?;
            let shape = RecordShape {
                k: rival.symbols.into(),
                fill_permille: rival.fill_permille.into(),
            };
            let mut watch = self.watch(id, "items");
            let pivot = distiller.student();
            let found = match targets {
                Gathered::Bytes(targets) => {
                    ownership(pivot, items, &unknown, targets, &shape, &mut watch)?
                }
                Gathered::Tokens(targets, space) => {
                    let targets = (targets, *space);
                    token_ownership(pivot, items, &unknown, targets, &shape, &mut watch)?
                }
            };
            known.owned.extend(found);
        }
        let is_owned = |item: &u64| known.owned.get(item) == Some(&true);
        Ok(visited.iter().copied().filter(is_owned).collect())
    }

    fn learn_text(
        &self,
        id: &JobId,
        job: &DistilJob,
        distiller: &mut Distiller,
        known: &mut Known,
    ) -> Result<Learned, WorkError> {
        let text = match &known.text {
            Some(text) => text.clone(),
            None => known.text.insert(self.private_text(distiller)?).clone(),
        };
        let mut watch = self.watch(id, "steps");
        let items = text.len();
        let loss = distiller.run_text(text, job.inner, &mut watch)?;
        Ok(learned(loss, items, 0))
    }

    /// The site's private text as tokens of the pivot, in files without a name.
    fn private_text(&self, distiller: &Distiller) -> Result<Items, WorkError> {
        let paths = &self.folders.train_data;
        if paths.is_empty() {
            return Err(WorkError::Setting {
                field: "train.data",
                problem: "names no private text; a round of mode adapters trains on it".to_owned(),
            });
        }
        let source = Source::open(paths).map_err(TrainError::from)?;
        let chat = chat_format(Some(&self.folders.pivot.resolve()?), SystemClock.now())?;
        let pivot = distiller.student();
        let encoder = Encoder::new(&pivot.tokenizer, &pivot.vocab, &*chat, Loss::default());
        let how = Preparation {
            length: distiller.row_tokens(),
            long: LongItems::default(),
            held_out: 0.0,
            seed: distiller.settings().seed,
            max_bad_rows: 0,
            at_most: None,
        };
        let folder = self.spool.state_path("");
        let data = prepare(&source, &encoder, &how, &folder, |_| {
            if (self.stop)() {
                Err(WorkError::Stopped)
            } else {
                Ok(())
            }
        })?;
        Ok(Items::from(Arc::clone(&data.train)))
    }
}

fn learned(loss: f64, items: usize, owned: usize) -> Learned {
    [
        ("loss", loss),
        ("usable_items", items as f64),
        ("owned_items", owned as f64),
    ]
}

fn behind_a_server() -> WorkError {
    WorkError::Setting {
        field: "source",
        problem: "the source is behind a server, and this round's loss needs its own logits"
            .to_owned(),
    }
}
