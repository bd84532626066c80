//! Whom a round's records give away: sources that read the public text, that repeat another's records, or that say nothing.
//!
//! Three findings, each an integer against a bound of the manifest:
//!
//! - `decoy`: on spans that are wrong on purpose (see [`consilium_protocol::decoys`]) the source needs fewer bits a span than
//!   the bound, on the mean. A wrong word of the set costs an honest source at least what it takes to choose among the
//!   words that fit; who gives the observed text a high probability whatever it thinks, pays nothing.
//! - `duplicate`: the records of two sources are nearly equal: their mean total variation is below the bound. Which of the
//!   two copied, records do not say; the first by name is the one that is kept.
//! - `constant`: the source says nearly the same at every position: the mean total variation between one position and
//!   the next is below the bound. Uniform records are a case of this, and so is any free rider that has no model.
//!
//! Shards are added one by one and in any order; sums of integers decide.

use std::collections::BTreeMap;

use consilium_kernels::fusion::variation;
use consilium_protocol::InstitutionId;
use consilium_protocol::decoys::DecoyKey;
use consilium_protocol::manifest::{Finding, Manifest, SymbolSpace};
use consilium_protocol::reference::ReferenceSet;
use consilium_protocol::shard::Shard;
use serde::{Deserialize, Serialize};

use super::error::FusionError;
use super::records::{Ready, Space};

/// Something that a source's records give away.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Flag {
    /// Whose records.
    pub institution: InstitutionId,
    /// What was found.
    pub finding: Finding,
    /// The source whose records it repeats.
    pub of: Option<InstitutionId>,
    /// What was measured: bits a decoy in thousandths, or a mean total variation in millionths.
    pub measured: u64,
    /// The least that is expected, in the same unit.
    pub bound: u64,
}

/// What screening found.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Screened {
    /// Decoys that were counted.
    pub decoys: u64,
    /// Flags in the order of their institutions.
    pub flags: Vec<Flag>,
    /// Sources that the manifest's policy keeps out of the fusion, ascending.
    pub excluded: Vec<InstitutionId>,
}

/// Sums over the shards of a round.
#[derive(Debug)]
pub struct Screen<'a> {
    manifest: &'a Manifest,
    reference: &'a ReferenceSet,
    key: Option<&'a DecoyKey>,
    decoys: u64,
    sums: BTreeMap<InstitutionId, Sums>,
    pairs: BTreeMap<(InstitutionId, InstitutionId), Variation>,
}

#[derive(Debug, Default)]
struct Sums {
    decoy_sixteenths: u64,
    steps: Variation,
}

/// A sum of total variations and of what it runs over.
#[derive(Debug, Default, Clone, Copy)]
struct Variation {
    sum: u128,
    positions: u128,
}

impl Variation {
    fn add(&mut self, sum: u64, positions: usize) {
        self.sum += u128::from(sum);
        self.positions += u128::try_from(positions).unwrap_or(0);
    }

    /// The mean in millionths; none of nothing.
    fn mean_ppm(self) -> Option<u64> {
        let mean = (self.sum * 1_000_000).checked_div(self.positions << 32)?;
        Some(u64::try_from(mean).unwrap_or(u64::MAX))
    }
}

impl<'a> Screen<'a> {
    /// Before any shard. Without a key no source can fail a decoy.
    #[must_use]
    pub fn new(
        manifest: &'a Manifest,
        reference: &'a ReferenceSet,
        key: Option<&'a DecoyKey>,
    ) -> Self {
        Self {
            manifest,
            reference,
            key,
            decoys: 0,
            sums: BTreeMap::new(),
            pairs: BTreeMap::new(),
        }
    }

    /// Adds shard `index` of all sources.
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
        let ready = Ready::<S>::of_sources(self.manifest, self.reference, index, sources)?;
        let decoys = self.key.map_or(&[][..], |key| &key.decoys);
        for (place, item) in ready.items.iter().enumerate() {
            let wrong = |error| ready.wrong(place, error);
            let number = ready.first() + u64::try_from(place).unwrap_or(0);
            let decoy = decoys
                .binary_search_by_key(&number, |decoy| decoy.item)
                .ok()
                .and_then(|at| decoys.get(at));
            self.decoys += u64::from(decoy.is_some());
            let spelled: Vec<_> = decoy.map_or_else(Vec::new, |decoy| {
                S::spelling(item.item, decoy.from..decoy.to)
            });
            for (source, (who, view)) in ready.institutions.iter().zip(&item.sources).enumerate() {
                let sums = self.sums.entry(who.clone()).or_default();
                for &position in &spelled {
                    sums.decoy_sixteenths += u64::from(item.evidence.sixteenths(position, source));
                }
                let last = view.positions().saturating_sub(1);
                if let (Some(here), Some(next)) = (view.slice(0..last), view.slice(1..last + 1)) {
                    sums.steps.add(variation(here, next).map_err(wrong)?, last);
                }
                for (other, theirs) in ready.institutions.iter().zip(&item.sources).take(source) {
                    let distance = variation(*theirs, *view).map_err(wrong)?;
                    let pair = (other.clone(), who.clone());
                    let pair = self.pairs.entry(pair).or_default();
                    pair.add(distance, view.positions());
                }
            }
        }
        Ok(())
    }

    /// What was found.
    #[must_use]
    pub fn finish(self) -> Screened {
        let bounds = self.manifest.screening;
        let mut flags = Vec::new();
        let ppm = |permille: u32| u64::from(permille) * 1000;
        for (who, sums) in &self.sums {
            let mut flag = |finding, measured: Option<u64>, bound: u64| {
                if let Some(measured) = measured.filter(|measured| *measured < bound) {
                    flags.push(Flag {
                        institution: who.clone(),
                        finding,
                        of: None,
                        measured,
                        bound,
                    });
                }
            };
            let bits = (sums.decoy_sixteenths.saturating_mul(1000) / 16).checked_div(self.decoys);
            flag(Finding::Decoy, bits, bounds.decoy_millibits.into());
            let constant = ppm(bounds.constant_permille);
            flag(Finding::Constant, sums.steps.mean_ppm(), constant);
        }
        let bound = ppm(bounds.duplicate_permille);
        for ((first, second), distance) in &self.pairs {
            if let Some(measured) = distance.mean_ppm().filter(|measured| *measured < bound) {
                flags.push(Flag {
                    institution: second.clone(),
                    finding: Finding::Duplicate,
                    of: Some(first.clone()),
                    measured,
                    bound,
                });
            }
        }
        flags.sort_by(|a, b| {
            (&a.institution, a.finding, &a.of).cmp(&(&b.institution, b.finding, &b.of))
        });
        let mut excluded: Vec<_> = flags
            .iter()
            .filter(|flag| bounds.excludes(flag.finding))
            .map(|flag| flag.institution.clone())
            .collect();
        excluded.dedup();
        Screened {
            decoys: self.decoys,
            flags,
            excluded,
        }
    }
}
