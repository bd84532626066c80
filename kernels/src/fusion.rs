//! Fusing the records of several sources, in integers only.
//!
//! A code q has the mass `T[q] = round(2^(31 - q/16))`. A source's masses at a position, end and
//! tail included, sum to Z (near 2^31); its share of a symbol is `(T[q] << 32) / Z`, rounded down.
//! Weights are shares of 2^16, so the fused mass `sum_i w_i p_i(s)` is out of 2^48. The largest are
//! kept (ties: the smaller symbol) until they and the end fill the shape, at least one; everything
//! else, the sources' tails and what rounding lost included, is the tail. Codes of the result are
//! the nearest by integer logarithm. Addition of integers has no order, so neither threads, nor the
//! order of sources, nor the machine can change a byte. [`Routing`] gives the weights from the bits
//! that each source needs.

use std::fmt;
use std::iter::Sum;
use std::ops::{Add, Range};

use crate::backend::Backend;
use crate::code;
#[cfg(feature = "cuda")]
use crate::cuda;
#[cfg(not(feature = "cuda"))]
use crate::error::CudaError;
use crate::error::FusionError;
use crate::records::{RecordShape, RecordView, Records, Symbol};
use crate::{cpu, reference};

/// Sum of the weights of an item's sources.
pub const WEIGHT_UNITY: u32 = 1 << 16;

/// Binary digits of a fused mass.
pub(crate) const MASS_BITS: u32 = 48;

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

    /// Bits per byte in 2^-32.
    fn fixed(self) -> u128 {
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
    let mut bits = Bits {
        sixteenths: u64::from(record.end()[target.len()]),
        bytes: 1,
    };
    for (position, &byte) in target.iter().enumerate() {
        if unlabeled.iter().any(|span| span.contains(&position)) {
            continue;
        }
        let mut listed = 1;
        let mut sixteenths = None;
        for (symbol, code) in record.listed(position) {
            listed += 1;
            if symbol == byte {
                sixteenths = Some(u32::from(code));
            }
        }
        let sixteenths = sixteenths.unwrap_or_else(|| {
            u32::from(record.tail()[position]) + code::log2_sixteenths(257 - listed)
        });
        bits = bits
            + Bits {
                sixteenths: u64::from(sixteenths),
                bytes: 1,
            };
    }
    Ok(bits)
}

/// How sources share an item.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Routing {
    /// Weights in proportion to `exp(-sharpness * bits per byte)`; 20 is a good sharpness.
    Softmax {
        /// Factor of the bits per byte.
        sharpness: u32,
    },
    /// The source with the fewest bits per byte; on a tie the first.
    MinCe,
    /// Equal weights.
    Uniform,
}

/// Weights of the sources of one item; they sum to exactly [`WEIGHT_UNITY`] (no sources, no
/// weights).
///
/// What rounding down leaves goes to the largest remainders, on a tie to the source that comes
/// first: callers give sources in order of their institution.
#[must_use]
pub fn route(routing: Routing, bits: &[Bits]) -> Vec<u32> {
    let Some(best) = bits.iter().map(|bits| bits.fixed()).min() else {
        return Vec::new();
    };
    match routing {
        Routing::Softmax { sharpness } => {
            let masses: Vec<u64> = bits
                .iter()
                .map(|bits| exp_minus(sharpness, bits.fixed() - best))
                .collect();
            apportion(&masses)
        }
        Routing::MinCe => {
            let first = bits.iter().position(|bits| bits.fixed() == best);
            (0..bits.len())
                .map(|i| if Some(i) == first { WEIGHT_UNITY } else { 0 })
                .collect()
        }
        Routing::Uniform => apportion(&vec![1; bits.len()]),
    }
}

/// Appends the fused positions of one item to `out`.
///
/// `weights` are those of [`route`], one per source; a source of weight zero has no influence.
///
/// # Errors
/// Where weights do not match the sources or do not sum to [`WEIGHT_UNITY`], sources differ in
/// length, or the shape is not that of `out`; `out` is then unchanged.
pub fn fuse_item<S: Symbol>(
    weights: &[u32],
    sources: &[RecordView<'_, S>],
    shape: &RecordShape,
    out: &mut Records<S>,
) -> Result<(), FusionError> {
    Backend::best().fuse_item(weights, sources, shape, out)
}

impl Backend {
    /// [`fuse_item`] on this implementation; all give the same bytes.
    ///
    /// # Errors
    /// As [`fuse_item`].
    pub fn fuse_item<S: Symbol>(
        self,
        weights: &[u32],
        sources: &[RecordView<'_, S>],
        shape: &RecordShape,
        out: &mut Records<S>,
    ) -> Result<(), FusionError> {
        shape.check::<S>()?;
        out.check_k(shape.k)?;
        if weights.len() != sources.len() {
            return Err(FusionError::Weights {
                weights: weights.len(),
                sources: sources.len(),
            });
        }
        let sum = weights.iter().map(|&weight| u64::from(weight)).sum();
        if sum != u64::from(WEIGHT_UNITY) {
            return Err(FusionError::WeightSum { sum });
        }
        let expected = sources.first().map_or(0, RecordView::positions);
        for (source_index, source) in sources.iter().enumerate() {
            let got = source.positions();
            if got != expected {
                return Err(FusionError::Positions {
                    source_index,
                    got,
                    expected,
                });
            }
        }
        match self {
            Self::Reference => reference::fusion::fuse(weights, sources, shape, out),
            Self::Cpu => cpu::fusion::fuse(weights, sources, shape, out)?,
            #[cfg(feature = "cuda")]
            Self::Cuda => cuda::fuse(cuda::device()?, weights, sources, shape, out)?,
            #[cfg(not(feature = "cuda"))]
            Self::Cuda => return Err(CudaError::NotBuilt.into()),
        }
        Ok(())
    }
}

/// Shares of [`WEIGHT_UNITY`] in proportion to masses of which at least one is positive.
fn apportion(masses: &[u64]) -> Vec<u32> {
    let sum: u128 = masses.iter().map(|&mass| u128::from(mass)).sum();
    let scaled = |mass: u64| u128::from(mass) * u128::from(WEIGHT_UNITY);
    let mut weights: Vec<u32> = masses
        .iter()
        .map(|&mass| u32::try_from(scaled(mass) / sum).unwrap_or(WEIGHT_UNITY))
        .collect();
    let mut by_remainder: Vec<usize> = (0..masses.len()).collect();
    by_remainder.sort_by_key(|&i| (std::cmp::Reverse(scaled(masses[i]) % sum), i));
    let given: u64 = weights.iter().map(|&weight| u64::from(weight)).sum();
    let left = usize::try_from(u64::from(WEIGHT_UNITY) - given).unwrap_or(0);
    for &i in by_remainder.iter().take(left) {
        weights[i] += 1;
    }
    weights
}

/// `round(2^32 log2 e)`.
const LOG2_E: u128 = 6_196_328_019;

/// `round(2^(63 - 2^-j))` for j = 1 to 32: factors of the binary digits of an exponent.
const ROOTS: [u64; 32] = [
    0x5a82_7999_fcef_3242,
    0x6ba2_7e65_6b4e_b57a,
    0x7560_6373_ee92_1c97,
    0x7a92_be8a_9243_6616,
    0x7d41_d96d_b915_019d,
    0x7e9f_0606_7a43_60ba,
    0x7f4f_08ae_3dc7_c426,
    0x7fa7_65ac_a88f_6453,
    0x7fd3_ab29_0e46_d769,
    0x7fe9_d3a8_e07b_f086,
    0x7ff4_e959_7bed_93ab,
    0x7ffa_748d_ff8d_c61f,
    0x7ffd_3a3f_5002_0332,
    0x7ffe_9d1d_bc0a_75aa,
    0x7fff_4e8e_6306_ed59,
    0x7fff_a747_12c3_cdfd,
    0x7fff_d3a3_81b1_fa29,
    0x7fff_e9d1_beed_018a,
    0x7fff_f4e8_defb_81d7,
    0x7fff_fa74_6f5f_012f,
    0x7fff_fd3a_37a7_d0a8,
    0x7fff_fe9d_1bd1_fc58,
    0x7fff_ff4e_8de8_832d,
    0x7fff_ffa7_46f4_22d7,
    0x7fff_ffd3_a37a_09bb,
    0x7fff_ffe9_d1bd_02f2,
    0x7fff_fff4_e8de_80fe,
    0x7fff_fffa_746f_4060,
    0x7fff_fffd_3a37_a028,
    0x7fff_fffe_9d1b_d012,
    0x7fff_ffff_4e8d_e809,
    0x7fff_ffff_a746_f404,
];

/// `2^62 exp(-factor * x)` for x in 2^-32, to about 2^-30 relative.
fn exp_minus(factor: u32, x: u128) -> u64 {
    // 256 bits per byte are more than codes can say, and keep the product within 2^105.
    let x = x.min(256 << 32);
    let exponent = (x * u128::from(factor) * LOG2_E) >> 32;
    let whole = u32::try_from(exponent >> 32).unwrap_or(u32::MAX);
    let mut value = 1_u128 << 62;
    for (digit, &root) in (1..=32).zip(&ROOTS) {
        if (exponent >> (32 - digit)) & 1 == 1 {
            value = (value * u128::from(root)) >> 63;
        }
    }
    u64::try_from(value)
        .ok()
        .and_then(|value| value.checked_shr(whole))
        .unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn roots_square_to_their_predecessors() {
        let mut square = 1_u128 << 62;
        for (digit, &root) in (1..).zip(&ROOTS) {
            // (r - 1/2)^2 < 2^63 * predecessor < (r + 1/2)^2, up to the predecessor's own rounding.
            let exact = square << 63;
            let root = u128::from(root);
            assert!((root - 1) * (root - 1) < exact, "root {digit} too large");
            assert!(exact < (root + 1) * (root + 1), "root {digit} too small");
            square = root;
        }
    }

    #[test]
    fn the_integer_exponential_is_the_exponential() {
        for factor in [1, 7, 20, 1000] {
            for step in 0..2000_u128 {
                let x = step * 12_345_678;
                let exact = (-f64::from(factor) * x as f64 / 2_f64.powi(32)).exp();
                let value = exp_minus(factor, x) as f64 / 2_f64.powi(62);
                assert!(
                    (value - exact).abs() <= 2e-9 * exact + 2_f64.powi(-61),
                    "{factor} {x}"
                );
            }
        }
        assert_eq!(exp_minus(u32::MAX, u128::MAX), 0);
    }

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
