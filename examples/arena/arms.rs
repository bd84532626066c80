//! The arms: one way to a model each, with its source. All start from the same pivot and see the same public text.

use anyhow::{Context, Result};
use consilium_examples::lab::trainer::permuted_targets;
use consilium_node::worker::LoadedModel;
use consilium_protocol::manifest::FusionRule;
use consilium_protocol::shard::Shard;

use crate::bench::Bench;

/// What an arm is there for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Role {
    /// One institution's own model.
    Source,
    /// What must be beaten.
    Baseline,
    /// A method.
    Method,
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
    Arm {
        id: "pivot",
        label: "pivot before",
        origin: "",
        role: Role::Baseline,
        make: |bench| Ok(LoadedModel::load(&bench.pivot)?),
    },
    Arm {
        id: "sft",
        label: "SFT on the public text",
        origin: "cross-entropy on the same items",
        role: Role::Baseline,
        make: |bench| bench.trainer().on_labels(bench.reference.items()),
    },
    method("mean", "uniform mean", "FedMD, arXiv 1910.03581", |bench| {
        records(bench, FusionRule::Uniform, SYMBOLS)
    }),
    method(
        "min_ce",
        "minCE",
        "FuseLLM, arXiv 2401.10491, on bytes",
        |bench| records(bench, FusionRule::MinCe, SYMBOLS),
    ),
    Arm {
        id: "softmax",
        label: "softmax routing (default)",
        origin: "this project",
        role: Role::Ours,
        make: |bench| records(bench, SOFTMAX, SYMBOLS),
    },
    method("dense", "softmax, 64 symbols", "this project", |bench| {
        records(bench, SOFTMAX, 64)
    }),
    method(
        "top8",
        "softmax, 8 symbols and tail",
        "this project",
        |bench| records(bench, SOFTMAX, 8),
    ),
    method(
        "top2",
        "softmax, 2 symbols and tail",
        "this project",
        |bench| records(bench, SOFTMAX, 2),
    ),
    Arm {
        id: "centralised",
        label: "centralised (bound)",
        origin: "cross-entropy on all private text",
        role: Role::Bound,
        make: |bench| bench.trainer().on_labels(&bench.private()),
    },
    Arm {
        id: "permuted",
        label: "permuted records (control)",
        origin: "records dealt to the wrong items",
        role: Role::Control,
        make: permuted,
    },
];

const SOFTMAX: FusionRule = FusionRule::Softmax {
    sharpness: SHARPNESS,
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

const fn source(
    id: &'static str,
    label: &'static str,
    make: fn(&Bench) -> Result<LoadedModel>,
) -> Arm {
    Arm {
        id,
        label,
        origin: "private text and a little public text",
        role: Role::Source,
        make,
    }
}

const fn method(
    id: &'static str,
    label: &'static str,
    origin: &'static str,
    make: fn(&Bench) -> Result<LoadedModel>,
) -> Arm {
    Arm {
        id,
        label,
        origin,
        role: Role::Method,
        make,
    }
}

fn local(bench: &Bench, at: usize) -> Result<LoadedModel> {
    let folder = bench.sources.get(at).context("no such institution")?;
    Ok(LoadedModel::load(folder)?)
}

/// Records of `symbols` symbols, fused by a rule and distilled.
fn records(bench: &Bench, rule: FusionRule, symbols: u16) -> Result<LoadedModel> {
    let sources = bench.records(symbols)?;
    bench.distil(&bench.fuse(rule, symbols, &sources)?)
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
