//! What each institution's records are worth: leave-one-out and Shapley value per domain, on the public holdout.
//!
//! The value of a coalition is what its fused records save of the uniform distribution's 8 bits: bits per byte of the labelled
//! bytes, read from the records that the manifest's own rule makes of the coalition's records alone. Fusing is cheap, so
//! every coalition is fused: 2^n - 1 fusions of the holdout for up to ten institutions, at most
//! `screening.account_items` items each. Beyond that, orders of arrival are drawn (Castro, Gómez and Tejada, Computers &
//! Operations Research 36, 2009), from the manifest's seed: about 64, or 2 n where that is more, each of n fusions, in groups of
//! one order and its rotations. The standard error is reported.
//!
//! Shapley values add up to the value of all (efficiency); a source that changes nothing gets nothing; two that do the same get
//! the same (Ghorbani and Zou, arXiv 1904.02868). They are of this round's records and this holdout, no more.

use std::collections::{BTreeMap, BTreeSet};

use consilium_kernels::fusion::Bits;
use consilium_protocol::InstitutionId;
use consilium_protocol::decoys::DecoyKey;
use consilium_protocol::manifest::{Manifest, SymbolSpace};
use consilium_protocol::reference::ReferenceSet;
use consilium_protocol::shard::Shard;
use rand::SeedableRng;
use rand::seq::SliceRandom;
use rand_chacha::ChaCha8Rng;
use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use super::error::FusionError;
use super::records::{Fuser, Ready, Space};

/// Institutions up to which all coalitions are fused.
const EXACT: usize = 10;
/// Most orders of arrival beyond that, rotations counted; at least two groups are drawn.
const ORDERS: usize = 64;
/// Bits of a byte of which nothing is known, in sixteenths: `16 log2 257`.
const NOTHING: u64 = 128;
/// Domain of items that name none.
const ALL: &str = "all";

/// A coalition: indices of institutions, ascending.
type Coalition = Vec<usize>;

/// What everybody's records are worth.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Accounts {
    /// The institutions, ascending.
    pub institutions: Vec<InstitutionId>,
    /// Orders of arrival that were drawn; none where all coalitions were fused.
    pub orders: Option<u32>,
    /// Coalitions that were fused.
    pub coalitions: u64,
    /// Items that were measured.
    pub items: u64,
    /// Bits per byte of the fusion of all, over all domains.
    pub fused: f64,
    /// The same without each institution; none where there is only one.
    pub without: Vec<Option<f64>>,
    /// By domain, in the order of their names.
    pub domains: Vec<DomainAccount>,
}

/// The accounts of one domain.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DomainAccount {
    /// Its name in the reference set; `all` for items that name none.
    pub domain: String,
    /// Labelled bytes, and one for the end of each item.
    pub bytes: u64,
    /// Bits per byte of the fusion of all.
    pub fused: f64,
    /// One for each institution.
    pub members: Vec<MemberAccount>,
}

/// What one institution's records are worth in a domain. Bits per byte; positive is better.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MemberAccount {
    /// Bits per byte of its own records alone.
    pub alone: f64,
    /// What the fusion of all saves by it: bits without it less bits with it.
    pub leave_one_out: f64,
    /// Its Shapley value.
    pub shapley: f64,
    /// Standard error of the value, where orders were drawn.
    pub standard_error: Option<f64>,
}

/// Sums over the shards of a round.
#[derive(Debug)]
pub struct Accountant<'a> {
    manifest: &'a Manifest,
    reference: &'a ReferenceSet,
    institutions: Vec<InstitutionId>,
    orders: Option<Vec<Vec<usize>>>,
    coalitions: Vec<Coalition>,
    items: Vec<u64>,
    /// By domain, bits of every coalition.
    totals: BTreeMap<String, Vec<Bits64>>,
}

#[derive(Debug, Clone, Copy, Default)]
struct Bits64 {
    sixteenths: u64,
    bytes: u64,
}

impl Bits64 {
    fn add(&mut self, bits: Bits) {
        self.sixteenths += bits.sixteenths;
        self.bytes += u64::from(bits.bytes);
    }

    #[expect(
        clippy::cast_precision_loss,
        reason = "a report; sums stay far below 2^53"
    )]
    fn per_byte(self) -> f64 {
        self.sixteenths as f64 / 16.0 / self.bytes.max(1) as f64
    }
}

/// Items that contributions are measured on: the key's holdout, or every item with a label that is no decoy where there is
/// none; at most `screening.account_items`, spread evenly.
#[must_use]
pub fn holdout(manifest: &Manifest, reference: &ReferenceSet, key: Option<&DecoyKey>) -> Vec<u64> {
    let all: Vec<u64> = match key {
        Some(key) if !key.holdout.is_empty() => key.holdout.clone(),
        _ => {
            let decoys: BTreeSet<u64> = key.map_or_else(BTreeSet::new, |key| {
                key.decoys.iter().map(|d| d.item).collect()
            });
            (0..manifest.items)
                .filter(|item| !decoys.contains(item))
                .collect()
        }
    };
    let most = usize::try_from(manifest.screening.account_items).unwrap_or(usize::MAX);
    if most == 0 || reference.items().is_empty() {
        return Vec::new();
    }
    let step = all.len().div_ceil(most).max(1);
    all.into_iter().step_by(step).collect()
}

impl<'a> Accountant<'a> {
    /// Before any shard; `items` as [`holdout`] gives them.
    #[must_use]
    pub fn new(
        manifest: &'a Manifest,
        reference: &'a ReferenceSet,
        institutions: &[InstitutionId],
        items: Vec<u64>,
    ) -> Self {
        let mut institutions = institutions.to_vec();
        institutions.sort();
        let n = institutions.len();
        let orders = (n > EXACT).then(|| drawn(n, manifest.seed));
        let coalitions = match &orders {
            None => (1_u32..1 << n)
                .map(|mask| (0..n).filter(|i| mask >> i & 1 == 1).collect())
                .collect(),
            Some(orders) => visited(n, orders).into_iter().collect(),
        };
        Self {
            manifest,
            reference,
            institutions,
            orders,
            coalitions,
            items,
            totals: BTreeMap::new(),
        }
    }

    /// Adds shard `index` of all institutions.
    ///
    /// # Errors
    /// As [`super::fuse_shard`].
    pub fn add(
        &mut self,
        index: u32,
        sources: &[(InstitutionId, Shard)],
    ) -> Result<(), FusionError> {
        match self.manifest.symbol_space {
            SymbolSpace::Bytes => self.add_space::<u8>(index, sources),
            SymbolSpace::Tokens { .. } => self.add_space::<u32>(index, sources),
        }
    }

    fn add_space<S: Space>(
        &mut self,
        index: u32,
        sources: &[(InstitutionId, Shard)],
    ) -> Result<(), FusionError> {
        let range = self.manifest.shard_range(index);
        let here: Vec<usize> = self
            .items
            .iter()
            .filter(|item| range.contains(item))
            .filter_map(|item| usize::try_from(item - range.start).ok())
            .collect();
        if here.is_empty() {
            return Ok(());
        }
        let ready = Ready::<S>::of_sources(self.manifest, self.reference, index, sources)?;
        let measured: Vec<Result<Vec<Bits>, FusionError>> = self
            .coalitions
            .par_iter()
            .map(|coalition| {
                let fuser = Fuser::of(&ready, coalition.clone())?;
                here.iter()
                    .map(|&item| bits(&ready, &fuser, item))
                    .collect()
            })
            .collect();
        let count = self.coalitions.len();
        for (coalition, measured) in measured.into_iter().enumerate() {
            for (&item, bits) in here.iter().zip(measured?) {
                let domain = ready.items[item].item.domain.as_deref().unwrap_or(ALL);
                let totals = self.totals.entry(domain.to_owned());
                let totals = totals.or_insert_with(|| vec![Bits64::default(); count]);
                if let Some(total) = totals.get_mut(coalition) {
                    total.add(bits);
                }
            }
        }
        Ok(())
    }

    /// The accounts; none where nothing was measured.
    #[must_use]
    pub fn finish(self) -> Option<Accounts> {
        let places: BTreeMap<&Coalition, usize> = self.coalitions.iter().zip(0..).collect();
        let n = self.institutions.len();
        let everybody: Coalition = (0..n).collect();
        let mut union = vec![Bits64::default(); self.coalitions.len()];
        for totals in self.totals.values() {
            for (sum, total) in union.iter_mut().zip(totals) {
                sum.sixteenths += total.sixteenths;
                sum.bytes += total.bytes;
            }
        }
        if n == 0 || union.iter().all(|total| total.bytes == 0) {
            return None;
        }
        let of = |totals: &[Bits64], coalition: &Coalition| {
            let at = places.get(coalition).and_then(|&place| totals.get(place));
            let bytes = totals.first().map_or(1, |total| total.bytes);
            at.copied()
                .unwrap_or(Bits64 {
                    sixteenths: NOTHING * bytes,
                    bytes,
                })
                .per_byte()
        };
        let domains = self.totals.iter().map(|(domain, totals)| {
            let bits = |coalition: &Coalition| of(totals, coalition);
            let members = match &self.orders {
                None => exact(n, &bits),
                Some(orders) => sampled(n, orders, &bits),
            };
            DomainAccount {
                domain: domain.clone(),
                bytes: totals.first().map_or(0, |total| total.bytes),
                fused: bits(&everybody),
                members,
            }
        });
        let without = |source| (n > 1).then(|| of(&union, &others(n, source)));
        Some(Accounts {
            orders: self
                .orders
                .as_ref()
                .map(|orders| u32::try_from(orders.len()).unwrap_or(u32::MAX)),
            coalitions: u64::try_from(self.coalitions.len()).unwrap_or(u64::MAX),
            items: u64::try_from(self.items.len()).unwrap_or(u64::MAX),
            fused: of(&union, &everybody),
            without: (0..n).map(without).collect(),
            domains: domains.collect(),
            institutions: self.institutions.clone(),
        })
    }
}

impl Accounts {
    /// The institution without which the fusion needs the fewest bits, if it then needs less than `1000 / (1000 +
    /// bound_permille)` of them: R-4.2's blame. None where the fusion of all holds.
    #[must_use]
    pub fn blamed(&self, bound_permille: u32) -> Option<&InstitutionId> {
        let bound = 1.0 + f64::from(bound_permille) / 1000.0;
        let (who, least) = self
            .institutions
            .iter()
            .zip(&self.without)
            .filter_map(|(who, without)| Some((who, (*without)?)))
            .min_by(|a, b| a.1.total_cmp(&b.1))?;
        (self.fused > least * bound).then_some(who)
    }
}

/// Bits of an item in the records that a coalition fuses to.
fn bits<S: Space>(
    ready: &Ready<'_, S>,
    fuser: &Fuser<'_, '_, S>,
    item: usize,
) -> Result<Bits, FusionError> {
    let fused = fuser.fused(item)?;
    let evidence = S::evidence(
        ready.manifest,
        ready.items[item].item,
        &[fused.records.view()],
    )
    .map_err(|error| ready.wrong(item, error))?;
    Ok(evidence.totals().first().copied().unwrap_or_default())
}

fn others(n: usize, without: usize) -> Coalition {
    (0..n).filter(|&i| i != without).collect()
}

/// Shapley values by their definition: the mean over sizes of the mean gain over coalitions of that size.
fn exact(n: usize, bits: &impl Fn(&Coalition) -> f64) -> Vec<MemberAccount> {
    let value = |mask: u32| -bits(&(0..n).filter(|i| mask >> i & 1 == 1).collect());
    let values: Vec<f64> = (0..1_u32 << n).map(value).collect();
    let at = |mask: u32| values[usize::try_from(mask).unwrap_or(0)];
    let all = (1_u32 << n) - 1;
    (0..n)
        .map(|source| {
            let me = 1_u32 << source;
            let mut gains = vec![(0.0, 0.0); n];
            for mask in (0..=all).filter(|mask| mask & me == 0) {
                let size = usize::try_from(mask.count_ones()).unwrap_or(0);
                gains[size].0 += at(mask | me) - at(mask);
                gains[size].1 += 1.0;
            }
            let sum: f64 = gains.iter().map(|(gain, count)| gain / count).sum();
            MemberAccount {
                alone: -at(me),
                leave_one_out: at(all) - at(all & !me),
                shapley: sum / gains.len() as f64,
                standard_error: None,
            }
        })
        .collect()
}

/// Mean gains over orders of arrival; the standard errors are those of the means of [`drawn`]'s groups.
fn sampled(
    n: usize,
    orders: &[Vec<usize>],
    bits: &impl Fn(&Coalition) -> f64,
) -> Vec<MemberAccount> {
    let groups: Vec<Vec<f64>> = orders
        .chunks(n)
        .map(|group| {
            let mut gains = vec![0.0; n];
            for order in group {
                let mut here = Coalition::new();
                let mut before = bits(&here);
                for &source in order {
                    let place = here.partition_point(|&i| i < source);
                    here.insert(place, source);
                    let after = bits(&here);
                    gains[source] += (before - after) / group.len() as f64;
                    before = after;
                }
            }
            gains
        })
        .collect();
    let everybody: Coalition = (0..n).collect();
    let count = groups.len() as f64;
    (0..n)
        .map(|source| {
            let gains = || groups.iter().map(|gains| gains[source]);
            let mean = gains().sum::<f64>() / count;
            let squares: f64 = gains().map(|gain| (gain - mean) * (gain - mean)).sum();
            let variance = squares / (count - 1.0).max(1.0) / count;
            MemberAccount {
                alone: bits(&vec![source]),
                leave_one_out: bits(&others(n, source)) - bits(&everybody),
                shapley: mean,
                standard_error: Some(variance.sqrt()),
            }
        })
        .collect()
}

/// Groups of n orders: a random one and its rotations, so that everybody comes at every place equally often. What comes
/// first gains most, and who is first more often than others would look better than it is.
fn drawn(n: usize, seed: u64) -> Vec<Vec<usize>> {
    let mut random = ChaCha8Rng::seed_from_u64(seed);
    let mut order: Vec<usize> = (0..n).collect();
    let mut orders = Vec::new();
    for _ in 0..(ORDERS / n.max(1)).max(2) {
        order.shuffle(&mut random);
        for _ in 0..n {
            order.rotate_left(1);
            orders.push(order.clone());
        }
    }
    orders
}

/// Coalitions that the orders pass through, those of one and those of all but one.
fn visited(n: usize, orders: &[Vec<usize>]) -> BTreeSet<Coalition> {
    let mut visited: BTreeSet<Coalition> = (0..n)
        .flat_map(|source| [vec![source], others(n, source)])
        .collect();
    for order in orders {
        let mut here = Coalition::new();
        for &source in order {
            let place = here.partition_point(|&i| i < source);
            here.insert(place, source);
            visited.insert(here.clone());
        }
    }
    visited
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_definition_is_the_mean_over_all_orders_of_arrival() {
        // A game of three that is neither additive nor symmetric: bits saved by each coalition.
        let saved = |coalition: &Coalition| -> f64 {
            let sum: usize = coalition.iter().map(|i| [1, 3, 4][*i]).sum();
            let both = coalition.contains(&0) && coalition.contains(&2);
            -(sum as f64) - if both { 2.5 } else { 0.0 }
        };
        let orders = [
            [0, 1, 2],
            [0, 2, 1],
            [1, 0, 2],
            [1, 2, 0],
            [2, 0, 1],
            [2, 1, 0],
        ];
        let by_orders = sampled(3, &orders.map(|order| order.to_vec()), &saved);
        for (exact, mean) in exact(3, &saved).iter().zip(&by_orders) {
            assert!(
                (exact.shapley - mean.shapley).abs() < 1e-12,
                "{exact:?} {mean:?}"
            );
            assert!((exact.leave_one_out - mean.leave_one_out).abs() < 1e-12);
        }
        for (member, expected) in exact(3, &saved).iter().zip([2.25, 3.0, 5.25]) {
            assert!((member.shapley - expected).abs() < 1e-12, "{member:?}");
        }
    }
}
