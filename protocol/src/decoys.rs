//! The key of a reference set with decoys: which spans are wrong on purpose and which items are held out.
//!
//! The aggregator's manifest commits to the file's SHA-256 when a round opens, and publishes the file once the records are
//! closed. Until then nobody else knows it: a source that reads the public text to look good shows that it does where the
//! text is wrong. A nonce keeps the digest from being guessed.

use serde::{Deserialize, Serialize};

use crate::ids::Digest;
use crate::reference::ReferenceSet;

/// Version of the file.
const FORMAT: u32 = 1;

/// A span of an item's target whose bytes are wrong on purpose.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Decoy {
    /// Item of the reference set.
    pub item: u64,
    /// First byte of the target that is wrong.
    pub from: u32,
    /// Byte after the last that is wrong.
    pub to: u32,
}

/// The key file, as JSON.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DecoyKey {
    /// Version of the format, 1.
    pub format: u32,
    /// Digest of the reference set that holds the decoys.
    pub reference: Digest,
    /// 32 random bytes in hexadecimal.
    pub nonce: String,
    /// Decoys in the order of their items, one an item.
    pub decoys: Vec<Decoy>,
    /// Items that nobody trains on and that contributions are measured on, ascending; none of them a decoy.
    pub holdout: Vec<u64>,
}

/// Why bytes are no key of a reference set.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("decoy key: {0}")]
pub struct DecoyError(String);

impl DecoyKey {
    /// A key for a reference set.
    #[must_use]
    pub fn new(reference: Digest, nonce: [u8; 32], decoys: Vec<Decoy>, holdout: Vec<u64>) -> Self {
        Self {
            format: FORMAT,
            reference,
            nonce: hex::encode(nonce),
            decoys,
            holdout,
        }
    }

    /// Parses a key and checks it against its reference set.
    ///
    /// # Errors
    /// A sentence that names the field.
    pub fn parse(bytes: &[u8], reference: &ReferenceSet) -> Result<Self, DecoyError> {
        let key: Self =
            serde_json::from_slice(bytes).map_err(|error| DecoyError(error.to_string()))?;
        key.check(reference).map_err(DecoyError)?;
        Ok(key)
    }

    /// Items that no node trains on: decoys and holdout, ascending.
    #[must_use]
    pub fn withheld(&self) -> Vec<u64> {
        let decoys = self.decoys.iter().map(|decoy| decoy.item);
        let mut items: Vec<u64> = decoys.chain(self.holdout.iter().copied()).collect();
        items.sort_unstable();
        items
    }

    fn check(&self, reference: &ReferenceSet) -> Result<(), String> {
        if self.format != FORMAT {
            return Err(format!("format {} is not supported", self.format));
        }
        if self.reference != reference.digest() {
            return Err(format!(
                "it is for reference set {}, this one is {}",
                self.reference,
                reference.digest()
            ));
        }
        if self.nonce.len() != 64 || hex::decode(&self.nonce).is_err() {
            return Err("nonce must have 64 hexadecimal digits".to_owned());
        }
        if !self.decoys.is_sorted_by(|a, b| a.item < b.item) {
            return Err("decoys must be in the order of their items, one an item".to_owned());
        }
        let item = |index: u64| {
            let index = usize::try_from(index).ok();
            index.and_then(|index| reference.items().get(index))
        };
        for decoy in &self.decoys {
            let length = item(decoy.item).map_or(0, |item| item.target.len());
            if decoy.from >= decoy.to || usize::try_from(decoy.to).map_or(true, |to| to > length) {
                return Err(format!(
                    "decoy {}..{} of item {} lies outside of its target's {length} bytes",
                    decoy.from, decoy.to, decoy.item
                ));
            }
        }
        if !self.holdout.is_sorted_by(|a, b| a < b)
            || self
                .holdout
                .last()
                .is_some_and(|&last| item(last).is_none())
        {
            return Err("holdout must be ascending items of the reference set".to_owned());
        }
        let is_decoy = |held: &u64| self.decoys.binary_search_by_key(held, |d| d.item).is_ok();
        if self.holdout.iter().any(is_decoy) {
            return Err("an item is both decoy and holdout".to_owned());
        }
        if self.withheld().len() >= reference.items().len() {
            return Err("nothing is left to train on".to_owned());
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_fits_its_reference_set_or_is_refused_by_field() {
        let text = "{\"target\":\"abcd\"}\n".repeat(4);
        let set = ReferenceSet::parse(text.as_bytes()).unwrap();
        let decoy = |item, from, to| Decoy { item, from, to };
        let parse = |key: &DecoyKey| DecoyKey::parse(&serde_json::to_vec(key).unwrap(), &set);
        let key = |decoys, holdout| DecoyKey::new(set.digest(), [7; 32], decoys, holdout);
        let good = key(vec![decoy(0, 1, 4), decoy(2, 0, 1)], vec![1]);
        assert_eq!(parse(&good), Ok(good.clone()));
        assert_eq!(good.withheld(), [0, 1, 2]);
        let mut foreign = good.clone();
        foreign.reference = Digest::of(b"other");
        let mut bare = good;
        bare.nonce.clear();
        for (bad, field) in [
            (key(vec![decoy(2, 0, 1), decoy(0, 1, 4)], vec![]), "order"),
            (key(vec![decoy(0, 1, 5)], vec![]), "outside"),
            (key(vec![decoy(9, 0, 1)], vec![]), "outside"),
            (key(vec![decoy(0, 1, 2)], vec![0]), "both"),
            (key(vec![], vec![4]), "holdout"),
            (key(vec![decoy(0, 1, 2)], vec![1, 2, 3]), "nothing is left"),
            (foreign, "reference set"),
            (bare, "nonce"),
        ] {
            let error = parse(&bad).unwrap_err().to_string();
            assert!(error.contains(field), "{error}, expected {field}");
        }
    }
}
