//! The manifest's rule applied to single items, for any of the sources.

use consilium_kernels::fusion::{
    Doubt, Evidence, Mixing, Robust, Routing, Scope, competent, entropies, fuse, route,
    route_exponents, route_positions, sample, tail_to_labels, variation, without_tail,
};
use consilium_kernels::{FusionError as KernelError, RecordShape, RecordView, Records, Symbol};
use consilium_protocol::Digest;
use consilium_protocol::manifest::{FusionRule, TargetTail};
use rayon::prelude::*;

use super::ready::{Ready, Space};
use crate::fusion::error::FusionError;

/// Sources that a median needs to tell one that is off from the others.
const MAJORITY: usize = 3;

/// A fused item.
#[derive(Debug)]
pub(crate) struct Fused<S> {
    /// One weight per source of the shard.
    pub(crate) weights: Vec<u32>,
    /// The fused record.
    pub(crate) records: Records<S>,
}

/// Fuses items of a shard.
#[derive(Debug)]
pub(crate) struct Fuser<'a, 'r, S> {
    ready: &'a Ready<'r, S>,
    /// The sources that take part, by index, ascending.
    chosen: Vec<usize>,
    /// Of each chosen source, its mean distance from the median of those competent with it, in units of 2^-32; none
    /// without evidence.
    distances: Vec<Option<u64>>,
}

/// What mixes the records of an item.
enum Recipe {
    Item(Vec<u32>),
    Positions(Vec<u32>),
    Geometric(Vec<u32>),
    /// A statistic of the sources with these indices.
    Robust(Robust, Vec<usize>),
}

impl<'a, 'r, S: Space> Fuser<'a, 'r, S> {
    /// With all sources.
    pub(crate) fn new(ready: &'a Ready<'r, S>) -> Result<Self, FusionError> {
        Self::of(ready, (0..ready.institutions.len()).collect())
    }

    /// With some of the sources, as if the others had not contributed; indices ascend.
    pub(crate) fn of(ready: &'a Ready<'r, S>, chosen: Vec<usize>) -> Result<Self, FusionError> {
        let mut fuser = Self {
            ready,
            distances: vec![None; chosen.len()],
            chosen,
        };
        if let FusionRule::ExpGuard {
            competence_millibits,
            ..
        } = ready.manifest.fusion
        {
            fuser.distances = fuser.measure(competence_millibits)?;
        }
        Ok(fuser)
    }

    /// The item as it goes back to the nodes.
    pub(crate) fn target(&self, item: usize) -> Result<Fused<S>, FusionError> {
        let manifest = self.ready.manifest;
        let form = manifest.targets;
        let slots = usize::from(form.slots(manifest.symbols));
        // One slot is kept free for a label.
        let mixed = match form.tail {
            TargetTail::Label => slots.saturating_sub(1).max(1),
            TargetTail::Ghost | TargetTail::Dropped => slots,
        };
        let wrong = |error| self.ready.wrong(item, error);
        let mut fused = if form.draws == 0 {
            self.mixed(item, mixed, manifest.fill_permille.into())?
        } else {
            // Whatever any source lists can be drawn.
            let all = usize::from(manifest.symbols).saturating_mul(self.chosen.len());
            let mut fused = self.mixed(item, all.clamp(slots, S::MAX_SLOTS.max(slots)), 1000)?;
            let seed = sample_seed(manifest.seed, self.ready.first(), item);
            fused.records = sample(fused.records.view(), form.draws, seed, mixed).map_err(wrong)?;
            fused
        };
        let records = fused.records.view();
        match form.tail {
            TargetTail::Label => {
                let labels = S::labels(self.ready.items[item].item);
                fused.records = tail_to_labels(records, &labels, slots).map_err(wrong)?;
            }
            TargetTail::Ghost => {}
            TargetTail::Dropped => fused.records = without_tail(records),
        }
        Ok(fused)
    }

    /// The item by the rule alone, in the records' own shape.
    pub(crate) fn fused(&self, item: usize) -> Result<Fused<S>, FusionError> {
        let manifest = self.ready.manifest;
        self.mixed(item, manifest.symbols.into(), manifest.fill_permille.into())
    }

    fn mixed(&self, item: usize, k: usize, fill_permille: u32) -> Result<Fused<S>, FusionError> {
        let wrong = |error| self.ready.wrong(item, error);
        let (sources, evidence) = self.inputs(item);
        let shape = RecordShape { k, fill_permille };
        let recipe = self.recipe(&sources, &evidence);
        let mut records = Records::new(k).map_err(|error| wrong(error.into()))?;
        let shares = mix(&recipe, &sources, &shape, &mut records).map_err(wrong)?;
        let mut weights = vec![0; self.ready.institutions.len()];
        for (&source, share) in self.chosen.iter().zip(shares) {
            weights[source] = share;
        }
        Ok(Fused { weights, records })
    }

    /// Records and evidence of the chosen sources.
    fn inputs(&self, item: usize) -> (Vec<RecordView<'r, S>>, Evidence) {
        let item = &self.ready.items[item];
        let sources = self.chosen.iter().filter_map(|&at| item.sources.get(at));
        (
            sources.copied().collect(),
            item.evidence.of_sources(&self.chosen),
        )
    }

    fn recipe(&self, sources: &[RecordView<'_, S>], evidence: &Evidence) -> Recipe {
        let soft = |sharpness, doubt: Option<Doubt<'_>>| {
            let scope = if self.ready.is_causal {
                Scope::Before
            } else {
                Scope::Item
            };
            route_positions(sharpness, scope, evidence, doubt)
        };
        let bits = evidence.totals();
        match self.ready.manifest.fusion {
            FusionRule::Softmax { sharpness } if self.ready.is_causal => {
                Recipe::Positions(soft(sharpness, None))
            }
            FusionRule::Softmax { sharpness } => {
                Recipe::Item(route(Routing::Softmax { sharpness }, &bits))
            }
            FusionRule::MinCe => Recipe::Item(route(Routing::MinCe, &bits)),
            FusionRule::Uniform => Recipe::Item(route(Routing::Uniform, &bits)),
            FusionRule::Causal { sharpness } => {
                Recipe::Positions(route_positions(sharpness, Scope::Before, evidence, None))
            }
            FusionRule::Confidence {
                sharpness,
                entropy_permille,
            } => {
                let columns: Vec<Vec<u64>> =
                    sources.iter().map(|source| entropies(*source)).collect();
                let entropies: Vec<u64> = (0..evidence.positions())
                    .flat_map(|position| columns.iter().map(move |column| column[position]))
                    .collect();
                let confidence = Doubt {
                    permille: entropy_permille,
                    of: &entropies,
                };
                Recipe::Positions(soft(sharpness, Some(confidence)))
            }
            FusionRule::LogAverage { sharpness } => Recipe::Geometric(soft(sharpness, None)),
            FusionRule::Median {
                competence_millibits,
            } => Recipe::Robust(Robust::Median, competent(&bits, competence_millibits)),
            FusionRule::TrimmedMean {
                competence_millibits,
                trim_permille,
            } => Recipe::Robust(
                Robust::TrimmedMean { trim_permille },
                competent(&bits, competence_millibits),
            ),
            FusionRule::ExpGuard {
                eta_permille,
                sharpness,
                ..
            } if sharpness > 0 && self.ready.is_causal => {
                let doubts = self.doubts(0..self.chosen.len());
                let doubts: Vec<u64> = (0..evidence.positions())
                    .flat_map(|_| doubts.iter().copied())
                    .collect();
                let trust = Doubt {
                    permille: eta_permille,
                    of: &doubts,
                };
                Recipe::Positions(soft(sharpness, Some(trust)))
            }
            FusionRule::ExpGuard {
                competence_millibits,
                eta_permille,
                sharpness,
            } => {
                let able = competent(&bits, competence_millibits);
                let doubts = self.doubts(able.iter().copied());
                let exponents: Vec<u128> = able
                    .iter()
                    .zip(doubts)
                    .map(|(&source, doubt)| {
                        u128::from(doubt) * u128::from(eta_permille) / 1000
                            + u128::from(sharpness) * bits[source].fixed()
                    })
                    .collect();
                let mut weights = vec![0; self.chosen.len()];
                for (source, weight) in able.into_iter().zip(route_exponents(&exponents)) {
                    weights[source] = weight;
                }
                Recipe::Item(weights)
            }
        }
    }

    /// Distances of some of the chosen; without evidence, the least of the others'.
    fn doubts(&self, of: impl Iterator<Item = usize> + Clone) -> Vec<u64> {
        let distances = of.map(|source| self.distances[source]);
        let least = distances.clone().flatten().min().unwrap_or(0);
        distances
            .map(|distance| distance.unwrap_or(least))
            .collect()
    }

    /// Mean distance of each chosen source from the median of the competent, where there are enough of them.
    fn measure(&self, competence_millibits: u32) -> Result<Vec<Option<u64>>, FusionError> {
        let per_item: Vec<_> = (0..self.ready.items.len())
            .into_par_iter()
            .map(|item| {
                let (sources, evidence) = self.inputs(item);
                let able = competent(&evidence.totals(), competence_millibits);
                distances(&able, &sources, self.ready.manifest.symbols)
                    .map_err(|error| self.ready.wrong(item, error))
            })
            .collect();
        let mut sums = vec![(0_u128, 0_u128); self.chosen.len()];
        for item in per_item {
            let (able, positions) = item?;
            for (source, distance) in able {
                sums[source].0 += u128::from(distance);
                sums[source].1 += positions;
            }
        }
        let mean = |(sum, positions): (u128, u128)| {
            let mean = sum.checked_div(positions)?;
            Some(u64::try_from(mean).unwrap_or(u64::MAX))
        };
        Ok(sums.into_iter().map(mean).collect())
    }
}

/// Of one item, the distance of each competent source from their median, summed over the positions, and how many these are.
type Distances = (Vec<(usize, u64)>, u128);

fn distances<S: Symbol>(
    able: &[usize],
    sources: &[RecordView<'_, S>],
    symbols: u16,
) -> Result<Distances, KernelError> {
    if able.len() < MAJORITY {
        return Ok((Vec::new(), 0));
    }
    let heard: Vec<_> = able.iter().map(|&source| sources[source]).collect();
    let k = usize::from(symbols)
        .saturating_mul(able.len())
        .min(S::MAX_SLOTS);
    let mut centre = Records::new(k)?;
    let shape = RecordShape {
        k,
        fill_permille: 1000,
    };
    fuse(Mixing::Robust(Robust::Median), &heard, &shape, &mut centre)?;
    let of = |(&source, record): (&usize, &RecordView<'_, S>)| {
        Ok((source, variation(*record, centre.view())?))
    };
    let distances = able.iter().zip(&heard).map(of);
    let positions = u128::try_from(centre.positions()).unwrap_or(0);
    Ok((distances.collect::<Result<_, KernelError>>()?, positions))
}

/// Appends the mixture; one weight per source for the report.
fn mix<S: Symbol>(
    recipe: &Recipe,
    sources: &[RecordView<'_, S>],
    shape: &RecordShape,
    out: &mut Records<S>,
) -> Result<Vec<u32>, KernelError> {
    let last = |weights: &[u32]| weights[weights.len().saturating_sub(sources.len())..].to_vec();
    match recipe {
        Recipe::Item(weights) => {
            fuse(Mixing::Item(weights), sources, shape, out)?;
            Ok(weights.clone())
        }
        Recipe::Positions(weights) => {
            fuse(Mixing::Positions(weights), sources, shape, out)?;
            Ok(last(weights))
        }
        Recipe::Geometric(weights) => {
            fuse(Mixing::Geometric(weights), sources, shape, out)?;
            Ok(last(weights))
        }
        Recipe::Robust(robust, able) => {
            let heard: Vec<_> = able.iter().map(|&source| sources[source]).collect();
            fuse(Mixing::Robust(*robust), &heard, shape, out)?;
            let mut weights = vec![0; sources.len()];
            for (&source, weight) in able.iter().zip(route_exponents(&vec![0; able.len()])) {
                weights[source] = weight;
            }
            Ok(weights)
        }
    }
}

/// Seed of the draws of an item: the first 8 bytes, little-endian, of SHA-256 over `consilium/sample`, the manifest's seed
/// and the item's number, both as eight little-endian bytes.
fn sample_seed(seed: u64, first: u64, item: usize) -> u64 {
    let item = first.saturating_add(u64::try_from(item).unwrap_or(u64::MAX));
    let mut bytes = b"consilium/sample".to_vec();
    bytes.extend(seed.to_le_bytes());
    bytes.extend(item.to_le_bytes());
    let digest = Digest::of(&bytes);
    let first = digest.as_bytes().first_chunk().copied();
    u64::from_le_bytes(first.unwrap_or_default())
}
