//! Fusion as the module of the public function states it, with maps and wide integers.

use std::cmp::Reverse;
use std::collections::BTreeMap;

use crate::code;
use crate::fusion::MASS_BITS;
use crate::records::{RecordShape, RecordView, Records, Symbol};

pub(crate) fn fuse<S: Symbol>(
    weights: &[u32],
    sources: &[RecordView<'_, S>],
    shape: &RecordShape,
    out: &mut Records<S>,
) {
    for position in 0..sources.first().map_or(0, RecordView::positions) {
        let mut fused: BTreeMap<S, u64> = BTreeMap::new();
        let mut end = 0_u64;
        for (&weight, source) in weights
            .iter()
            .zip(sources)
            .filter(|&(&weight, _)| weight > 0)
        {
            let total = u128::from(source.total_mass(position));
            let share = |code: u8| {
                let share = (u128::from(code::mass(code)) << 32) / total;
                u64::from(weight) * u64::try_from(share).unwrap_or(u64::MAX)
            };
            for (symbol, code) in source.listed(position) {
                *fused.entry(symbol).or_default() += share(code);
            }
            end += source.end().get(position).map_or(0, |&code| share(code));
        }
        let mut ranked: Vec<(S, u64)> = fused.into_iter().collect();
        ranked.sort_by_key(|&(symbol, mass)| (Reverse(mass), symbol));
        let full = u128::from(shape.fill_permille) << MASS_BITS;
        let mut filled = end;
        let mut kept = Vec::new();
        for (symbol, mass) in ranked {
            if kept.len() == shape.k || (!kept.is_empty() && u128::from(filled) * 1000 >= full) {
                break;
            }
            filled += mass;
            kept.push((symbol, code::encode_mass(mass, MASS_BITS)));
        }
        kept.sort_unstable();
        let tail = (1 << MASS_BITS) - filled;
        out.push(
            &kept,
            code::encode_mass(end, MASS_BITS),
            code::encode_mass(tail, MASS_BITS),
        );
    }
}
