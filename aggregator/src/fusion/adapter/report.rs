//! What a merge says about itself.

use consilium_protocol::InstitutionId;

/// What went into a merge and what it lost.
#[derive(Debug, Clone, PartialEq, serde::Serialize)]
pub struct MergeReport {
    /// Name of the merge rule.
    pub rule: &'static str,
    /// Name of the defence.
    pub defence: &'static str,
    /// Of every entry, values that were left out at each end.
    pub trimmed: usize,
    /// Every member, in institution order.
    pub members: Vec<MemberReport>,
    /// Cosines of the members' updates, `[members, members]` row-major.
    pub cosines: Vec<f64>,
    /// For rules that average factors: `|sum p B A - (sum p B)(sum p A)| / |sum p B A|` over all matrices.
    pub bias: Option<f64>,
    /// What recompression lost.
    pub truncation: Truncation,
}

/// One member of a merge.
#[derive(Debug, Clone, PartialEq, serde::Serialize)]
pub struct MemberReport {
    /// Who.
    pub institution: InstitutionId,
    /// Rank of its matrices.
    pub rank: usize,
    /// Share of the merge by its part.
    pub part: f64,
    /// Share that it had.
    pub share: f64,
    /// What its update was multiplied by before it counted.
    pub scale: f64,
    /// Norm of its update: adapter minus start, products with their LoRA scale and whole modules together.
    pub norm: f64,
    /// What is strange about it, whatever the defence.
    pub flag: Option<String>,
    /// Why it did not count.
    pub excluded: Option<String>,
}

/// Norm of what recompression cut off, relative to the norm of the whole.
#[derive(Debug, Clone, PartialEq, serde::Serialize)]
pub struct Truncation {
    /// Mean over the matrices.
    pub mean: f64,
    /// Largest of the matrices.
    pub worst: f64,
    /// Every matrix, in name order.
    pub matrices: Vec<MatrixTruncation>,
}

/// Truncation of one matrix.
#[derive(Debug, Clone, PartialEq, serde::Serialize)]
pub struct MatrixTruncation {
    /// PEFT name of the layer.
    pub layer: String,
    /// Of the merged product. Of rules on entries also what the low-rank form of their result lacks, as if both were
    /// orthogonal, as they are where the start is zero.
    pub product: f64,
    /// Of the outer momentum.
    pub velocity: f64,
    /// Bias of the averaged factors, for rules that average factors.
    pub bias: Option<f64>,
}

impl Truncation {
    /// The mean in millionths, as logged.
    #[must_use]
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "a share of 0 to 1"
    )]
    pub fn ppm(&self) -> u32 {
        (self.mean.clamp(0.0, 1.0) * 1e6).round() as u32
    }

    pub(super) fn of(matrices: Vec<MatrixTruncation>) -> Self {
        let count = matrices.len().max(1) as f64;
        Self {
            mean: matrices.iter().map(|m| m.product).sum::<f64>() / count,
            worst: matrices.iter().map(|m| m.product).fold(0.0, f64::max),
            matrices,
        }
    }
}
