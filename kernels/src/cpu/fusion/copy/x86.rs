//! Sixteen positions of sixteen slots at once, with AVX-512.
//!
//! A position is one 128-bit lane. Intrinsics that touch no memory are safe where their
//! instructions are known to exist; what is left to argue is that, and the pointers of loads.
#![expect(unsafe_code, reason = "intrinsics")]

use std::arch::x86_64::{
    __m512i, _mm_loadu_si128, _mm512_add_epi8, _mm512_add_epi32, _mm512_adds_epu16,
    _mm512_and_si512, _mm512_bslli_epi128, _mm512_castps_si512, _mm512_castsi512_ps,
    _mm512_cmpeq_epi8_mask, _mm512_cmpgt_epu32_mask, _mm512_cmple_epu32_mask,
    _mm512_cmpneq_epi8_mask, _mm512_cvtepu8_epi32, _mm512_loadu_si512, _mm512_max_epu8,
    _mm512_mullo_epi32, _mm512_permutexvar_epi16, _mm512_permutexvar_epi32, _mm512_set1_epi8,
    _mm512_set1_epi32, _mm512_setzero_si512, _mm512_shuffle_ps, _mm512_srli_epi16,
    _mm512_srli_epi32, _mm512_srlv_epi16, _mm512_srlv_epi32, _mm512_sub_epi32,
    _mm512_unpackhi_epi8, _mm512_unpackhi_epi64, _mm512_unpacklo_epi8, _mm512_unpacklo_epi64,
};

use super::{BLOCK, SETTLED, is_settled};
use crate::code::{self, FLOOR};
use crate::cpu::multiversion::{Level, level};
use crate::records::{RecordView, Symbol};

/// Slots of a position.
const K: usize = 16;
/// Digits of an exact mass that [`HALVES`] leaves out.
const SHIFT: u32 = 16;
/// What the rough total of all slots, the end and the tail may lack: 18 masses, 3/2 each.
const TOTAL_LACK: u32 = 27;
/// First slot of each position in a mask of 64 slots.
const FIRST_SLOTS: u64 = 0x0001_0001_0001_0001;

/// Positions that a copy does not settle; `None` where this file is not for the machine or the
/// source.
pub(super) fn unsettled<S: Symbol>(
    source: &RecordView<'_, S>,
    fill_permille: u32,
) -> Option<Vec<usize>> {
    if source.k() != K || level() != Level::Avx512 {
        return None;
    }
    // SAFETY: the level says that the machine has these instructions.
    Some(unsafe { list(source, fill_permille) })
}

#[target_feature(enable = "avx512f,avx512bw")]
fn list<S: Symbol>(source: &RecordView<'_, S>, fill_permille: u32) -> Vec<usize> {
    let mut found = Vec::new();
    let mut note = |block: usize, mut unsure: u16| {
        while unsure != 0 {
            let position = block * BLOCK + unsure.trailing_zeros() as usize;
            if !is_settled(source, position, fill_permille) {
                found.push(position);
            }
            unsure &= unsure - 1;
        }
    };
    let fits = Fits::new(fill_permille);
    let (symbols, last_symbols) = source.symbols().as_chunks();
    let (codes, last_codes) = source.codes().as_chunks();
    let (ends, last_ends) = source.end().as_chunks();
    let (tails, last_tails) = source.tail().as_chunks();
    for (block, ((symbols, codes), tails)) in symbols.iter().zip(codes).zip(tails).enumerate() {
        let ends = ends.get(block).unwrap_or(&[FLOOR; BLOCK]);
        note(
            block,
            !fits.surely(codes, ends, tails) | floors(symbols, codes),
        );
    }
    let rest = last_tails.len();
    if rest > 0 {
        let codes = &padded(last_codes);
        let unsure = !fits.surely(codes, &padded(last_ends), &padded(last_tails));
        let mut symbols = [S::default(); BLOCK * K];
        symbols[..last_symbols.len()].copy_from_slice(last_symbols);
        let there = (1 << rest) - 1;
        note(tails.len(), (unsure | floors(&symbols, codes)) & there);
    }
    found
}

/// The rest of a column, filled up with floors.
fn padded<const N: usize>(rest: &[u8]) -> [u8; N] {
    let mut all = [FLOOR; N];
    all[..rest.len()].copy_from_slice(rest);
    all
}

/// Positions that list a symbol with the floor's code, as bits.
#[target_feature(enable = "avx512f,avx512bw")]
#[inline]
fn floors<S: Symbol>(symbols: &[S; BLOCK * K], codes: &[u8; BLOCK * K]) -> u16 {
    let floor = _mm512_set1_epi8(-1);
    let mut positions = 0;
    for (quarter, codes) in codes.as_chunks::<64>().0.iter().enumerate() {
        let mut at_floor = _mm512_cmpeq_epi8_mask(load(codes), floor);
        let symbols = &symbols[quarter * 64..][..64];
        if let Some(symbols) = S::bytes(symbols).and_then(|bytes| bytes.first_chunk::<64>()) {
            let symbols = load(symbols);
            let before = _mm512_bslli_epi128::<1>(symbols);
            at_floor &= _mm512_cmpneq_epi8_mask(symbols, before) | FIRST_SLOTS;
        } else {
            for (slot, pair) in symbols.windows(2).enumerate() {
                let same = u64::from(pair[0] == pair[1]) << (slot + 1);
                at_floor &= !same | FIRST_SLOTS;
            }
        }
        if at_floor != 0 {
            for position in 0..4 {
                let any = at_floor >> (16 * position) & 0xffff != 0;
                positions |= u16::from(any) << (4 * quarter + position);
            }
        }
    }
    positions
}

/// What the rough masses of a position must be for all its codes to stay.
struct Fits {
    least: u32,
    most: u32,
    unfilled_permille: u32,
}

impl Fits {
    fn new(fill_permille: u32) -> Self {
        let narrow = |total: u64| u32::try_from(total >> SHIFT).unwrap_or(0);
        Self {
            least: narrow(*SETTLED.start()) + 1,
            most: narrow(*SETTLED.end()) - TOTAL_LACK,
            unfilled_permille: 1000 - fill_permille.min(1000),
        }
    }

    /// Bits of positions that are settled if no used slot has the floor's code. A position that has
    /// none of the bits may be settled, too.
    ///
    /// Where the masses before the tail, without the least one, do not fill the shape, the least one
    /// and the tail are more than what a full shape leaves out.
    #[target_feature(enable = "avx512f,avx512bw")]
    #[inline]
    fn surely(&self, codes: &[u8; BLOCK * K], ends: &[u8; BLOCK], tails: &[u8; BLOCK]) -> u16 {
        let mut sums = [_mm512_setzero_si512(); 4];
        let mut tops = sums;
        let (quarters, _) = codes.as_chunks::<64>();
        for ((sum, top), codes) in sums.iter_mut().zip(&mut tops).zip(quarters) {
            let codes = load(codes);
            let zero = _mm512_setzero_si512();
            *sum = _mm512_adds_epu16(
                rough_words(_mm512_unpacklo_epi8(codes, zero)),
                rough_words(_mm512_unpackhi_epi8(codes, zero)),
            );
            // One more than each code, so that the floor wraps to zero.
            *top = _mm512_add_epi8(codes, _mm512_set1_epi8(1));
        }
        let low = _mm512_set1_epi32(0xffff);
        let sum = across(sums, |a, b| _mm512_adds_epu16(a, b));
        let sum = _mm512_add_epi32(_mm512_and_si512(sum, low), _mm512_srli_epi32::<16>(sum));
        let top = across(tops, |a, b| _mm512_max_epu8(a, b));
        let top = _mm512_max_epu8(top, _mm512_srli_epi32::<16>(top));
        let top = _mm512_max_epu8(top, _mm512_srli_epi32::<8>(top));
        let byte = _mm512_set1_epi32(0xff);
        let last = _mm512_sub_epi32(_mm512_and_si512(top, byte), _mm512_set1_epi32(1));
        let last = _mm512_and_si512(last, byte);

        let tail = rough_longs(load_bytes(tails));
        let total = _mm512_add_epi32(sum, rough_longs(load_bytes(ends)));
        let total = _mm512_add_epi32(total, tail);
        let left = _mm512_add_epi32(rough_longs(last), tail);
        let left = _mm512_mullo_epi32(left, splat(1000));
        let most = _mm512_add_epi32(total, splat(TOTAL_LACK));
        let unfilled = _mm512_mullo_epi32(most, splat(self.unfilled_permille));
        _mm512_cmple_epu32_mask(splat(self.least), total)
            & _mm512_cmple_epu32_mask(total, splat(self.most))
            & _mm512_cmpgt_epu32_mask(left, unfilled)
    }
}

/// What four vectors of four positions each come to, 32 bits of each position in order.
#[target_feature(enable = "avx512f,avx512bw")]
#[inline]
fn across(parts: [__m512i; 4], join: impl Fn(__m512i, __m512i) -> __m512i) -> __m512i {
    let [a, b, c, d] = parts;
    let halves = |a, b| join(_mm512_unpacklo_epi64(a, b), _mm512_unpackhi_epi64(a, b));
    let (ab, cd) = (
        _mm512_castsi512_ps(halves(a, b)),
        _mm512_castsi512_ps(halves(c, d)),
    );
    let even = _mm512_castps_si512(_mm512_shuffle_ps::<0x88>(ab, cd));
    let odd = _mm512_castps_si512(_mm512_shuffle_ps::<0xdd>(ab, cd));
    const ORDER: [u32; 16] = [0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15];
    _mm512_permutexvar_epi32(load(&ORDER), join(even, odd))
}

/// Rough masses of codes, `floor(2^(15 - j/16))` shifted right by the whole bits, in lanes of 16 bits.
#[target_feature(enable = "avx512f,avx512bw")]
#[inline]
fn rough_words(codes: __m512i) -> __m512i {
    const HALVES: [u16; 32] = {
        let mut table = [0; 32];
        let mut at = 0;
        while at < 32 {
            table[at] = (code::BASE[at % 16] >> 48) as u16;
            at += 1;
        }
        table
    };
    let halves = _mm512_permutexvar_epi16(codes, load(&HALVES));
    _mm512_srlv_epi16(halves, _mm512_srli_epi16::<4>(codes))
}

/// The same in lanes of 32 bits.
#[target_feature(enable = "avx512f,avx512bw")]
#[inline]
fn rough_longs(codes: __m512i) -> __m512i {
    const HALVES: [u32; 16] = {
        let mut table = [0; 16];
        let mut at = 0;
        while at < 16 {
            table[at] = (code::BASE[at] >> 48) as u32;
            at += 1;
        }
        table
    };
    let halves = _mm512_permutexvar_epi32(codes, load(&HALVES));
    _mm512_srlv_epi32(halves, _mm512_srli_epi32::<4>(codes))
}

#[target_feature(enable = "avx512f,avx512bw")]
#[inline]
fn splat(value: u32) -> __m512i {
    _mm512_set1_epi32(value.cast_signed())
}

/// Integers that fill a vector.
#[target_feature(enable = "avx512f,avx512bw")]
#[inline]
fn load<T: Into<u64>, const N: usize>(from: &[T; N]) -> __m512i {
    const { assert!(size_of::<[T; N]>() == 64, "one vector") };
    // SAFETY: 64 bytes are there.
    unsafe { _mm512_loadu_si512(from.as_ptr().cast()) }
}

/// Bytes, each in a lane of 32 bits.
#[target_feature(enable = "avx512f,avx512bw")]
#[inline]
fn load_bytes(from: &[u8; BLOCK]) -> __m512i {
    // SAFETY: 16 bytes are there.
    _mm512_cvtepu8_epi32(unsafe { _mm_loadu_si128(from.as_ptr().cast()) })
}

#[cfg(test)]
mod tests {
    use std::arch::x86_64::{_mm_cvtsi128_si32, _mm512_castsi512_si128};

    use super::*;

    #[test]
    fn rough_masses_lack_at_most_three_halves() {
        if level() != Level::Avx512 {
            return;
        }
        for code in 0..=255 {
            // SAFETY: the level says that the machine has these instructions.
            let lanes = unsafe { both(code) };
            let exact = code::mass(code);
            for rough in lanes {
                let rough = rough << SHIFT;
                let lack = exact.checked_sub(rough);
                assert!(
                    lack.is_some_and(|lack| lack <= 3 << (SHIFT - 1)),
                    "code {code}: {rough}"
                );
            }
        }
    }

    #[target_feature(enable = "avx512f,avx512bw")]
    fn both(code: u8) -> [u32; 2] {
        let codes = load_bytes(&[code; BLOCK]);
        let first = |lanes| _mm_cvtsi128_si32(_mm512_castsi512_si128(lanes)).cast_unsigned();
        [
            first(rough_words(codes)) & 0xffff,
            first(rough_longs(codes)),
        ]
    }
}
