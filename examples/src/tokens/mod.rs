//! Tokens of one tokenizer in terms of another's: how published methods carry token distributions over.
//!
//! A token is the bytes that it spells; the end of a record spells none and is like no other token.

mod warp;

use std::collections::BTreeMap;

use consilium_kernels::Vocab;

pub use warp::{edit_distance, partners};

/// A distribution, or a part of one: ranks and their shares.
pub type Shares = Vec<(u32, f64)>;

/// Pieces that a token without its like is spelled with at most (X-Token, arXiv 2605.21699).
const PIECES: usize = 4;
/// Weight of the first piece, and what each further one has of the one before it.
const PIECE_WEIGHTS: (f64, f64) = (0.9, 0.1);

/// The tokens of a vocabulary by rank, the end of a record the last.
#[derive(Debug, Clone)]
pub struct Spellings {
    tokens: Vec<Vec<u8>>,
    ranks: BTreeMap<Vec<u8>, u32>,
}

impl Spellings {
    /// All tokens that spell bytes, and one end.
    #[must_use]
    pub fn of(vocab: &Vocab) -> Self {
        let spelled = (0..vocab.byte_tokens()).map(|rank| vocab.token_bytes(rank).to_vec());
        Self::new(spelled)
    }

    /// Tokens in order, to which the end is added. Of tokens that spell the same, the first counts.
    fn new(spelled: impl IntoIterator<Item = Vec<u8>>) -> Self {
        let mut tokens: Vec<Vec<u8>> = spelled.into_iter().collect();
        tokens.push(Vec::new());
        let mut ranks = BTreeMap::new();
        for (rank, token) in (0..).zip(&tokens) {
            ranks.entry(token.clone()).or_insert(rank);
        }
        Self { tokens, ranks }
    }

    /// Rank of the end.
    #[must_use]
    pub fn end(&self) -> u32 {
        self.rank(&[]).unwrap_or_default()
    }

    /// What a rank spells; nothing past the last.
    #[must_use]
    pub fn token(&self, rank: u32) -> &[u8] {
        self.tokens.get(rank as usize).map_or(&[], Vec::as_slice)
    }

    /// The rank that spells this.
    #[must_use]
    pub fn rank(&self, token: &[u8]) -> Option<u32> {
        self.ranks.get(token).copied()
    }

    /// For each token of `source` the one here that spells the same, or else the one of least edit distance, the first
    /// of several: the vocabulary map of FuseLLM (arXiv 2401.10491, `MinED`).
    #[must_use]
    pub fn nearest(&self, source: &Self) -> Vec<u32> {
        let nearest = |token: &Vec<u8>| {
            let by_distance = || {
                let ranks = (0..).zip(&self.tokens).filter(|(_, own)| !own.is_empty());
                let nearest = ranks.min_by_key(|(_, own)| edit_distance(own, token));
                nearest.map_or_else(|| self.end(), |(rank, _)| rank)
            };
            self.rank(token).unwrap_or_else(by_distance)
        };
        source.tokens.iter().map(nearest).collect()
    }

    /// For each token of `source` the one here that spells the same, or else the first pieces of its spelling here, the
    /// longest from the left, each with a tenth of the share of the one before it: the projection of X-Token (arXiv
    /// 2605.21699). Shares sum to one; a token that cannot be spelled has none.
    #[must_use]
    pub fn projection(&self, source: &Self) -> Vec<Shares> {
        let project = |token: &Vec<u8>| {
            let pieces = match self.rank(token) {
                Some(rank) => vec![rank],
                None => self.pieces(token),
            };
            let (first, ratio) = PIECE_WEIGHTS;
            let weights = std::iter::successors(Some(first), |weight| Some(weight * ratio));
            let shares: Shares = pieces.into_iter().zip(weights).take(PIECES).collect();
            normalised(summed(shares))
        };
        source.tokens.iter().map(project).collect()
    }

    /// The longest tokens from the left that spell `bytes`; none where a byte has no token.
    fn pieces(&self, mut bytes: &[u8]) -> Vec<u32> {
        let mut pieces = Vec::new();
        while !bytes.is_empty() {
            let longest = (1..=bytes.len()).rev().find_map(|length| {
                let (head, rest) = bytes.split_at(length);
                Some((self.rank(head)?, rest))
            });
            let Some((rank, rest)) = longest else {
                return Vec::new();
            };
            pieces.push(rank);
            bytes = rest;
        }
        pieces
    }
}

/// A distribution over a source's ranks through its [`projection`](Spellings::projection).
#[must_use]
pub fn projected(distribution: &[f64], projection: &[Shares]) -> Shares {
    let cells = distribution.iter().zip(projection);
    summed(
        cells
            .flat_map(|(mass, row)| row.iter().map(move |&(rank, share)| (rank, mass * share)))
            .collect(),
    )
}

/// The `most` likeliest of a source's ranks by their [`nearest`](Spellings::nearest), of several with the same the likeliest
/// alone, made to sum to one.
#[must_use]
pub fn renamed(distribution: &[f64], nearest: &[u32], most: usize) -> Shares {
    let mut ranked: Vec<(f64, u32)> = distribution
        .iter()
        .copied()
        .zip(nearest.iter().copied())
        .collect();
    // Stable: the smaller rank of the source on a tie.
    ranked.sort_by(|a, b| b.0.total_cmp(&a.0));
    let mut shares = Shares::new();
    for (mass, rank) in ranked.into_iter().take(most) {
        if shares.iter().all(|&(known, _)| known != rank) {
            shares.push((rank, mass));
        }
    }
    normalised(shares)
}

/// Shares by rank, those of one rank added up.
fn summed(shares: Shares) -> Shares {
    let mut sums: BTreeMap<u32, f64> = BTreeMap::new();
    for (rank, share) in shares {
        *sums.entry(rank).or_default() += share;
    }
    sums.into_iter().collect()
}

/// Shares that sum to one, unless there are none.
#[must_use]
pub fn normalised(mut shares: Shares) -> Shares {
    let sum: f64 = shares.iter().map(|(_, share)| share).sum();
    if sum > 0.0 {
        for (_, share) in &mut shares {
            *share = (*share / sum).min(1.0);
        }
    }
    shares
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spellings(tokens: &[&str]) -> Spellings {
        Spellings::new(tokens.iter().map(|token| token.as_bytes().to_vec()))
    }

    fn sum(shares: &Shares) -> f64 {
        shares.iter().map(|(_, share)| share).sum()
    }

    #[test]
    fn the_same_tokenizer_maps_every_token_to_itself() {
        let own = spellings(&["a", "ab", "b", " ref"]);
        let all: Vec<u32> = (0..5).collect();
        assert_eq!((own.nearest(&own), own.end()), (all.clone(), 4));
        let expected: Vec<Shares> = all.iter().map(|&rank| vec![(rank, 1.0)]).collect();
        assert_eq!(own.projection(&own), expected);
        let mass = [0.5, 0.125, 0.25, 0.0, 0.125];
        let same: Shares = (0..).zip(mass).collect();
        assert_eq!(projected(&mass, &own.projection(&own)), same);
        assert_eq!(
            renamed(&mass, &own.nearest(&own), 2),
            [(0, 2.0 / 3.0), (2, 1.0 / 3.0)]
        );
    }

    #[test]
    fn a_token_without_its_like_goes_to_the_nearest_and_never_to_the_end() {
        let own = spellings(&["a", "k", "kavo", "kavu", "tam"]);
        let source = spellings(&["kavos", "tamu", "z", "kavu"]);
        assert_eq!(own.nearest(&source), [2, 4, 0, 3, 5]);
    }

    #[test]
    fn of_two_that_are_renamed_alike_the_likelier_stays() {
        // Ranks 0 and 1 of the source are both rank 7 here.
        let got = renamed(&[0.1, 0.4, 0.2, 0.3], &[7, 7, 8, 9], 4);
        assert_eq!(
            got.iter().map(|&(rank, _)| rank).collect::<Vec<_>>(),
            [7, 9, 8]
        );
        assert!((got[0].1 - 0.4 / 0.9).abs() < 1e-12 && (sum(&got) - 1.0).abs() < 1e-12);
    }

    #[test]
    fn a_token_in_pieces_has_nine_parts_in_ten_on_the_first_and_mass_is_kept() {
        let own = spellings(&["a", "b", "c", "d", "e", "kav"]);
        let source = spellings(&["kava", "abcde", "aab", "kav"]);
        let projection = own.projection(&source);
        // 0.9 and 0.09 of 0.99.
        let [(first, nine), (second, tenth)] = projection[0][..] else {
            panic!("{projection:?}")
        };
        assert_eq!((first, second), (0, 5));
        assert!((tenth - 10.0 / 11.0).abs() < 1e-12 && (nine - 1.0 / 11.0).abs() < 1e-12);
        // Four pieces of five, and a byte that comes twice.
        let ranks: Vec<u32> = projection[1].iter().map(|&(rank, _)| rank).collect();
        assert_eq!(ranks, [0, 1, 2, 3]);
        assert!((projection[2][0].1 - 0.99 / 0.999).abs() < 1e-12);
        assert_eq!(projection[3], [(5, 1.0)]);
        for row in &projection {
            assert!((sum(row) - 1.0).abs() < 1e-12, "{row:?}");
        }
        let all = projected(&[0.3, 0.2, 0.1, 0.15, 0.25], &projection);
        assert!((sum(&all) - 1.0).abs() < 1e-12);
        let end = all.iter().find(|(rank, _)| *rank == own.end());
        assert_eq!(end.map(|(_, share)| *share), Some(0.25));
    }
}
