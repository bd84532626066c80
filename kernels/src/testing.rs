//! Random vocabularies, targets and logits for the tests beside the code.
#![expect(
    clippy::cast_possible_truncation,
    reason = "random numbers below small bounds"
)]

use proptest::prelude::*;

use crate::code::FLOOR;
use crate::element::Element;
use crate::records::Records;
use crate::vocab::{TokenKind, Vocab};

/// SplitMix64: reproducible from one seed.
#[derive(Clone, Debug)]
pub(crate) struct Random(pub(crate) u64);

impl Random {
    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// In 0..bound.
    pub(crate) fn below(&mut self, bound: usize) -> usize {
        (self.next() % bound as u64) as usize
    }

    /// In -1..1.
    pub(crate) fn signed(&mut self) -> f32 {
        (self.next() >> 40) as f32 / (1 << 23) as f32 - 1.0
    }

    pub(crate) fn logits(&mut self, count: usize, scale: f32) -> Vec<f32> {
        (0..count).map(|_| self.signed() * scale).collect()
    }
}

/// A vocabulary and an item spelled with it.
#[derive(Clone, Debug)]
pub(crate) struct Case {
    pub(crate) vocab: Vocab,
    pub(crate) tokens: Vec<u32>,
    pub(crate) scale: f32,
    pub(crate) random: Random,
}

impl Case {
    pub(crate) fn bytes(&self) -> Vec<u8> {
        self.tokens
            .iter()
            .flat_map(|&rank| self.vocab.token_bytes(rank))
            .copied()
            .collect()
    }

    pub(crate) fn rows(&mut self, rows: usize) -> Vec<f32> {
        self.random.logits(rows * self.vocab.len(), self.scale)
    }

    /// Logits of the item.
    pub(crate) fn logits(&mut self) -> Vec<f32> {
        self.rows(self.tokens.len() + 1)
    }

    /// A target of random codes, in which the observed byte is often, but not always, listed.
    pub(crate) fn target(&mut self, k: usize) -> Records {
        let mut records = Records::new(k).unwrap();
        let bytes = self.bytes();
        for position in 0..=bytes.len() {
            let mut listed = std::collections::BTreeMap::new();
            if let Some(&byte) = bytes.get(position).filter(|_| self.random.below(4) > 0) {
                listed.insert(byte, self.random.below(64) as u8);
            }
            for _ in 0..=self.random.below(k) {
                if listed.len() < k {
                    let byte = ALPHABET[self.random.below(ALPHABET.len())];
                    listed.insert(byte, self.random.below(256) as u8);
                }
            }
            let listed: Vec<(u8, u8)> = listed.into_iter().collect();
            let mut code = || {
                if self.random.below(3) == 0 {
                    FLOOR
                } else {
                    self.random.below(200) as u8
                }
            };
            records.push(&listed, code(), code());
        }
        records
    }

    /// The item's tokens as one to three items, some of them perhaps empty.
    pub(crate) fn items(&mut self) -> Vec<Vec<u32>> {
        let cuts = [(); 2].map(|()| self.random.below(self.tokens.len() + 1));
        let (first, second) = (cuts[0].min(cuts[1]), cuts[0].max(cuts[1]));
        let parts = [0..first, first..second, second..self.tokens.len()];
        let count = 1 + self.random.below(3);
        parts
            .into_iter()
            .rev()
            .take(count)
            .map(|part| self.tokens[part].to_vec())
            .collect()
    }

    /// A token-space target of random codes over random ids, with a position per row.
    pub(crate) fn token_target(&mut self, k: usize) -> Records<u32> {
        let mut records = Records::new(k).unwrap();
        for _ in 0..=self.tokens.len() {
            let mut listed = std::collections::BTreeMap::new();
            for _ in 0..=self.random.below(k) {
                let id = self.random.below(self.vocab.len()) as u32;
                listed.insert(id, self.random.below(256) as u8);
            }
            let listed: Vec<(u32, u8)> = listed.into_iter().collect();
            let tail = self.random.below(300).min(255) as u8;
            records.push(&listed, FLOOR, tail);
        }
        records
    }

    /// The token-space target that is certain of what was observed.
    pub(crate) fn one_hot_tokens(&self) -> Records<u32> {
        let mut records = Records::new(2).unwrap();
        for &rank in self.tokens.iter().chain([&self.vocab.end_ranks().start]) {
            records.push(&[(self.vocab.id_of_rank()[rank as usize], 0)], FLOOR, FLOOR);
        }
        records
    }

    /// The target that is certain of what was observed.
    pub(crate) fn one_hot(&self) -> Records {
        let mut records = Records::new(2).unwrap();
        for byte in self.bytes() {
            records.push(&[(byte, 0)], FLOOR, FLOOR);
        }
        records.push(&[(7, FLOOR)], 0, FLOOR);
        records
    }
}

/// Values as they are stored in another type.
pub(crate) fn stored<T: Element>(values: &[f32]) -> Vec<T> {
    values.iter().map(|&value| T::from_f32(value)).collect()
}

/// Few byte values, so that prefixes and whole tokens collide; both ends of the range.
const ALPHABET: [u8; 5] = [0, b'a', b'b', b'c', 0xff];

/// Vocabularies of 1 to 40 byte tokens with shared prefixes and duplicates, 1 to 3 ends, up to 3
/// ignored; items of 0 to 40 tokens; logits from flat to +-10,000.
pub(crate) fn cases() -> impl Strategy<Value = Case> {
    let token = prop::collection::vec(prop::sample::select(&ALPHABET[..]), 1..6);
    let tokens = prop::collection::vec(token, 1..41);
    let scales = prop::sample::select(&[0.1_f32, 3.0, 30.0, 1e4][..]);
    (
        tokens,
        1_usize..4,
        0_usize..4,
        0_usize..41,
        scales,
        any::<u64>(),
    )
        .prop_map(|(tokens, ends, ignored, length, scale, seed)| {
            let mut random = Random(seed);
            let mut kinds: Vec<TokenKind<'_>> =
                tokens.iter().map(|token| TokenKind::Bytes(token)).collect();
            for (kind, count) in [
                (TokenKind::EndOfRecord, ends),
                (TokenKind::Ignored, ignored),
            ] {
                for _ in 0..count {
                    kinds.insert(random.below(kinds.len() + 1), kind);
                }
            }
            let vocab = Vocab::new(kinds).unwrap();
            let bound = vocab.byte_tokens() as usize;
            let tokens = (0..length).map(|_| random.below(bound) as u32).collect();
            Case {
                vocab,
                tokens,
                scale,
                random,
            }
        })
}
