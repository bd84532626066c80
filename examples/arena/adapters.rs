//! Merged adapters under scrutiny: how exact the rules are, and what each attack costs under each defence.
//!
//! Both look at adapters that the four institutions trained on their private text: exactness where one stretch ends, attacks in an
//! inner round in the middle. A liar is a fifth institution that joins for this inner round, with text of its own, see
//! `sites::mixed`, or with that of one of the four.

use anyhow::{Context, Result};
use consilium_examples::attacks::adapters::{Adapter, Attack};
use consilium_examples::attacks::table::{Cell, Scene, error_of_sum, table};
use consilium_node::worker::evaluate::bits_per_byte;
use consilium_protocol::manifest::{Defence, MergeRule};
use serde::{Deserialize, Serialize};

use crate::attacks::INSIDER;
use crate::bench::Bench;
use crate::exchange::{Lesson, Merging, in_the_middle, merge, trained_once, with_adapter};

/// Rules and defences of the table; the first is a round's default.
pub(crate) const DEFENCES: [(MergeRule, Defence); 7] = [
    (MergeRule::Product, Defence::ClipNorm),
    (MergeRule::Product, Defence::None),
    (MergeRule::Product, Defence::Standard),
    (
        MergeRule::Product,
        Defence::CentredClipping {
            radius_permille: 1000,
            iterations: 3,
        },
    ),
    (
        MergeRule::Product,
        Defence::GeometricMedian { iterations: 8 },
    ),
    (
        MergeRule::Product,
        Defence::MultiKrum {
            byzantine: 1,
            keep: 2,
        },
    ),
    (MergeRule::Product, Defence::TrimmedMean { byzantine: 1 }),
];
/// Inner rounds before the attack.
const HONEST_ROUNDS: u32 = 3;
/// Of the lines that measure, one in so many.
const EVERY: usize = 4;

/// How far merged products are from the weighted sum of products, relative to that.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct Exactness {
    /// The seed of the world.
    pub(crate) seed: u64,
    /// FLoRA stacking.
    pub(crate) stack: f64,
    /// FedEx residual.
    pub(crate) residual: f64,
    /// Means of the factors: the bias of FedIT.
    pub(crate) factors: f64,
    /// QR and SVD back to the manifest's rank: what the best adapter of that rank must lose.
    pub(crate) product: f64,
}

/// One cell of the table of attacks, with its seed.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct AdapterAttack {
    /// The seed of the world.
    pub(crate) seed: u64,
    /// Attack, rule and what came of it; the score is bits per byte on fresh lines.
    #[serde(flatten)]
    pub(crate) cell: Cell,
}

/// Distances of merged products from the exact sum.
pub(crate) fn exactness(bench: &Bench) -> Result<Exactness> {
    let trained = trained_once(bench, Lesson::Private)?;
    let parts: Vec<Adapter> = trained
        .adapters
        .iter()
        .map(|(_, bytes)| Adapter::parse(bytes))
        .collect::<Result<_>>()?;
    let of = |rule: MergeRule| {
        let training = Merging::once(rule).training(bench);
        let seed = bench.world.seed;
        let merged = merge(&training, seed, &trained.start, None, &trained.adapters)?;
        error_of_sum(&parts, &Adapter::parse(&merged.adapter)?)
    };
    Ok(Exactness {
        seed: bench.world.seed,
        stack: of(MergeRule::Stack)?,
        residual: of(MergeRule::Residual)?,
        factors: of(MergeRule::Factors)?,
        product: of(MergeRule::Product)?,
    })
}

/// Every attack of one in five under every defence: by a liar with text of its own, and by one that has another's text, who counts that
/// twice even where it is honest.
pub(crate) fn attacks(bench: &Bench) -> Result<Vec<AdapterAttack>> {
    let (trained, own) = in_the_middle(bench, HONEST_ROUNDS)?;
    let start = Adapter::parse(&trained.start)?;
    let honest: Vec<Adapter> = trained
        .adapters
        .iter()
        .map(|(_, bytes)| Adapter::parse(bytes))
        .collect::<Result<_>>()?;
    let training = &bench.training;
    let score = |adapter: &Adapter| {
        let model = with_adapter(bench, training, &adapter.to_bytes()?)?;
        let lines = bench.world.tests.lines.iter().flatten().step_by(EVERY);
        let texts = lines.map(|item| (item.context.as_str(), item.target.as_str()));
        Ok(bits_per_byte(&model, texts, &mut ())?)
    };
    let copied = honest.get(INSIDER).context("an insider")?.clone();
    let mut attacks = Vec::new();
    for (liar, whose) in [
        (Adapter::parse(&own)?, ""),
        (copied, ", with another's text"),
    ] {
        let adapters: Vec<Adapter> = std::iter::once(liar).chain(honest.clone()).collect();
        let scene = Scene {
            training,
            start: &start,
            adapters: &adapters,
            dishonest: 1,
            seed: bench.world.seed,
        };
        for mut cell in table(scene, &Attack::all(5, 1), &DEFENCES, &score)? {
            cell.attack += whose;
            let seed = bench.world.seed;
            attacks.push(AdapterAttack { seed, cell });
        }
    }
    Ok(attacks)
}
