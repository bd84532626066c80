//! One trainer: the same pivot and the same adapters in one place; what is learned from differs.

use std::path::Path;

use anyhow::{Context, Result};
use consilium_aggregator::fusion;
use consilium_node::worker::source::LoadedModel;
use consilium_node::worker::train::distill::{Distiller, Objective, Plan, Settings};
use consilium_node::worker::train::targets::Targets;
use consilium_protocol::InstitutionId;
use consilium_protocol::manifest::{Manifest, Training};
use consilium_protocol::reference::{Item, ReferenceSet};
use consilium_protocol::shard::{Shard, Symbols};
use rand::seq::SliceRandom;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

/// One trainer in one place, under the adapters of the round.
#[derive(Debug, Clone, Copy)]
pub struct Trainer<'a> {
    /// Folder of the pivot.
    pub pivot: &'a Path,
    /// The round's training; rate and steps are replaced.
    pub training: &'a Training,
    /// Steps of 12 rows.
    pub steps: u64,
    /// Peak learning rate.
    pub rate: f64,
    /// Seed of data order and adapter.
    pub seed: u64,
}

impl Trainer<'_> {
    /// Trains on the observed tokens of `items`, declared answers included: the strongest use of such labels.
    ///
    /// # Errors
    /// As [`run`](Self::run).
    pub fn on_labels(&self, items: &[Item]) -> Result<LoadedModel> {
        self.run(items, Objective::CrossEntropy, true)
    }

    /// Distils from fused records, as the nodes do: declared answers are no labels.
    ///
    /// # Errors
    /// As [`run`](Self::run).
    pub fn on_targets(&self, items: &[Item], targets: &Targets) -> Result<LoadedModel> {
        let cross_entropy = self.training.cross_entropy_permille as f32 / 1000.0;
        let objective = Objective::Trie {
            targets,
            cross_entropy,
        };
        self.run(items, objective, false)
    }

    /// Trains the pivot's adapter for all steps. `answers` says whether declared answers are labels as well.
    ///
    /// # Errors
    /// A pivot that cannot be loaded, targets that do not fit the items, or numbers that are not finite.
    pub fn run(
        &self,
        items: &[Item],
        objective: Objective<'_>,
        answers: bool,
    ) -> Result<LoadedModel> {
        let (mut distiller, plan) = self.begin(items, answers)?;
        distiller.run(&plan, items, objective, &mut ())?;
        Ok(distiller.into_student())
    }

    /// The pivot with a fresh adapter, and the order in which it will see the items.
    ///
    /// # Errors
    /// A pivot that cannot be loaded, or items of which none fits a row.
    pub fn begin(&self, items: &[Item], answers: bool) -> Result<(Distiller, Plan)> {
        let pivot = LoadedModel::load(self.pivot)?;
        let mut settings = Settings::of(self.training, self.seed)?;
        settings.local_steps = self.steps;
        settings.schedule.steps = self.steps;
        settings.schedule.rate = self.rate;
        settings.label_unlabeled = answers;
        let distiller = Distiller::new(pivot, settings)?;
        let all: Vec<u64> = (0..items.len() as u64).collect();
        let plan = distiller.plan(items, &all, 0)?;
        Ok((distiller, plan))
    }
}

/// Lines of text as items of one set. Of all private text: what nobody in the consortium may have, the bound.
pub fn items_of<'a>(lines: impl IntoIterator<Item = &'a String>) -> Vec<Item> {
    lines
        .into_iter()
        .map(|line| Item {
            context: String::new(),
            target: line.clone(),
            ..Item::default()
        })
        .collect()
}

/// The records of all items of a set, from its shards in order.
///
/// # Errors
/// Shards of another set, or that do not fit the items.
pub fn targets_of(reference: &ReferenceSet, shard_items: u32, shards: &[Shard]) -> Result<Targets> {
    let all: Vec<u64> = (0..reference.items().len() as u64).collect();
    let targets = Targets::gather(reference, &all, shard_items, |index| {
        let shard = shards.get(index as usize).map(Shard::to_bytes);
        Ok(shard.transpose().ok().flatten().unwrap_or_default())
    })?;
    Ok(targets)
}

/// Fuses records after moving them between items of equal length: what remains is format without knowledge. Returns the
/// targets in shards of the whole set.
///
/// # Errors
/// Records that do not fit the items.
pub fn permuted_targets(
    manifest: &Manifest,
    reference: &ReferenceSet,
    shards: &[(InstitutionId, Vec<Shard>)],
    seed: u64,
) -> Result<Vec<Shard>> {
    let order = permutation(reference.items(), seed);
    let permuted = shards
        .iter()
        .map(|(who, shards)| Ok((who.clone(), permute(shards, &order)?)))
        .collect::<Result<Vec<_>>>()?;
    (0..manifest.shards())
        .map(|index| {
            let sources: Vec<_> = permuted
                .iter()
                .filter_map(|(who, shards)| {
                    Some((who.clone(), shards.get(index as usize)?.clone()))
                })
                .collect();
            Ok(fusion::fuse_shard(manifest, reference, index, &sources)?.targets)
        })
        .collect()
}

/// Item `i` gets the records of item `order[i]`: a random cycle among the items of its length.
fn permutation(items: &[Item], seed: u64) -> Vec<usize> {
    let mut random = ChaCha8Rng::seed_from_u64(seed);
    let mut order: Vec<usize> = (0..items.len()).collect();
    let mut by_length: Vec<usize> = (0..items.len()).collect();
    let keys: Vec<u64> = items.iter().map(|_| random.next_u64()).collect();
    by_length.sort_by_key(|&index| (items[index].target.len(), keys[index]));
    for group in by_length.chunk_by(|&a, &b| items[a].target.len() == items[b].target.len()) {
        let mut shuffled = group.to_vec();
        shuffled.shuffle(&mut random);
        for (place, &item) in shuffled.iter().enumerate() {
            order[item] = shuffled[(place + 1) % shuffled.len()];
        }
    }
    order
}

fn permute(shards: &[Shard], order: &[usize]) -> Result<Vec<Shard>> {
    let places: Vec<(usize, usize)> = shards
        .iter()
        .enumerate()
        .flat_map(|(shard, content)| (0..content.offsets.len() - 1).map(move |item| (shard, item)))
        .collect();
    let mut first = 0;
    shards
        .iter()
        .map(|shard| {
            let items = shard.offsets.len() - 1;
            let k = usize::from(shard.header.symbols);
            let mut out = shard.clone();
            for item in 0..items {
                let (from_shard, from_item) = places[order[first + item]];
                let source = &shards[from_shard];
                let to = shard.item(item).context("an item without positions")?;
                let from = source
                    .item(from_item)
                    .context("an item without positions")?;
                out.end[to.clone()].copy_from_slice(&source.end[from.clone()]);
                out.tail[to.clone()].copy_from_slice(&source.tail[from.clone()]);
                let (to, from) = (to.start * k..to.end * k, from.start * k..from.end * k);
                out.codes[to.clone()].copy_from_slice(&source.codes[from.clone()]);
                if let (Symbols::Bytes(out), Symbols::Bytes(source)) =
                    (&mut out.symbols, &source.symbols)
                {
                    out[to].copy_from_slice(&source[from]);
                }
            }
            first += items;
            Ok(out)
        })
        .collect()
}
