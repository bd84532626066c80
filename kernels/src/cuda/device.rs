//! The device of this process: found once, with its memory and its kernels.

use std::fmt;
use std::mem::size_of_val;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use cudarc::driver::sys::{CUdevice_attribute, CUfunction_attribute_enum};
use cudarc::driver::{
    CudaContext, CudaEvent, CudaFunction, CudaModule, CudaSlice, CudaStream, DevicePtr, DeviceRepr,
    DriverError, LaunchConfig, PushKernelArg, sys,
};
use cudarc::nvrtc::Ptx;

use crate::cuda::blas::Blas;
use crate::cuda::raw::{Address, THREADS, Unit};
use crate::cuda::tries::{ResidentTrie, Tries};
use crate::error::CudaError;
use crate::vocab::Vocab;

/// CUDA 12.4, whose PTX the kernels are written in.
const NEEDED: i32 = 12_040;

/// Multiprocessor generation of the instructions used: Ampere.
const CAPABILITY: (i32, i32) = (8, 0);

#[cfg(not(windows))]
const LIBRARIES: [&str; 2] = ["libcuda.so.1", "libcuda.so"];
#[cfg(windows)]
const LIBRARIES: [&str; 1] = ["nvcuda.dll"];
#[cfg(not(windows))]
const LIBRARY_NAMES: &str = "libcuda.so.1, libcuda.so";
#[cfg(windows)]
const LIBRARY_NAMES: &str = "nvcuda.dll";

/// Most bytes of shared memory that a kernel declares itself.
const STATIC_SHARED: u32 = 16 << 10;

/// The first NVIDIA device of this machine.
pub struct Device {
    context: Arc<CudaContext>,
    stream: Arc<CudaStream>,
    name: String,
    pub(super) multiprocessors: u32,
    /// Bytes of shared memory that a block can ask for.
    pub(super) shared_limit: u32,
    modules: [OnceLock<Result<Arc<CudaModule>, CudaError>>; Unit::COUNT],
    tries: Mutex<Tries>,
    blas: OnceLock<Result<Blas, CudaError>>,
}

impl fmt::Debug for Device {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Device")
            .field("name", &self.name)
            .finish_non_exhaustive()
    }
}

/// The device of this process, probed on the first call.
///
/// # Errors
/// Where there is no driver, the driver or the device is too old, or there is no device.
pub fn device() -> Result<&'static Device, CudaError> {
    static DEVICE: OnceLock<Result<Device, CudaError>> = OnceLock::new();
    DEVICE
        .get_or_init(Device::find)
        .as_ref()
        .map_err(Clone::clone)
}

/// Memory of the device, freed on drop.
pub(super) struct Buffer<T> {
    slice: CudaSlice<T>,
    address: Address,
}

impl<T> Buffer<T> {
    pub(super) fn address(&self) -> Address {
        self.address
    }
}

impl Device {
    fn find() -> Result<Self, CudaError> {
        check_driver()?;
        let count = CudaContext::device_count().map_err(driver("counting devices"))?;
        if count == 0 {
            return Err(CudaError::NoDevice);
        }
        let context = CudaContext::new(0).map_err(driver("opening the device"))?;
        let name = context
            .name()
            .map_err(driver("reading the device's name"))?;
        let capability = context
            .compute_capability()
            .map_err(driver("reading the device's capability"))?;
        if capability < CAPABILITY {
            let found = format!("{}.{}", capability.0, capability.1);
            return Err(CudaError::OldDevice { name, found });
        }
        let attribute = |attribute| {
            let value = context
                .attribute(attribute)
                .map_err(driver("reading an attribute"))?;
            Ok(u32::try_from(value).unwrap_or(0))
        };
        Ok(Self {
            multiprocessors: attribute(
                CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT,
            )?,
            shared_limit: attribute(
                CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN,
            )?,
            stream: context.default_stream(),
            context,
            name,
            modules: Default::default(),
            tries: Mutex::default(),
            blas: OnceLock::new(),
        })
    }

    /// Its name, as the driver gives it.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Bytes of device memory in use by all programs.
    ///
    /// # Errors
    /// Where the driver fails.
    pub fn memory_in_use(&self) -> Result<usize, CudaError> {
        self.memory().map(|(free, total)| total - free)
    }

    /// Bytes of device memory that no program uses.
    ///
    /// # Errors
    /// Where the driver fails.
    pub fn memory_free(&self) -> Result<usize, CudaError> {
        self.memory().map(|(free, _)| free)
    }

    fn memory(&self) -> Result<(usize, usize), CudaError> {
        self.context
            .mem_get_info()
            .map_err(driver("reading memory"))
    }

    /// Waits until all work is done.
    ///
    /// # Errors
    /// Where earlier work failed.
    pub fn synchronize(&self) -> Result<(), CudaError> {
        self.bind()?;
        self.stream
            .synchronize()
            .map_err(driver("waiting for the device"))
    }

    /// Seconds that the device takes for the work which `work` starts.
    ///
    /// # Errors
    /// Those of `work` and of the driver.
    pub fn time(&self, work: impl FnOnce() -> Result<(), CudaError>) -> Result<f64, CudaError> {
        let event = || -> Result<CudaEvent, CudaError> {
            let flags = Some(sys::CUevent_flags::CU_EVENT_DEFAULT);
            self.stream
                .record_event(flags)
                .map_err(driver("recording an event"))
        };
        self.bind()?;
        let start = event()?;
        work()?;
        let milliseconds = start.elapsed_ms(&event()?).map_err(driver("timing"))?;
        Ok(f64::from(milliseconds) / 1e3)
    }

    /// Bytes per second that a copy within the device reads and writes, the two added.
    ///
    /// # Errors
    /// Where the driver fails.
    pub fn copy_bandwidth(&self) -> Result<f64, CudaError> {
        const BYTES: usize = 1 << 30;
        let (from, to) = (self.filled::<u8>(BYTES, 1)?, self.filled::<u8>(BYTES, 2)?);
        let mut best = f64::INFINITY;
        for _ in 0..10 {
            let seconds = self.time(|| {
                // SAFETY: both buffers have as many bytes and live until the time is taken.
                let status = unsafe {
                    cudarc::driver::result::memcpy_dtod_async(
                        to.address,
                        from.address,
                        BYTES,
                        self.stream.cu_stream(),
                    )
                };
                status.map_err(driver("copying on the device"))
            })?;
            best = best.min(seconds);
        }
        Ok(2.0 * BYTES as f64 / best)
    }

    /// Whether products run on cuBLAS.
    #[must_use]
    pub fn has_blas(&self) -> bool {
        self.blas().is_ok()
    }

    /// cuBLAS, where the machine has it.
    ///
    /// # Errors
    /// Where it is not found or does not start; the crate's own matrix product is then used.
    pub(super) fn blas(&self) -> Result<&Blas, CudaError> {
        self.bind()?;
        self.blas
            .get_or_init(|| Blas::find(self.stream.cu_stream().cast()))
            .as_ref()
            .map_err(Clone::clone)
    }

    /// The vocabulary's trie, uploaded on first use.
    pub(super) fn trie(&self, vocab: &Vocab) -> Result<Arc<ResidentTrie>, CudaError> {
        let mut tries = self.tries.lock().unwrap_or_else(PoisonError::into_inner);
        tries.find_or_add(vocab.id(), || ResidentTrie::new(self, vocab))
    }

    /// Memory whose contents are arbitrary.
    pub(super) fn allocate<T: DeviceRepr>(&self, len: usize) -> Result<Buffer<T>, CudaError> {
        self.bind()?;
        // SAFETY: every job writes what it later reads of a buffer from here.
        let slice = unsafe { self.stream.alloc(len.max(1)) };
        Ok(self.buffer(slice.map_err(driver("allocating device memory"))?))
    }

    /// Memory full of a byte.
    pub(super) fn filled<T: DeviceRepr>(
        &self,
        len: usize,
        byte: u8,
    ) -> Result<Buffer<T>, CudaError> {
        let buffer = self.allocate(len)?;
        self.fill(&buffer, byte)?;
        Ok(buffer)
    }

    pub(super) fn fill<T>(&self, buffer: &Buffer<T>, byte: u8) -> Result<(), CudaError> {
        let bytes = buffer.slice.num_bytes();
        // SAFETY: the buffer has as many bytes, and the stream orders the write after earlier uses.
        let status = unsafe {
            cudarc::driver::result::memset_d8_async(
                buffer.address,
                byte,
                bytes,
                self.stream.cu_stream(),
            )
        };
        status.map_err(driver("filling device memory"))
    }

    /// A copy of `values`.
    pub(super) fn upload<T: DeviceRepr>(&self, values: &[T]) -> Result<Buffer<T>, CudaError> {
        if values.is_empty() {
            return self.allocate(1);
        }
        self.bind()?;
        let slice = self.stream.clone_htod(values);
        Ok(self.buffer(slice.map_err(driver("copying to the device"))?))
    }

    /// The first `len` values, when all work before is done.
    pub(super) fn download<T: DeviceRepr>(
        &self,
        buffer: &Buffer<T>,
        len: usize,
    ) -> Result<Vec<T>, CudaError> {
        if len == 0 {
            return Ok(Vec::new());
        }
        let values = self.stream.clone_dtoh(&buffer.slice.slice(..len));
        let values = values.map_err(driver("copying from the device"))?;
        self.synchronize()?;
        Ok(values)
    }

    /// Overwrites `to` with the first values of `buffer`, when all work before is done.
    pub(super) fn download_into<T: DeviceRepr>(
        &self,
        buffer: &Buffer<T>,
        to: &mut [T],
    ) -> Result<(), CudaError> {
        if !to.is_empty() {
            let from = buffer.slice.slice(..to.len());
            self.stream
                .memcpy_dtoh(&from, to)
                .map_err(driver("copying from the device"))?;
        }
        self.synchronize()
    }

    /// Overwrites the first values of `to`.
    pub(super) fn upload_into<T: DeviceRepr>(
        &self,
        values: &[T],
        to: &mut Buffer<T>,
    ) -> Result<(), CudaError> {
        if values.is_empty() {
            return Ok(());
        }
        let mut to = to.slice.slice_mut(..values.len());
        self.stream
            .memcpy_htod(values, &mut to)
            .map_err(driver("copying to the device"))
    }

    /// A kernel that may ask for `shared` bytes of dynamic shared memory.
    pub(super) fn kernel(
        &self,
        unit: Unit,
        name: &str,
        shared: u32,
    ) -> Result<CudaFunction, CudaError> {
        let most = self.shared_limit.saturating_sub(STATIC_SHARED);
        if shared > most {
            return Err(CudaError::Unsupported {
                what: "a row that takes more shared memory than the device has",
            });
        }
        self.bind()?;
        let module = self.modules[unit as usize].get_or_init(|| {
            let module = self.context.load_module(Ptx::from_src(unit.ptx()));
            module.map_err(driver("loading kernels"))
        });
        let module = module.as_ref().map_err(Clone::clone)?;
        let function = module
            .load_function(name)
            .map_err(driver("finding a kernel"))?;
        if shared > 32 << 10 {
            // A property of the kernel, not of the launch: jobs of other sizes may be under way.
            let limit = CUfunction_attribute_enum::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
            function
                .set_attribute(limit, most.cast_signed())
                .map_err(driver("asking for shared memory"))?;
        }
        Ok(function)
    }

    /// Blocks of a kernel that run at a time.
    pub(super) fn resident_blocks(
        &self,
        kernel: &CudaFunction,
        shared: u32,
    ) -> Result<u32, CudaError> {
        let blocks = kernel
            .occupancy_max_active_blocks_per_multiprocessor(THREADS, shared as usize, None)
            .map_err(driver("asking for the occupancy"))?;
        Ok(blocks.max(1) * self.multiprocessors)
    }

    /// Starts a kernel on `grid` blocks.
    ///
    /// # Safety
    /// `job` must be the argument that the kernel declares, its addresses must be of memory that is as large as the
    /// kernel expects and lives until the device is done.
    pub(super) unsafe fn launch<J: DeviceRepr>(
        &self,
        kernel: &CudaFunction,
        grid: (u32, u32),
        shared: u32,
        job: &J,
    ) -> Result<(), CudaError> {
        if grid.0 == 0 || grid.1 == 0 {
            return Ok(());
        }
        let config = LaunchConfig {
            grid_dim: (grid.0, grid.1, 1),
            block_dim: (THREADS, 1, 1),
            shared_mem_bytes: shared,
        };
        let mut launch = self.stream.launch_builder(kernel);
        launch.arg(job);
        // SAFETY: the caller's promise.
        let started = unsafe { launch.launch(config) };
        started.map(drop).map_err(driver("starting a kernel"))
    }

    fn buffer<T>(&self, slice: CudaSlice<T>) -> Buffer<T> {
        let (address, _) = slice.device_ptr(&self.stream);
        let address: Address = address;
        Buffer { address, slice }
    }

    fn bind(&self) -> Result<(), CudaError> {
        self.context
            .bind_to_thread()
            .map_err(driver("using the device"))
    }
}

/// Looks for the driver before cudarc does, which panics where there is none.
fn check_driver() -> Result<(), CudaError> {
    let found = LIBRARIES.iter().any(|name| {
        // SAFETY: the driver's library is made to be loaded by name and runs nothing of ours.
        unsafe { libloading::Library::new(*name) }.is_ok()
    });
    if !found {
        return Err(CudaError::NoDriver {
            names: LIBRARY_NAMES,
        });
    }
    let mut version = 0;
    // SAFETY: writes one integer, and may be called before everything else.
    let status = unsafe { sys::cuDriverGetVersion(&raw mut version) };
    status
        .result()
        .map_err(driver("asking for the driver's version"))?;
    if version < NEEDED {
        return Err(CudaError::OldDriver {
            found: format!("{}.{}", version / 1000, version % 1000 / 10),
            needed: "12.4",
        });
    }
    Ok(())
}

pub(super) fn driver(what: &'static str) -> impl Fn(DriverError) -> CudaError {
    move |error| CudaError::Driver {
        what,
        reason: error.to_string(),
    }
}

/// A number that a kernel counts in 32 bits.
pub(super) fn count(value: usize) -> Result<u32, CudaError> {
    u32::try_from(value).map_err(|_| CudaError::Unsupported {
        what: "more than 2^32 - 1 entries",
    })
}

/// Elements of logits, gradients and weights as the bytes that cross to the device.
pub(super) fn bytes_of<T: crate::element::Element>(values: &[T]) -> &[u8] {
    // SAFETY: elements are floats of two or four bytes without padding, and the slice covers exactly them.
    unsafe { std::slice::from_raw_parts(values.as_ptr().cast(), size_of_val(values)) }
}

/// As [`bytes_of`], to write to.
pub(super) fn bytes_of_mut<T: crate::element::Element>(values: &mut [T]) -> &mut [u8] {
    // SAFETY: as in `bytes_of`; every pattern of bits is a float.
    unsafe { std::slice::from_raw_parts_mut(values.as_mut_ptr().cast(), size_of_val(values)) }
}
