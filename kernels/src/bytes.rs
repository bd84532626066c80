//! Values as they stand in files: little-endian, in any of the storage types.

use half::{bf16, f16};

use crate::element::Dtype;

/// Writes the values that the bytes hold, as many as both have.
pub fn decode(dtype: Dtype, bytes: &[u8], out: &mut [f32]) {
    match dtype {
        Dtype::F32 => {
            for (out, bytes) in out.iter_mut().zip(bytes.as_chunks::<4>().0) {
                *out = f32::from_le_bytes(*bytes);
            }
        }
        Dtype::Bf16 => {
            for (out, bytes) in out.iter_mut().zip(bytes.as_chunks::<2>().0) {
                *out = bf16::from_le_bytes(*bytes).to_f32();
            }
        }
        Dtype::F16 => {
            for (out, bytes) in out.iter_mut().zip(bytes.as_chunks::<2>().0) {
                *out = f16::from_le_bytes(*bytes).to_f32();
            }
        }
    }
}

/// The bytes of values as [`Dtype::F32`].
#[must_use]
pub fn encode(values: &[f32]) -> Vec<u8> {
    let mut bytes = vec![0; size_of_val(values)];
    for (bytes, value) in bytes.as_chunks_mut::<4>().0.iter_mut().zip(values) {
        *bytes = value.to_le_bytes();
    }
    bytes
}

/// Whether every value is finite.
#[must_use]
pub fn are_finite(values: &[f32]) -> bool {
    // Whole chunks, because a loop that may end after any value is not one of vectors.
    let of_chunk = |chunk: &[f32]| {
        chunk
            .iter()
            .fold(true, |all, value| all & value.is_finite())
    };
    values.chunks(1024).all(of_chunk)
}

/// Whether every value that the bytes hold is finite.
#[must_use]
pub fn hold_finite(dtype: Dtype, bytes: &[u8]) -> bool {
    let mut values = [0f32; 1024];
    let size = match dtype {
        Dtype::F32 => 4,
        Dtype::Bf16 | Dtype::F16 => 2,
    };
    bytes.chunks(values.len() * size).all(|bytes| {
        let values = &mut values[..bytes.len() / size];
        decode(dtype, bytes, values);
        are_finite(values)
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::Random;

    #[test]
    fn values_come_back() {
        let values = Random(3).logits(2051, 100.0);
        let mut back = vec![0f32; values.len()];
        decode(Dtype::F32, &encode(&values), &mut back);
        assert_eq!(back, values);
        let halves = values.iter().map(|&value| f16::from_f32(value));
        let bytes: Vec<u8> = halves.clone().flat_map(f16::to_le_bytes).collect();
        decode(Dtype::F16, &bytes, &mut back);
        assert_eq!(back, halves.map(f16::to_f32).collect::<Vec<_>>());
        let halves = values.iter().map(|&value| bf16::from_f32(value));
        let bytes: Vec<u8> = halves.clone().flat_map(bf16::to_le_bytes).collect();
        decode(Dtype::Bf16, &bytes, &mut back);
        assert_eq!(back, halves.map(bf16::to_f32).collect::<Vec<_>>());
    }

    #[test]
    fn one_value_that_is_not_finite_is_found_anywhere() {
        for len in [1, 1023, 1024, 1025, 2051] {
            let mut values = vec![1f32; len];
            assert!(are_finite(&values));
            for (at, value) in [
                (0, f32::NAN),
                (len / 2, f32::INFINITY),
                (len - 1, -f32::INFINITY),
            ] {
                values[at] = value;
                assert!(!are_finite(&values));
                assert!(!hold_finite(Dtype::F32, &encode(&values)));
                let halves = values.iter().map(|&value| f16::from_f32(value));
                let bytes: Vec<u8> = halves.flat_map(f16::to_le_bytes).collect();
                assert!(!hold_finite(Dtype::F16, &bytes));
                let halves = values.iter().map(|&value| bf16::from_f32(value));
                let bytes: Vec<u8> = halves.flat_map(bf16::to_le_bytes).collect();
                assert!(!hold_finite(Dtype::Bf16, &bytes));
                values[at] = 1.0;
            }
            assert!(hold_finite(Dtype::F32, &encode(&values)));
        }
    }
}
