//! Seeded draws, defined here so that a new version of a random-number crate cannot change the data.

use rand_chacha::{
    ChaCha8Rng,
    rand_core::{Rng, SeedableRng},
};

use super::Domain;

/// Independent streams of one seed.
#[derive(Clone, Copy, Debug)]
pub(super) enum Stream {
    Truth,
    Public,
    Tests,
    Private(Domain),
    Holdout(Domain),
}

impl Stream {
    fn number(self) -> u64 {
        match self {
            Self::Truth => 0,
            Self::Public => 1,
            Self::Tests => 2,
            Self::Private(domain) => 16 + domain.index() as u64,
            Self::Holdout(domain) => 32 + domain.index() as u64,
        }
    }
}

/// A stream of unbiased draws.
#[derive(Debug)]
pub(super) struct Dice(ChaCha8Rng);

impl Dice {
    pub(super) fn new(seed: u64, stream: Stream) -> Self {
        let mut key = [0; 32];
        key[..8].copy_from_slice(&seed.to_le_bytes());
        let mut generator = ChaCha8Rng::from_seed(key);
        generator.set_stream(stream.number());
        Self(generator)
    }

    /// Uniform in `0..n`; `n` is at least 1. Multiply and reject (Lemire 2019, algorithm 5).
    pub(super) fn below(&mut self, n: usize) -> usize {
        let n = n as u64;
        let biased = n.wrapping_neg() % n;
        loop {
            let product = u128::from(self.0.next_u64()) * u128::from(n);
            let low = product & u128::from(u64::MAX);
            if low >= u128::from(biased) {
                return usize::try_from(product >> 64).expect("smaller than n, which is a usize");
            }
        }
    }

    /// Uniform choice from a list that is not empty.
    pub(super) fn pick<'a, T>(&mut self, from: &'a [T]) -> &'a T {
        &from[self.below(from.len())]
    }

    /// Fisher-Yates.
    pub(super) fn shuffle<T>(&mut self, items: &mut [T]) {
        for last in (1..items.len()).rev() {
            items.swap(last, self.below(last + 1));
        }
    }

    /// `count` cards from shuffled passes over a deck that is not empty: no card comes twice more often than another.
    pub(super) fn deal<T: Copy>(&mut self, deck: &[T], count: usize) -> Vec<T> {
        let mut dealt = Vec::with_capacity(count + deck.len());
        while dealt.len() < count {
            let mut pass = deck.to_vec();
            self.shuffle(&mut pass);
            dealt.extend(pass);
        }
        dealt.truncate(count);
        dealt
    }
}
