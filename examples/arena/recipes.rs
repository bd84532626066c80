//! How arms come by their models: what several of them do with the bench.

use anyhow::{Context, Result};
use consilium_examples::lab::trainer::permuted_targets;
use consilium_node::worker::LoadedModel;
use consilium_node::worker::train::distill::{Objective, SortedLoss, Teacher};
use consilium_protocol::manifest::{FusionRule, MergeRule, TargetForm, TargetTail};
use consilium_protocol::shard::Shard;

use crate::bench::Bench;
use crate::exchange::{Lesson, Merging, exchanged};

/// Symbols of a record by default.
pub(crate) const SYMBOLS: u16 = 16;

/// Half of the sum: between the mean of four and the sum.
pub(crate) const ARITHMETIC: MergeRule = MergeRule::TaskArithmetic {
    scale_permille: 500,
};

/// As a round's targets are by default.
pub(crate) const USUAL: TargetForm = TargetForm {
    symbols: None,
    tail: TargetTail::Label,
    draws: 0,
};

/// Targets of so many symbols that say nothing else but how much the others have together.
pub(crate) const fn ghost(symbols: u16) -> TargetForm {
    TargetForm {
        symbols: Some(symbols),
        tail: TargetTail::Ghost,
        draws: 0,
    }
}

pub(crate) fn local(bench: &Bench, at: usize) -> Result<LoadedModel> {
    let folder = bench.sources.get(at).context("no such institution")?;
    Ok(LoadedModel::load(folder)?)
}

/// Records of `symbols` symbols, fused by a rule and distilled.
pub(crate) fn records(
    bench: &Bench,
    how: (FusionRule, TargetForm),
    symbols: u16,
) -> Result<LoadedModel> {
    let sources = bench.records(symbols)?;
    bench.distil(&bench.fuse(how, symbols, &sources)?)
}

pub(crate) fn fused(bench: &Bench, rule: FusionRule) -> Result<LoadedModel> {
    records(bench, (rule, USUAL), SYMBOLS)
}

/// A rule with its default parameters.
pub(crate) fn named_rule(bench: &Bench, name: &str) -> Result<LoadedModel> {
    let rule = FusionRule::named(name).with_context(|| format!("no rule is called {name:?}"))?;
    fused(bench, rule)
}

/// Targets of the default rule where they beat the pivot's own record of an item, labels elsewhere.
pub(crate) fn dual(bench: &Bench) -> Result<LoadedModel> {
    let items = bench.reference.items();
    let targets = bench.fuse(
        (FusionRule::default(), ghost(SYMBOLS)),
        SYMBOLS,
        &bench.records(SYMBOLS)?,
    )?;
    let targets = bench.targets(&targets)?;
    let (mut distiller, plan) = bench.trainer().begin(items, false)?;
    let owned = bench.owned(distiller.student(), &plan.visited()?, &targets, SYMBOLS)?;
    let objective = Objective::OwnedTrie {
        targets: &targets,
        owned: &owned,
        cross_entropy: bench.training.cross_entropy_permille as f32 / 1000.0,
    };
    distiller.run(&plan, items, objective, &mut ())?;
    Ok(distiller.into_student())
}

/// All sources' largest logits by their place in descending order, summed over the sources, beside labels of equal weight.
pub(crate) fn sorted(bench: &Bench, loss: SortedLoss, symbols: usize) -> Result<LoadedModel> {
    let items = bench.reference.items();
    let (mut distiller, plan) = bench.trainer().begin(items, true)?;
    let visited = plan.visited()?;
    let aligned = bench
        .sources
        .iter()
        .map(|folder| {
            let source = LoadedModel::load(folder)?;
            Ok(distiller.align(&source, &plan, items, &visited, symbols, &mut ())?)
        })
        .collect::<Result<Vec<_>>>()?;
    let teachers: Vec<Teacher<'_>> = aligned
        .iter()
        .map(|logits| Teacher {
            logits,
            owned: None,
        })
        .collect();
    let objective = Objective::Sorted {
        teachers: &teachers,
        loss,
        cross_entropy: 0.5,
    };
    distiller.run(&plan, items, objective, &mut ())?;
    Ok(distiller.into_student())
}

/// Adapters trained on private text.
pub(crate) fn private(bench: &Bench, merging: Merging) -> Result<LoadedModel> {
    exchanged(bench, Lesson::Private, merging)
}

pub(crate) fn permuted(bench: &Bench) -> Result<LoadedModel> {
    let manifest = bench.manifest(FusionRule::default(), SYMBOLS)?;
    let sources: Vec<_> = bench
        .records(SYMBOLS)?
        .into_iter()
        .map(|(who, shard)| (who, vec![shard]))
        .collect();
    let seed = bench.world.seed;
    let targets = permuted_targets(&manifest, &bench.reference, &sources, seed)?;
    let targets: &Shard = targets.first().context("no targets")?;
    bench.distil(targets)
}
