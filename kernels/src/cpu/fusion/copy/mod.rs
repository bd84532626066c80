//! One source of full weight: a copy, but for the positions whose codes or slots would change.

#[cfg(target_arch = "x86_64")]
mod x86;

use std::ops::{Range, RangeInclusive};

use super::{Mixing, mix};
use crate::code::{self, FLOOR};
use crate::cpu::multiversion::multiversion;
use crate::fusion::WEIGHT_UNITY;
use crate::records::{ColumnsMut, RecordShape, RecordView, Symbol};

/// Most slots for which [`SETTLED`] holds.
const SLOTS: usize = 32;

/// Positions whose masses are worked out at once.
const BLOCK: usize = 16;

/// Totals with which every code is encoded as itself: `encode((T[q] << 32) / Z + lost) = q` for all
/// q and for `lost` up to the 33 units that rounding 32 symbols and the end down adds to the tail.
const SETTLED: RangeInclusive<u64> = 2_102_477_518..=2_194_480_505;

/// Whether a source can be copied to this shape.
pub(super) fn fits<S: Symbol>(source: &RecordView<'_, S>, shape: &RecordShape) -> bool {
    source.k() == shape.k && shape.k <= SLOTS
}

/// Mends what was copied.
pub(super) fn mend<S: Symbol>(
    source: &RecordView<'_, S>,
    range: Range<usize>,
    shape: &RecordShape,
    out: &mut ColumnsMut<'_, S>,
) {
    let Some(part) = source.slice(range) else {
        return;
    };
    let found = unsettled(&part, shape.fill_permille);
    mix::run_some(Mixing::Item(&[WEIGHT_UNITY]), &[part], &found, shape, out);
}

/// Positions that a copy does not settle.
fn unsettled<S: Symbol>(source: &RecordView<'_, S>, fill_permille: u32) -> Vec<usize> {
    #[cfg(target_arch = "x86_64")]
    if let Some(found) = x86::unsettled(source, fill_permille) {
        return found;
    }
    unsettled_anywhere(source, fill_permille)
}

multiversion! {
    fn unsettled_anywhere<S: Symbol>(source: &RecordView<'_, S>, fill_permille: u32) -> Vec<usize> {
        match source.k() {
            // Loops of known length.
            8 => list::<S, 8>(source, fill_permille),
            16 => list::<S, 16>(source, fill_permille),
            _ => (0..source.positions())
                .filter(|&position| !is_settled(source, position, fill_permille))
                .collect(),
        }
    }
}

#[inline(always)]
fn list<S: Symbol, const K: usize>(source: &RecordView<'_, S>, fill_permille: u32) -> Vec<usize> {
    let mut found = Vec::new();
    let blocks = source.symbols().chunks(BLOCK * K);
    for (block, (symbols, codes)) in blocks.zip(source.codes().chunks(BLOCK * K)).enumerate() {
        let (codes, _) = codes.as_chunks::<K>();
        let positions = block * BLOCK..block * BLOCK + codes.len();
        let end = source.end().get(positions.clone()).unwrap_or(&[]);
        let tail = &source.tail()[positions.clone()];
        let are_sure = surely_settled(codes, end, tail, fill_permille);
        let is_plain = !lists_floor(symbols, codes.as_flattened());
        for ((position, is_sure), codes) in positions.zip(are_sure).zip(codes) {
            let is_sure = is_sure && is_plain && codes[0] != FLOOR;
            if !is_sure && !is_settled(source, position, fill_permille) {
                found.push(position);
            }
        }
    }
    found
}

fn is_settled<S: Symbol>(source: &RecordView<'_, S>, position: usize, fill_permille: u32) -> bool {
    let end = source.end().get(position).copied();
    let codes = source.used(position).1;
    settled(codes, end, source.tail()[position], fill_permille)
}

/// Whether a slot has the floor's code and another symbol than the slot before it: otherwise slots
/// with that code are unused, but for a first one.
#[inline(always)]
fn lists_floor<S: Symbol>(symbols: &[S], codes: &[u8]) -> bool {
    let pairs = symbols.iter().zip(symbols.iter().skip(1));
    let mut any = 0;
    for ((before, symbol), &code) in pairs.zip(codes.iter().skip(1)) {
        any |= u8::from(before != symbol) & u8::from(code == FLOOR);
    }
    any != 0
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

/// The same of up to 16 positions from approximate masses, with room for what they are off: no
/// table, whole vectors. Unused slots count as well, as the floor that they are. True only where
/// [`settled`] is, if used slots do not have the floor's code.
#[inline(always)]
fn surely_settled<const K: usize>(
    codes: &[[u8; K]],
    end: &[u8],
    tail: &[u8],
    fill_permille: u32,
) -> [bool; BLOCK] {
    let mut masses = [[0; K]; BLOCK];
    let slots = masses.as_flattened_mut().iter_mut();
    for (mass, &code) in slots.zip(codes.as_flattened()) {
        *mass = rough_mass(code);
    }
    let (mut listed, mut last) = ([0_u32; BLOCK], [FLOOR; BLOCK]);
    for (listed, masses) in listed.iter_mut().zip(&masses) {
        *listed = masses.iter().sum();
    }
    for (last, codes) in last.iter_mut().zip(codes) {
        *last = largest_below_floor(codes);
    }
    let (mut ends, mut tails) = ([0; BLOCK], [0; BLOCK]);
    for (mass, &code) in ends.iter_mut().zip(end) {
        *mass = rough_mass(code);
    }
    for (mass, &code) in tails.iter_mut().zip(tail) {
        *mass = rough_mass(code);
    }
    let mut are_sure = [false; BLOCK];
    for at in 0..BLOCK {
        let before_tail = listed[at] + ends[at];
        let most = before_tail + tails[at];
        let room = most >> 12;
        // Of all slots, and more.
        let unused = 34 * (rough_mass(FLOOR) + 2);
        let least = u64::from(most.saturating_sub(room + unused));
        let before = u64::from(before_tail + room).saturating_sub(rough_mass(last[at]).into());
        // No shortcut, so that positions are lanes.
        are_sure[at] = (least >= SETTLED.start().div_ceil(32))
            & (u64::from(most + room) <= SETTLED.end() >> 5)
            & (before * 1000 < least * u64::from(fill_permille));
    }
    are_sure
}

/// The floor where there is none below it.
#[inline(always)]
fn largest_below_floor<const K: usize>(codes: &[u8; K]) -> u8 {
    // One more than each code, so that the floor wraps to zero.
    let mut lanes = codes.map(|code| code.wrapping_add(1));
    let mut width = K / 2;
    // Halves of a known length become vectors, a fold over all lanes does not.
    while width > 0 {
        for lane in 0..width {
            lanes[lane] = lanes[lane].max(lanes[lane + width]);
        }
        width /= 2;
    }
    lanes[0].wrapping_sub(1)
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
    use crate::records::Records;
    use crate::testing::Random;

    /// Records that are nearly full, with used slots at the floor now and then.
    #[expect(clippy::cast_possible_truncation, reason = "below 256")]
    fn records(random: &mut Random, k: usize) -> Records {
        let mut records = Records::new(k).unwrap();
        for _ in 0..500 {
            let mut left = 0.999;
            let mut listed = std::collections::BTreeMap::new();
            for _ in 0..=random.below(k) {
                let mass = left * (0.3 + 0.6 * random.below(100) as f64 / 100.0);
                left -= mass;
                let is_floor = random.below(12) == 0;
                let code = if is_floor { FLOOR } else { code::encode(mass) };
                listed.insert(random.below(200) as u8, code);
            }
            let listed: Vec<(u8, u8)> = listed.into_iter().collect();
            let tail = code::encode(left + 0.001);
            records.push(&listed, code::encode(0.0002), tail);
        }
        records
    }

    /// Any codes: totals far from one, certain ends, nothing but floors.
    #[expect(clippy::cast_possible_truncation, reason = "below 256")]
    fn wild(random: &mut Random, k: usize) -> Records {
        let mut records = Records::new(k).unwrap();
        for position in 0..200 {
            let spread = [4, 60, 256][position % 3];
            let mut code = || 255 - random.below(spread) as u8 * u8::from(spread != 60);
            let (end, tail) = (code(), code());
            let symbols: std::collections::BTreeSet<u8> = (0..=random.below(k))
                .map(|_| random.below(200) as u8)
                .collect();
            let base = random.below(256) as u8;
            let listed: Vec<(u8, u8)> = symbols
                .into_iter()
                .map(|symbol| (symbol, base.wrapping_add(random.below(spread) as u8)))
                .collect();
            records.push(&listed, end, tail);
        }
        records
    }

    /// The same positions as records of tokens.
    fn tokens(source: &RecordView<'_>) -> Records<u32> {
        let symbols = source.symbols().iter().map(|&byte| 300 * u32::from(byte));
        let columns = (source.codes().to_vec(), source.tail().to_vec());
        Records::from_columns(source.k(), symbols.collect(), columns.0, vec![], columns.1).unwrap()
    }

    /// Every way of looking lists the same; how many are listed, and how many not.
    fn counts<S: Symbol>(source: &RecordView<'_, S>, fill: u32) -> [usize; 2] {
        let exact: Vec<usize> = (0..source.positions())
            .filter(|&position| !is_settled(source, position, fill))
            .collect();
        let k = source.k();
        assert_eq!(unsettled(source, fill), exact, "{k} slots, {fill}");
        assert_eq!(unsettled_anywhere(source, fill), exact, "{k} slots, {fill}");
        [exact.len(), source.positions() - exact.len()]
    }

    #[test]
    fn positions_that_are_not_listed_are_settled_exactly() {
        let mut random = Random(2);
        let mut sums = [0; 2];
        for k in [1, 5, 8, 16, 32] {
            for source in [records(&mut random, k), wild(&mut random, k)] {
                // Whole blocks of positions, and what remains.
                for positions in [0..200, 3..190, 7..12] {
                    let source = source.view().slice(positions).unwrap();
                    let [listed, others] = counts_at_all_fills(&source);
                    sums = [sums[0] + listed, sums[1] + others];
                }
            }
        }
        assert!(sums.iter().all(|&count| count > 1000), "{sums:?}");
    }

    /// [`counts`] of bytes and tokens.
    fn counts_at_all_fills(source: &RecordView<'_>) -> [usize; 2] {
        let tokens = tokens(source);
        [0, 600, 995, 1000].iter().fold([0; 2], |sums, &fill| {
            let (bytes, tokens) = (counts(source, fill), counts(&tokens.view(), fill));
            [0, 1].map(|at| sums[at] + bytes[at] + tokens[at])
        })
    }

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
