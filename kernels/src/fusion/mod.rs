//! Fusing the records of several sources, in integers only.
//!
//! A code q has the mass `T[q] = round(2^(31 - q/16))`. A source's masses at a position, end and
//! tail included, sum to Z (near 2^31); its share of a symbol is `(T[q] << 32) / Z`, rounded down.
//! [`Mixing`] says how the shares of all sources become one mass per symbol, out of 2^48. The
//! largest are kept (ties: the smaller symbol) until they and the end fill the shape, at least one;
//! everything else, the sources' tails and what rounding lost included, is the tail. Codes of the
//! result are the nearest by integer logarithm. Addition of integers has no order, so neither
//! threads, nor the order of sources, nor the machine can change a byte. [`Routing`] gives weights
//! from the bits that each source needs, [`Evidence`] to every rule that looks at single
//! positions. [`sample`], [`tail_to_labels`] and [`without_tail`] are other forms of a fused
//! record.

mod bits;
mod distance;
mod evidence;
mod routing;
mod targets;

pub use bits::{Bits, item_bits};
pub use distance::variation;
pub use evidence::{Evidence, ObservedToken, entropies};
pub(crate) use routing::exp2_minus;
pub use routing::{
    Doubt, Routing, Scope, competent, route, route_causal, route_exponents, route_positions,
};
pub use targets::{sample, tail_to_labels, without_tail};

use crate::backend::Backend;
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

/// A statistic of the sources' shares of a symbol, one vote per source: what a minority of the
/// sources says of it moves the result no further than what the others say.
///
/// After Yin et al., arXiv 1803.01498, definitions 1 and 2 (coordinate-wise median and trimmed
/// mean), of the 257 shares that make a position's distribution:
///
/// - A listed symbol, and the end, count with their share; a byte that a source does not list with
///   an equal part of its tail, `tail share / (257 - listed)` rounded down, where listed includes
///   the end, as in [`item_bits`]. A record does not say how many tokens there are: among tokens,
///   one that is not listed counts as nothing, and the tail counts as one symbol.
/// - The d smallest and d largest of a symbol's n values are dropped; the rest has the mean m,
///   rounded down.
/// - Symbols listed by no source all have the same m; M is the sum of m over all symbols, listed or
///   not. The fused mass of a symbol is `(m << 48) / M`, rounded down, because statistics of
///   distributions do not sum to one.
///
/// Two sources or fewer have no majority: nothing is dropped and the result is their plain mean.
/// Sources that know different things are no case for this: where one of many knows an answer, it
/// is the outlier.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Robust {
    /// `d = (n - 1) / 2`: the middle value, or the mean of the two middle ones.
    Median,
    /// `d = n * trim_permille / 1000`, rounded down: too small a trim for n drops nothing.
    TrimmedMean {
        /// Share of the sources that is dropped at each end, below 500.
        trim_permille: u32,
    },
}

impl Robust {
    /// Values dropped at each end of `sources`, of which at least one remains.
    pub(crate) fn dropped(self, sources: usize) -> usize {
        match self {
            Self::Median => sources.saturating_sub(1) / 2,
            Self::TrimmedMean { trim_permille } => {
                let permille = usize::try_from(trim_permille).unwrap_or(usize::MAX);
                sources.saturating_mul(permille) / 1000
            }
        }
    }
}

/// How the shares of several sources become one mass.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mixing<'a> {
    /// `sum_i w_i p_i(s)` with the item's weights, one per source, as [`route`] gives them.
    Item(&'a [u32]),
    /// The same with weights `[N, sources]` of their own at every position, as [`route_causal`]
    /// gives them.
    Positions(&'a [u32]),
    /// The geometric mean `prod_i p_i(s)^w_i`, renormalised (logarithmic opinion pool, Genest and
    /// Zidek, Statistical Science 1, 1986), with weights `[N, sources]` as in
    /// [`Mixing::Positions`].
    ///
    /// In codes: a symbol has the exponent `sum_i w_i q_i(s)`, in units of 2^-20 bits, and the mass
    /// `2^(32 - (exponent - least exponent) / 2^20)` rounded down; M is the sum of the masses of all
    /// 257 symbols, and the fused mass is `(mass << 48) / M`, rounded down. A byte that a source does
    /// not list has the code of its tail plus `16 log2(257 - listed)`, as in [`item_bits`]; a token
    /// the largest code, 255, and the tails count as one symbol. What a source says counts as it is:
    /// totals that differ from one are a common factor. A single source that denies a symbol with
    /// its floor takes most of it away.
    Geometric(&'a [u32]),
    /// A robust statistic without weights.
    Robust(Robust),
}

impl<'a> Mixing<'a> {
    /// Weights of the sources at a position; none where the mixing has no weights.
    pub(crate) fn weights(self, position: usize, sources: usize) -> &'a [u32] {
        match self {
            Self::Item(weights) => weights,
            Self::Positions(weights) | Self::Geometric(weights) => {
                &weights[position * sources..][..sources]
            }
            Self::Robust(_) => &[],
        }
    }

    fn check(self, sources: usize, positions: usize) -> Result<(), FusionError> {
        if sources == 0 {
            return Err(FusionError::Nothing);
        }
        let (weights, expected) = match self {
            Self::Item(weights) => (weights, sources),
            Self::Positions(weights) | Self::Geometric(weights) => {
                (weights, sources.saturating_mul(positions))
            }
            Self::Robust(Robust::TrimmedMean { trim_permille }) if trim_permille >= 500 => {
                return Err(FusionError::Trim {
                    permille: trim_permille,
                });
            }
            Self::Robust(_) => return Ok(()),
        };
        if weights.len() != expected {
            return Err(FusionError::Weights {
                weights: weights.len(),
                expected,
            });
        }
        for row in weights.chunks_exact(sources) {
            let sum = row.iter().map(|&weight| u64::from(weight)).sum();
            if sum != u64::from(WEIGHT_UNITY) {
                return Err(FusionError::WeightSum { sum });
            }
        }
        Ok(())
    }
}

/// Appends the fused positions of one item to `out`, with one weight per source.
///
/// `weights` are those of [`route`]; a source of weight zero has no influence.
///
/// # Errors
/// As [`fuse`].
pub fn fuse_item<S: Symbol>(
    weights: &[u32],
    sources: &[RecordView<'_, S>],
    shape: &RecordShape,
    out: &mut Records<S>,
) -> Result<(), FusionError> {
    fuse(Mixing::Item(weights), sources, shape, out)
}

/// Appends the fused positions of one item to `out`.
///
/// # Errors
/// Where there are no sources, weights do not match them or do not sum to [`WEIGHT_UNITY`], nothing
/// would be left of a trimmed mean, sources differ in length, or the shape is not that of `out`;
/// `out` is then unchanged.
pub fn fuse<S: Symbol>(
    mixing: Mixing<'_>,
    sources: &[RecordView<'_, S>],
    shape: &RecordShape,
    out: &mut Records<S>,
) -> Result<(), FusionError> {
    Backend::best().fuse(mixing, sources, shape, out)
}

impl Backend {
    /// [`fuse`] on this implementation; all give the same bytes.
    ///
    /// # Errors
    /// As [`fuse`].
    pub fn fuse<S: Symbol>(
        self,
        mixing: Mixing<'_>,
        sources: &[RecordView<'_, S>],
        shape: &RecordShape,
        out: &mut Records<S>,
    ) -> Result<(), FusionError> {
        shape.check::<S>()?;
        out.check_k(shape.k)?;
        let expected = sources.first().map_or(0, RecordView::positions);
        mixing.check(sources.len(), expected)?;
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
            Self::Reference => reference::fusion::fuse(mixing, sources, shape, out),
            Self::Cpu => cpu::fusion::fuse(mixing, sources, shape, out),
            // No kernel of its own.
            #[cfg(feature = "cuda")]
            Self::Cuda if matches!(mixing, Mixing::Geometric(_)) => {
                cpu::fusion::fuse(mixing, sources, shape, out);
            }
            #[cfg(feature = "cuda")]
            Self::Cuda => cuda::fuse(cuda::device()?, mixing, sources, shape, out)?,
            #[cfg(not(feature = "cuda"))]
            Self::Cuda => return Err(CudaError::NotBuilt.into()),
        }
        Ok(())
    }

    /// [`fuse_item`] on this implementation; all give the same bytes.
    ///
    /// # Errors
    /// As [`fuse`].
    pub fn fuse_item<S: Symbol>(
        self,
        weights: &[u32],
        sources: &[RecordView<'_, S>],
        shape: &RecordShape,
        out: &mut Records<S>,
    ) -> Result<(), FusionError> {
        self.fuse(Mixing::Item(weights), sources, shape, out)
    }
}
