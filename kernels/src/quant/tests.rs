use proptest::prelude::*;

use super::nf4::LEVELS;
use super::*;
use crate::testing::Random;

const ALL: [Format; 4] = [Format::F32, Format::Bf16, Format::Int8, Format::Nf4];

/// Largest magnitude of the values that share a scale with each.
fn scales(format: Format, values: &[f32], columns: usize) -> Vec<f32> {
    let size = if format == Format::Nf4 {
        BLOCK
    } else {
        columns
    };
    let largest = |block: &[f32]| block.iter().fold(0f32, |best, value| best.max(value.abs()));
    values
        .chunks_exact(columns)
        .flat_map(|row| row.chunks(size))
        .flat_map(|block| vec![largest(block); block.len()])
        .collect()
}

/// The bound of the error that rounding to the format can make.
fn bound(format: Format, value: f32, scale: f32, step: f32) -> f32 {
    match format {
        Format::F32 => 0.0,
        Format::Bf16 => value.abs() / 256.0,
        Format::Int8 => scale / 254.0 * 1.001,
        // Half the widest gap between levels, and what the scale's own rounding moves.
        Format::Nf4 => scale * (LEVELS[1] - LEVELS[0]) / 2.0 * 1.001 + step,
    }
}

proptest! {
    #[test]
    fn a_decoded_value_is_within_half_a_step_of_the_value(
        rows in 1usize..9,
        columns in 1usize..200,
        seed in any::<u64>(),
        magnitude in -20i32..20,
    ) {
        let mut random = Random(seed);
        let values = random.logits(rows * columns, 2f32.powi(magnitude));
        for format in ALL {
            let packed = Packed::new(format, &values, columns);
            let mut out = vec![f32::NAN; values.len()];
            packed.matrix().decode(&mut out);
            let step = 2f32.powi(magnitude) / 127.0;
            for ((got, &value), scale) in out.iter().zip(&values).zip(scales(format, &values, columns)) {
                let error = (got - value).abs();
                prop_assert!(
                    error <= bound(format, value, scale, step),
                    "{format:?}: {got} for {value}, scale {scale}"
                );
            }
        }
    }

    #[test]
    fn any_rows_decode_alone_as_they_do_together(
        rows in 1usize..40,
        columns in 1usize..200,
        seed in any::<u64>(),
    ) {
        let mut random = Random(seed);
        let values = random.logits(rows * columns, 0.1);
        for format in ALL {
            let mut packed = Packed::new(format, &values, columns);
            let mut whole = vec![0.0; values.len()];
            packed.matrix().decode(&mut whole);
            prop_assert_eq!(packed.codes_len(), rows * format.row_bytes(columns));
            let codes = packed.take_codes();
            let (first, count) = (random.below(rows), random.below(rows));
            let count = count.min(rows - first);
            let mut some = vec![0.0; count * columns];
            packed.with_codes(&codes).slice(first, count).decode(&mut some);
            prop_assert_eq!(&some, &whole[first * columns..(first + count) * columns]);
        }
    }
}

#[test]
fn zeros_and_single_outliers_survive() {
    for format in ALL {
        let mut values = vec![0.0; 3 * 70];
        values[75] = -8.0;
        let packed = Packed::new(format, &values, 70);
        let mut out = vec![1.0; values.len()];
        packed.matrix().decode(&mut out);
        for (at, (got, want)) in out.iter().zip(&values).enumerate() {
            assert!(
                (got - want).abs() < 0.04,
                "{format:?}, {at}: {got} for {want}"
            );
        }
        assert!(
            values
                .iter()
                .zip(&out)
                .all(|(want, got)| *want != 0.0 || *got == 0.0)
        );
    }
}

#[test]
fn sizes_are_those_of_the_table() {
    let values = Random(1).logits(1024 * 1024, 1.0);
    let share = |format| Packed::new(format, &values, 1024).bytes() as f64 / values.len() as f64;
    assert!((share(Format::F32) - 4.0).abs() < 1e-9);
    assert!((share(Format::Bf16) - 2.0).abs() < 1e-9);
    assert!((share(Format::Int8) - 1.0039).abs() < 1e-3);
    assert!((share(Format::Nf4) - 0.5159).abs() < 1e-3);
}

/// Codes and scales of bitsandbytes 0.50.2 on the CPU:
/// `quantize_4bit(torch.tensor(values).view(2, 128), blocksize=64, quant_type="nf4")`.
#[test]
fn nf4_codes_are_those_of_bitsandbytes() {
    const CODES: &str = "17e29f3b05d17e2af4c06d18e2a04c16e29f3b05d17e29f3c05d18e2af4c16e1\
                         9f3b05d17e29f3b05d18e2af4c06e18e3b04d17e29f3b05d17e2af4c06d18e2a\
                         04c16e29f3b05d17e29f3c05d18e2af4c16e18e3b05d17e29f3b05d18e2af4c1\
                         6d18e3b04c17e29f3b05d17e2af4c06d18e2a04c16e29f3b05d17e29f3c05d18";
    let values: Vec<f32> = (0..256u16)
        .map(|i| (f32::from((i * 37 + 11) % 101) - 50.0) / 64.0 * f32::from(1 + i / 64))
        .collect();
    let mut codes = Vec::new();
    let scales: Vec<f32> = values
        .chunks(BLOCK)
        .map(|block| nf4::write(block, &mut codes))
        .collect();
    let hex: String = codes.iter().map(|byte| format!("{byte:02x}")).collect();
    assert_eq!(hex, CODES);
    assert_eq!(scales, [0.781_25, 1.531_25, 2.343_75, 3.125]);
}
