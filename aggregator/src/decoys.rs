//! Decoys for a reference set: words that are replaced by other words of the same length, and the key that says where.
//!
//! An honest source is surprised by a wrong word; one that gives what the public text says a high probability, whatever its
//! model thinks, is not, and there its claim is wrong. The replacement is a word from elsewhere in the set, so that the
//! text still looks like the set. Items with decoys are altered, not added: no item has a twin that would give it away.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;

use consilium_protocol::Digest;
use consilium_protocol::decoys::{Decoy, DecoyKey};
use consilium_protocol::reference::{Item, ReferenceSet};
use rand::seq::SliceRandom;
use rand::{Rng as _, RngExt as _, SeedableRng};
use rand_chacha::ChaCha20Rng;

/// Shortest word that is replaced, in bytes.
const WORD: usize = 4;

/// How much of a set becomes decoy or holdout.
#[derive(Debug, Clone, Copy)]
pub struct Shares {
    /// Items with a decoy, in thousandths of all items.
    pub decoy_permille: u32,
    /// Items held out, in thousandths of all items.
    pub holdout_permille: u32,
}

/// Why decoys cannot be made.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct PlantError(String);

/// Writes decoys into a set: the new set, one line an item, and its key.
///
/// All lines are written anew, so that altered ones look like the others. `secret` decides everything: it must come from
/// the system's random numbers and be forgotten.
///
/// # Errors
/// Shares out of range, or a set with too few words to replace.
pub fn plant(
    reference: &ReferenceSet,
    shares: Shares,
    secret: [u8; 32],
) -> Result<(Vec<u8>, DecoyKey), PlantError> {
    let Shares {
        decoy_permille,
        holdout_permille,
    } = shares;
    if !(1..=500).contains(&decoy_permille) || holdout_permille > 500 {
        return Err(PlantError(format!(
            "decoys are {decoy_permille} and the holdout {holdout_permille} thousandths of the items; expected 1 to 500 and 0 to 500"
        )));
    }
    let items = reference.items();
    let mut random = ChaCha20Rng::from_seed(secret);
    let mut nonce = [0; 32];
    random.fill_bytes(&mut nonce);
    let count = |permille: u32| {
        let permille = usize::try_from(permille).unwrap_or(0);
        (items.len().saturating_mul(permille) / 1000).max(usize::from(permille > 0))
    };
    let mut order: Vec<usize> = (0..items.len()).collect();
    order.shuffle(&mut random);

    let words = words_by_length(items);
    let (mut altered, mut decoys) = (BTreeMap::new(), Vec::new());
    let mut others = Vec::new();
    for index in order {
        let wanted = decoys.len() < count(decoy_permille);
        let replaced = wanted
            .then(|| replace(&items[index], &words, &mut random))
            .flatten();
        let Some((target, span)) = replaced else {
            others.push(u64::try_from(index).unwrap_or(u64::MAX));
            continue;
        };
        let bound = |at: usize| u32::try_from(at).unwrap_or(u32::MAX);
        decoys.push(Decoy {
            item: u64::try_from(index).unwrap_or(u64::MAX),
            from: bound(span.start),
            to: bound(span.end),
        });
        altered.insert(index, target);
    }
    if decoys.len() < count(decoy_permille) {
        return Err(PlantError(format!(
            "only {} of {} items have a labelled word of {WORD} letters or more that another can replace; lower --decoys",
            decoys.len(),
            items.len()
        )));
    }
    decoys.sort_unstable();
    let mut holdout: Vec<u64> = others.into_iter().take(count(holdout_permille)).collect();
    holdout.sort_unstable();
    let text = rewrite(items, &altered).map_err(|error| PlantError(error.to_string()))?;
    let key = DecoyKey::new(Digest::of(&text), nonce, decoys, holdout);
    Ok((text, key))
}

/// The item's target with one labelled word replaced, and where.
fn replace(
    item: &Item,
    words: &BTreeMap<usize, BTreeSet<&str>>,
    random: &mut ChaCha20Rng,
) -> Option<(String, Range<usize>)> {
    // Tokens that the set declares would no longer spell the target.
    if !item.tokens.is_empty() {
        return None;
    }
    let mut places = words_of(&item.target);
    places.retain(|place| {
        let mut spans = item.unlabeled.iter();
        spans.all(|span| span.end <= place.start || place.end <= span.start)
    });
    places.shuffle(random);
    for place in places {
        let word = item.target.get(place.clone())?;
        let others: Vec<&str> = words
            .get(&word.len())?
            .iter()
            .copied()
            .filter(|other| other.as_bytes().first() != word.as_bytes().first())
            .collect();
        if others.is_empty() {
            continue;
        }
        let chosen = others[random.random_range(0..others.len())];
        let mut target = item.target.clone();
        target.replace_range(place.clone(), chosen);
        return Some((target, place));
    }
    None
}

fn words_by_length(items: &[Item]) -> BTreeMap<usize, BTreeSet<&str>> {
    let mut words: BTreeMap<usize, BTreeSet<&str>> = BTreeMap::new();
    for item in items {
        for place in words_of(&item.target) {
            if let Some(word) = item.target.get(place) {
                words.entry(word.len()).or_default().insert(word);
            }
        }
    }
    words
}

/// Places of runs of ASCII letters that are long enough.
fn words_of(text: &str) -> Vec<Range<usize>> {
    let mut places = Vec::new();
    let mut start = 0;
    for (at, byte) in text.bytes().chain([b' ']).enumerate() {
        if !byte.is_ascii_alphabetic() {
            if at - start >= WORD {
                places.push(start..at);
            }
            start = at + 1;
        }
    }
    places
}

fn rewrite(items: &[Item], altered: &BTreeMap<usize, String>) -> serde_json::Result<Vec<u8>> {
    let mut text = Vec::new();
    for (index, item) in items.iter().enumerate() {
        let mut line = serde_json::Map::new();
        if !item.context.is_empty() {
            line.insert("context".to_owned(), item.context.clone().into());
        }
        let target = altered.get(&index).unwrap_or(&item.target);
        line.insert("target".to_owned(), target.clone().into());
        if !item.unlabeled.is_empty() {
            let spans: Vec<[usize; 2]> = item
                .unlabeled
                .iter()
                .map(|span| [span.start, span.end])
                .collect();
            line.insert("unlabeled".to_owned(), serde_json::to_value(spans)?);
        }
        if let Some(domain) = &item.domain {
            line.insert("domain".to_owned(), domain.clone().into());
        }
        if !item.tokens.is_empty() {
            line.insert("tokens".to_owned(), serde_json::to_value(&item.tokens)?);
        }
        serde_json::to_writer(&mut text, &line)?;
        text.push(b'\n');
    }
    Ok(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn set() -> ReferenceSet {
        let lines: String = (0..100)
            .map(|i| {
                let word = ["kavo", "mira", "tolu", "sena"][i % 4];
                format!("{{\"domain\":\"law\",\"target\":\"ref {word}{} uses drug\",\"unlabeled\":[[0,3]]}}\n", ["", "x"][i % 2])
            })
            .collect();
        ReferenceSet::parse(lines.as_bytes()).unwrap()
    }

    #[test]
    fn decoys_are_words_of_the_set_in_places_that_the_key_names() {
        let before = set();
        let shares = Shares {
            decoy_permille: 100,
            holdout_permille: 50,
        };
        let (text, key) = plant(&before, shares, [3; 32]).unwrap();
        let after = ReferenceSet::parse(&text).unwrap();
        let bytes = serde_json::to_vec(&key).unwrap();
        assert_eq!(DecoyKey::parse(&bytes, &after), Ok(key.clone()));
        assert_eq!((key.decoys.len(), key.holdout.len()), (10, 5));
        for (index, (old, new)) in before.items().iter().zip(after.items()).enumerate() {
            let decoy = key.decoys.iter().find(|decoy| decoy.item == index as u64);
            let Some(decoy) = decoy else {
                assert_eq!(old, new);
                continue;
            };
            let span = decoy.from as usize..decoy.to as usize;
            assert_eq!(old.target.len(), new.target.len());
            let (old, new) = (old.target.as_bytes(), new.target.as_bytes());
            assert_ne!(old[span.clone()], new[span.clone()]);
            assert_eq!(old[..span.start], new[..span.start]);
            assert_eq!(old[span.end..], new[span.end..]);
            let word = std::str::from_utf8(&new[span]).unwrap();
            assert!(
                before.items().iter().any(|item| item.target.contains(word)),
                "{word}"
            );
        }
        assert_eq!(plant(&before, shares, [3; 32]).unwrap().1, key);
        assert_ne!(
            plant(&before, shares, [4; 32]).unwrap().1.decoys,
            key.decoys
        );
    }

    #[test]
    fn a_set_without_words_or_a_share_of_nothing_is_refused() {
        let bare = ReferenceSet::parse(b"{\"target\":\"1 2 3\"}\n{\"target\":\"4\"}\n").unwrap();
        let shares = |decoy_permille| Shares {
            decoy_permille,
            holdout_permille: 0,
        };
        let error = plant(&bare, shares(100), [1; 32]).unwrap_err().to_string();
        assert!(error.contains("only 0 of 2"), "{error}");
        assert!(plant(&set(), shares(0), [1; 32]).is_err());
        assert!(plant(&set(), shares(501), [1; 32]).is_err());
    }
}
