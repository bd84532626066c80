//! How far apart two records are.

use crate::code;
use crate::error::FusionError;
use crate::records::{RecordView, Symbol};

/// Total variation between two records, summed over their positions, in units of 2^-32: 0 where
/// they are equal, 2^32 for a position at which they have nothing in common.
///
/// Half the sum of the absolute differences of the shares (see the module of fusion) of every
/// symbol, the end included. What a source does not list has an equal part of its tail; among
/// tokens, whose number a record does not say, nothing, and the tails are compared as one symbol.
/// Each share is rounded down, so equal records are at distance 0 and no other statement is exact
/// beyond 2^-24 a position.
///
/// # Errors
/// Where the records differ in length.
pub fn variation<S: Symbol>(
    a: RecordView<'_, S>,
    b: RecordView<'_, S>,
) -> Result<u64, FusionError> {
    let (expected, got) = (a.positions(), b.positions());
    if got != expected {
        return Err(FusionError::Positions {
            source_index: 1,
            got,
            expected,
        });
    }
    Ok((0..expected).map(|p| at(&a, &b, p)).sum())
}

fn at<S: Symbol>(a: &RecordView<'_, S>, b: &RecordView<'_, S>, position: usize) -> u64 {
    let (a, b) = (Side::of(a, position), Side::of(b, position));
    let mut sum = a.end.abs_diff(b.end);
    let (mut i, mut j, mut union) = (0, 0, 0_u64);
    loop {
        let (left, right) = (a.symbols.get(i), b.symbols.get(j));
        let (mine, theirs) = match (left, right) {
            (None, None) => break,
            (Some(x), Some(y)) => (x <= y, y <= x),
            (left, right) => (left.is_some(), right.is_some()),
        };
        let of = |side: &Side<'_, S>, index: usize, is_listed: bool| {
            if is_listed {
                side.share(side.codes[index])
            } else {
                side.unlisted
            }
        };
        sum += of(&a, i, mine).abs_diff(of(&b, j, theirs));
        i += usize::from(mine);
        j += usize::from(theirs);
        union += 1;
    }
    let others = if S::HAS_END {
        256_u64.saturating_sub(union) * a.unlisted.abs_diff(b.unlisted)
    } else {
        a.tail.abs_diff(b.tail)
    };
    (sum + others) / 2
}

struct Side<'a, S> {
    symbols: &'a [S],
    codes: &'a [u8],
    total: u64,
    end: u64,
    tail: u64,
    unlisted: u64,
}

impl<'a, S: Symbol> Side<'a, S> {
    fn of(record: &RecordView<'a, S>, position: usize) -> Self {
        let (symbols, codes) = record.used(position);
        let mut side = Self {
            symbols,
            codes,
            total: record.total_mass(position),
            end: 0,
            tail: 0,
            unlisted: 0,
        };
        side.end = record
            .end()
            .get(position)
            .map_or(0, |&code| side.share(code));
        side.tail = side.share(record.tail()[position]);
        if S::HAS_END {
            let others = 256_u64.saturating_sub(symbols.len() as u64);
            side.unlisted = side.tail.checked_div(others).unwrap_or(0);
        }
        side
    }

    fn share(&self, code: u8) -> u64 {
        (u64::from(code::mass(code)) << 32) / self.total
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::records::Records;

    fn record(symbols: [u8; 2], codes: [u8; 2], end: u8, tail: u8) -> Records {
        Records::from_columns(2, symbols.to_vec(), codes.to_vec(), vec![end], vec![tail]).unwrap()
    }

    #[test]
    fn variation_is_half_the_sum_of_differences() {
        let a = record([1, 2], [16, 16], 255, 255);
        let b = record([2, 3], [16, 16], 255, 255);
        let unit = 2_f64.powi(32);
        let distance = |a: &Records, b: &Records| {
            let there = variation(a.view(), b.view()).unwrap();
            assert_eq!(there, variation(b.view(), a.view()).unwrap());
            there as f64 / unit
        };
        assert!(distance(&a, &a) == 0.0);
        assert!((distance(&a, &b) - 0.5).abs() < 1e-4);
        let far = record([7, 8], [16, 16], 255, 255);
        assert!((distance(&a, &far) - 1.0).abs() < 1e-3);
        // All in the tail against half on one byte: 1/256 of the tail lies there already.
        let tail = record([1, 1], [255, 255], 255, 0);
        let half = record([1, 2], [16, 255], 255, 16);
        assert!((distance(&tail, &half) - 0.5).abs() < 0.01);
        let longer = Records::from_columns(1, vec![1, 1], vec![0, 0], vec![255; 2], vec![255; 2]);
        assert!(variation(a.view(), longer.unwrap().view()).is_err());
    }
}
