//! Random parts and random order, the same on every machine.
//!
//! All draws come from ChaCha8 with a key of little-endian words and zeros, and each choice takes one of its 64-bit
//! words, so that the permutation of a seed can be recomputed in any language.

use consilium_protocol::message::Part;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

/// A part that does not fit the reference set.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("part {from}..{to} is empty or outside of the reference set's {items} items")]
pub struct PartError {
    /// First position.
    pub from: u64,
    /// Position after the last.
    pub to: u64,
    /// Items of the reference set.
    pub items: u64,
}

/// Items of a part, in the order of the permutation: its places `from..to`.
///
/// The permutation of `0..items` is the shuffle of Fisher and Yates from the last place down to place 1: with the next
/// word r, place i changes with place `floor(r (i + 1) / 2^64)`. The key is the part's seed.
///
/// # Errors
/// The part is empty or ends after the last item.
pub fn items_of(part: &Part, items: u64) -> Result<Vec<u64>, PartError> {
    let outside = PartError {
        from: part.from,
        to: part.to,
        items,
    };
    if part.from >= part.to || part.to > items {
        return Err(outside);
    }
    let mut all: Vec<u64> = (0..items).collect();
    shuffle(&mut all, &mut generator(&[part.seed]));
    let range = usize::try_from(part.from)
        .ok()
        .zip(usize::try_from(part.to).ok());
    range
        .and_then(|(from, to)| all.get(from..to))
        .map(<[u64]>::to_vec)
        .ok_or(outside)
}

/// The generator whose key starts with these words; at most four.
pub(crate) fn generator(words: &[u64]) -> ChaCha8Rng {
    let mut key = [0; 32];
    for (place, word) in key.chunks_exact_mut(8).zip(words) {
        place.copy_from_slice(&word.to_le_bytes());
    }
    ChaCha8Rng::from_seed(key)
}

/// Shuffles in place as [`items_of`] does.
pub(crate) fn shuffle<T>(values: &mut [T], generator: &mut ChaCha8Rng) {
    for last in (1..values.len()).rev() {
        let scaled = u128::from(generator.next_u64()) * (last as u128 + 1);
        // The product is below (last + 1) 2^64.
        let place = usize::try_from(scaled >> 64).unwrap_or(last);
        values.swap(last, place);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn part(from: u64, to: u64) -> Part {
        Part { seed: 7, from, to }
    }

    #[test]
    fn parts_of_one_seed_cover_every_item_once() {
        let mut all = Vec::new();
        for (from, to) in [(0, 313), (313, 314), (314, 1000)] {
            all.extend(items_of(&part(from, to), 1000).unwrap());
        }
        assert_ne!(all[..50], (0..50).collect::<Vec<u64>>());
        all.sort_unstable();
        assert_eq!(all, (0..1000).collect::<Vec<u64>>());
    }

    #[test]
    fn the_permutation_of_a_seed_is_the_one_that_another_chacha8_gives() {
        let all = items_of(&part(0, 16), 16).unwrap();
        let elsewhere = [2, 7, 13, 8, 5, 9, 14, 11, 1, 10, 15, 4, 3, 0, 6, 12];
        assert_eq!(all, elsewhere);
    }

    #[test]
    fn parts_outside_of_the_set_are_refused() {
        for (from, to) in [(0, 17), (3, 3), (5, 4), (16, 17), (u64::MAX, u64::MAX)] {
            assert!(items_of(&part(from, to), 16).is_err(), "{from}..{to}");
        }
    }
}
