//! Where tensors live and how many threads work on them.

use candle_core::Device;

/// The device of all tensors of this worker.
pub fn device() -> Device {
    Device::Cpu
}

/// Threads of the worker: `RAYON_NUM_THREADS`, else all cores. Several workers on one machine should
/// share its cores out, because results do not depend on the number and waiting threads cost time.
pub fn threads() -> usize {
    rayon::current_num_threads()
}
