//! The arms: one way to a model each, with its source. All start from the same pivot and see the same public text.

use anyhow::Result;
use consilium_node::worker::LoadedModel;
use consilium_node::worker::train::distill::SortedLoss;
use consilium_protocol::manifest::{FusionRule, MergeRule, TargetForm, TargetTail};

use crate::bench::{Bench, DENSE};
use crate::exchange::{Lesson, Merging, exchanged};
use crate::private::pmixed;
use crate::recipes::{
    ARITHMETIC, SYMBOLS, USUAL, dual, fused, ghost, local, named_rule, permuted, private, records,
    sorted,
};
use crate::tokens::{fusellm, xtoken};

/// What an arm is there for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Role {
    /// One institution's own model.
    Source,
    /// What must be beaten.
    Baseline,
    /// A method.
    Method,
    /// This project's pipeline with another rule of fusion or another form of targets.
    Variant,
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
    variant(
        "min_ce",
        "minCE",
        "FuseLLM, arXiv 2401.10491, on bytes",
        |bench| fused(bench, FusionRule::MinCe),
    ),
    variant(
        "softmax",
        "softmax routing",
        "FuseLLM's AvgCE, arXiv 2401.10491, sharper",
        |bench| named_rule(bench, "softmax"),
    ),
    arm(
        "guarded",
        "guarded softmax (default)",
        "this project, after arXiv 2402.12265",
        Role::Ours,
        |bench| fused(bench, FusionRule::default()),
    ),
    variant("causal", "causal routing", "this project", |bench| {
        named_rule(bench, "causal")
    }),
    variant(
        "confidence",
        "softmax x confidence",
        "after arXiv 2501.02795, version 1",
        |bench| named_rule(bench, "confidence"),
    ),
    variant(
        "log_average",
        "log-average",
        "logarithmic opinion pool",
        |bench| named_rule(bench, "log_average"),
    ),
    variant(
        "median",
        "median",
        "arXiv 1803.01498, competent sources",
        |bench| named_rule(bench, "median"),
    ),
    variant(
        "trimmed",
        "trimmed mean",
        "arXiv 1803.01498, competent sources",
        |bench| named_rule(bench, "trimmed_mean"),
    ),
    variant(
        "exp_guard",
        "ExpGuard",
        "arXiv 2402.12265, competent sources",
        |bench| named_rule(bench, "exp_guard"),
    ),
    variant(
        "dual",
        "dual minCE",
        "FedMKT, arXiv 2406.02224, on bytes",
        dual,
    ),
    variant("dense", "default, 64 symbols", "this project", |bench| {
        records(bench, (FusionRule::default(), USUAL), DENSE)
    }),
    variant(
        "top8",
        "default, 8 symbols",
        "this project; tail to labels, arXiv 2503.16870",
        |bench| records(bench, (FusionRule::default(), USUAL), 8),
    ),
    variant(
        "ghost8",
        "default, 8 symbols, ghost tail",
        "ghost token, arXiv 2503.16870",
        |bench| records(bench, (FusionRule::default(), ghost(8)), 8),
    ),
    variant("top2", "default, 2 symbols", "this project", |bench| {
        records(bench, (FusionRule::default(), USUAL), 2)
    }),
    variant(
        "no_tail",
        "default, 2 symbols, no tail",
        "renormalised top-k",
        |bench| {
            let form = TargetForm {
                tail: TargetTail::Dropped,
                ..ghost(2)
            };
            records(bench, (FusionRule::default(), form), 2)
        },
    ),
    variant("drawn", "default, 50 draws", "arXiv 2503.16870", |bench| {
        let form = TargetForm { draws: 50, ..USUAL };
        records(bench, (FusionRule::default(), form), SYMBOLS)
    }),
    method(
        "pmixed",
        "PMixED, epsilon 1 a draw",
        "arXiv 2403.15638, on bytes, one draw",
        pmixed,
    ),
    method("uld", "ULD", "arXiv 2402.12030, all sources", |bench| {
        sorted(bench, SortedLoss::Probability, 64)
    }),
    method(
        "uld_top10",
        "ULD, top 10",
        "arXiv 2402.12030 and 2501.02795",
        |bench| sorted(bench, SortedLoss::Probability, 10),
    ),
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
        "fusellm",
        "FuseLLM, MinCE and MinED",
        "arXiv 2401.10491, top 10",
        fusellm,
    ),
    method(
        "xtoken",
        "X-Token P-KL, best teacher",
        "after arXiv 2605.21699",
        xtoken,
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

const fn variant(
    id: &'static str,
    label: &'static str,
    origin: &'static str,
    make: fn(&Bench) -> Result<LoadedModel>,
) -> Arm {
    arm(id, label, origin, Role::Variant, make)
}

const fn second(
    id: &'static str,
    label: &'static str,
    origin: &'static str,
    make: fn(&Bench) -> Result<LoadedModel>,
) -> Arm {
    arm(id, label, origin, Role::Private, make)
}
