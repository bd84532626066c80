//! Bits that a source needs for what was observed, read from its codes.

use std::fmt;
use std::iter::Sum;
use std::ops::{Add, Range};

use crate::code;
use crate::error::FusionError;
use crate::records::RecordView;

/// Bits that a source needs for the labelled symbols of an item.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Bits {
    /// Bits in sixteenths.
    pub sixteenths: u64,
    /// Symbols counted: labelled bytes, and one for the end of the record.
    pub bytes: u32,
}

impl Bits {
    /// Bits per byte, for reports; no decision uses it.
    #[must_use]
    pub fn per_byte(&self) -> f64 {
        self.sixteenths as f64 / 16.0 / f64::from(self.bytes.max(1))
    }

    /// One symbol.
    fn of_symbol(sixteenths: u32) -> Self {
        Self {
            sixteenths: u64::from(sixteenths),
            bytes: 1,
        }
    }

    /// Bits per byte in units of 2^-32.
    #[must_use]
    pub fn fixed(self) -> u128 {
        (u128::from(self.sixteenths) << 32) / (16 * u128::from(self.bytes.max(1)))
    }
}

impl Add for Bits {
    type Output = Self;

    fn add(self, other: Self) -> Self {
        Self {
            sixteenths: self.sixteenths + other.sixteenths,
            bytes: self.bytes + other.bytes,
        }
    }
}

impl Sum for Bits {
    fn sum<I: Iterator<Item = Self>>(items: I) -> Self {
        items.fold(Self::default(), Self::add)
    }
}

/// Prints bits per byte with three decimals, by integer arithmetic.
impl fmt::Display for Bits {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let thousandths = (self.fixed() * 1000 + (1 << 31)) >> 32;
        write!(f, "{}.{:03}", thousandths / 1000, thousandths % 1000)
    }
}

/// Bits of the observed bytes of an item and its end, read from codes.
///
/// Bytes inside `unlabeled` ranges of the target do not count; the end does. A byte that is not
/// listed has an equal share of the tail: the tail's code plus `log2(257 - listed)`, where listed
/// includes the end.
///
/// # Errors
/// Where the record does not have one position per byte and one for the end.
pub fn item_bits(
    record: RecordView<'_>,
    target: &[u8],
    unlabeled: &[Range<usize>],
) -> Result<Bits, FusionError> {
    let (got, expected) = (record.positions(), target.len() + 1);
    if got != expected {
        return Err(FusionError::Positions {
            source_index: 0,
            got,
            expected,
        });
    }
    let labelled =
        (0..target.len()).filter(|position| !unlabeled.iter().any(|span| span.contains(position)));
    let bits = labelled
        .map(|position| Bits::of_symbol(byte_sixteenths(record, position, target[position])))
        .sum::<Bits>()
        + Bits::of_symbol(u32::from(record.end()[target.len()]));
    Ok(bits)
}

/// Bits of a byte at a position, in sixteenths.
pub(super) fn byte_sixteenths(record: RecordView<'_>, position: usize, byte: u8) -> u32 {
    let mut listed = 1;
    for (symbol, code) in record.listed(position) {
        if symbol == byte {
            return u32::from(code);
        }
        listed += 1;
    }
    u32::from(record.tail()[position]) + code::log2_sixteenths(257 - listed)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bits_print_without_floats() {
        let bits = Bits {
            sixteenths: 37,
            bytes: 2,
        };
        assert_eq!(bits.to_string(), "1.156");
        assert!((bits.per_byte() - 1.15625).abs() < 1e-12);
        assert_eq!(Bits::default().to_string(), "0.000");
    }
}
