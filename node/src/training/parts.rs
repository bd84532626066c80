//! An estimate of memory as `plan` answers it: the peak and its parts, of the host and of a device.

use crate::reply::Reply;
use crate::worker::plan::{DeviceMemory, Estimate, HostMemory, Memory};

/// Adds every number.
pub(super) fn with_estimate(reply: Reply, estimate: &Estimate) -> Reply {
    match estimate {
        Estimate::Host(memory) => with(reply, &of_processors(memory)),
        Estimate::Device(device, host) => with(with(reply, &of_device(device)), &beside(host)),
    }
}

fn with(reply: Reply, parts: &[(&str, usize)]) -> Reply {
    parts
        .iter()
        .fold(reply, |reply, (name, bytes)| reply.with(name, *bytes))
}

fn of_processors(memory: &Memory) -> [(&'static str, usize); 10] {
    let Memory {
        weights,
        offloaded,
        adapters,
        gradients,
        optimiser,
        activations,
        head,
        process,
        loading,
    } = *memory;
    [
        ("memory_bytes", memory.total()),
        ("weights_bytes", weights),
        ("offloaded_bytes", offloaded),
        ("adapters_bytes", adapters),
        ("gradients_bytes", gradients),
        ("optimiser_bytes", optimiser),
        ("activations_bytes", activations),
        ("head_bytes", head),
        ("process_bytes", process),
        ("loading_bytes", loading),
    ]
}

fn of_device(memory: &DeviceMemory) -> [(&'static str, usize); 10] {
    let DeviceMemory {
        weights,
        buffers,
        adapters,
        gradients,
        optimiser,
        activations,
        head,
        process,
        after,
    } = *memory;
    [
        ("device_memory_bytes", memory.total()),
        ("device_weights_bytes", weights),
        ("device_buffers_bytes", buffers),
        ("device_adapters_bytes", adapters),
        ("device_gradients_bytes", gradients),
        ("device_optimiser_bytes", optimiser),
        ("device_activations_bytes", activations),
        ("device_head_bytes", head),
        ("device_process_bytes", process),
        ("device_after_bytes", after),
    ]
}

fn beside(memory: &HostMemory) -> [(&'static str, usize); 5] {
    let HostMemory {
        weights,
        buffers,
        process,
        loading,
    } = *memory;
    [
        ("memory_bytes", memory.total()),
        ("weights_bytes", weights),
        ("buffers_bytes", buffers),
        ("process_bytes", process),
        ("loading_bytes", loading),
    ]
}
