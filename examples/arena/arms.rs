//! The arms: one way to a model each, with its source. All start from the same pivot and see the same public text.

use anyhow::{Context, Result};
use consilium_examples::lab::trainer::permuted_targets;
use consilium_node::worker::LoadedModel;
use consilium_node::worker::train::distill::{Objective, SortedLoss, Teacher};
use consilium_protocol::manifest::{FusionRule, MergeRule, TargetForm};
use consilium_protocol::shard::Shard;

use crate::attacks::GUARDED;
use crate::bench::Bench;
use crate::exchange::{Lesson, Merging, exchanged};

/// What an arm is there for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Role {
    /// One institution's own model.
    Source,
    /// What must be beaten.
    Baseline,
    /// A method.
    Method,
    /// A method that trains the pivot itself on private text, which adapters can give away: a track of its own.
    Private,
    /// This project's default.
    Ours,
    /// Sees what no consortium may see.
    Bound,
    /// Must learn nothing.
    Control,
}

/// A way to a model.
#[derive(Debug)]
pub(crate) struct Arm {
    /// Name on the command line and in JSON.
    pub(crate) id: &'static str,
    /// Name in tables.
    pub(crate) label: &'static str,
    /// Where the method comes from.
    pub(crate) origin: &'static str,
    /// What it is there for.
    pub(crate) role: Role,
    /// Makes the model.
    pub(crate) make: fn(&Bench) -> Result<LoadedModel>,
}

/// Symbols of a record by default.
const SYMBOLS: u16 = 16;
/// exp(-sharpness x bits per byte).
const SHARPNESS: u32 = 20;

/// Every arm, in the order of all tables.
pub(crate) static ARMS: &[Arm] = &[
    source("bank", "bank alone", |bench| local(bench, 0)),
    source("clinic", "clinic alone", |bench| local(bench, 1)),
    source("hospital", "hospital alone", |bench| local(bench, 2)),
    source("insurer", "insurer alone", |bench| local(bench, 3)),
    arm("pivot", "pivot before", "", Role::Baseline, |bench| {
        Ok(LoadedModel::load(&bench.pivot)?)
    }),
    arm(
        "sft",
        "SFT on the public text",
        "cross-entropy on the same items",
        Role::Baseline,
        |bench| bench.trainer().on_labels(bench.reference.items()),
    ),
    method("mean", "uniform mean", "FedMD, arXiv 1910.03581", |bench| {
        fused(bench, FusionRule::Uniform)
    }),
    method(
        "min_ce",
        "minCE",
        "FuseLLM, arXiv 2401.10491, on bytes",
        |bench| fused(bench, FusionRule::MinCe),
    ),
    arm(
        "softmax",
        "softmax routing (default)",
        "this project",
        Role::Ours,
        |bench| fused(bench, SOFTMAX),
    ),
    method("causal", "causal routing", "this project", |bench| {
        named_rule(bench, "causal")
    }),
    method(
        "confidence",
        "softmax x confidence",
        "after arXiv 2501.02795, version 1",
        |bench| named_rule(bench, "confidence"),
    ),
    method(
        "log_average",
        "log-average",
        "logarithmic opinion pool",
        |bench| named_rule(bench, "log_average"),
    ),
    method(
        "median",
        "median",
        "arXiv 1803.01498, competent sources",
        |bench| named_rule(bench, "median"),
    ),
    method(
        "trimmed",
        "trimmed mean",
        "arXiv 1803.01498, competent sources",
        |bench| named_rule(bench, "trimmed_mean"),
    ),
    method(
        "exp_guard",
        "ExpGuard",
        "arXiv 2402.12265, competent sources",
        |bench| named_rule(bench, "exp_guard"),
    ),
    method(
        "guarded",
        "ExpGuard x softmax",
        "this project, after arXiv 2402.12265",
        |bench| fused(bench, GUARDED),
    ),
    method(
        "dual",
        "dual minCE",
        "FedMKT, arXiv 2406.02224, on bytes",
        dual,
    ),
    method("dense", "softmax, 64 symbols", "this project", |bench| {
        records(bench, (SOFTMAX, PLAIN), 64)
    }),
    method(
        "top8",
        "softmax, 8 symbols and tail",
        "this project",
        |bench| records(bench, (SOFTMAX, PLAIN), 8),
    ),
    method(
        "top2",
        "softmax, 2 symbols and tail",
        "this project",
        |bench| records(bench, (SOFTMAX, PLAIN), 2),
    ),
    method(
        "no_tail",
        "softmax, 2 symbols, no tail",
        "renormalised top-k",
        |bench| {
            let form = TargetForm {
                drop_tail: true,
                ..PLAIN
            };
            records(bench, (SOFTMAX, form), 2)
        },
    ),
    method("drawn", "softmax, 50 draws", "arXiv 2503.16870", |bench| {
        let form = TargetForm { draws: 50, ..PLAIN };
        records(bench, (SOFTMAX, form), SYMBOLS)
    }),
    method("uld", "ULD", "arXiv 2402.12030, all sources", |bench| {
        sorted(bench, SortedLoss::Probability, 64)
    }),
    method(
        "infifusion",
        "InfiFusion, unified",
        "arXiv 2501.02795, top 10",
        |bench| sorted(bench, SortedLoss::Standardised { temperature: 1.0 }, 10),
    ),
    method(
        "infigfusion",
        "InfiGFusion",
        "arXiv 2505.13893, top 10",
        |bench| {
            let loss = SortedLoss::Graph {
                temperature: 1.0,
                weight: 1.0,
            };
            sorted(bench, loss, 10)
        },
    ),
    method(
        "pairwise",
        "pairwise, own records, mean",
        "after arXiv 2501.02795, on bytes",
        |bench| exchanged(bench, Lesson::Records, Merging::once(MergeRule::Product)),
    ),
    method(
        "pairwise_arithmetic",
        "pairwise, task arithmetic",
        "arXiv 2501.02795 and 2212.04089",
        |bench| exchanged(bench, Lesson::Records, Merging::once(ARITHMETIC)),
    ),
    method(
        "infifusion_pairwise",
        "InfiFusion, pairwise",
        "arXiv 2501.02795, top 10, task arithmetic",
        |bench| exchanged(bench, Lesson::Logits, Merging::once(ARITHMETIC)),
    ),
    second(
        "fedavg",
        "FedAvg of factors, 8 merges",
        "FedIT, arXiv 2305.05644",
        |bench| private(bench, Merging::often(MergeRule::Factors, [1000, 0])),
    ),
    second("ffa", "FFA-LoRA, 8 merges", "arXiv 2403.12313", |bench| {
        private(bench, Merging::often(MergeRule::Ffa, [1000, 0]))
    }),
    second(
        "diloco",
        "DiLoCo on products, 8 merges",
        "arXiv 2311.08105 and 2402.11505",
        |bench| private(bench, Merging::often(MergeRule::Product, [700, 700])),
    ),
    second(
        "svd",
        "exact mean and SVD, 1 merge",
        "FlexLoRA, arXiv 2402.11505",
        |bench| private(bench, Merging::once(MergeRule::Product)),
    ),
    second(
        "flora",
        "FLoRA stacking, 1 merge",
        "arXiv 2409.05976",
        |bench| private(bench, Merging::once(MergeRule::Stack)),
    ),
    second(
        "arithmetic",
        "task arithmetic, 1 merge",
        "arXiv 2212.04089",
        |bench| private(bench, Merging::once(ARITHMETIC)),
    ),
    second("ties", "TIES, 1 merge", "arXiv 2306.01708", |bench| {
        let rule = MergeRule::Ties {
            density_permille: 200,
            scale_permille: 1000,
        };
        private(bench, Merging::once(rule))
    }),
    second("dare", "DARE, 1 merge", "arXiv 2311.03099", |bench| {
        let rule = MergeRule::Dare {
            density_permille: 500,
            scale_permille: 250,
        };
        private(bench, Merging::once(rule))
    }),
    second(
        "sce",
        "SCE, 1 merge",
        "FuseChat, arXiv 2408.07990",
        |bench| {
            let rule = MergeRule::Sce {
                select_permille: 100,
            };
            private(bench, Merging::once(rule))
        },
    ),
    arm(
        "centralised",
        "centralised (bound)",
        "cross-entropy on all private text",
        Role::Bound,
        |bench| bench.trainer().on_labels(&bench.private()),
    ),
    arm(
        "permuted",
        "permuted records (control)",
        "records dealt to the wrong items",
        Role::Control,
        permuted,
    ),
];

/// Half of the sum: between the mean of four and the sum.
const ARITHMETIC: MergeRule = MergeRule::TaskArithmetic {
    scale_permille: 500,
};

const SOFTMAX: FusionRule = FusionRule::Softmax {
    sharpness: SHARPNESS,
};
/// Targets as they are fused.
const PLAIN: TargetForm = TargetForm {
    symbols: None,
    drop_tail: false,
    draws: 0,
};

/// The arm of this name.
pub(crate) fn named(id: &str) -> Option<&'static Arm> {
    ARMS.iter().find(|arm| arm.id == id)
}

/// One line per arm.
pub(crate) fn list() -> String {
    ARMS.iter()
        .map(|arm| format!("{:<14}{:<32}{}", arm.id, arm.label, arm.origin))
        .collect::<Vec<_>>()
        .join("\n")
}

const fn arm(
    id: &'static str,
    label: &'static str,
    origin: &'static str,
    role: Role,
    make: fn(&Bench) -> Result<LoadedModel>,
) -> Arm {
    Arm {
        id,
        label,
        origin,
        role,
        make,
    }
}

const fn source(
    id: &'static str,
    label: &'static str,
    make: fn(&Bench) -> Result<LoadedModel>,
) -> Arm {
    let origin = "private text and a little public text";
    arm(id, label, origin, Role::Source, make)
}

const fn method(
    id: &'static str,
    label: &'static str,
    origin: &'static str,
    make: fn(&Bench) -> Result<LoadedModel>,
) -> Arm {
    arm(id, label, origin, Role::Method, make)
}

const fn second(
    id: &'static str,
    label: &'static str,
    origin: &'static str,
    make: fn(&Bench) -> Result<LoadedModel>,
) -> Arm {
    arm(id, label, origin, Role::Private, make)
}

fn local(bench: &Bench, at: usize) -> Result<LoadedModel> {
    let folder = bench.sources.get(at).context("no such institution")?;
    Ok(LoadedModel::load(folder)?)
}

/// Records of `symbols` symbols, fused by a rule and distilled.
fn records(bench: &Bench, how: (FusionRule, TargetForm), symbols: u16) -> Result<LoadedModel> {
    let sources = bench.records(symbols)?;
    bench.distil(&bench.fuse(how, symbols, &sources)?)
}

fn fused(bench: &Bench, rule: FusionRule) -> Result<LoadedModel> {
    records(bench, (rule, PLAIN), SYMBOLS)
}

/// A rule with its default parameters.
fn named_rule(bench: &Bench, name: &str) -> Result<LoadedModel> {
    let rule = FusionRule::named(name).with_context(|| format!("no rule is called {name:?}"))?;
    fused(bench, rule)
}

/// Softmax targets where they beat the pivot's own record of an item, labels elsewhere.
fn dual(bench: &Bench) -> Result<LoadedModel> {
    let items = bench.reference.items();
    let targets = bench.fuse((SOFTMAX, PLAIN), SYMBOLS, &bench.records(SYMBOLS)?)?;
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
fn sorted(bench: &Bench, loss: SortedLoss, symbols: usize) -> Result<LoadedModel> {
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
fn private(bench: &Bench, merging: Merging) -> Result<LoadedModel> {
    exchanged(bench, Lesson::Private, merging)
}

fn permuted(bench: &Bench) -> Result<LoadedModel> {
    let manifest = bench.manifest(SOFTMAX, SYMBOLS)?;
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
