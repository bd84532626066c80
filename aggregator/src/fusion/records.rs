//! Records become targets: routing from bits that are recomputed here, then a mixture, in integers only.
//!
//! A number that a node claims has no influence. Spans without labels do not count for the routing; where the whole
//! reference set declares none, softmax routing scores causally, each position by the bytes before it, so that an answer
//! that nobody knows cannot spoil the weights of what precedes it. Sources are taken in the order of their institutions
//! and every item is fused on its own, so the result is the same bytes for any order of arrival, any number of threads
//! and any machine.

use std::collections::BTreeMap;

use consilium_kernels::fusion::{Bits, Mixing, Routing, fuse, item_bits, route, route_causal};
use consilium_kernels::{RecordShape, RecordView, Records};
use consilium_protocol::InstitutionId;
use consilium_protocol::manifest::{FusionRule, Manifest, SymbolSpace};
use consilium_protocol::reference::{Item, ReferenceSet};
use consilium_protocol::shard::{Header, Shard, Symbols};
use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use super::error::FusionError;

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
    /// Per item, one weight per source; each item's weights sum to 65,536. Of an item that was routed causally, those
    /// of its last position.
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
    let items = items(manifest, reference, shard_index)?;
    view(manifest, items, shard_index, institution, shard).map(|_| ())
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
    let items = items(manifest, reference, shard_index)?;
    let mut sorted = BTreeMap::new();
    for (institution, shard) in sources {
        if sorted.insert(institution, shard).is_some() {
            return Err(FusionError::Twice(institution.clone()));
        }
    }
    if sorted.is_empty() {
        return Err(FusionError::Nothing);
    }
    let views: Vec<_> = sorted
        .par_iter()
        .map(|(institution, shard)| view(manifest, items, shard_index, institution, shard))
        .collect();
    let views = views.into_iter().collect::<Result<Vec<_>, _>>()?;
    let range = manifest.shard_range(shard_index);
    let starts: Vec<usize> = items
        .iter()
        .scan(0_usize, |next, item| {
            let start = *next;
            *next += item.positions();
            Some(start)
        })
        .collect();
    let fuser = Fuser {
        manifest,
        views: &views,
        causal: reference
            .items()
            .iter()
            .all(|item| item.unlabeled.is_empty()),
    };
    let fused: Vec<Result<Fused, _>> = items
        .par_iter()
        .zip(&starts)
        .map(|(item, &start)| fuser.item(item, start))
        .collect();

    let k = usize::from(manifest.symbols);
    let mut routing = ShardRouting {
        institutions: sorted.into_keys().cloned().collect(),
        first: range.start,
        weights: Vec::with_capacity(items.len()),
        sixteenths: Vec::with_capacity(items.len()),
        bytes: Vec::with_capacity(items.len()),
    };
    let mut columns = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
    let mut offsets = vec![0];
    for (item, fused) in range.clone().zip(fused) {
        let fused = fused.map_err(|source| FusionError::Records {
            shard: shard_index,
            item,
            source,
        })?;
        let records = fused.records.view();
        columns.0.extend_from_slice(records.symbols());
        columns.1.extend_from_slice(records.codes());
        columns.2.extend_from_slice(records.end());
        columns.3.extend_from_slice(records.tail());
        offsets.push(u64::try_from(columns.3.len()).unwrap_or(u64::MAX));
        routing
            .bytes
            .push(fused.bits.first().map_or(0, |bits| bits.bytes));
        routing
            .sixteenths
            .push(fused.bits.iter().map(|bits| bits.sixteenths).collect());
        routing.weights.push(fused.weights);
    }
    debug_assert_eq!(columns.0.len(), columns.3.len() * k, "K slots per position");
    let (symbols, codes, end, tail) = columns;
    Ok(FusedShard {
        targets: Shard {
            header: Header::new(
                manifest.reference,
                range,
                manifest.symbol_space,
                manifest.symbols,
            ),
            symbols: Symbols::Bytes(symbols),
            codes,
            end,
            tail,
            missed: vec![NOT_MISSED; 2 * items.len()],
            offsets,
        },
        routing,
    })
}

struct Fused {
    weights: Vec<u32>,
    bits: Vec<Bits>,
    records: Records,
}

struct Fuser<'a> {
    manifest: &'a Manifest,
    views: &'a [RecordView<'a>],
    /// Whether the reference set declares no span at all.
    causal: bool,
}

impl Fuser<'_> {
    fn item(&self, item: &Item, start: usize) -> Result<Fused, consilium_kernels::FusionError> {
        let shape = RecordShape {
            k: usize::from(self.manifest.symbols),
            fill_permille: u32::from(self.manifest.fill_permille),
        };
        let end = start + item.positions();
        let expected = item.positions();
        let sources = self
            .views
            .iter()
            .enumerate()
            .map(|(source_index, view)| {
                view.slice(start..end)
                    .ok_or_else(|| consilium_kernels::FusionError::Positions {
                        source_index,
                        got: view.positions(),
                        expected,
                    })
            })
            .collect::<Result<Vec<_>, _>>()?;
        let bits = sources
            .iter()
            .map(|source| item_bits(*source, item.target.as_bytes(), &item.unlabeled))
            .collect::<Result<Vec<_>, _>>()?;
        let routing = match self.manifest.fusion {
            FusionRule::Softmax { sharpness } => Routing::Softmax { sharpness },
            FusionRule::MinCe => Routing::MinCe,
            FusionRule::Uniform => Routing::Uniform,
        };
        let mut records = Records::new(shape.k)?;
        let weights = match routing {
            Routing::Softmax { sharpness } if self.causal => {
                let rows = route_causal(sharpness, &sources, item.target.as_bytes())?;
                fuse(Mixing::Positions(&rows), &sources, &shape, &mut records)?;
                rows[rows.len() - sources.len()..].to_vec()
            }
            _ => {
                let weights = route(routing, &bits);
                fuse(Mixing::Item(&weights), &sources, &shape, &mut records)?;
                weights
            }
        };
        Ok(Fused {
            weights,
            bits,
            records,
        })
    }
}

/// The reference items of a shard.
fn items<'a>(
    manifest: &Manifest,
    reference: &'a ReferenceSet,
    shard: u32,
) -> Result<&'a [Item], FusionError> {
    if manifest.symbol_space != SymbolSpace::Bytes {
        return Err(FusionError::Unsupported(
            "records of tokens cannot be fused yet; use bytes",
        ));
    }
    let all = reference.items();
    if reference.digest() != manifest.reference
        || u64::try_from(all.len()).unwrap_or(u64::MAX) != manifest.items
    {
        return Err(FusionError::Reference(format!(
            "digest {} with {} items, the manifest has {} with {}",
            reference.digest(),
            all.len(),
            manifest.reference,
            manifest.items
        )));
    }
    let range = manifest.shard_range(shard);
    let bound = |at: u64| usize::try_from(at).unwrap_or(usize::MAX);
    all.get(bound(range.start)..bound(range.end))
        .filter(|items| !items.is_empty())
        .ok_or_else(|| FusionError::Reference(format!("no items for shard {shard}")))
}

/// The records of a shard after all checks.
fn view<'a>(
    manifest: &Manifest,
    items: &[Item],
    shard_index: u32,
    institution: &InstitutionId,
    shard: &'a Shard,
) -> Result<RecordView<'a>, FusionError> {
    let wrong = |problem: String| FusionError::Shard {
        institution: institution.clone(),
        shard: shard_index,
        problem,
    };
    let expected = Header::new(
        manifest.reference,
        manifest.shard_range(shard_index),
        manifest.symbol_space,
        manifest.symbols,
    );
    if shard.header != expected {
        return Err(wrong(format!(
            "its header is {:?}, expected {expected:?}",
            shard.header
        )));
    }
    for (index, item) in items.iter().enumerate() {
        let got = shard.item(index).map_or(0, |range| range.len());
        if got != item.positions() {
            return Err(wrong(format!(
                "item {index} of the shard has {got} positions, expected {}",
                item.positions()
            )));
        }
    }
    let Symbols::Bytes(symbols) = &shard.symbols else {
        return Err(wrong("its symbols are no bytes".to_owned()));
    };
    let view = RecordView::new(
        usize::from(manifest.symbols),
        symbols,
        &shard.codes,
        &shard.end,
        &shard.tail,
    )
    .map_err(|error| wrong(error.to_string()))?;
    view.check_mass()
        .map_err(|error| wrong(error.to_string()))?;
    Ok(view)
}

#[cfg(test)]
mod tests {
    use consilium_kernels::code;
    use consilium_protocol::manifest::{
        Deadlines, Defence, Distillation, MergeRule, Mode, Training,
    };
    use consilium_protocol::{ConsortiumId, Digest, RoundId};

    use super::*;

    const TEXT: &str =
        "{\"target\":\"ab\"}\n{\"target\":\"cxxd\",\"unlabeled\":[[1,3]]}\n{\"target\":\"e\"}\n";

    fn id(name: &str) -> InstitutionId {
        InstitutionId::new(name).unwrap()
    }

    fn manifest(fusion: FusionRule) -> Manifest {
        Manifest {
            consortium: ConsortiumId::new("test").unwrap(),
            round: RoundId(1),
            mode: Mode::Unified,
            charter: Digest::of(b"charter"),
            pivot: Digest::of(b"pivot"),
            reference: Digest::of(TEXT.as_bytes()),
            items: 3,
            symbol_space: SymbolSpace::Bytes,
            symbols: 2,
            fill_permille: 995,
            shard_items: 2,
            fusion,
            training: Training {
                inner_rounds: 1,
                local_steps: 1,
                rows: 1,
                row_tokens: 8,
                learning_rate_micros: 1,
                warmup_permille: 0,
                final_permille: 0,
                cross_entropy_permille: 0,
                rank: 1,
                alpha: 1,
                target_modules: Vec::new(),
                modules_to_save: Vec::new(),
                outer_rate_permille: 700,
                outer_momentum_permille: 700,
                distillation: Distillation::Trie,
                merge: MergeRule::Product,
                defence: Defence::None,
            },
            members: vec![id("a"), id("b"), id("c")],
            quorum: 1,
            deadlines: Deadlines {
                contribute_seconds: 1,
                distil_seconds: 1,
                evaluate_seconds: 1,
            },
            max_weight: None,
            seed: 1,
            previous_release: None,
        }
    }

    /// Records that give each observed byte of the shard's items this probability; `blind` items get 1/8 instead.
    fn shard(manifest: &Manifest, index: u32, probability: f64, blind: &[usize]) -> Shard {
        let set = ReferenceSet::parse(TEXT.as_bytes()).unwrap();
        shard_of(&set, manifest, index, probability, blind)
    }

    fn shard_of(
        set: &ReferenceSet,
        manifest: &Manifest,
        index: u32,
        probability: f64,
        blind: &[usize],
    ) -> Shard {
        let range = manifest.shard_range(index);
        let header = Header::new(
            set.digest(),
            range.clone(),
            SymbolSpace::Bytes,
            manifest.symbols,
        );
        let mut shard = Shard {
            header,
            symbols: Symbols::Bytes(Vec::new()),
            codes: Vec::new(),
            end: Vec::new(),
            tail: Vec::new(),
            missed: Vec::new(),
            offsets: vec![0],
        };
        let mut symbols = Vec::new();
        for item in range {
            let index = usize::try_from(item).unwrap();
            let item = &set.items()[index];
            let p = if blind.contains(&index) {
                0.125
            } else {
                probability
            };
            for byte in item.target.bytes() {
                symbols.extend([byte, byte]);
                shard.codes.extend([code::encode(p), u8::MAX]);
                shard.end.push(u8::MAX);
                shard.tail.push(code::encode(1.0 - p));
            }
            symbols.extend([b'z', b'z']);
            shard.codes.extend([code::encode(1.0 - p), u8::MAX]);
            shard.end.push(code::encode(p));
            shard.tail.push(u8::MAX);
            shard.missed.extend([255, 255]);
            shard.offsets.push(u64::try_from(shard.end.len()).unwrap());
        }
        shard.symbols = Symbols::Bytes(symbols);
        shard
    }

    #[test]
    fn each_item_follows_the_source_that_knows_it_in_any_order() {
        let manifest = manifest(FusionRule::Softmax { sharpness: 20 });
        let set = ReferenceSet::parse(TEXT.as_bytes()).unwrap();
        let mut sources = vec![
            (id("c"), shard(&manifest, 0, 0.125, &[])),
            (id("a"), shard(&manifest, 0, 0.9, &[1])),
            (id("b"), shard(&manifest, 0, 0.9, &[0])),
        ];
        let fused = fuse_shard(&manifest, &set, 0, &sources).unwrap();
        let routing = &fused.routing;
        assert_eq!(routing.institutions, [id("a"), id("b"), id("c")]);
        assert_eq!(routing.weights, [[65_536, 0, 0], [0, 65_536, 0]]);
        // Two bytes and the end; of the second item two bytes are no label.
        assert_eq!(routing.bytes, [3, 3]);
        let known = 3 * u64::from(code::encode(0.9));
        assert_eq!(routing.sixteenths, [[known, 144, 144], [144, known, 144]]);
        assert_eq!(routing.totals()[0].sixteenths, known + 144);
        assert_eq!(fused.targets.offsets, [0, 3, 8]);
        let bytes = fused.targets.to_bytes().unwrap();
        for _ in 0..3 {
            sources.rotate_left(1);
            let again = fuse_shard(&manifest, &set, 0, &sources).unwrap();
            assert_eq!(again.targets.to_bytes().unwrap(), bytes);
            assert_eq!(again, fused);
        }
        let last = [(id("a"), shard(&manifest, 1, 0.9, &[]))];
        assert_eq!(
            fuse_shard(&manifest, &set, 1, &last)
                .unwrap()
                .targets
                .offsets,
            [0, 2]
        );
    }

    #[test]
    fn without_a_declared_span_each_position_follows_what_came_before_it() {
        let text = "{\"target\":\"ab\"}\n{\"target\":\"cxxd\"}\n{\"target\":\"e\"}\n";
        let set = ReferenceSet::parse(text.as_bytes()).unwrap();
        let manifest = Manifest {
            reference: set.digest(),
            ..manifest(FusionRule::Softmax { sharpness: 20 })
        };
        let sources = [
            (id("a"), shard_of(&set, &manifest, 0, 0.9, &[1])),
            (id("b"), shard_of(&set, &manifest, 0, 0.9, &[0])),
        ];
        let fused = fuse_shard(&manifest, &set, 0, &sources).unwrap();
        let (even, known) = (code::encode((0.9 + 0.125) / 2.0), code::encode(0.9));
        let first_slots: Vec<u8> = fused.targets.codes.iter().copied().step_by(2).collect();
        assert_eq!(first_slots[..2], [even, known]);
        assert_eq!(first_slots[3..7], [even, known, known, known]);
        assert_eq!(fused.routing.weights, [[65_536, 0], [0, 65_536]]);
    }

    #[test]
    fn a_shard_that_is_not_the_one_asked_for_is_refused_by_name() {
        let manifest = manifest(FusionRule::Uniform);
        let set = ReferenceSet::parse(TEXT.as_bytes()).unwrap();
        let good = shard(&manifest, 0, 0.9, &[]);
        assert!(check_shard(&manifest, &set, 0, &id("b"), &good).is_ok());
        let mut heavy = good.clone();
        heavy.tail.fill(0);
        let mut shifted = good.clone();
        shifted.offsets = vec![0, 4, 8];
        for bad in [shard(&manifest, 1, 0.9, &[]), heavy, shifted] {
            let sources = [(id("a"), good.clone()), (id("b"), bad)];
            let error = fuse_shard(&manifest, &set, 0, &sources).unwrap_err();
            assert!(
                matches!(&error, FusionError::Shard { institution, shard: 0, .. } if *institution == id("b")),
                "{error}"
            );
        }
        let twice = [(id("a"), good.clone()), (id("a"), good.clone())];
        assert!(matches!(
            fuse_shard(&manifest, &set, 0, &twice),
            Err(FusionError::Twice(_))
        ));
        assert!(matches!(
            fuse_shard(&manifest, &set, 0, &[]),
            Err(FusionError::Nothing)
        ));
        let other = ReferenceSet::parse(b"{\"target\":\"ab\"}\n").unwrap();
        let error = fuse_shard(&manifest, &other, 0, &[(id("a"), good.clone())]).unwrap_err();
        assert!(matches!(error, FusionError::Reference(_)), "{error}");
        let error = fuse_shard(&manifest, &set, 7, &[(id("a"), good)]).unwrap_err();
        assert!(matches!(error, FusionError::Reference(_)), "{error}");
    }
}
