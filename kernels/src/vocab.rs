//! A vocabulary in byte-sorted order, which makes its trie a set of contiguous ranges.
//!
//! Ranks: byte tokens in ascending order of their bytes, then the tokens that end a record, then
//! ignored ones. Tokens that spell the same bytes (a byte-fallback token and a plain one, say) get
//! neighbouring ranks in order of their ids, and count as ONE class everywhere: the probability of
//! a token is that of its byte string. All end-of-record tokens are likewise one class. Ignored
//! tokens have no mass: every softmax of this crate runs over the byte and end tokens only, and the
//! logits of ignored ones are not read.

use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::error::VocabError;
use crate::trie::Trie;

/// What one token means.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TokenKind<'a> {
    /// Spells these bytes, at least one.
    Bytes(&'a [u8]),
    /// Ends a record.
    EndOfRecord,
    /// Never predicted: padding, unused and other special tokens.
    Ignored,
}

/// Byte-sorted vocabulary with its trie.
#[derive(Clone, Debug)]
pub struct Vocab {
    /// One number per call of [`Vocab::new`], shared by clones: the key of what a device holds.
    #[cfg_attr(
        not(feature = "cuda"),
        expect(dead_code, reason = "only devices keep copies")
    )]
    id: u64,
    /// Bytes of all byte tokens, in rank order.
    bytes: Vec<u8>,
    /// Start of each byte token in `bytes`, and the end of the last.
    offsets: Vec<u32>,
    /// A bit for each byte token: whether it spells what the rank before it spells.
    repeats: Vec<u64>,
    rank_of_id: Vec<u32>,
    id_of_rank: Vec<u32>,
    ends: Range<u32>,
    trie: Trie,
}

impl Vocab {
    /// Sorts `tokens`, given in order of their ids.
    ///
    /// # Errors
    /// Where a byte token is empty, none spells bytes, none ends a record, or sizes pass `u32`.
    pub fn new<'a>(tokens: impl IntoIterator<Item = TokenKind<'a>>) -> Result<Self, VocabError> {
        let tokens: Vec<_> = tokens.into_iter().collect();
        let count = u32::try_from(tokens.len()).map_err(|_| VocabError::TooLarge)?;
        let mut sorted = Vec::new();
        let mut ends = Vec::new();
        let mut ignored = Vec::new();
        for (id, token) in (0..count).zip(&tokens) {
            match token {
                TokenKind::Bytes([]) => return Err(VocabError::EmptyToken { id: id as usize }),
                TokenKind::Bytes(bytes) => sorted.push((*bytes, id)),
                TokenKind::EndOfRecord => ends.push(id),
                TokenKind::Ignored => ignored.push(id),
            }
        }
        if sorted.is_empty() {
            return Err(VocabError::NoByteTokens);
        }
        if ends.is_empty() {
            return Err(VocabError::NoEndOfRecord);
        }
        sorted.sort_unstable();

        let bytes = sorted
            .iter()
            .flat_map(|(bytes, _)| bytes.iter().copied())
            .collect::<Vec<_>>();
        u32::try_from(bytes.len()).map_err(|_| VocabError::TooLarge)?;
        let mut offsets = vec![0];
        let mut offset = 0;
        for (token, _) in &sorted {
            offset += u32::try_from(token.len()).map_err(|_| VocabError::TooLarge)?;
            offsets.push(offset);
        }
        let mut repeats = vec![0; sorted.len() / 64 + 1];
        for (rank, pair) in (1..).zip(sorted.windows(2)) {
            repeats[rank / 64] |= u64::from(pair[0].0 == pair[1].0) << (rank % 64);
        }
        let first_end = u32::try_from(sorted.len()).map_err(|_| VocabError::TooLarge)?;
        let past_ends = first_end + u32::try_from(ends.len()).map_err(|_| VocabError::TooLarge)?;
        let trie = Trie::new(first_end, |rank| sorted[rank as usize].0);

        let id_of_rank: Vec<u32> = sorted
            .iter()
            .map(|&(_, id)| id)
            .chain(ends)
            .chain(ignored)
            .collect();
        let mut rank_of_id = vec![0; id_of_rank.len()];
        for (rank, &id) in (0..count).zip(&id_of_rank) {
            rank_of_id[id as usize] = rank;
        }
        static NEXT: AtomicU64 = AtomicU64::new(0);
        Ok(Self {
            id: NEXT.fetch_add(1, Ordering::Relaxed),
            bytes,
            offsets,
            repeats,
            rank_of_id,
            id_of_rank,
            ends: first_end..past_ends,
            trie,
        })
    }

    /// Number of tokens: the width of a logits row.
    #[expect(clippy::len_without_is_empty, reason = "a vocabulary is never empty")]
    #[must_use]
    pub fn len(&self) -> usize {
        self.id_of_rank.len()
    }

    /// Rank of every token id.
    #[must_use]
    pub fn rank_of_id(&self) -> &[u32] {
        &self.rank_of_id
    }

    /// Token id of every rank: the permutation for the rows of an output head.
    #[must_use]
    pub fn id_of_rank(&self) -> &[u32] {
        &self.id_of_rank
    }

    /// Number of tokens that spell bytes; they occupy ranks `0..byte_tokens()`.
    #[must_use]
    pub fn byte_tokens(&self) -> u32 {
        self.ends.start
    }

    /// Ranks of all tokens that end a record.
    #[must_use]
    pub fn end_ranks(&self) -> Range<u32> {
        self.ends.clone()
    }

    /// Bytes that a token spells; empty for end-of-record and ignored tokens, and for ranks out of
    /// range.
    #[must_use]
    pub fn token_bytes(&self, rank: u32) -> &[u8] {
        let rank = rank as usize;
        match self.offsets.get(rank..rank.saturating_add(2)) {
            Some(&[start, end]) => &self.bytes[start as usize..end as usize],
            _ => &[],
        }
    }

    #[cfg(feature = "cuda")]
    pub(crate) fn id(&self) -> u64 {
        self.id
    }

    pub(crate) fn trie(&self) -> &Trie {
        &self.trie
    }

    pub(crate) fn ends(&self) -> Range<usize> {
        self.ends.start as usize..self.ends.end as usize
    }

    /// Number of columns that carry mass: byte and end tokens.
    pub(crate) fn live(&self) -> usize {
        self.ends.end as usize
    }

    /// Ranks of the class of a byte or end token; `None` for ignored ones and ranks out of range.
    #[must_use]
    pub fn class(&self, rank: u32) -> Option<Range<usize>> {
        if self.ends.contains(&rank) {
            return Some(self.ends());
        }
        if rank >= self.byte_tokens() {
            return None;
        }
        let (mut start, mut end) = (rank as usize, rank as usize + 1);
        while self.is_repeat(start) {
            start -= 1;
        }
        while self.is_repeat(end) {
            end += 1;
        }
        Some(start..end)
    }

    fn is_repeat(&self, rank: usize) -> bool {
        self.repeats[rank / 64] >> (rank % 64) & 1 == 1
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn ranks_are_sorted_bytes_then_ends_then_ignored() {
        let vocab = Vocab::new([
            TokenKind::Ignored,
            TokenKind::Bytes(b"b"),
            TokenKind::EndOfRecord,
            TokenKind::Bytes(b"ab"),
            TokenKind::Bytes(b"a"),
            TokenKind::EndOfRecord,
            TokenKind::Bytes(b"ab"),
        ])
        .unwrap();
        assert_eq!(vocab.id_of_rank(), [4, 3, 6, 1, 2, 5, 0]);
        assert_eq!(vocab.rank_of_id(), [6, 3, 4, 1, 0, 5, 2]);
        assert_eq!(vocab.end_ranks(), 4..6);
        assert_eq!(vocab.token_bytes(2), b"ab");
        assert_eq!(vocab.token_bytes(4), b"");
        assert_eq!(vocab.token_bytes(u32::MAX), b"");
        assert_eq!(vocab.class(1), Some(1..3));
        assert_eq!(vocab.class(5), Some(4..6));
        assert_eq!(vocab.class(6), None);
    }

    #[test]
    fn unusable_vocabularies_are_refused() {
        let refused =
            |tokens: &[TokenKind<'static>]| Vocab::new(tokens.iter().copied()).unwrap_err();
        assert_eq!(refused(&[]), VocabError::NoByteTokens);
        assert_eq!(refused(&[TokenKind::EndOfRecord]), VocabError::NoByteTokens);
        assert_eq!(
            refused(&[TokenKind::Bytes(b"a")]),
            VocabError::NoEndOfRecord
        );
        assert_eq!(
            refused(&[TokenKind::EndOfRecord, TokenKind::Bytes(b"")]),
            VocabError::EmptyToken { id: 1 }
        );
    }

    proptest! {
        #[test]
        fn every_prefix_is_the_range_of_tokens_that_start_with_it(
            tokens in prop::collection::vec(prop::collection::vec(0_u8..4, 1..6), 1..40),
        ) {
            let kinds = tokens.iter().map(|bytes| TokenKind::Bytes(bytes));
            let vocab = Vocab::new(kinds.chain([TokenKind::EndOfRecord])).unwrap();
            for token in &tokens {
                for depth in 0..=token.len() {
                    let prefix = &token[..depth];
                    let node = *vocab.trie().find(prefix).unwrap();
                    for rank in 0..vocab.byte_tokens() {
                        let bytes = vocab.token_bytes(rank);
                        let index = rank as usize;
                        prop_assert_eq!(node.all().contains(&index), bytes.starts_with(prefix));
                        prop_assert_eq!(node.stops().contains(&index), bytes == prefix);
                    }
                    let mut ranks = node.longer().start;
                    for child in vocab.trie().children(&node) {
                        prop_assert_eq!(child.all().start, ranks);
                        ranks = child.all().end;
                        prop_assert_eq!(vocab.token_bytes(child.start)[depth], child.byte);
                    }
                    prop_assert_eq!(ranks, node.all().end);
                }
            }
            prop_assert!(vocab.trie().find(&[9]).is_none());
        }
    }
}
