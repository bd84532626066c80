//! What every source says of every symbol that was observed in an item: all that routing needs.

use std::ops::Range;

use super::bits::{Bits, byte_sixteenths};
use crate::code::{self, FLOOR};
use crate::error::FusionError;
use crate::records::{RecordView, Symbol};

/// A token of an item's target, in a tokenizer that all sources share.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ObservedToken {
    /// Its id.
    pub id: u32,
    /// Bytes of the target that it spells; 0 for a token that only ends the record.
    pub bytes: u32,
}

/// Surprisal of the observed symbol for each position and source, and how many bytes it stands
/// for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Evidence {
    sources: usize,
    /// `[N, sources]`, sixteenths of a bit.
    sixteenths: Vec<u32>,
    /// `[N]`; 0 where the symbol is no label.
    bytes: Vec<u32>,
}

impl Evidence {
    /// Of the bytes of a target and the end of the record, which counts as one byte. Bytes inside
    /// `unlabeled` ranges are no label.
    ///
    /// # Errors
    /// Where a source does not have one position per byte and one for the end.
    pub fn of_bytes(
        sources: &[RecordView<'_>],
        target: &[u8],
        unlabeled: &[Range<usize>],
    ) -> Result<Self, FusionError> {
        let expected = target.len() + 1;
        check_positions(sources, expected)?;
        let mut sixteenths = Vec::with_capacity(expected * sources.len());
        for (position, &byte) in target.iter().enumerate() {
            let of = |source: &RecordView<'_>| byte_sixteenths(*source, position, byte);
            sixteenths.extend(sources.iter().map(of));
        }
        let end = |source: &RecordView<'_>| u32::from(source.end()[target.len()]);
        sixteenths.extend(sources.iter().map(end));
        let is_label = |position: usize| !unlabeled.iter().any(|span| span.contains(&position));
        let bytes = (0..target.len()).map(|position| u32::from(is_label(position)));
        Ok(Self {
            sources: sources.len(),
            sixteenths,
            bytes: bytes.chain([1]).collect(),
        })
    }

    /// Of the tokens of a target. A token that is not listed has an equal share of the tail among
    /// the `size` tokens of the vocabulary; one that touches an `unlabeled` range of bytes is no
    /// label; one that spells nothing counts as one byte.
    ///
    /// # Errors
    /// Where a source does not have one position per token.
    pub fn of_tokens(
        sources: &[RecordView<'_, u32>],
        tokens: &[ObservedToken],
        unlabeled: &[Range<usize>],
        size: u32,
    ) -> Result<Self, FusionError> {
        check_positions(sources, tokens.len())?;
        let mut sixteenths = Vec::with_capacity(tokens.len() * sources.len());
        let mut bytes = Vec::with_capacity(tokens.len());
        let mut from = 0_usize;
        for (position, token) in tokens.iter().enumerate() {
            let of =
                |source: &RecordView<'_, u32>| token_sixteenths(*source, position, token.id, size);
            sixteenths.extend(sources.iter().map(of));
            let to = from.saturating_add(usize::try_from(token.bytes).unwrap_or(usize::MAX));
            let is_label = !unlabeled
                .iter()
                .any(|span| span.start < to && from < span.end);
            bytes.push(if is_label { token.bytes.max(1) } else { 0 });
            from = to;
        }
        Ok(Self {
            sources: sources.len(),
            sixteenths,
            bytes,
        })
    }

    /// Sources.
    #[must_use]
    pub fn sources(&self) -> usize {
        self.sources
    }

    /// Positions of the item.
    #[must_use]
    pub fn positions(&self) -> usize {
        self.bytes.len()
    }

    /// What a source needs for the symbol at a position; nothing where it is no label.
    #[must_use]
    pub fn bits(&self, position: usize, source: usize) -> Bits {
        let bytes = self.bytes.get(position).copied().unwrap_or(0);
        let place = position * self.sources + source;
        match self.sixteenths.get(place) {
            Some(&sixteenths) if bytes > 0 => Bits {
                sixteenths: u64::from(sixteenths),
                bytes,
            },
            _ => Bits::default(),
        }
    }

    /// Sixteenths of a bit that a source needs for the symbol at a position, label or not; 0 outside.
    #[must_use]
    pub fn sixteenths(&self, position: usize, source: usize) -> u32 {
        let place = position * self.sources + source;
        self.sixteenths.get(place).copied().unwrap_or(0)
    }

    /// What each source needs for all labels of the item.
    #[must_use]
    pub fn totals(&self) -> Vec<Bits> {
        (0..self.sources)
            .map(|source| (0..self.positions()).map(|p| self.bits(p, source)).sum())
            .collect()
    }

    /// The same evidence of some of the sources, in the order given.
    #[must_use]
    pub fn of_sources(&self, chosen: &[usize]) -> Self {
        let mut sixteenths = Vec::with_capacity(self.bytes.len() * chosen.len());
        for row in self.sixteenths.chunks_exact(self.sources.max(1)) {
            sixteenths.extend(chosen.iter().filter_map(|&source| row.get(source)));
        }
        Self {
            sources: chosen.len(),
            sixteenths,
            bytes: self.bytes.clone(),
        }
    }
}

/// Entropy of a source at every position, in units of 2^-32 bits.
///
/// What is not listed counts as spread evenly over the other bytes; among tokens, whose number a
/// record does not say, as one symbol.
#[must_use]
pub fn entropies<S: Symbol>(record: RecordView<'_, S>) -> Vec<u64> {
    (0..record.positions())
        .map(|position| {
            let total = u128::from(record.total_mass(position));
            let term = |code: u8, sixteenths: u32| {
                (u128::from(code::mass(code)) << 32) / total * u128::from(sixteenths)
            };
            let (mut sum, mut others) = (0, 256_u64);
            for (_, code) in record.listed(position) {
                sum += term(code, u32::from(code));
                others = others.saturating_sub(1);
            }
            if let Some(&end) = record.end().get(position) {
                sum += term(end, u32::from(end));
            }
            let tail = record.tail()[position];
            let spread = if S::HAS_END {
                code::log2_sixteenths(others)
            } else {
                0
            };
            sum += term(tail, u32::from(tail) + spread);
            u64::try_from(sum / 16).unwrap_or(u64::MAX)
        })
        .collect()
}

/// Bits of a token at a position, in sixteenths.
fn token_sixteenths(record: RecordView<'_, u32>, position: usize, token: u32, size: u32) -> u32 {
    let mut listed = 0_u64;
    for (symbol, code) in record.listed(position) {
        if symbol == token {
            return u32::from(code);
        }
        listed += 1;
    }
    let others = u64::from(size).saturating_sub(listed);
    let tail = record.tail().get(position).copied().unwrap_or(FLOOR);
    u32::from(tail) + code::log2_sixteenths(others)
}

fn check_positions<S: Symbol>(
    sources: &[RecordView<'_, S>],
    expected: usize,
) -> Result<(), FusionError> {
    for (source_index, source) in sources.iter().enumerate() {
        let got = source.positions();
        if got != expected {
            return Err(FusionError::Positions {
                source_index,
                got,
                expected,
            });
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::records::Records;

    #[test]
    fn tokens_are_weighed_by_the_bytes_they_spell() {
        let record =
            Records::from_columns(2, vec![5_u32, 9, 7, 7], vec![16, 16, 3, 255], vec![], {
                vec![255, 64]
            })
            .unwrap();
        let token = |id, bytes| ObservedToken { id, bytes };
        let evidence = |tokens: &[ObservedToken], unlabeled: &[Range<usize>]| {
            Evidence::of_tokens(&[record.view()], tokens, unlabeled, 66).unwrap()
        };
        let all = evidence(&[token(9, 4), token(1, 0)], &[]);
        // Not listed: a sixty-fifth of the tail, 4 bits and log2 65.
        let second = 64 + code::log2_sixteenths(65);
        assert_eq!(
            all.totals(),
            [Bits {
                sixteenths: u64::from(16 + second),
                bytes: 5
            }]
        );
        let tokens = [token(9, 4), token(7, 3)];
        let touched = evidence(&tokens, &[3..4, 7..9]);
        assert_eq!(
            touched.totals(),
            [Bits {
                sixteenths: 3,
                bytes: 3
            }]
        );
        assert!(Evidence::of_tokens(&[record.view()], &tokens[..1], &[], 66).is_err());
    }

    #[test]
    fn entropy_is_that_of_the_distribution() {
        let sure = Records::from_columns(1, vec![b'a'], vec![0], vec![255], vec![255]).unwrap();
        assert!(entropies(sure.view())[0] < 1 << 22);
        // Half one byte, half spread over the 255 others and a floor of the end.
        let half = Records::from_columns(1, vec![b'a'], vec![16], vec![255], vec![16]).unwrap();
        let bits = entropies(half.view())[0] as f64 / 2_f64.powi(32);
        assert!((bits - (1.0 + 0.5 * 255_f64.log2())).abs() < 0.05, "{bits}");
    }
}
