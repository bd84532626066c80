//! The operations on an NVIDIA device.
//!
//! Three layers: `raw` declares what crosses to the kernels, [`device()`] finds the device and turns every failure of the
//! driver into a [`CudaError`], the modules above it prepare and start jobs on checked inputs. Kernels are CUDA C in
//! `src/`, embedded as PTX for compute capability 8.0, which the driver compiles for the device at hand; `compile.py`
//! regenerates and checks them. Nothing of CUDA is needed to build, and nothing but the driver to run: the driver's
//! library is looked for before anything else touches it, and its absence is an error value. cuBLAS is used for the
//! products of the fused head where the machine has it (`CONSILIUM_CUDA_LIBRARIES` names a folder to look in first).

#![expect(
    unsafe_code,
    reason = "launches, addresses and the C interface of cuBLAS; each block says why it holds"
)]

mod adapters;
mod blas;
mod device;
mod fusion;
mod gemm;
mod head;
pub mod host;
mod logits;
mod loss;
mod raw;
mod rows;
mod score;
mod terms;
#[cfg(test)]
mod tests;
mod tries;

pub use crate::error::CudaError;
pub(crate) use adapters::merge;
pub use device::{Device, device};
pub(crate) use fusion::fuse;
pub use head::{Hidden, ResidentHead, WeightGradient};
pub use logits::Logits;
pub use loss::LossJob;
pub use score::{BranchRows, Scoring};
