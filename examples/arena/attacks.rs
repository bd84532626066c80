//! What each attack on records costs under each rule: a fifth institution lies, the other four do not.
//!
//! Measured on fresh lines with true answers, without training: bits per byte of the fused records at every byte, the answers
//! included, relative to what the same rule makes of the four honest alone. The liar owns the records of one of them, as an
//! insider would; routing does not look at the answers, as in a round.

use anyhow::{Context, Result};
use consilium_aggregator::fusion::fuse_shard;
use consilium_examples::attacks::records::{Aim, Attack, attacked};
use consilium_kernels::fusion::item_bits;
use consilium_kernels::{RecordShape, RecordView};
use consilium_node::worker::LoadedModel;
use consilium_node::worker::score::score_shard;
use consilium_protocol::InstitutionId;
use consilium_protocol::manifest::{FusionRule, Manifest};
use consilium_protocol::reference::ReferenceSet;
use consilium_protocol::shard::{Shard, Symbols};
use serde::{Deserialize, Serialize};

use crate::bench::Bench;
use crate::sites::NAMES;

/// Rules of the table by their names in it; the first is the default.
pub(crate) const RULES: [&str; 6] = [
    "guarded_softmax",
    "softmax",
    "uniform",
    "median",
    "trimmed_mean",
    "exp_guard",
];

/// The institution whose records or text the liar owns.
pub(crate) const INSIDER: usize = 2;
/// Name of the liar.
pub(crate) const LIAR: &str = "mallory";
/// Symbols of a record.
const SYMBOLS: u16 = 16;

/// One attack under all rules.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct AttackRow {
    /// The seed of the world.
    pub(crate) seed: u64,
    /// Name of the attack.
    pub(crate) attack: String,
    /// Whether it lies everywhere, or only where routing does not look.
    pub(crate) only_answers: bool,
    /// Bits more than without the liar, in thousandths, by rule; `none` is what the rule itself costs against the default.
    pub(crate) cost_permille: Vec<f64>,
}

impl AttackRow {
    /// Name and reach.
    pub(crate) fn label(&self) -> String {
        if self.only_answers {
            format!("{}, answers only", self.attack)
        } else {
            self.attack.clone()
        }
    }

    /// Whether its cost is to be bounded: members in collusion are more than any rule can bear.
    pub(crate) fn is_collusion(&self) -> bool {
        self.attack == Attack::RunnerUp.name()
    }
}

/// Every attack under every rule.
pub(crate) fn table(bench: &Bench) -> Result<Vec<AttackRow>> {
    let scene = Scene::new(bench)?;
    let honest = RULES
        .iter()
        .map(|rule| scene.bits(rule, &scene.honest))
        .collect::<Result<Vec<f64>>>()?;
    let row = |attack: &str, only_answers: bool, cost_permille: Vec<f64>| AttackRow {
        seed: bench.world.seed,
        attack: attack.to_owned(),
        only_answers,
        cost_permille,
    };
    let cost = |bits: f64, than: f64| 1000.0 * (bits / than - 1.0);
    let mut rows = vec![row(
        "none",
        false,
        honest.iter().map(|&bits| cost(bits, honest[0])).collect(),
    )];
    let own = &scene.honest.get(INSIDER).context("an insider")?.1;
    let known: Vec<&Shard> = scene.honest.iter().map(|(_, shard)| shard).collect();
    for attack in Attack::ALL {
        for aim in [Aim::All, Aim::Unlabeled] {
            let lie = attacked(attack, aim, own, &known, scene.reference.items())?;
            let mut sent = scene.honest.clone();
            sent.push((InstitutionId::new(LIAR)?, lie));
            let costs = RULES
                .iter()
                .zip(&honest)
                .map(|(rule, &than)| Ok(cost(scene.bits(rule, &sent)?, than)))
                .collect::<Result<Vec<f64>>>()?;
            rows.push(row(attack.name(), aim == Aim::Unlabeled, costs));
        }
    }
    Ok(rows)
}

/// True lines as a reference set, and what the honest say of them.
struct Scene {
    reference: ReferenceSet,
    manifest: Manifest,
    honest: Vec<(InstitutionId, Shard)>,
}

impl Scene {
    fn new(bench: &Bench) -> Result<Self> {
        let lines = bench.world.tests.lines.iter().flatten();
        let text: String = lines
            .map(|item| {
                let target = format!("{}{}", item.context, item.target);
                let spans: Vec<[usize; 2]> = answer(&target).into_iter().collect();
                serde_json::json!({"target": target, "unlabeled": spans}).to_string() + "\n"
            })
            .collect();
        let reference = ReferenceSet::parse(text.as_bytes())?;
        let items = reference.items().len();
        let shape = RecordShape {
            k: SYMBOLS.into(),
            fill_permille: 995,
        };
        let honest = NAMES
            .into_iter()
            .zip(&bench.sources)
            .map(|(name, folder)| {
                let source = LoadedModel::load(folder)?;
                let scored = score_shard(&source, &reference, 0..items as u64, &shape, &mut ())?;
                Ok((InstitutionId::new(name)?, scored.shard))
            })
            .collect::<Result<Vec<_>>>()?;
        let mut members = honest
            .iter()
            .map(|(who, _)| who.clone())
            .chain([InstitutionId::new(LIAR)?])
            .collect::<Vec<_>>();
        members.sort_unstable();
        let manifest = Manifest {
            reference: reference.digest(),
            items: items as u64,
            shard_items: u32::try_from(items)?,
            members,
            ..bench.manifest(FusionRule::Uniform, SYMBOLS)?
        };
        Ok(Self {
            reference,
            manifest,
            honest,
        })
    }

    /// Bits per byte of the fused records, at every byte.
    fn bits(&self, name: &str, sources: &[(InstitutionId, Shard)]) -> Result<f64> {
        let manifest = Manifest {
            fusion: FusionRule::named(name).with_context(|| format!("no rule {name:?}"))?,
            ..self.manifest.clone()
        };
        let shard = fuse_shard(&manifest, &self.reference, 0, sources)?.targets;
        let Symbols::Bytes(symbols) = &shard.symbols else {
            anyhow::bail!("targets of tokens");
        };
        let k = usize::from(shard.header.symbols);
        let view = RecordView::new(k, symbols, &shard.codes, &shard.end, &shard.tail)?;
        let (mut sixteenths, mut bytes) = (0, 0);
        for (at, item) in self.reference.items().iter().enumerate() {
            let positions = shard.item(at).context("an item without positions")?;
            let record = view.slice(positions).context("positions of an item")?;
            let bits = item_bits(record, item.target.as_bytes(), &[])?;
            sixteenths += bits.sixteenths;
            bytes += u64::from(bits.bytes);
        }
        Ok(sixteenths as f64 / 16.0 / bytes as f64)
    }
}

/// Where a line's answer stands: between the arrow's verb and the unit.
fn answer(line: &str) -> Option<[usize; 2]> {
    let verb = ["-> use ", "-> give "]
        .into_iter()
        .find_map(|verb| Some(line.find(verb)? + verb.len()))?;
    let unit = line.len().checked_sub(3)?;
    (verb < unit).then_some([verb, unit])
}
