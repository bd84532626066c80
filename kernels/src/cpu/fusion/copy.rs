//! One source of full weight: a copy, but for the positions whose codes or slots would change.

use std::ops::{Range, RangeInclusive};

use super::{Mixing, mix};
use crate::code;
use crate::cpu::multiversion::multiversion;
use crate::fusion::WEIGHT_UNITY;
use crate::records::{ColumnsMut, RecordShape, RecordView, Symbol};

/// Most slots for which [`SETTLED`] holds.
const SLOTS: usize = 32;

/// Totals with which every code is encoded as itself: `encode((T[q] << 32) / Z + lost) = q` for all
/// q and for `lost` up to the 33 units that rounding 32 symbols and the end down adds to the tail.
const SETTLED: RangeInclusive<u64> = 2_102_477_518..=2_194_480_505;

/// Whether a source can be copied to this shape.
pub(super) fn fits<S: Symbol>(source: &RecordView<'_, S>, shape: &RecordShape) -> bool {
    source.k() == shape.k && shape.k <= SLOTS
}

pub(super) fn run<S: Symbol>(
    source: &RecordView<'_, S>,
    range: Range<usize>,
    shape: &RecordShape,
    out: &mut ColumnsMut<'_, S>,
) {
    let Some(part) = source.slice(range) else {
        return;
    };
    out.symbols.copy_from_slice(part.symbols());
    out.codes.copy_from_slice(part.codes());
    out.end.copy_from_slice(part.end());
    out.tail.copy_from_slice(part.tail());
    for position in unsettled(&part, shape.fill_permille) {
        let mut place = out.part(position..position + 1);
        let weights = Mixing::Item(&[WEIGHT_UNITY]);
        mix::run(weights, &[part], position..position + 1, shape, &mut place);
    }
}

multiversion! {
    /// Positions that a copy does not settle.
    fn unsettled<S: Symbol>(source: &RecordView<'_, S>, fill_permille: u32) -> Vec<usize> {
        match source.k() {
            // Loops of known length.
            8 => list(source, 8, fill_permille),
            16 => list(source, 16, fill_permille),
            k => list(source, k, fill_permille),
        }
    }
}

#[inline(always)]
fn list<S: Symbol>(source: &RecordView<'_, S>, k: usize, fill_permille: u32) -> Vec<usize> {
    let slots = source
        .symbols()
        .chunks_exact(k)
        .zip(source.codes().chunks_exact(k));
    let mut found = Vec::new();
    for (position, (symbols, codes)) in slots.enumerate() {
        let last = symbols[k - 1];
        let mut equal = 0_u8;
        for &symbol in symbols {
            equal += u8::from(symbol == last);
        }
        let used = (k + 1 - usize::from(equal)).min(k);
        let end = source.end().get(position).copied();
        let tail = source.tail()[position];
        if !surely_settled(codes, used, end, tail, fill_permille)
            && !settled(&codes[..used], end, tail, fill_permille)
        {
            found.push(position);
        }
    }
    found
}

/// Whether all codes stay as they are, and all symbols are chosen: the one that is chosen last is
/// chosen if what comes before it does not fill the shape; rounding down makes that less.
fn settled(codes: &[u8], end: Option<u8>, tail: u8, fill_permille: u32) -> bool {
    let mass = |code: u8| u64::from(code::mass(code));
    let listed: u64 = codes.iter().map(|&code| mass(code)).sum();
    let before_tail = listed + end.map_or(0, mass);
    let total = before_tail + mass(tail);
    let least = codes.iter().copied().max().map_or(0, mass);
    let before = before_tail - least;
    SETTLED.contains(&total)
        && (codes.len() == 1 || before * 1000 < total * u64::from(fill_permille))
}

/// The same from approximate masses, with room for what they are off: no table, whole vectors.
/// True only where [`settled`] is.
#[inline(always)]
fn surely_settled(
    codes: &[u8],
    used: usize,
    end: Option<u8>,
    tail: u8,
    fill_permille: u32,
) -> bool {
    let mut listed = 0;
    let mut least = u32::MAX;
    for (slot, &code) in codes.iter().enumerate() {
        let mass = rough_mass(code);
        listed += if slot < used { mass } else { 0 };
        least = least.min(if slot < used { mass } else { u32::MAX });
    }
    let tail = rough_mass(tail);
    let total = listed + end.map_or(0, rough_mass) + tail;
    let room = total >> 12;
    let before = u64::from(total - tail - least + room);
    let totals = (SETTLED.start() >> 5) + u64::from(room)..(SETTLED.end() >> 5) - u64::from(room);
    totals.contains(&u64::from(total))
        && (used == 1 || before * 1000 < u64::from(total - room) * u64::from(fill_permille))
}

/// `2^(26 - code/16)`, at most one more than 2^-13 of it off: a cubic for the sixteenths. 34 of them
/// fit 32 bits.
#[inline(always)]
fn rough_mass(code: u8) -> u32 {
    let sixteenths = i32::from(code & 15);
    let mantissa = ((-1_304 * sixteenths + 121_106) * sixteenths - 5_798_662) * sixteenths;
    (134_207_785 + mantissa).cast_unsigned() >> (1 + (code >> 4))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rough_masses_are_close_from_both_sides() {
        for code in 0..=255 {
            let exact = f64::from(code::mass(code)) / 32.0;
            let off = (f64::from(rough_mass(code)) - exact).abs();
            assert!(off <= 1.0 + exact / 8192.0, "code {code}: {off} of {exact}");
        }
    }

    #[test]
    fn settled_totals_are_those_that_change_no_code() {
        let changes = |total: u64| {
            (0..=255).any(|code| {
                let share = (u64::from(code::mass(code)) << 32) / total;
                let recoded = |lost| code::encode_mass(share + lost, 32);
                recoded(0) != code || recoded(SLOTS as u64 + 1) != code
            })
        };
        // Codes are monotone in the total, so what holds at both ends holds between them.
        assert!(!changes(*SETTLED.start()) && !changes(*SETTLED.end()));
        assert!(changes(SETTLED.start() - 100_000) && changes(SETTLED.end() + 1));
    }
}
