//! cuBLAS, found at run time. It is not part of the driver; PyTorch and the CUDA toolkit bring it along.

use std::ffi::c_void;
use std::path::PathBuf;

use libloading::Library;

use crate::cuda::raw::Gemm;
use crate::element::Dtype;
use crate::error::CudaError;

/// Names a folder that is searched first.
pub(super) const FOLDER: &str = "CONSILIUM_CUDA_LIBRARIES";

/// Set to anything, keeps to the crate's own matrix product.
pub(super) const OWN: &str = "CONSILIUM_OWN_GEMM";

const NAMES: [&str; 3] = ["libcublas.so.13", "libcublas.so.12", "libcublas.so"];

type Handle = *mut c_void;
type Create = unsafe extern "C" fn(*mut Handle) -> i32;
type SetStream = unsafe extern "C" fn(Handle, *mut c_void) -> i32;
type GemmEx = unsafe extern "C" fn(
    Handle,
    i32,
    i32,
    i32,
    i32,
    i32,
    *const c_void,
    *const c_void,
    i32,
    i32,
    *const c_void,
    i32,
    i32,
    *const c_void,
    *mut c_void,
    i32,
    i32,
    i32,
    i32,
) -> i32;

/// A handle bound to the device's stream.
pub(super) struct Blas {
    handle: Handle,
    gemm: GemmEx,
    _library: Library,
}

// SAFETY: cuBLAS allows a handle to be used from any thread; `Blas` only enqueues on one stream, and the driver orders
// what several threads enqueue.
unsafe impl Send for Blas {}
// SAFETY: as above; calls do not change the handle's settings after `find`.
unsafe impl Sync for Blas {}

impl Blas {
    /// Loads the library and makes a handle for `stream`, in the current context.
    pub(super) fn find(stream: *mut c_void) -> Result<Self, CudaError> {
        if std::env::var_os(OWN).is_some() {
            return Err(missing("turned off by CONSILIUM_OWN_GEMM".into()));
        }
        let library = load()?;
        // SAFETY: the symbols have had these types since cuBLAS 8 (and the compute type of `cublasGemmEx` since 11).
        let create = *unsafe { library.get::<Create>(b"cublasCreate_v2") }.map_err(no_symbol)?;
        // SAFETY: as above.
        let set_stream =
            *unsafe { library.get::<SetStream>(b"cublasSetStream_v2") }.map_err(no_symbol)?;
        // SAFETY: as above.
        let gemm = *unsafe { library.get::<GemmEx>(b"cublasGemmEx") }.map_err(no_symbol)?;
        let mut handle = std::ptr::null_mut();
        // SAFETY: writes the handle.
        status("cublasCreate", unsafe { create(&raw mut handle) })?;
        // SAFETY: the handle was just made; the stream lives as long as the process's device.
        status("cublasSetStream", unsafe { set_stream(handle, stream) })?;
        Ok(Self {
            handle,
            gemm,
            _library: library,
        })
    }

    /// `c = alpha a b (+ c)` with row-major operands; `transposed` are those of the crate's own kernels: a stored
    /// `[k, m]`, b stored `[k, n]`.
    ///
    /// # Safety
    /// As the launch of a kernel on the same job.
    pub(super) unsafe fn multiply(
        &self,
        job: &Gemm,
        dtype: Dtype,
        (transposed_a, transposed_b): (bool, bool),
    ) -> Result<(), CudaError> {
        const F32: i32 = 0;
        const COMPUTE_F32: i32 = 68;
        const DEFAULT: i32 = -1;
        let kind = match dtype {
            Dtype::F32 => F32,
            Dtype::F16 => 2,
            Dtype::Bf16 => 14,
        };
        let beta = if job.add == 0 { 0.0_f32 } else { 1.0 };
        let int = |value: u64| {
            i32::try_from(value).map_err(|_| CudaError::Unsupported {
                what: "a matrix with a side beyond 2^31",
            })
        };
        // A row-major matrix is the transpose of a column-major one: c^T = b^T a^T.
        // SAFETY: the caller's promise; `alpha` and `beta` are read before the call returns.
        let result = unsafe {
            (self.gemm)(
                self.handle,
                i32::from(!transposed_b),
                i32::from(transposed_a),
                int(job.n.into())?,
                int(job.m.into())?,
                int(job.k.into())?,
                (&raw const job.alpha).cast(),
                job.b as *const c_void,
                kind,
                int(job.b_stride)?,
                job.a as *const c_void,
                kind,
                int(job.a_stride)?,
                (&raw const beta).cast(),
                job.c as *mut c_void,
                F32,
                int(job.c_stride)?,
                COMPUTE_F32,
                DEFAULT,
            )
        };
        status("cublasGemmEx", result)
    }
}

fn load() -> Result<Library, CudaError> {
    let folder = std::env::var_os(FOLDER).map(PathBuf::from);
    let folders = folder.iter().cloned().chain([PathBuf::new()]);
    let mut reason = String::new();
    for path in folders.flat_map(|folder| NAMES.map(|name| folder.join(name))) {
        // SAFETY: cuBLAS is made to be loaded by name; its initialisers touch nothing of ours.
        match unsafe { Library::new(&path) } {
            Ok(library) => return Ok(library),
            Err(error) => reason = error.to_string(),
        }
    }
    Err(missing(reason))
}

fn missing(reason: String) -> CudaError {
    CudaError::Driver {
        what: "loading cuBLAS",
        reason,
    }
}

#[expect(clippy::needless_pass_by_value, reason = "an argument of map_err")]
fn no_symbol(error: libloading::Error) -> CudaError {
    missing(error.to_string())
}

fn status(what: &'static str, code: i32) -> Result<(), CudaError> {
    if code == 0 {
        Ok(())
    } else {
        Err(CudaError::Driver {
            what,
            reason: format!("cuBLAS status {code}"),
        })
    }
}
