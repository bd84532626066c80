//! One pass from logits to exponentials, written so that the compiler vectorises it on any target.

/// Independent accumulators: enough for a 512-bit register of `f32`, and a fixed order of
/// summation.
const LANES: usize = 16;

/// Largest value of a row.
///
/// # Errors
/// The index of the first value that is NaN or infinite.
pub(super) fn max_finite(row: &[f32]) -> Result<f32, usize> {
    let mut largest = [f32::NEG_INFINITY; LANES];
    let mut poison = [0.0_f32; LANES];
    let (blocks, rest) = row.as_chunks::<LANES>();
    for block in blocks {
        for lane in 0..LANES {
            largest[lane] = if block[lane] > largest[lane] {
                block[lane]
            } else {
                largest[lane]
            };
            // Zero for every finite value, NaN for the others; NaN stays.
            poison[lane] += block[lane] * 0.0;
        }
    }
    for (lane, &value) in rest.iter().enumerate() {
        largest[lane] = if value > largest[lane] {
            value
        } else {
            largest[lane]
        };
        poison[lane] += value * 0.0;
    }
    if poison.iter().any(|lane| lane.is_nan()) {
        return Err(row.iter().position(|value| !value.is_finite()).unwrap_or(0));
    }
    Ok(largest.into_iter().fold(f32::NEG_INFINITY, f32::max))
}

/// Writes `exp(row - max)`; `max` is at least every value of the row.
pub(super) fn exponentials(row: &[f32], max: f32, out: &mut [f32]) {
    for (out, &value) in out.iter_mut().zip(row) {
        *out = exp_of_nonpositive(value - max);
    }
}

/// Sum in a fixed order: lanes in `f32`, then lanes in `f64`. Relative error of non-negative values
/// below 1e-6.
pub(super) fn sum(values: &[f32]) -> f64 {
    // Blocks bound the number of additions per lane, so that error does not grow with the
    // vocabulary.
    values.chunks(64 * LANES).map(sum_block).sum()
}

fn sum_block(values: &[f32]) -> f64 {
    let mut lanes = [0.0_f32; LANES];
    let (blocks, rest) = values.as_chunks::<LANES>();
    for block in blocks {
        for lane in 0..LANES {
            lanes[lane] += block[lane];
        }
    }
    for (lane, &value) in rest.iter().enumerate() {
        lanes[lane] += value;
    }
    lanes.into_iter().map(f64::from).sum()
}

/// `e^x` for `x <= 0`, relative error below 2e-7, zero below -87 (where `f32` nears its smallest
/// normal value).
///
/// Cody-Waite reduction by ln 2 in two parts and the degree-6 polynomial of Cephes' `expf`.
#[inline]
#[expect(
    clippy::cast_possible_wrap,
    reason = "the low bits of the shifted value are a signed integer"
)]
fn exp_of_nonpositive(x: f32) -> f32 {
    // Adding 1.5 * 2^23 rounds to an integer and leaves it in the low bits of the mantissa.
    const SHIFT: f32 = 12_582_912.0;
    const LN2_HIGH: f32 = 0.693_359_4;
    const LN2_LOW: f32 = -2.121_944_4e-4;
    let shifted = x * std::f32::consts::LOG2_E + SHIFT;
    let exponent = shifted - SHIFT;
    let r = x - exponent * LN2_HIGH - exponent * LN2_LOW;
    let mut p = 1.987_569_1e-4_f32;
    p = p * r + 1.398_2e-3;
    p = p * r + 8.333_452e-3;
    p = p * r + 4.166_579_6e-2;
    p = p * r + 1.666_666_6e-1;
    p = p * r + 0.5;
    let mantissa = p * (r * r) + r + 1.0;
    let bits = (shifted.to_bits() as i32).wrapping_add(127) << 23;
    let scale = f32::from_bits(bits.cast_unsigned());
    if x < -87.0 { 0.0 } else { mantissa * scale }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_exponential_is_within_its_stated_error() {
        let mut worst = 0.0_f64;
        for step in 0..=870_000_i32 {
            let x = step as f32 * -1e-4;
            let exact = f64::from(x).exp();
            worst = worst.max((f64::from(exp_of_nonpositive(x)) / exact - 1.0).abs());
        }
        assert!(worst < 2e-7, "worst relative error {worst:e}");
        assert_eq!(exp_of_nonpositive(0.0).to_bits(), 1.0_f32.to_bits());
        assert_eq!(exp_of_nonpositive(-88.0).to_bits(), 0);
        assert_eq!(exp_of_nonpositive(f32::NEG_INFINITY).to_bits(), 0);
    }

    #[test]
    fn the_first_value_that_is_not_finite_is_named() {
        for length in [1, 15, 16, 17, 40] {
            let row: Vec<f32> = (0..length).map(|i| i as f32 - 20.0).collect();
            assert_eq!(max_finite(&row), Ok(length as f32 - 21.0));
            for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
                let mut row = row.clone();
                row[length / 2] = bad;
                row[length - 1] = bad;
                assert_eq!(max_finite(&row), Err(length / 2));
            }
        }
    }

    #[test]
    fn a_long_sum_keeps_its_precision() {
        let values: Vec<f32> = (0..200_001).map(|i| 1.0 / (1.0 + i as f32)).collect();
        let exact: f64 = values.iter().map(|&value| f64::from(value)).sum();
        assert!((sum(&values) / exact - 1.0).abs() < 1e-7);
    }
}
