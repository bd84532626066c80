//! Fusion by merging short sorted lists, a fixed run of positions per task.

use std::ops::Range;

use rayon::prelude::*;

use crate::code;
use crate::error::RecordError;
use crate::fusion::MASS_BITS;
use crate::records::{RecordShape, RecordView, Records, Symbol};

/// Positions of one task.
const POSITIONS: usize = 128;

pub(crate) fn fuse<S: Symbol>(
    weights: &[u32],
    sources: &[RecordView<'_, S>],
    shape: &RecordShape,
    out: &mut Records<S>,
) -> Result<(), RecordError> {
    let positions = sources.first().map_or(0, RecordView::positions);
    let weighted: Vec<(u64, RecordView<'_, S>)> = weights
        .iter()
        .zip(sources)
        .filter(|&(&weight, _)| weight > 0)
        .map(|(&weight, &source)| (u64::from(weight), source))
        .collect();
    if positions <= POSITIONS {
        fuse_run(&weighted, 0..positions, shape, out);
        return Ok(());
    }
    let runs: Vec<Range<usize>> = (0..positions)
        .step_by(POSITIONS)
        .map(|start| start..positions.min(start + POSITIONS))
        .collect();
    let fused: Vec<Result<Records<S>, RecordError>> = runs
        .into_par_iter()
        .map(|run| {
            let mut records = Records::new(shape.k)?;
            fuse_run(&weighted, run, shape, &mut records);
            Ok(records)
        })
        .collect();
    for records in fused {
        out.append(records?.view())?;
    }
    Ok(())
}

fn fuse_run<S: Symbol>(
    sources: &[(u64, RecordView<'_, S>)],
    run: Range<usize>,
    shape: &RecordShape,
    out: &mut Records<S>,
) {
    let full = (u128::from(shape.fill_permille) << MASS_BITS).div_ceil(1000);
    let mut masses: Vec<(S, u64)> = Vec::new();
    let mut listed = Vec::with_capacity(shape.k);
    for position in run {
        masses.clear();
        let mut end = 0;
        for (weight, source) in sources {
            // At most 258 masses of 2^31, and a mass shifted by 32: both fit 64 bits.
            let total = source.total_mass(position);
            let share = |code: u8| weight * ((u64::from(code::mass(code)) << 32) / total);
            masses.extend(
                source
                    .listed(position)
                    .map(|(symbol, code)| (symbol, share(code))),
            );
            end += source.end().get(position).map_or(0, |&code| share(code));
        }
        merge(&mut masses);
        masses.sort_unstable_by(|a, b| b.1.cmp(&a.1).then(a.0.cmp(&b.0)));
        let mut filled = end;
        listed.clear();
        for &(symbol, mass) in masses.iter().take(shape.k) {
            if !listed.is_empty() && u128::from(filled) >= full {
                break;
            }
            filled += mass;
            listed.push((symbol, code::encode_mass(mass, MASS_BITS)));
        }
        listed.sort_unstable_by_key(|&(symbol, _)| symbol);
        let tail = (1 << MASS_BITS) - filled;
        out.push(
            &listed,
            code::encode_mass(end, MASS_BITS),
            code::encode_mass(tail, MASS_BITS),
        );
    }
}

/// Adds up the masses of equal symbols.
fn merge<S: Symbol>(masses: &mut Vec<(S, u64)>) {
    masses.sort_unstable_by_key(|&(symbol, _)| symbol);
    masses.dedup_by(|next, kept| {
        let same = next.0 == kept.0;
        if same {
            kept.1 += next.1;
        }
        same
    });
}
