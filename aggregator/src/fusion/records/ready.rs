//! Checked records of a shard, ready to be fused: one view per source and item, and what was observed.

use std::collections::BTreeMap;
use std::ops::Range;

use consilium_kernels::fusion::{Evidence, ObservedToken};
use consilium_kernels::{RecordView, Symbol};
use consilium_protocol::InstitutionId;
use consilium_protocol::manifest::{Manifest, SymbolSpace};
use consilium_protocol::reference::{Item, ReferenceSet};
use consilium_protocol::shard::{Header, Shard, Symbols};
use rayon::prelude::*;

use crate::fusion::error::FusionError;

/// A symbol space that shards may be in.
pub(crate) trait Space: Symbol {
    /// The shard's symbols, if it is of this space.
    fn column(symbols: &Symbols) -> Option<&[Self]>;
    /// Symbols of a shard of this space.
    fn wrap(symbols: Vec<Self>) -> Symbols;
    /// Positions of an item's records.
    fn positions(item: &Item) -> usize;
    /// Positions that spell some of these bytes of the target.
    fn spelling(item: &Item, bytes: Range<u32>) -> Vec<usize>;
    /// What was observed at each position, where it is a label.
    fn labels(item: &Item) -> Vec<Option<Self>>;
    /// What sources say of what was observed.
    fn evidence(
        manifest: &Manifest,
        item: &Item,
        sources: &[RecordView<'_, Self>],
    ) -> Result<Evidence, consilium_kernels::FusionError>;
}

impl Space for u8 {
    fn column(symbols: &Symbols) -> Option<&[Self]> {
        match symbols {
            Symbols::Bytes(bytes) => Some(bytes),
            Symbols::Tokens(_) => None,
        }
    }

    fn wrap(symbols: Vec<Self>) -> Symbols {
        Symbols::Bytes(symbols)
    }

    fn positions(item: &Item) -> usize {
        item.positions()
    }

    fn spelling(_: &Item, bytes: Range<u32>) -> Vec<usize> {
        bytes
            .filter_map(|byte| usize::try_from(byte).ok())
            .collect()
    }

    fn labels(item: &Item) -> Vec<Option<Self>> {
        let mut labels: Vec<_> = item.target.bytes().map(Some).collect();
        for span in &item.unlabeled {
            labels[span.clone()].fill(None);
        }
        labels.push(None);
        labels
    }

    fn evidence(
        _: &Manifest,
        item: &Item,
        sources: &[RecordView<'_, Self>],
    ) -> Result<Evidence, consilium_kernels::FusionError> {
        Evidence::of_bytes(sources, item.target.as_bytes(), &item.unlabeled)
    }
}

impl Space for u32 {
    fn column(symbols: &Symbols) -> Option<&[Self]> {
        match symbols {
            Symbols::Tokens(tokens) => Some(tokens),
            Symbols::Bytes(_) => None,
        }
    }

    fn wrap(symbols: Vec<Self>) -> Symbols {
        Symbols::Tokens(symbols)
    }

    fn positions(item: &Item) -> usize {
        item.tokens.len()
    }

    fn spelling(item: &Item, bytes: Range<u32>) -> Vec<usize> {
        let mut from = 0_u32;
        let mut positions = Vec::new();
        for (position, (_, length)) in item.tokens.iter().enumerate() {
            let to = from.saturating_add(*length);
            if from < bytes.end && bytes.start < to {
                positions.push(position);
            }
            from = to;
        }
        positions
    }

    fn labels(item: &Item) -> Vec<Option<Self>> {
        let mut labels: Vec<_> = item.tokens.iter().map(|&(id, _)| Some(id)).collect();
        for span in &item.unlabeled {
            let bytes = |at| Self::try_from(at).unwrap_or(Self::MAX);
            for position in Self::spelling(item, bytes(span.start)..bytes(span.end)) {
                labels[position] = None;
            }
        }
        labels
    }

    fn evidence(
        manifest: &Manifest,
        item: &Item,
        sources: &[RecordView<'_, Self>],
    ) -> Result<Evidence, consilium_kernels::FusionError> {
        let size = match manifest.symbol_space {
            SymbolSpace::Tokens { size, .. } => size,
            SymbolSpace::Bytes => 0,
        };
        let tokens: Vec<_> = item
            .tokens
            .iter()
            .map(|&(id, bytes)| ObservedToken { id, bytes })
            .collect();
        Evidence::of_tokens(sources, &tokens, &item.unlabeled, size)
    }
}

/// One item of a shard.
#[derive(Debug)]
pub(crate) struct ReadyItem<'a, S> {
    /// The item.
    pub(crate) item: &'a Item,
    /// One record per source, in the order of the institutions.
    pub(crate) sources: Vec<RecordView<'a, S>>,
    /// What they say of what was observed.
    pub(crate) evidence: Evidence,
}

/// A shard of all sources.
#[derive(Debug)]
pub(crate) struct Ready<'a, S> {
    /// The round's manifest.
    pub(crate) manifest: &'a Manifest,
    /// The sources, ascending.
    pub(crate) institutions: Vec<InstitutionId>,
    /// Index of the shard.
    pub(crate) shard: u32,
    /// Whether the whole reference set declares no span.
    pub(crate) is_causal: bool,
    /// Its items.
    pub(crate) items: Vec<ReadyItem<'a, S>>,
}

/// Sources in the order of their institutions.
///
/// # Errors
/// None, or one twice.
pub(super) fn sorted(
    sources: &[(InstitutionId, Shard)],
) -> Result<BTreeMap<&InstitutionId, &Shard>, FusionError> {
    let mut sorted = BTreeMap::new();
    for (institution, shard) in sources {
        if sorted.insert(institution, shard).is_some() {
            return Err(FusionError::Twice(institution.clone()));
        }
    }
    if sorted.is_empty() {
        return Err(FusionError::Nothing);
    }
    Ok(sorted)
}

impl<'a, S: Space> Ready<'a, S> {
    /// Checks shard `shard` of these sources, in any order.
    pub(crate) fn of_sources(
        manifest: &'a Manifest,
        reference: &'a ReferenceSet,
        shard: u32,
        sources: &'a [(InstitutionId, Shard)],
    ) -> Result<Self, FusionError> {
        Self::new(manifest, reference, shard, &sorted(sources)?)
    }

    pub(crate) fn new(
        manifest: &'a Manifest,
        reference: &'a ReferenceSet,
        shard: u32,
        sources: &BTreeMap<&InstitutionId, &'a Shard>,
    ) -> Result<Self, FusionError> {
        let items = items(manifest, reference, shard)?;
        let views: Vec<_> = sources
            .par_iter()
            .map(|(institution, source)| view::<S>(manifest, items, shard, institution, source))
            .collect();
        let views = views.into_iter().collect::<Result<Vec<_>, _>>()?;
        let mut ready = Self {
            manifest,
            institutions: sources.keys().map(|&who| who.clone()).collect(),
            shard,
            is_causal: reference
                .items()
                .iter()
                .all(|item| item.unlabeled.is_empty()),
            items: Vec::with_capacity(items.len()),
        };
        let mut start = 0_usize;
        for (index, item) in items.iter().enumerate() {
            let end = start.saturating_add(S::positions(item));
            let sources: Vec<_> = views
                .iter()
                .filter_map(|view| view.slice(start..end))
                .collect();
            let evidence = S::evidence(manifest, item, &sources)
                .map_err(|source| ready.wrong(index, source))?;
            ready.items.push(ReadyItem {
                item,
                sources,
                evidence,
            });
            start = end;
        }
        Ok(ready)
    }

    /// An error of item `index` of the shard.
    pub(crate) fn wrong(
        &self,
        index: usize,
        source: consilium_kernels::FusionError,
    ) -> FusionError {
        FusionError::Records {
            shard: self.shard,
            item: self.first() + u64::try_from(index).unwrap_or(0),
            source,
        }
    }

    /// Number of the shard's first item in the reference set.
    pub(crate) fn first(&self) -> u64 {
        self.manifest.shard_range(self.shard).start
    }
}

/// Whether the reference set has what the manifest's symbol space needs. For the opening of a round.
///
/// # Errors
/// In token space, an item without tokens or with one that the vocabulary does not have.
pub fn check_reference(manifest: &Manifest, reference: &ReferenceSet) -> Result<(), FusionError> {
    let SymbolSpace::Tokens { size, .. } = manifest.symbol_space else {
        return Ok(());
    };
    for (index, item) in reference.items().iter().enumerate() {
        let problem = if item.tokens.is_empty() {
            "has no field tokens; routing in token space reads what was observed from there"
                .to_owned()
        } else if let Some((id, _)) = item.tokens.iter().find(|(id, _)| *id >= size) {
            format!("has token {id}, the manifest's vocabulary has {size}")
        } else {
            continue;
        };
        return Err(FusionError::Reference(format!("item {index} {problem}")));
    }
    Ok(())
}

/// The reference items of a shard.
pub(super) fn items<'a>(
    manifest: &Manifest,
    reference: &'a ReferenceSet,
    shard: u32,
) -> Result<&'a [Item], FusionError> {
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
pub(super) fn view<'a, S: Space>(
    manifest: &Manifest,
    items: &[Item],
    shard_index: u32,
    institution: &InstitutionId,
    shard: &'a Shard,
) -> Result<RecordView<'a, S>, FusionError> {
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
        let (got, expected) = (
            shard.item(index).map_or(0, |range| range.len()),
            S::positions(item),
        );
        if got != expected {
            return Err(wrong(format!(
                "item {index} of the shard has {got} positions, expected {expected}"
            )));
        }
    }
    let symbols = S::column(&shard.symbols)
        .ok_or_else(|| wrong("its symbols are of another space".to_owned()))?;
    let end = if S::HAS_END {
        shard.end.as_slice()
    } else {
        &[]
    };
    let view = RecordView::new(
        usize::from(manifest.symbols),
        symbols,
        &shard.codes,
        end,
        &shard.tail,
    )
    .map_err(|error| wrong(error.to_string()))?;
    view.check_mass()
        .map_err(|error| wrong(error.to_string()))?;
    Ok(view)
}
