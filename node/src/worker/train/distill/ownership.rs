//! Which items a source may teach: those that it predicts better than the pivot did before the round.
//!
//! FedMKT's dual minCE (arXiv 2406.02224), on bits of the labelled bytes instead of token cross-entropy, so that no
//! tokenizer has an advantage. Nobody says who knows what: the two records do.

use std::collections::BTreeMap;

use consilium_kernels::RecordShape;
use consilium_kernels::fusion::item_bits;
use consilium_protocol::manifest::SymbolSpace;
use consilium_protocol::reference;

use super::item_at;
use crate::worker::error::WorkError;
use crate::worker::monitor::Monitor;
use crate::worker::score::{evidence, score_items, score_token_items};
use crate::worker::source::LoadedModel;
use crate::worker::train::targets::Targets;

/// For each of `wanted`, whether its target takes fewer bits than the pivot's own record of the same shape for the labelled
/// bytes and the end. On equal bits the pivot keeps the item.
///
/// # Errors
/// An item that is not there, one without a target, or a pivot that gives no finite numbers.
pub fn ownership(
    pivot: &LoadedModel,
    items: &[reference::Item],
    wanted: &[u64],
    targets: &Targets,
    shape: &RecordShape,
    monitor: &mut dyn Monitor,
) -> Result<BTreeMap<u64, bool>, WorkError> {
    let chosen = wanted
        .iter()
        .map(|&index| item_at(items, index))
        .collect::<Result<Vec<_>, _>>()?;
    let mut owned = BTreeMap::new();
    let refuse = |index: u64, problem: &dyn std::fmt::Display| {
        WorkError::Targets(format!("item {index}: {problem}"))
    };
    score_items(pivot, &chosen, shape, monitor, |place, own| {
        let (index, item) = (wanted[place], chosen[place]);
        let target = targets.of(index).ok_or_else(|| refuse(index, &"none"))?;
        let bits = |record| {
            item_bits(record, item.target.as_bytes(), &item.unlabeled)
                .map_err(|error| refuse(index, &error))
        };
        let is_owned = bits(target)?.sixteenths < bits(own)?.sixteenths;
        owned.insert(index, is_owned);
        Ok(())
    })?;
    Ok(owned)
}

/// As [`ownership`], by records in token space.
///
/// # Errors
/// As [`ownership`], or an item whose `tokens` are not those of the pivot.
pub(crate) fn token_ownership(
    pivot: &LoadedModel,
    items: &[reference::Item],
    wanted: &[u64],
    (targets, space): (&Targets<u32>, SymbolSpace),
    shape: &RecordShape,
    monitor: &mut dyn Monitor,
) -> Result<BTreeMap<u64, bool>, WorkError> {
    let chosen = wanted
        .iter()
        .map(|&index| Ok((index, item_at(items, index)?)))
        .collect::<Result<Vec<_>, WorkError>>()?;
    let mut owned = BTreeMap::new();
    score_token_items(pivot, &chosen, shape, monitor, |place, own| {
        let (index, item) = chosen[place];
        let target = targets
            .of(index)
            .ok_or_else(|| WorkError::Targets(format!("item {index}: none")))?;
        let bits = evidence(item, &[target, own], &item.unlabeled, space)?.totals();
        let is_owned = matches!(*bits, [target, own] if target.sixteenths < own.sixteenths);
        owned.insert(index, is_owned);
        Ok(None)
    })?;
    Ok(owned)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::worker::score::{bits, score_shard, score_token_shard};
    use crate::worker::testing::{model, reference, token_reference, token_space};

    #[test]
    fn an_item_belongs_to_the_source_whose_record_is_better_on_labelled_bytes() {
        let shape = RecordShape {
            k: 16,
            fill_permille: 995,
        };
        let (reference, pivot) = (reference(), model(1));
        let all: Vec<u64> = (0..8).collect();
        let records = |source: &LoadedModel| {
            Targets::gather(&reference, &all, 8, |_| {
                let scored = score_shard(source, &reference, 0..8, &shape, &mut ())?;
                Ok(scored.shard.to_bytes()?)
            })
            .unwrap()
        };
        let bits = |targets: &Targets, index: u64| {
            let item = &reference.items()[usize::try_from(index).unwrap()];
            let record = targets.of(index).unwrap();
            let bits = item_bits(record, item.target.as_bytes(), &item.unlabeled).unwrap();
            bits.sixteenths
        };
        let (ours, theirs) = (records(&pivot), records(&model(2)));
        let items = reference.items();
        let owned = ownership(&pivot, items, &all, &theirs, &shape, &mut ()).unwrap();
        assert_eq!(owned.len(), 8);
        for (&index, &is_owned) in &owned {
            assert_eq!(
                is_owned,
                bits(&theirs, index) < bits(&ours, index),
                "{index}"
            );
        }
        assert!(owned.values().any(|&owned| owned) && owned.values().any(|&owned| !owned));
        // Against itself a model owns nothing.
        let own = ownership(&pivot, items, &all, &ours, &shape, &mut ()).unwrap();
        assert!(own.values().all(|&owned| !owned));
    }

    #[test]
    fn in_token_space_an_item_belongs_to_the_source_that_needs_fewer_bits() {
        let shape = RecordShape {
            k: 16,
            fill_permille: 995,
        };
        let pivot = model(1);
        let (reference, space) = (token_reference(&pivot, true), token_space(&pivot));
        let all: Vec<u64> = (0..8).collect();
        let records = |source: &LoadedModel| {
            Targets::gather_tokens(&reference, &all, space, 8, |_| {
                let scored = score_token_shard(source, &reference, 0..8, space, &shape, &mut ())?;
                Ok(scored.shard.to_bytes()?)
            })
            .unwrap()
        };
        let (ours, theirs) = (records(&pivot), records(&model(2)));
        let items = reference.items();
        let owned = |targets| {
            token_ownership(&pivot, items, &all, (targets, space), &shape, &mut ()).unwrap()
        };
        let found = owned(&theirs);
        assert!(found.values().any(|&owned| owned) && found.values().any(|&owned| !owned));
        for (index, item) in (0..)
            .zip(items)
            .filter(|(_, item)| item.unlabeled.is_empty())
        {
            let of =
                |targets: &Targets<u32>| bits(item, targets.of(index).unwrap(), space).unwrap();
            assert_eq!(found[&index], of(&theirs) < of(&ours), "{index}");
        }
        assert!(owned(&ours).values().all(|&owned| !owned));
    }
}
