//! Records: sparse next-symbol distributions, one per position of an item.
//!
//! A position has `k` slots of (symbol, code), the code of the end of the record and the code of
//! the tail, the mass of all symbols not listed. Used slots come first, symbols strictly ascending,
//! at least one; each unused slot repeats the last used symbol with code 255, so a slot equal to
//! its predecessor is unused. An item of L bytes has L + 1 positions; the last predicts the end of
//! the record.

mod columns;

use std::fmt;
use std::ops::Range;

use crate::code::{self, FLOOR};
use crate::error::RecordError;

pub(crate) use columns::ColumnsMut;

mod sealed {
    #[expect(
        unnameable_types,
        reason = "keeps the symbol spaces to the two that the format has"
    )]
    pub trait Sealed: Sized {
        fn index(self) -> usize;
        fn of(index: usize) -> Self;
        /// Symbols that are bytes.
        fn bytes(symbols: &[Self]) -> Option<&[u8]>;
    }
    impl Sealed for u8 {
        fn index(self) -> usize {
            usize::from(self)
        }
        fn of(index: usize) -> Self {
            Self::try_from(index).unwrap_or(Self::MAX)
        }
        fn bytes(symbols: &[Self]) -> Option<&[u8]> {
            Some(symbols)
        }
    }
    impl Sealed for u32 {
        fn index(self) -> usize {
            usize::try_from(self).unwrap_or(usize::MAX)
        }
        fn of(index: usize) -> Self {
            Self::try_from(index).unwrap_or(Self::MAX)
        }
        fn bytes(_: &[Self]) -> Option<&[u8]> {
            None
        }
    }
}

/// What a record predicts: bytes (`u8`), or tokens of a shared tokenizer (`u32`).
pub trait Symbol: Copy + Ord + fmt::Debug + Default + Send + Sync + sealed::Sealed {
    /// Largest number of slots per position.
    const MAX_SLOTS: usize;
    /// Whether the end of the record has a column of its own; among tokens it is a symbol like the
    /// others.
    const HAS_END: bool;
}

impl Symbol for u8 {
    const MAX_SLOTS: usize = 256;
    const HAS_END: bool = true;
}

impl Symbol for u32 {
    const MAX_SLOTS: usize = 4096;
    const HAS_END: bool = false;
}

/// How many symbols a position lists.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RecordShape {
    /// Slots per position.
    pub k: usize,
    /// Symbols are listed, likeliest first and the smaller one on a tie, until they and the end
    /// hold this share of the mass.
    pub fill_permille: u32,
}

impl RecordShape {
    /// Checks the ranges.
    ///
    /// # Errors
    /// Where `k` is 0 or beyond the symbol space's maximum, or the fill beyond 1000.
    pub fn check<S: Symbol>(&self) -> Result<(), RecordError> {
        check_slots::<S>(self.k)?;
        if self.fill_permille > 1000 {
            return Err(RecordError::Fill {
                permille: self.fill_permille,
            });
        }
        Ok(())
    }
}

fn check_slots<S: Symbol>(k: usize) -> Result<(), RecordError> {
    if (1..=S::MAX_SLOTS).contains(&k) {
        Ok(())
    } else {
        Err(RecordError::Slots {
            k,
            max: S::MAX_SLOTS,
        })
    }
}

/// Checked columns of records, borrowed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RecordView<'a, S = u8> {
    k: usize,
    symbols: &'a [S],
    codes: &'a [u8],
    end: &'a [u8],
    tail: &'a [u8],
}

impl<'a, S: Symbol> RecordView<'a, S> {
    /// Checks the layout of columns: `symbols` and `codes` `[N * k]`, `tail` `[N]`, `end` `[N]` or
    /// empty among tokens.
    ///
    /// # Errors
    /// Where lengths disagree, symbols do not ascend or an unused slot has a code.
    pub fn new(
        k: usize,
        symbols: &'a [S],
        codes: &'a [u8],
        end: &'a [u8],
        tail: &'a [u8],
    ) -> Result<Self, RecordError> {
        check_slots::<S>(k)?;
        let positions = tail.len();
        let slots = positions.saturating_mul(k);
        let ends = if S::HAS_END { positions } else { 0 };
        for (column, got, expected) in [
            ("symbols", symbols.len(), slots),
            ("codes", codes.len(), slots),
            ("end", end.len(), ends),
        ] {
            if got != expected {
                return Err(RecordError::Length {
                    column,
                    got,
                    expected,
                });
            }
        }
        for (position, (symbols, codes)) in symbols
            .chunks_exact(k)
            .zip(codes.chunks_exact(k))
            .enumerate()
        {
            check_position(position, symbols, codes)?;
        }
        Ok(Self {
            k,
            symbols,
            codes,
            end,
            tail,
        })
    }

    /// Checks that every position's masses sum to one, as far as rounding to codes allows.
    ///
    /// Rounding moves each mass by up to 2.2 %, hence 975 to 1025 permille. Whoever admits records
    /// from others calls this; a sum far from one would make routing scores incomparable.
    ///
    /// # Errors
    /// Names the first position outside.
    pub fn check_mass(&self) -> Result<(), RecordError> {
        for position in 0..self.positions() {
            let permille = (self.total_mass(position) * 1000) >> 31;
            if !(975..=1025).contains(&permille) {
                return Err(RecordError::Mass { position, permille });
            }
        }
        Ok(())
    }

    /// Slots per position.
    #[must_use]
    pub fn k(&self) -> usize {
        self.k
    }

    /// Number of positions, one more than the item has symbols.
    #[must_use]
    pub fn positions(&self) -> usize {
        self.tail.len()
    }

    /// Symbols of all slots, `[N * k]`.
    #[must_use]
    pub fn symbols(&self) -> &'a [S] {
        self.symbols
    }

    /// Codes of all slots, `[N * k]`.
    #[must_use]
    pub fn codes(&self) -> &'a [u8] {
        self.codes
    }

    /// Codes of the end of the record, `[N]`; empty among tokens.
    #[must_use]
    pub fn end(&self) -> &'a [u8] {
        self.end
    }

    /// Codes of the tail, `[N]`.
    #[must_use]
    pub fn tail(&self) -> &'a [u8] {
        self.tail
    }

    /// A range of positions, such as one item of a shard; `None` where it is out of range.
    #[must_use]
    pub fn slice(&self, positions: Range<usize>) -> Option<Self> {
        let tail = self.tail.get(positions.clone())?;
        let slots = positions.start * self.k..positions.end * self.k;
        let end = if S::HAS_END {
            self.end.get(positions)?
        } else {
            self.end
        };
        Some(Self {
            k: self.k,
            symbols: self.symbols.get(slots.clone())?,
            codes: self.codes.get(slots)?,
            end,
            tail,
        })
    }

    /// Used slots of a position: symbols, ascending, and their codes.
    #[inline(always)]
    pub(crate) fn used(&self, position: usize) -> (&'a [S], &'a [u8]) {
        let slots = position * self.k..(position + 1) * self.k;
        let (symbols, codes) = (&self.symbols[slots.clone()], &self.codes[slots]);
        // Unused slots repeat the last symbol; counting them has no branch per slot.
        let last = symbols[self.k - 1];
        let equal = symbols.iter().filter(|&&symbol| symbol == last).count();
        let used = (self.k + 1 - equal).min(self.k);
        (&symbols[..used], &codes[..used])
    }

    /// Listed symbols of a position with their codes, ascending.
    pub(crate) fn listed(&self, position: usize) -> impl Iterator<Item = (S, u8)> + use<'a, S> {
        let (symbols, codes) = self.used(position);
        symbols.iter().copied().zip(codes.iter().copied())
    }

    /// Sum of the masses of a position, in units of 2^-31.
    pub(crate) fn total_mass(&self, position: usize) -> u64 {
        let listed: u64 = self
            .listed(position)
            .map(|(_, code)| u64::from(code::mass(code)))
            .sum();
        let end = self
            .end
            .get(position)
            .map_or(0, |&code| u64::from(code::mass(code)));
        listed + end + u64::from(code::mass(self.tail[position]))
    }
}

fn used_slots<S: Symbol>(symbols: &[S]) -> usize {
    1 + symbols
        .windows(2)
        .take_while(|pair| pair[0] != pair[1])
        .count()
}

fn check_position<S: Symbol>(
    position: usize,
    symbols: &[S],
    codes: &[u8],
) -> Result<(), RecordError> {
    let used = used_slots(symbols);
    if symbols[..used].windows(2).any(|pair| pair[0] > pair[1])
        || symbols[used..]
            .iter()
            .any(|&symbol| symbol != symbols[used - 1])
    {
        return Err(RecordError::Order { position });
    }
    if codes[used..].iter().any(|&code| code != FLOOR) {
        return Err(RecordError::UnusedSlot { position });
    }
    Ok(())
}

/// Records that grow item by item; always well-formed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Records<S = u8> {
    k: usize,
    symbols: Vec<S>,
    codes: Vec<u8>,
    end: Vec<u8>,
    tail: Vec<u8>,
}

impl<S: Symbol> Records<S> {
    /// No positions yet.
    ///
    /// # Errors
    /// Where `k` is 0 or beyond the symbol space's maximum.
    pub fn new(k: usize) -> Result<Self, RecordError> {
        check_slots::<S>(k)?;
        Ok(Self::empty(k))
    }

    /// No positions yet, for a number of slots that was checked.
    pub(crate) fn empty(k: usize) -> Self {
        Self {
            k,
            symbols: Vec::new(),
            codes: Vec::new(),
            end: Vec::new(),
            tail: Vec::new(),
        }
    }

    /// Checks and takes columns, as [`RecordView::new`] does.
    ///
    /// # Errors
    /// Where the columns are not well-formed records.
    pub fn from_columns(
        k: usize,
        symbols: Vec<S>,
        codes: Vec<u8>,
        end: Vec<u8>,
        tail: Vec<u8>,
    ) -> Result<Self, RecordError> {
        RecordView::new(k, &symbols, &codes, &end, &tail)?;
        Ok(Self {
            k,
            symbols,
            codes,
            end,
            tail,
        })
    }

    /// All positions.
    #[must_use]
    pub fn view(&self) -> RecordView<'_, S> {
        RecordView {
            k: self.k,
            symbols: &self.symbols,
            codes: &self.codes,
            end: &self.end,
            tail: &self.tail,
        }
    }

    /// Number of positions.
    #[must_use]
    pub fn positions(&self) -> usize {
        self.tail.len()
    }

    /// Slots per position.
    #[must_use]
    pub fn k(&self) -> usize {
        self.k
    }

    /// Forgets all positions and keeps the memory.
    pub fn clear(&mut self) {
        self.symbols.clear();
        self.codes.clear();
        self.end.clear();
        self.tail.clear();
    }

    /// Adds the positions of another set with the same number of slots.
    ///
    /// # Errors
    /// Where the numbers of slots differ.
    pub fn append(&mut self, other: RecordView<'_, S>) -> Result<(), RecordError> {
        self.check_k(other.k)?;
        self.extend_from(other);
        Ok(())
    }

    /// Adds the positions of a set with the same number of slots.
    pub(crate) fn extend_from(&mut self, other: RecordView<'_, S>) -> ColumnsMut<'_, S> {
        debug_assert_eq!(self.k, other.k, "slots");
        let before = self.tail.len();
        self.symbols.extend_from_slice(other.symbols);
        self.codes.extend_from_slice(other.codes);
        self.end.extend_from_slice(other.end);
        self.tail.extend_from_slice(other.tail);
        self.since(before)
    }

    pub(crate) fn check_k(&self, k: usize) -> Result<(), RecordError> {
        if self.k == k {
            Ok(())
        } else {
            Err(RecordError::Slots { k, max: self.k })
        }
    }

    /// Adds one position. `listed` is ascending, holds 1 to `k` symbols; `end` is ignored among
    /// tokens.
    pub(crate) fn push(&mut self, listed: &[(S, u8)], end: u8, tail: u8) {
        self.extend_by(1).write(0, listed, end, tail);
    }

    /// Adds positions that the caller must write, each once.
    pub(crate) fn extend_by(&mut self, positions: usize) -> ColumnsMut<'_, S> {
        let before = self.tail.len();
        let after = before + positions;
        self.symbols.resize(after * self.k, S::default());
        self.codes.resize(after * self.k, FLOOR);
        self.end.resize(if S::HAS_END { after } else { 0 }, FLOOR);
        self.tail.resize(after, FLOOR);
        self.since(before)
    }

    /// The positions from `before` on, of those that are there.
    fn since(&mut self, before: usize) -> ColumnsMut<'_, S> {
        let ends = if S::HAS_END { before } else { 0 };
        ColumnsMut {
            k: self.k,
            symbols: &mut self.symbols[before * self.k..],
            codes: &mut self.codes[before * self.k..],
            end: &mut self.end[ends..],
            tail: &mut self.tail[before..],
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn unused_slots_repeat_the_last_symbol_with_the_floor() {
        let mut records = Records::<u8>::new(3).unwrap();
        records.push(&[(7, 16)], 20, 30);
        records.push(&[(1, 16), (0xff, 40)], 255, 255);
        assert_eq!(records.view().symbols(), [7, 7, 7, 1, 0xff, 0xff]);
        assert_eq!(records.view().codes(), [16, 255, 255, 16, 40, 255]);
        let second = records.view().slice(1..2).unwrap();
        assert_eq!(second.listed(0).collect::<Vec<_>>(), [(1, 16), (0xff, 40)]);
        assert_eq!(records.view().slice(1..3), None);
        let columns = records.clone();
        let rebuilt =
            Records::from_columns(3, columns.symbols, columns.codes, columns.end, columns.tail);
        assert_eq!(rebuilt, Ok(records));
    }

    #[test]
    fn malformed_columns_are_refused() {
        let refused = |k, symbols: &[u8], codes: &[u8], end: &[u8]| {
            RecordView::new(k, symbols, codes, end, &[0]).unwrap_err()
        };
        assert_eq!(
            refused(0, &[], &[], &[0]),
            RecordError::Slots { k: 0, max: 256 }
        );
        assert_eq!(
            refused(257, &[], &[], &[0]),
            RecordError::Slots { k: 257, max: 256 }
        );
        assert_eq!(
            refused(2, &[1], &[0, 0], &[0]),
            RecordError::Length {
                column: "symbols",
                got: 1,
                expected: 2
            }
        );
        assert_eq!(
            refused(1, &[1], &[0], &[]),
            RecordError::Length {
                column: "end",
                got: 0,
                expected: 1
            }
        );
        assert_eq!(
            refused(2, &[2, 1], &[0, 0], &[0]),
            RecordError::Order { position: 0 }
        );
        assert_eq!(
            refused(3, &[1, 1, 2], &[0, 255, 0], &[0]),
            RecordError::Order { position: 0 }
        );
        assert_eq!(
            refused(2, &[1, 1], &[0, 9], &[0]),
            RecordError::UnusedSlot { position: 0 }
        );
        assert!(RecordView::<u32>::new(1, &[70_000], &[0], &[], &[255]).is_ok());
    }

    #[test]
    fn a_position_that_claims_more_than_everything_is_refused() {
        let sure = RecordView::new(2, &[1_u8, 2], &[0, 255], &[255], &[255]).unwrap();
        assert_eq!(sure.check_mass(), Ok(()));
        let twice = RecordView::new(2, &[1_u8, 2], &[0, 0], &[255], &[255]).unwrap();
        assert_eq!(
            twice.check_mass(),
            Err(RecordError::Mass {
                position: 0,
                permille: 2000
            })
        );
        let half = RecordView::new(1, &[1_u8], &[16], &[255], &[255]).unwrap();
        assert_eq!(
            half.check_mass(),
            Err(RecordError::Mass {
                position: 0,
                permille: 500
            })
        );
    }
}
