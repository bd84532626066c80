//! Merging adapters; inputs are checked by `crate::adapters`.

use crate::adapters::Merging;
use crate::cuda::device::{Buffer, Device, bytes_of, count};
use crate::cuda::raw::{self, Address, RULE_ROBUST, RULE_SCE, RULE_SUM, RULE_TIES, THREADS, Unit};
use crate::cuda::rows::suffix;
use crate::element::Element;
use crate::error::AdapterError;

/// Values that cross at a time: what a chunk of every adapter takes is small beside the device's memory.
const CHUNK: usize = 1 << 24;

/// `out[j]` from the value j of every adapter: the bits of `cpu::adapters`.
pub(crate) fn merge<T: Element>(
    device: &Device,
    merging: Merging<'_>,
    adapters: &[&[T]],
    out: &mut [f32],
) -> Result<(), AdapterError> {
    for (index, out) in out.chunks_mut(CHUNK).enumerate() {
        let start = index * CHUNK;
        let values = start..start + out.len();
        let parts: Vec<&[T]> = adapters
            .iter()
            .map(|adapter| &adapter[values.clone()])
            .collect();
        merge_chunk(device, merging, &parts, out).map_err(|error| match error {
            AdapterError::Overflow { index } => AdapterError::Overflow {
                index: start + index,
            },
            other => other.shifted(start),
        })?;
    }
    Ok(())
}

fn merge_chunk<T: Element>(
    device: &Device,
    merging: Merging<'_>,
    adapters: &[&[T]],
    out: &mut [f32],
) -> Result<(), AdapterError> {
    let among = adapters.len();
    let (rule, weights, thresholds) = match merging {
        Merging::Sum { weights } => (RULE_SUM, weights, &[][..]),
        Merging::Robust(_) => (RULE_ROBUST, &[][..], &[][..]),
        Merging::Ties {
            weights,
            thresholds,
        } => (RULE_TIES, weights, thresholds),
        Merging::Sce { weights } => (RULE_SCE, weights, &[][..]),
    };
    let (dropped, columns) = match merging {
        Merging::Robust(rule) => (rule.dropped(among), among * THREADS as usize * 4),
        _ => (0, 0),
    };
    let shared = count(columns)?;
    let kernel = device.kernel(
        Unit::Adapters,
        &format!("merge_{}", suffix(T::DTYPE)),
        shared,
    )?;
    let values = adapters
        .iter()
        .map(|values| device.upload(bytes_of(values)))
        .collect::<Result<Vec<_>, _>>()?;
    let addresses: Vec<Address> = values.iter().map(Buffer::address).collect();
    let (addresses, weights, thresholds) = (
        device.upload(&addresses)?,
        device.upload(weights)?,
        device.upload(thresholds)?,
    );
    let merged = device.allocate::<f32>(out.len())?;
    let failed = device.filled::<u64>(2, 0xff)?;
    let job = raw::Merge {
        adapters: addresses.address(),
        weights: weights.address(),
        thresholds: thresholds.address(),
        out: merged.address(),
        bad: failed.address(),
        overflow: failed.address() + 8,
        count: out.len() as u64,
        among: count(among)?,
        rule,
        dropped: count(dropped)?,
        padding: 0,
    };
    let blocks = count(out.len().div_ceil(THREADS as usize))?;
    // SAFETY: the job of the merge kernels: `count` values of the kernel's type for every adapter, a weight each where
    // the rule has them, a column of shared memory per thread, all held by this function until it has downloaded.
    unsafe { device.launch(&kernel, (blocks, 1), shared, &job) }?;
    let failed = device.download(&failed, 2)?;
    let cell = |index: usize| {
        usize::try_from(failed[index])
            .ok()
            .filter(|&cell| cell != usize::MAX)
    };
    if let Some(cell) = cell(0) {
        return Err(AdapterError::NotFinite {
            adapter: cell % among,
            index: cell / among,
        });
    }
    if let Some(index) = cell(1) {
        return Err(AdapterError::Overflow { index });
    }
    Ok(device.download_into(&merged, out)?)
}
