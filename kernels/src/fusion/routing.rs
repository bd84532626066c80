//! Weights of sources from the bits that they need.

use super::WEIGHT_UNITY;
use super::bits::Bits;
use super::evidence::Evidence;
use crate::error::FusionError;
use crate::records::RecordView;

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
    let mut weights = vec![0; bits.len()];
    route_into(routing, bits, &mut weights, &mut Vec::new());
    weights
}

/// Weights `[N, sources]` for every position of an item, from the bits of the bytes before it.
///
/// [`route_positions`] with [`Scope::Before`] for an item of bytes that declares no unlabeled span.
///
/// # Errors
/// Where a source does not have one position per byte of the target and one for the end.
pub fn route_causal(
    sharpness: u32,
    sources: &[RecordView<'_>],
    target: &[u8],
) -> Result<Vec<u32>, FusionError> {
    let evidence = Evidence::of_bytes(sources, target, &[])?;
    Ok(route_positions(sharpness, Scope::Before, &evidence, None))
}

/// What a position's weights may know.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scope {
    /// All labelled symbols of the item.
    Item,
    /// The labelled symbols before the position: an answer that nobody knows cannot spoil the
    /// weights of what comes before it. The first position has equal weights.
    Before,
}

/// A factor `exp(-permille / 1000 * D)` of the weights, D what a source is doubted by at the
/// position: its entropy in bits, so that of two that know an item equally well the surer one is
/// heard more, or its distance from the others.
#[derive(Clone, Copy, Debug)]
pub struct Doubt<'a> {
    /// Nepers per unit of doubt, in thousandths.
    pub permille: u32,
    /// `[N, sources]` in units of 2^-32, such as [`super::entropies`].
    pub of: &'a [u64],
}

/// Weights `[N, sources]` for every position, in proportion to `exp(-sharpness * bits per byte)`
/// of what the scope allows, and to what the doubt leaves.
#[must_use]
pub fn route_positions(
    sharpness: u32,
    scope: Scope,
    evidence: &Evidence,
    doubt: Option<Doubt<'_>>,
) -> Vec<u32> {
    let sources = evidence.sources();
    let mut weights = vec![0; sources * evidence.positions()];
    if sources == 0 {
        return weights;
    }
    let mut known = match scope {
        Scope::Item => evidence.totals(),
        Scope::Before => vec![Bits::default(); sources],
    };
    let mut exponents = vec![0; sources];
    let mut scratch = Vec::new();
    for (position, row) in weights.chunks_exact_mut(sources).enumerate() {
        for (source, (exponent, bits)) in exponents.iter_mut().zip(&known).enumerate() {
            *exponent = u128::from(sharpness) * bits.fixed();
            if let Some(Doubt { permille, of }) = doubt {
                let doubt = of.get(position * sources + source).copied();
                *exponent += u128::from(permille) * u128::from(doubt.unwrap_or(0)) / 1000;
            }
        }
        temper(&exponents, row, &mut scratch);
        if scope == Scope::Before {
            for (source, known) in known.iter_mut().enumerate() {
                *known = *known + evidence.bits(position, source);
            }
        }
    }
    weights
}

/// Weights in proportion to `exp(-exponent)`, exponents in units of 2^-32; they sum to
/// [`WEIGHT_UNITY`] like those of [`route`].
#[must_use]
pub fn route_exponents(exponents: &[u128]) -> Vec<u32> {
    let mut weights = vec![0; exponents.len()];
    temper(exponents, &mut weights, &mut Vec::new());
    weights
}

/// Indices of the sources whose bits per byte exceed the best's by at most `bound_millibits`
/// thousandths of a bit.
#[must_use]
pub fn competent(bits: &[Bits], bound_millibits: u32) -> Vec<usize> {
    let Some(best) = bits.iter().map(|bits| bits.fixed()).min() else {
        return Vec::new();
    };
    let bound = (u128::from(bound_millibits) << 32) / 1000;
    (0..bits.len())
        .filter(|&source| bits[source].fixed() - best <= bound)
        .collect()
}

fn temper(exponents: &[u128], weights: &mut [u32], scratch: &mut Vec<u128>) {
    let Some(&least) = exponents.iter().min() else {
        return;
    };
    scratch.clear();
    scratch.extend(
        exponents
            .iter()
            .map(|x| u128::from(exp_minus(1, x - least))),
    );
    apportion(scratch, weights);
}

fn route_into(routing: Routing, bits: &[Bits], weights: &mut [u32], scratch: &mut Vec<u128>) {
    let Some(best) = bits.iter().map(|bits| bits.fixed()).min() else {
        return;
    };
    scratch.clear();
    match routing {
        Routing::Softmax { sharpness } => {
            let mass = |bits: &Bits| u128::from(exp_minus(sharpness, bits.fixed() - best));
            scratch.extend(bits.iter().map(mass));
            apportion(scratch, weights);
        }
        Routing::MinCe => {
            weights.fill(0);
            if let Some(first) = bits.iter().position(|bits| bits.fixed() == best) {
                weights[first] = WEIGHT_UNITY;
            }
        }
        Routing::Uniform => {
            scratch.resize(bits.len(), 1);
            apportion(scratch, weights);
        }
    }
}

/// Shares of [`WEIGHT_UNITY`] in proportion to masses below 2^64 of which at least one is positive;
/// leaves remainders in place of the masses.
fn apportion(masses: &mut [u128], weights: &mut [u32]) {
    let sum: u128 = masses.iter().sum();
    let mut left = WEIGHT_UNITY;
    for (weight, mass) in weights.iter_mut().zip(masses.iter_mut()) {
        let scaled = *mass * u128::from(WEIGHT_UNITY);
        let share = scaled / sum;
        *mass = scaled - share * sum;
        *weight = u32::try_from(share).unwrap_or(WEIGHT_UNITY);
        left -= *weight;
    }
    // Remainders are below the sum and sum to `left` times it, so more than `left` are positive and
    // none is taken twice.
    for _ in 0..left {
        let largest = masses.iter().copied().max().unwrap_or(0);
        if let Some(i) = masses.iter().position(|&mass| mass == largest) {
            weights[i] += 1;
            masses[i] = 0;
        }
    }
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
    exp2_minus((x * u128::from(factor) * LOG2_E) >> 32)
}

/// `2^62 * 2^-exponent` for an exponent in 2^-32, to about 2^-30 relative.
pub(crate) fn exp2_minus(exponent: u128) -> u64 {
    let whole = u32::try_from(exponent >> 32).unwrap_or(u32::MAX);
    if exponent == 0 {
        return 1 << 62;
    }
    let mut value = 1_u128 << 62;
    for (digit, &root) in (1..=32).zip(&ROOTS) {
        // A choice of factors, not a branch: digits are as good as random.
        let factor = if (exponent >> (32 - digit)) & 1 == 1 {
            root
        } else {
            1 << 63
        };
        value = (value * u128::from(factor)) >> 63;
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
}
