//! Records become targets: routing from bits that are recomputed here, then a mixture, in integers only.
//!
//! A number that a node claims has no influence. Spans without labels do not count for the routing; where the whole
//! reference set declares none, the soft rules score causally, each position by the bytes before it, so that an answer
//! that nobody knows cannot spoil the weights of what precedes it. Sources are taken in the order of their institutions
//! and every item is fused on its own, so the result is the same bytes for any order of arrival, any number of threads
//! and any machine. One rule, `exp_guard`, weighs a source by all items of its shard; that is a sum of integers.
//!
//! Records of tokens are fused like those of bytes. What was observed is then read from the reference set's `tokens`,
//! because this program has no tokenizer; a reference set without them is refused when the round is opened.

mod ready;
mod rule;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;

use consilium_kernels::Records;
use consilium_kernels::fusion::Bits;
use consilium_protocol::InstitutionId;
use consilium_protocol::manifest::{Manifest, SymbolSpace};
use consilium_protocol::reference::ReferenceSet;
use consilium_protocol::shard::{Header, Shard};
use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use super::error::FusionError;
pub use ready::check_reference;
pub(super) use ready::{Ready, Space};
use rule::Fused;
pub(super) use rule::Fuser;

/// Code of the unseen mass of targets: none, what sources missed went into their tails.
const NOT_MISSED: u8 = u8::MAX;

/// Targets of one shard and how they came about.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FusedShard {
    /// The targets.
    pub targets: Shard,
    /// Weights and bits of every source and item.
    pub routing: ShardRouting,
}

/// Who had how much weight in which item.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ShardRouting {
    /// The sources, ascending.
    pub institutions: Vec<InstitutionId>,
    /// First item of the shard.
    pub first: u64,
    /// Per item, one weight per source; each item's weights sum to 65,536. Of an item whose weights differ from position
    /// to position, those of its last one; under a rule without weights, equal ones among the sources it counts.
    pub weights: Vec<Vec<u32>>,
    /// Per item, the bits that each source needs for the labelled bytes and the end, in sixteenths.
    pub sixteenths: Vec<Vec<u64>>,
    /// Per item, labelled bytes and one for the end.
    pub bytes: Vec<u32>,
}

impl ShardRouting {
    /// Bits of every source over all items, in the order of `institutions`.
    #[must_use]
    pub fn totals(&self) -> Vec<Bits> {
        let bytes = self
            .bytes
            .iter()
            .fold(0_u32, |sum, b| sum.saturating_add(*b));
        (0..self.institutions.len())
            .map(|source| Bits {
                sixteenths: self
                    .sixteenths
                    .iter()
                    .filter_map(|item| item.get(source))
                    .sum(),
                bytes,
            })
            .collect()
    }
}

/// Whether a shard is what shard `shard_index` of the round must be. For admission, before it counts.
///
/// # Errors
/// A header that contradicts the manifest, records that do not have the items' lengths, or masses far from one.
pub fn check_shard(
    manifest: &Manifest,
    reference: &ReferenceSet,
    shard_index: u32,
    institution: &InstitutionId,
    shard: &Shard,
) -> Result<(), FusionError> {
    let items = ready::items(manifest, reference, shard_index)?;
    match manifest.symbol_space {
        SymbolSpace::Bytes => {
            ready::view::<u8>(manifest, items, shard_index, institution, shard).map(|_| ())
        }
        SymbolSpace::Tokens { .. } => {
            ready::view::<u32>(manifest, items, shard_index, institution, shard).map(|_| ())
        }
    }
}

/// Fuses the shards `shard_index` of all sources.
///
/// # Errors
/// No sources, one source twice, or a shard that [`check_shard`] refuses.
pub fn fuse_shard(
    manifest: &Manifest,
    reference: &ReferenceSet,
    shard_index: u32,
    sources: &[(InstitutionId, Shard)],
) -> Result<FusedShard, FusionError> {
    let sorted = ready::sorted(sources)?;
    match manifest.symbol_space {
        SymbolSpace::Bytes => fuse_space::<u8>(manifest, reference, shard_index, &sorted),
        SymbolSpace::Tokens { .. } => fuse_space::<u32>(manifest, reference, shard_index, &sorted),
    }
}

fn fuse_space<S: Space>(
    manifest: &Manifest,
    reference: &ReferenceSet,
    shard_index: u32,
    sources: &BTreeMap<&InstitutionId, &Shard>,
) -> Result<FusedShard, FusionError> {
    let ready = Ready::<S>::new(manifest, reference, shard_index, sources)?;
    let fuser = Fuser::new(&ready)?;
    let fused: Vec<Result<Fused<S>, FusionError>> = (0..ready.items.len())
        .into_par_iter()
        .map(|item| fuser.target(item))
        .collect();

    let slots = manifest.targets.slots(manifest.symbols);
    let range = manifest.shard_range(shard_index);
    let mut routing = ShardRouting {
        institutions: ready.institutions.clone(),
        first: range.start,
        weights: Vec::with_capacity(fused.len()),
        sixteenths: Vec::with_capacity(fused.len()),
        bytes: Vec::with_capacity(fused.len()),
    };
    let mut records =
        Records::new(usize::from(slots)).map_err(|error| ready.wrong(0, error.into()))?;
    let mut offsets = vec![0];
    for (index, fused) in fused.into_iter().enumerate() {
        let fused = fused?;
        let appended = records.append(fused.records.view());
        appended.map_err(|error| ready.wrong(index, error.into()))?;
        offsets.push(u64::try_from(records.positions()).unwrap_or(u64::MAX));
        let bits = ready.items[index].evidence.totals();
        routing
            .bytes
            .push(bits.first().map_or(0, |bits| bits.bytes));
        routing
            .sixteenths
            .push(bits.iter().map(|bits| bits.sixteenths).collect());
        routing.weights.push(fused.weights);
    }
    let view = records.view();
    let end = if S::HAS_END {
        view.end().to_vec()
    } else {
        vec![u8::MAX; view.positions()]
    };
    Ok(FusedShard {
        targets: Shard {
            header: Header::new(manifest.reference, range, manifest.symbol_space, slots),
            symbols: S::wrap(view.symbols().to_vec()),
            codes: view.codes().to_vec(),
            end,
            tail: view.tail().to_vec(),
            missed: vec![NOT_MISSED; 2 * ready.items.len()],
            offsets,
        },
        routing,
    })
}
