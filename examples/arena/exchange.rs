//! Arms in which adapters travel in place of records: every institution trains the pivot's adapter at home, and the aggregator's
//! own rules merge them.
//!
//! Every institution makes the steps of a round's default (eight inner rounds of thirty), from the same start.

use std::collections::BTreeSet;
use std::ops::Range;
use std::sync::{Mutex, PoisonError};

use anyhow::{Context, Result};
use consilium_aggregator::fusion::{Content, MergeInput, Merged, merge_in_memory};
use consilium_examples::attacks::adapters::Adapter;
use consilium_examples::lab::parallel::{Job, in_parallel};
use consilium_examples::lab::trainer::items_of;
use consilium_node::worker::LoadedModel;
use consilium_node::worker::train::distill::{
    AlignedLogits, Distiller, Objective, Settings, SortedLoss, Teacher,
};
use consilium_node::worker::train::targets::Targets;
use consilium_protocol::InstitutionId;
use consilium_protocol::manifest::{Defence, MergeRule, Training};
use consilium_protocol::reference::Item;

use crate::attacks::LIAR;
use crate::bench::{Bench, RATE};
use crate::sites::{self, NAMES};

/// Symbols of an institution's own records.
const SYMBOLS: u16 = 16;
/// Largest logits of a position that the sorted loss compares.
const LARGEST: usize = 10;
/// Weight of labels beside a sorted loss.
const SORTED_LABELS: f32 = 0.5;

/// What an institution learns from at home.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Lesson {
    /// Its private text: federated LoRA.
    Private,
    /// Its own records where they beat the pivot's, labels elsewhere: mode `pairwise`.
    Records,
    /// Its own largest logits in the same way, compared in order (InfiFusion, pairwise).
    Logits,
}

/// How adapters become one, and how often.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Merging {
    /// The rule.
    pub(crate) rule: MergeRule,
    /// Merges; the steps are shared out over them.
    pub(crate) inner_rounds: u32,
    /// Outer Nesterov rate and momentum, in thousandths.
    pub(crate) outer: [u32; 2],
}

/// Adapters with the names of those who trained them.
pub(crate) type Adapters = Vec<(InstitutionId, Vec<u8>)>;

/// What everybody starts from, and what came of one stretch of training at each place.
#[derive(Debug, Clone)]
pub(crate) struct Trained {
    /// The adapter before.
    pub(crate) start: Vec<u8>,
    /// The adapters after.
    pub(crate) adapters: Adapters,
}

/// Adapters of one stretch, kept because several rules merge the very same.
#[derive(Debug, Default)]
pub(crate) struct Kept([Mutex<Option<Trained>>; 3]);

impl Merging {
    /// All steps at home, one merge, no outer step.
    pub(crate) const fn once(rule: MergeRule) -> Self {
        Self {
            rule,
            inner_rounds: 1,
            outer: [1000, 0],
        }
    }

    /// Eight merges.
    pub(crate) const fn often(rule: MergeRule, outer: [u32; 2]) -> Self {
        Self {
            rule,
            inner_rounds: 8,
            outer,
        }
    }

    /// What a manifest would say. Rules stand here as published, so without a defence.
    pub(crate) fn training(&self, bench: &Bench) -> Training {
        let all = bench.training.inner_rounds * bench.training.local_steps;
        Training {
            merge: self.rule,
            defence: Defence::None,
            inner_rounds: self.inner_rounds,
            local_steps: all / self.inner_rounds,
            outer_rate_permille: self.outer[0],
            outer_momentum_permille: self.outer[1],
            ..bench.training.clone()
        }
    }
}

/// The pivot with what the institutions' adapters became.
pub(crate) fn exchanged(bench: &Bench, lesson: Lesson, merging: Merging) -> Result<LoadedModel> {
    let training = merging.training(bench);
    if merging.inner_rounds == 1 {
        let Trained { start, adapters } = trained_once(bench, lesson)?;
        let merged = merge(&training, bench.world.seed, &start, None, &adapters)?;
        return with_adapter(bench, &training, &merged.adapter);
    }
    let rounds = 0..merging.inner_rounds;
    let start = after(
        bench,
        &mut learners(bench, lesson, &training)?,
        &training,
        rounds,
    )?;
    with_adapter(bench, &training, &start)
}

/// What honest institutions send in one inner round, after `inner` of them: what an attack hides among. And what a fifth one with
/// [`sites::mixed`] text would send if it were honest.
pub(crate) fn in_the_middle(bench: &Bench, inner: u32) -> Result<(Trained, Vec<u8>)> {
    let training = &bench.training;
    let mut learners = learners(bench, Lesson::Private, training)?;
    let start = after(bench, &mut learners, training, 0..inner)?;
    let adapters = stretch(&mut learners, &start, inner)?;
    let distiller = begun(bench, Lesson::Private, training)?;
    let mut fifth = Learner {
        who: InstitutionId::new(LIAR)?,
        distiller,
        items: items_of(&sites::mixed(&bench.world)),
        work: Work::Labels,
        cross_entropy: 1.0,
    };
    let own = fifth.learn(&start, inner)?;
    Ok((Trained { start, adapters }, own))
}

/// The merged adapter after these inner rounds.
fn after(
    bench: &Bench,
    learners: &mut [Learner],
    training: &Training,
    rounds: Range<u32>,
) -> Result<Vec<u8>> {
    let mut start = first(learners)?;
    let mut momentum: Option<Vec<u8>> = None;
    for inner in rounds {
        let adapters = stretch(learners, &start, inner)?;
        let seed = bench.world.seed + u64::from(inner);
        let merged = merge(training, seed, &start, momentum.as_deref(), &adapters)?;
        start = merged.adapter;
        momentum = Some(merged.momentum);
    }
    Ok(start)
}

/// What comes of all steps in one stretch; the same for every rule that merges once.
pub(crate) fn trained_once(bench: &Bench, lesson: Lesson) -> Result<Trained> {
    let slot = &bench.kept.0[lesson as usize];
    let mut slot = slot.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(trained) = &*slot {
        return Ok(trained.clone());
    }
    let training = Merging::once(MergeRule::Product).training(bench);
    let mut learners = learners(bench, lesson, &training)?;
    let start = first(&learners)?;
    let adapters = stretch(&mut learners, &start, 0)?;
    Ok(slot.insert(Trained { start, adapters }).clone())
}

/// Merges as the aggregator does, all with one weight.
pub(crate) fn merge(
    training: &Training,
    seed: u64,
    start: &[u8],
    momentum: Option<&[u8]>,
    adapters: &Adapters,
) -> Result<Merged> {
    let adapters: Vec<_> = adapters
        .iter()
        .map(|(who, bytes)| (who.clone(), Content::Bytes(bytes), 1))
        .collect();
    Ok(merge_in_memory(MergeInput {
        training,
        seed,
        start: Content::Bytes(start),
        momentum: momentum.map(Content::Bytes),
        adapters: &adapters,
    })?)
}

/// The pivot with an adapter of any rank; the manifest's alpha / rank stays the scale.
pub(crate) fn with_adapter(
    bench: &Bench,
    training: &Training,
    adapter: &[u8],
) -> Result<LoadedModel> {
    let parsed = Adapter::parse(adapter)?;
    let mut factors = parsed.0.iter().filter(|(name, _)| name.contains(".lora_A"));
    let (_, factor) = factors.next().context("an adapter without matrices")?;
    let rank = u32::try_from(*factor.shape.first().context("a factor without rank")?)?;
    let training = Training {
        rank,
        alpha: training.alpha * rank / training.rank,
        ..training.clone()
    };
    let settings = Settings::of(&training, bench.world.seed)?;
    let mut distiller = Distiller::new(LoadedModel::load(&bench.pivot)?, settings)?;
    distiller.set_start(adapter)?;
    Ok(distiller.into_student())
}

/// One institution at its work.
struct Learner {
    who: InstitutionId,
    distiller: Distiller,
    items: Vec<Item>,
    work: Work,
    /// Weight of labels beside records.
    cross_entropy: f32,
}

enum Work {
    Labels,
    Records(Targets, BTreeSet<u64>),
    Logits(AlignedLogits, BTreeSet<u64>),
}

impl Learner {
    fn new(bench: &Bench, at: usize, lesson: Lesson, training: &Training) -> Result<Self> {
        let distiller = begun(bench, lesson, training)?;
        let (items, work) = match lesson {
            Lesson::Private => {
                let private = sites::private(&bench.world);
                let own = private.get(at).context("no such institution")?;
                (items_of(own), Work::Labels)
            }
            Lesson::Records | Lesson::Logits => {
                let items = bench.reference.items().to_vec();
                let work = of_records(bench, at, lesson, &distiller, &items)?;
                (items, work)
            }
        };
        Ok(Self {
            who: InstitutionId::new(NAMES.get(at).context("no such institution")?)?,
            distiller,
            items,
            work,
            cross_entropy: training.cross_entropy_permille as f32 / 1000.0,
        })
    }

    /// One inner round from `start`.
    fn learn(&mut self, start: &[u8], inner: u32) -> Result<Vec<u8>> {
        self.distiller.set_start(start)?;
        let all: Vec<u64> = (0..self.items.len() as u64).collect();
        let plan = self.distiller.plan(&self.items, &all, inner)?;
        let teacher;
        let objective = match &self.work {
            Work::Labels => Objective::CrossEntropy,
            Work::Records(targets, owned) => Objective::OwnedTrie {
                targets,
                owned,
                cross_entropy: self.cross_entropy,
            },
            Work::Logits(logits, owned) => {
                teacher = [Teacher {
                    logits,
                    owned: Some(owned),
                }];
                Objective::Sorted {
                    teachers: &teacher,
                    loss: SortedLoss::Standardised { temperature: 1.0 },
                    cross_entropy: SORTED_LABELS,
                }
            }
        };
        self.distiller.run(&plan, &self.items, objective, &mut ())?;
        Ok(self.distiller.adapter_bytes()?)
    }
}

/// The pivot with an adapter to be trained.
fn begun(bench: &Bench, lesson: Lesson, training: &Training) -> Result<Distiller> {
    let pivot = LoadedModel::load(&bench.pivot)?;
    let mut settings = Settings::of(training, bench.world.seed)?;
    settings.schedule.rate = RATE;
    settings.label_unlabeled = lesson != Lesson::Records;
    Ok(Distiller::new(pivot, settings)?)
}

/// An institution's own records, or its logits, and the items at which it beats the pivot.
fn of_records(
    bench: &Bench,
    at: usize,
    lesson: Lesson,
    distiller: &Distiller,
    items: &[Item],
) -> Result<Work> {
    let records = bench.records(SYMBOLS)?;
    let (_, shard) = records.get(at).context("no such institution")?;
    let targets = bench.targets(shard)?;
    let all: Vec<u64> = (0..items.len() as u64).collect();
    let plan = distiller.plan(items, &all, 0)?;
    let visited = plan.visited()?;
    let owned = bench.owned(distiller.student(), &visited, &targets, SYMBOLS)?;
    if lesson == Lesson::Records {
        return Ok(Work::Records(targets, owned));
    }
    let source = LoadedModel::load(bench.sources.get(at).context("no such institution")?)?;
    let wanted: Vec<u64> = owned.iter().copied().collect();
    let logits = distiller.align(&source, &plan, items, &wanted, LARGEST, &mut ())?;
    Ok(Work::Logits(logits, owned))
}

fn learners(bench: &Bench, lesson: Lesson, training: &Training) -> Result<Vec<Learner>> {
    let jobs = (0..NAMES.len()).map(|at| -> Job<'_, Learner> {
        Box::new(move || Learner::new(bench, at, lesson, training))
    });
    in_parallel(jobs.collect())
}

/// The adapter before any training, the same for all.
fn first(learners: &[Learner]) -> Result<Vec<u8>> {
    let learner = learners.first().context("nobody learns")?;
    Ok(learner.distiller.adapter_bytes()?)
}

/// An inner round of everybody.
fn stretch(learners: &mut [Learner], start: &[u8], inner: u32) -> Result<Adapters> {
    let jobs = learners
        .iter_mut()
        .map(|learner| -> Job<'_, (InstitutionId, Vec<u8>)> {
            Box::new(move || {
                let adapter = learner.learn(start, inner)?;
                Ok((learner.who.clone(), adapter))
            })
        });
    in_parallel(jobs.collect())
}
