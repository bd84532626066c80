//! Rows of 32, 16 and 8 bits.

use half::bf16;

use crate::cpu::multiversion::multiversion;

/// Codes of 8 bits on either side of zero.
const INT8: f32 = 127.0;

/// Appends a row.
pub(super) fn write_bf16(row: &[f32], codes: &mut Vec<u8>) {
    let halves = row.iter().map(|&value| bf16::from_f32(value));
    codes.extend(halves.flat_map(bf16::to_le_bytes));
}

/// Appends `round(127 value / largest magnitude)` of a row, and returns what a code of one stands for.
pub(super) fn write_int8(row: &[f32], codes: &mut Vec<u8>) -> f32 {
    let largest = row.iter().fold(0f32, |best, value| best.max(value.abs()));
    let code = |value: f32| {
        let scaled = if largest > 0.0 {
            (value / largest * INT8).round_ties_even()
        } else {
            0.0
        };
        #[expect(clippy::cast_possible_truncation, reason = "in -127..=127")]
        let code = scaled as i8;
        code.cast_unsigned()
    };
    codes.extend(row.iter().map(|&value| code(value)));
    largest / INT8
}

multiversion! {
    pub(super) fn read_f32(codes: &[u8], out: &mut [f32]) {
        for (out, bytes) in out.iter_mut().zip(codes.as_chunks().0) {
            *out = f32::from_le_bytes(*bytes);
        }
    }
}

multiversion! {
    pub(super) fn read_bf16(codes: &[u8], out: &mut [f32]) {
        for (out, bytes) in out.iter_mut().zip(codes.as_chunks().0) {
            *out = f32::from_bits(u32::from(u16::from_le_bytes(*bytes)) << 16);
        }
    }
}

multiversion! {
    pub(super) fn read_int8(codes: &[u8], scale: f32, out: &mut [f32]) {
        for (out, code) in out.iter_mut().zip(codes) {
            *out = f32::from(code.cast_signed()) * scale;
        }
    }
}
