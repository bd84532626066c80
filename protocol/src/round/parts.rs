//! Who trains on which items of the reference set in an inner round.

use sha2::{Digest as _, Sha256};

use crate::ids::{Digest, InstitutionId};
use crate::message::Part;

/// Seed of the permutation of inner round `inner`: the first 8 bytes, little-endian, of SHA-256 over the manifest's
/// digest and `inner` as four little-endian bytes.
#[must_use]
pub fn part_seed(manifest: &Digest, inner: u32) -> u64 {
    let hash: [u8; 32] = Sha256::new()
        .chain_update(manifest.as_bytes())
        .chain_update(inner.to_le_bytes())
        .finalize()
        .into();
    hash.iter()
        .take(8)
        .rev()
        .fold(0, |seed, byte| seed << 8 | u64::from(*byte))
}

/// Disjoint parts that cover positions `0..items`, in institution order and in proportion to the capacities by largest
/// remainder (equal remainders: the earlier institution). A part may be empty; none come back if no one has capacity.
#[must_use]
pub fn parts(
    seed: u64,
    items: u64,
    capacities: &[(InstitutionId, u32)],
) -> Vec<(InstitutionId, Part)> {
    let mut members: Vec<&(InstitutionId, u32)> = capacities.iter().collect();
    members.sort();
    let total: u128 = members.iter().map(|(_, c)| u128::from(*c)).sum();
    if total == 0 {
        return Vec::new();
    }
    let quota = |capacity: u32| u128::from(items) * u128::from(capacity);
    let mut shares: Vec<u64> = members
        .iter()
        .map(|(_, c)| u64::try_from(quota(*c) / total).unwrap_or(items))
        .collect();
    let left = items.saturating_sub(shares.iter().sum());
    let mut order: Vec<usize> = (0..members.len()).collect();
    order.sort_by_key(|&i| (std::cmp::Reverse(quota(members[i].1) % total), i));
    // Each remainder is below 1, so there are fewer items left than members.
    for (i, _) in order.into_iter().zip(0..left) {
        shares[i] += 1;
    }
    let mut from = 0;
    members
        .into_iter()
        .zip(shares)
        .map(|((institution, _), share)| {
            let to = from + share;
            let part = Part { seed, from, to };
            from = to;
            (institution.clone(), part)
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn members(capacities: &[u32]) -> Vec<(InstitutionId, u32)> {
        let name = |i| InstitutionId::new(&format!("m{i:03}")).unwrap();
        (0..).map(name).zip(capacities.iter().copied()).collect()
    }

    #[test]
    fn the_seed_and_the_largest_remainders_are_pinned() {
        // From Python's hashlib: sha256(sha256(b"consilium").digest() + pack("<I", 7)).
        assert_eq!(part_seed(&Digest::of(b"consilium"), 7), 0x2254c9fd38b992a4);
        let mut reversed = members(&[3, 3, 1, 0]);
        reversed.reverse();
        let shares: Vec<u64> = parts(1, 10, &reversed)
            .iter()
            .map(|(_, part)| part.to - part.from)
            .collect();
        // Quotas 4.29, 4.29, 1.43, 0: the item left over goes to the third.
        assert_eq!(shares, [4, 4, 2, 0]);
        assert!(parts(1, 10, &members(&[0, 0])).is_empty());
    }

    proptest! {
        #[test]
        fn parts_cover_all_items_once_within_one_item_of_the_quota(
            items in prop_oneof![0u64..50, any::<u64>()],
            capacities in prop::collection::vec(prop_oneof![0u32..4, any::<u32>()], 1..9),
        ) {
            let total: u128 = capacities.iter().map(|c| u128::from(*c)).sum();
            prop_assume!(total > 0);
            let mut next = 0;
            for ((_, part), capacity) in parts(7, items, &members(&capacities)).iter().zip(&capacities) {
                prop_assert_eq!(part.from, next);
                next = part.to;
                let share = u128::from(part.to - part.from) * total;
                let quota = u128::from(items) * u128::from(*capacity);
                prop_assert!(share.abs_diff(quota) < total);
                prop_assert_eq!(part.seed, 7);
            }
            prop_assert_eq!(next, items);
        }
    }
}
