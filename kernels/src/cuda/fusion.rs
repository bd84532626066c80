//! Integer fusion; inputs are checked by `crate::fusion`.

use std::mem::size_of_val;

use crate::code;
use crate::cuda::device::{Buffer, Device, count};
use crate::cuda::raw::{self, Unit, WARPS};
use crate::error::FusionError;
use crate::fusion::{MASS_BITS, Mixing};
use crate::records::{RecordShape, RecordView, Records, Symbol};

/// Appends the fused positions of one item: the bytes of `cpu::fusion`. The caller sends geometric means there.
pub(crate) fn fuse<S: Symbol>(
    device: &Device,
    mixing: Mixing<'_>,
    sources: &[RecordView<'_, S>],
    shape: &RecordShape,
    out: &mut Records<S>,
) -> Result<(), FusionError> {
    let positions = sources.first().map_or(0, RecordView::positions);
    let heard = heard(mixing, sources);
    let most: usize = heard.iter().map(|(_, source)| source.k()).sum();
    let symbol = size_of::<S>();
    let lists = most * WARPS as usize * 2 * (8 + symbol);
    let (unit, name, shared) = match (mixing, S::HAS_END) {
        (Mixing::Item(_) | Mixing::Positions(_) | Mixing::Geometric(_), true) => {
            (Unit::Fusion, "fuse_bytes", lists)
        }
        (Mixing::Item(_) | Mixing::Positions(_) | Mixing::Geometric(_), false) => {
            (Unit::Fusion, "fuse_tokens", lists)
        }
        (Mixing::Robust(_), is_bytes) => {
            let name = ["fuse_robust_tokens", "fuse_robust_bytes"][usize::from(is_bytes)];
            let shares = heard.len() * WARPS as usize * 2 * 4;
            (Unit::Robust, name, lists.next_multiple_of(4) + shares)
        }
    };
    let shared = count(shared)?;
    let kernel = device.kernel(unit, name, shared)?;
    let dropped = match mixing {
        Mixing::Robust(rule) => rule.dropped(heard.len()),
        Mixing::Item(_) | Mixing::Positions(_) | Mixing::Geometric(_) => 0,
    };
    let weights = match mixing {
        Mixing::Positions(weights) | Mixing::Geometric(weights) => Some(device.upload(weights)?),
        Mixing::Item(_) | Mixing::Robust(_) => None,
    };

    let mut columns = Vec::new();
    let mut descriptions = Vec::new();
    for (weight, source) in heard {
        let column = |bytes: &[u8]| device.upload(bytes);
        let parts = [
            column(symbol_bytes(source.symbols()))?,
            column(source.codes())?,
            column(source.end())?,
            column(source.tail())?,
        ];
        descriptions.push(raw::Source {
            symbols: parts[0].address(),
            codes: parts[1].address(),
            end: if S::HAS_END { parts[2].address() } else { 0 },
            tail: parts[3].address(),
            slots: count(source.k())?,
            weight,
        });
        columns.push(parts);
    }
    let descriptions = device.upload(&descriptions)?;
    let masses: Vec<u32> = (0..=u8::MAX).map(code::mass).collect();
    let masses = device.upload(&masses)?;
    let half_steps = device.upload(&code::HALF_STEPS)?;
    let slots = positions * shape.k;
    let symbols = device.allocate::<u8>(slots * symbol)?;
    let codes = device.allocate::<u8>(slots)?;
    let (end, tail) = (
        device.allocate::<u8>(positions)?,
        device.allocate::<u8>(positions)?,
    );
    let full = (u128::from(shape.fill_permille) << MASS_BITS).div_ceil(1000);
    let job = raw::Fusion {
        sources: descriptions.address(),
        masses: masses.address(),
        half_steps: half_steps.address(),
        count: count(columns.len())?,
        positions: count(positions)?,
        most: count(most)?,
        slots: count(shape.k)?,
        full: u64::try_from(full).unwrap_or(u64::MAX),
        symbols: symbols.address(),
        codes: codes.address(),
        end: if S::HAS_END { end.address() } else { 0 },
        tail: tail.address(),
        weights: weights.as_ref().map_or(0, Buffer::address),
        dropped: count(dropped)?,
        padding: 0,
    };
    let blocks = job.positions.div_ceil(WARPS);
    // SAFETY: the job of the fusion kernels: columns of `positions` entries (times slots), symbols of the kernel's size,
    // shared memory for every warp's lists and shares, all held by this function until the downloads below have waited.
    unsafe { device.launch(&kernel, (blocks, 1), shared, &job) }?;
    let mut fused = vec![S::default(); slots];
    device.download_into(&symbols, symbol_bytes_mut(&mut fused))?;
    let records = Records::from_columns(
        shape.k,
        fused,
        device.download(&codes, slots)?,
        if S::HAS_END {
            device.download(&end, positions)?
        } else {
            Vec::new()
        },
        device.download(&tail, positions)?,
    )?;
    out.append(records.view())?;
    Ok(())
}

/// Sources that have a say, with the weight of an item.
fn heard<'a, 's, S: Symbol>(
    mixing: Mixing<'_>,
    sources: &'a [RecordView<'s, S>],
) -> Vec<(u32, &'a RecordView<'s, S>)> {
    let Mixing::Item(weights) = mixing else {
        return sources.iter().map(|source| (1, source)).collect();
    };
    let pairs = weights.iter().copied().zip(sources);
    pairs.filter(|&(weight, _)| weight > 0).collect()
}

fn symbol_bytes<S: Symbol>(symbols: &[S]) -> &[u8] {
    // SAFETY: symbols are `u8` or `u32`, without padding, and the slice covers exactly them.
    unsafe { std::slice::from_raw_parts(symbols.as_ptr().cast(), size_of_val(symbols)) }
}

fn symbol_bytes_mut<S: Symbol>(symbols: &mut [S]) -> &mut [u8] {
    // SAFETY: as in `symbol_bytes`; every pattern of bits is an integer.
    unsafe { std::slice::from_raw_parts_mut(symbols.as_mut_ptr().cast(), size_of_val(symbols)) }
}
