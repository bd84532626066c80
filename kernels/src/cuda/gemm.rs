//! Matrix products on the device: cuBLAS where it is found, else the crate's own kernels.

use crate::cuda::device::Device;
use crate::cuda::raw::{Gemm, Unit};
use crate::cuda::rows::suffix;
use crate::element::Dtype;
use crate::error::CudaError;

/// Which product of the fused head.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Product {
    /// `[m, k]` times the transpose of `[n, k]`: logits.
    Nt,
    /// `[m, k]` times `[k, n]`: gradient of the hidden states.
    Nn,
    /// The transpose of `[k, m]` times `[k, n]`: gradient of the weights.
    Tn,
}

impl Product {
    fn transposed(self) -> (bool, bool) {
        match self {
            Self::Nt => (false, false),
            Self::Nn => (false, true),
            Self::Tn => (true, true),
        }
    }

    fn suffix(self) -> &'static str {
        match self {
            Self::Nt => "nt",
            Self::Nn => "nn",
            Self::Tn => "tn",
        }
    }
}

/// Starts a product.
///
/// # Safety
/// The addresses are of matrices of the job's sizes, whose rows start at multiples of 16 bytes and whose memory reaches
/// to the next multiple of 16 bytes behind every row; they live until the device is done.
pub(super) unsafe fn multiply(
    device: &Device,
    job: &Gemm,
    dtype: Dtype,
    product: Product,
) -> Result<(), CudaError> {
    if let Ok(blas) = device.blas() {
        // SAFETY: the caller's promise.
        return unsafe { blas.multiply(job, dtype, product.transposed()) };
    }
    let (rows, columns, shared) = match dtype {
        Dtype::F32 => (64, 64, 0),
        Dtype::Bf16 | Dtype::F16 => (128, 256, 4 * (128 + 256) * 32 * 2),
    };
    let kernel = device.kernel(
        Unit::Gemm,
        &format!("gemm_{}_{}", suffix(dtype), product.suffix()),
        shared,
    )?;
    // Blocks that share columns run side by side, so that weights are read from memory once.
    let grid = (job.m.div_ceil(rows), job.n.div_ceil(columns));
    // SAFETY: the caller's promise; a block per tile.
    unsafe { device.launch(&kernel, grid, shared, job) }
}
