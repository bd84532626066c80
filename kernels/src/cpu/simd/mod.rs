//! Passes over one logits row at the widest vectors that the machine has.
//!
//! One body per pass ([`body`]), written over 16 lanes of `f32`; a level says how 16 lanes are held.
//! Every level sums in the same order, so levels differ only by how they round the exponential.

mod body;
mod portable;
#[cfg(target_arch = "x86_64")]
mod x86;

use std::sync::OnceLock;

use crate::element::Element;

/// Values per vector, at every level.
pub(crate) const LANES: usize = 16;

/// How vectors are held. Chosen once per process; tests name each.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Level {
    /// Loops over arrays, which the compiler vectorises for its target (SSE2, NEON).
    Portable,
    /// AVX2, FMA and F16C.
    #[cfg(target_arch = "x86_64")]
    Avx2,
    /// AVX-512 F and DQ.
    #[cfg(target_arch = "x86_64")]
    Avx512,
}

impl Level {
    /// The widest level that this machine has.
    pub(crate) fn best() -> Self {
        static BEST: OnceLock<Level> = OnceLock::new();
        *BEST.get_or_init(|| Self::present().pop().unwrap_or(Self::Portable))
    }

    /// All levels that this machine has, narrowest first.
    pub(crate) fn present() -> Vec<Self> {
        #[cfg(target_arch = "x86_64")]
        {
            let mut levels = vec![Self::Portable];
            if x86::has_avx2() {
                levels.push(Self::Avx2);
            }
            if x86::has_avx512() {
                levels.push(Self::Avx512);
            }
            levels
        }
        #[cfg(not(target_arch = "x86_64"))]
        vec![Self::Portable]
    }
}

/// What a run of columns becomes in [`scale`].
#[derive(Clone, Copy, Debug)]
pub(crate) struct Piece {
    /// End of the columns; they start where the piece before ends.
    pub(crate) end: u32,
    pub(crate) shift: f32,
    pub(crate) factor: f32,
}

macro_rules! dispatch {
    ($level:expr, $name:ident($($argument:expr),*)) => {
        match $level {
            Level::Portable => body::$name(portable::Portable, $($argument),*),
            #[cfg(target_arch = "x86_64")]
            Level::Avx2 => x86::avx2::$name($($argument),*),
            #[cfg(target_arch = "x86_64")]
            Level::Avx512 => x86::avx512::$name($($argument),*),
        }
    };
}

/// Largest value; [`f32::MIN`] of none. Values that are not finite may be passed over.
pub(crate) fn largest<T: Element>(level: Level, values: &[T]) -> f32 {
    dispatch!(level, largest(values))
}

/// `out[i] = sum exp(row - shift)` over the columns `bounds[i] .. bounds[i + 1]`; false where one of
/// them is not finite.
///
/// A column's exponential has relative error below `2e-7 + 1.2e-7 |x|`, the second part from rounding
/// the difference; it is zero below `2^-126` and infinite above `2^129`. Sums of it add at most 1.5e-6.
pub(crate) fn sum_exp<T: Element>(
    level: Level,
    row: &[T],
    bounds: &[u32],
    shift: f32,
    out: &mut [f64],
) -> bool {
    dispatch!(level, sum_exp(row, bounds, shift, out, body::AHEAD))
}

/// [`sum_exp`] of columns that are in the cache; asks for those that come `next` bytes later.
pub(crate) fn sum_exp_near<T: Element>(
    level: Level,
    columns: &[T],
    shift: f32,
    next: usize,
    out: &mut f64,
) -> bool {
    let bounds = [0, u32::try_from(columns.len()).expect("ranks are u32")];
    let out = std::slice::from_mut(out);
    dispatch!(level, sum_exp(columns, &bounds, shift, out, next))
}

/// `row = factor exp(row - shift)` in place, piece by piece from column 0; a factor of zero gives
/// zeros, and products below 2^-100 are zero.
pub(crate) fn scale_exp<T: Element>(level: Level, row: &mut [T], pieces: &[Piece]) {
    dispatch!(level, scale_exp(row, pieces));
}

/// Appends the columns from `start` on whose value is above the threshold to `found`, in order.
pub(crate) fn above<T: Element>(
    level: Level,
    row: &[T],
    start: usize,
    threshold: f32,
    found: &mut Vec<u32>,
) {
    dispatch!(level, above(row, start, threshold, found));
}

#[cfg(test)]
mod tests {
    use half::{bf16, f16};

    use super::*;
    use crate::testing::Random;

    fn exact_sum(values: &[f32], shift: f32) -> f64 {
        values
            .iter()
            .map(|&value| (f64::from(value) - f64::from(shift)).exp())
            .sum()
    }

    #[test]
    fn an_exponential_is_within_its_stated_error() {
        for level in Level::present() {
            for shift in [0.0_f32, 13.7] {
                for step in 0..300_000_i32 {
                    let value = shift - step as f32 * 3e-4;
                    let mut out = [0.0];
                    assert!(sum_exp(level, &[value], &[0, 1], shift, &mut out));
                    let x = f64::from(value) - f64::from(shift);
                    let error = (out[0] / x.exp() - 1.0).abs();
                    let zero = out[0] == 0.0 && x < -87.0;
                    assert!(
                        zero || x < -87.2 || error < 2e-7 + 1.2e-7 * x.abs(),
                        "{level:?}: exp({x}) off by {error:e}"
                    );
                }
            }
            let mut out = [1.0];
            for low in [-1e4, f32::MIN] {
                assert!(sum_exp(level, &[low], &[0, 1], 5.0, &mut out));
                assert_eq!(out[0].to_bits(), 0, "{level:?}");
            }
            assert!(sum_exp(level, &[5.0_f32], &[0, 1], 5.0, &mut out));
            assert!((out[0] - 1.0).abs() < 2e-7);
            for high in [95.0, 150.0, 1e4, f32::MAX] {
                assert!(sum_exp(level, &[high], &[0, 1], 5.0, &mut out));
                assert!(
                    out[0].is_infinite(),
                    "{level:?}: exp({high} - 5) is {}",
                    out[0]
                );
            }
        }
    }

    #[test]
    fn sums_and_maxima_of_every_length_and_type_are_those_of_their_columns() {
        fn check<T: Element>(level: Level, values: &[f32]) {
            let row: Vec<T> = values.iter().map(|&value| T::from_f32(value)).collect();
            let values: Vec<f32> = row.iter().map(|value| value.to_f32()).collect();
            let max = values.iter().copied().fold(f32::MIN, f32::max);
            assert!((largest(level, &row) - max).abs() < 1e-30, "{level:?}");
            let len = u32::try_from(row.len()).unwrap();
            let bounds = [0, len / 3, len / 3, len / 2, len];
            let mut out = [0.0; 4];
            assert!(sum_exp(level, &row, &bounds, 1.5, &mut out));
            for (pair, sum) in bounds.windows(2).zip(out) {
                let exact = exact_sum(&values[pair[0] as usize..pair[1] as usize], 1.5);
                assert!(
                    (sum - exact).abs() <= 1.5e-6 * exact,
                    "{level:?}, {len}: {sum} for {exact}"
                );
            }
        }
        let mut random = Random(3);
        for level in Level::present() {
            for length in (0..70).chain([1000, 1023, 1024, 1025, 5000, 70_001]) {
                let values = random.logits(length, 8.0);
                check::<f32>(level, &values);
                check::<bf16>(level, &values);
                check::<f16>(level, &values);
            }
        }
    }

    #[test]
    fn a_column_that_is_not_finite_is_noticed_wherever_it_is() {
        for level in Level::present() {
            for length in [1_usize, 15, 16, 17, 40, 1030] {
                for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
                    for place in 0..length {
                        let mut row = vec![0.5_f32; length];
                        row[place] = bad;
                        let bounds = [0, 0, u32::try_from(length).unwrap()];
                        assert!(
                            !sum_exp(level, &row, &bounds, 0.0, &mut [0.0; 2]),
                            "{level:?} {length} {place}"
                        );
                    }
                }
            }
        }
    }

    #[test]
    fn no_scaled_value_is_so_small_that_sums_of_it_are_slow() {
        for level in Level::present() {
            for factor in [1.0, -1e-3, 1e-20, -1e-35, 1e-40] {
                let mut row: Vec<f32> = (0..2000).map(|step| 0.1 * -step as f32).collect();
                let (end, shift) = (2000, 0.0);
                scale_exp(level, &mut row, &[Piece { end, shift, factor }]);
                for (step, value) in row.iter().enumerate() {
                    let exact = f64::from(factor) * (-0.1 * step as f64).exp();
                    let is_zero = *value == 0.0 && exact.abs() < 7.9e-31;
                    let error = (f64::from(*value) / exact - 1.0).abs();
                    assert!(
                        is_zero || value.abs() > 7.8e-31 && error < 1e-4,
                        "{level:?}, {factor:e}: {value:e} for {exact:e}"
                    );
                }
            }
        }
    }

    #[test]
    fn scaling_writes_every_column_of_its_pieces_and_no_other() {
        fn check<T: Element>(level: Level, length: usize, tolerance: f64) {
            let values = Random(9).logits(length, 6.0);
            let mut row: Vec<T> = values.iter().map(|&value| T::from_f32(value)).collect();
            let values: Vec<f32> = row.iter().map(|value| value.to_f32()).collect();
            let end = u32::try_from(length).unwrap();
            let middle = end / 3;
            let pieces = [
                (middle, 1.0, -0.25),
                (middle, 0.0, 9.0),
                (end.saturating_sub(2).max(middle), 2.0, 0.5),
            ]
            .map(|(end, shift, factor)| Piece { end, shift, factor });
            scale_exp(level, &mut row, &pieces);
            for (column, (&got, &was)) in row.iter().zip(&values).enumerate() {
                let column = u32::try_from(column).unwrap();
                let exact = if column < middle {
                    (f64::from(was) - 1.0).exp() * -0.25
                } else if column < pieces[2].end {
                    (f64::from(was) - 2.0).exp() * 0.5
                } else {
                    f64::from(was)
                };
                let error = (f64::from(got.to_f32()) - exact).abs();
                assert!(
                    error <= tolerance * exact.abs() + 1e-7,
                    "{level:?}, {column} of {length}: {got:?} for {exact}"
                );
            }
        }
        for level in Level::present() {
            for length in (3..60).chain([1000, 3001]) {
                check::<f32>(level, length, 2e-6);
                check::<bf16>(level, length, 1.0 / 250.0);
                check::<f16>(level, length, 1.0 / 2000.0);
            }
        }
    }
}
