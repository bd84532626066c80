//! Fusion as the module of the public function states it, with maps and wide integers.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet};

use crate::code;
use crate::fusion::{MASS_BITS, Mixing, Robust, exp2_minus};
use crate::records::{RecordShape, RecordView, Records, Symbol};

pub(crate) fn fuse<S: Symbol>(
    mixing: Mixing<'_>,
    sources: &[RecordView<'_, S>],
    shape: &RecordShape,
    out: &mut Records<S>,
) {
    for position in 0..sources.first().map_or(0, RecordView::positions) {
        let shares = || -> Vec<Shares<S>> {
            let sources = sources.iter();
            sources.map(|source| Shares::of(source, position)).collect()
        };
        let weights = mixing.weights(position, sources.len());
        let (fused, end) = match mixing {
            Mixing::Robust(robust) => statistic(robust, &shares()),
            Mixing::Item(_) | Mixing::Positions(_) => weighted(weights, &shares()),
            Mixing::Geometric(_) => geometric(weights, sources, position),
        };
        keep(&fused, end, shape, out);
    }
}

/// Shares of a source at a position, out of 2^32.
struct Shares<S> {
    listed: BTreeMap<S, u64>,
    end: u64,
    tail: u64,
    /// Share of a symbol that is not listed.
    unlisted: u64,
}

impl<S: Symbol> Shares<S> {
    fn of(source: &RecordView<'_, S>, position: usize) -> Self {
        let total = u128::from(source.total_mass(position));
        let share = |code: u8| {
            u64::try_from((u128::from(code::mass(code)) << 32) / total).unwrap_or(u64::MAX)
        };
        let listed: BTreeMap<S, u64> = source
            .listed(position)
            .map(|(symbol, code)| (symbol, share(code)))
            .collect();
        let tail = share(source.tail()[position]);
        let others = 256 - listed.len().min(256) as u64;
        let unlisted = if S::HAS_END {
            tail.checked_div(others).unwrap_or(0)
        } else {
            0
        };
        Self {
            end: source.end().get(position).map_or(0, |&code| share(code)),
            listed,
            tail,
            unlisted,
        }
    }
}

fn weighted<S: Symbol>(weights: &[u32], shares: &[Shares<S>]) -> (BTreeMap<S, u64>, u64) {
    let mut fused = BTreeMap::new();
    let mut end = 0;
    for (&weight, source) in weights.iter().zip(shares).filter(|pair| *pair.0 > 0) {
        for (&symbol, &share) in &source.listed {
            *fused.entry(symbol).or_default() += u64::from(weight) * share;
        }
        end += u64::from(weight) * source.end;
    }
    (fused, end)
}

fn statistic<S: Symbol>(robust: Robust, shares: &[Shares<S>]) -> (BTreeMap<S, u64>, u64) {
    let dropped = robust.dropped(shares.len());
    let middle = |share: &dyn Fn(&Shares<S>) -> u64| {
        let mut values: Vec<u64> = shares.iter().map(share).collect();
        values.sort_unstable();
        let rest = &values[dropped..values.len() - dropped];
        rest.iter().sum::<u64>() / rest.len() as u64
    };
    let symbols: BTreeSet<S> = shares
        .iter()
        .flat_map(|source| source.listed.keys().copied())
        .collect();
    let of = |symbol: S| middle(&|source| *source.listed.get(&symbol).unwrap_or(&source.unlisted));
    let end = middle(&|source| source.end);
    let others = if S::HAS_END {
        (256 - symbols.len() as u64) * middle(&|source| source.unlisted)
    } else {
        middle(&|source| source.tail)
    };
    let total = symbols.iter().map(|&symbol| of(symbol)).sum::<u64>() + end + others;
    let renormalised = |mass: u64| {
        u64::try_from((u128::from(mass) << MASS_BITS) / u128::from(total)).unwrap_or(u64::MAX)
    };
    let fused = symbols
        .iter()
        .map(|&symbol| (symbol, renormalised(of(symbol))))
        .collect();
    (fused, renormalised(end))
}

/// Codes of a source that has weight at a position.
struct Heard<S> {
    weight: u64,
    listed: BTreeMap<S, u64>,
    end: u64,
    tail: u64,
    /// Code of a symbol that is not listed.
    unlisted: u64,
}

impl<S: Symbol> Heard<S> {
    fn of(weight: u32, source: &RecordView<'_, S>, position: usize) -> Self {
        let listed: BTreeMap<S, u64> = source
            .listed(position)
            .map(|(symbol, code)| (symbol, u64::from(code)))
            .collect();
        let tail = u64::from(source.tail()[position]);
        let unlisted = if S::HAS_END {
            tail + u64::from(code::log2_sixteenths(256 - listed.len() as u64))
        } else {
            u64::from(code::FLOOR)
        };
        Self {
            weight: u64::from(weight),
            end: source
                .end()
                .get(position)
                .map_or(0, |&code| u64::from(code)),
            listed,
            tail,
            unlisted,
        }
    }
}

fn geometric<S: Symbol>(
    weights: &[u32],
    sources: &[RecordView<'_, S>],
    position: usize,
) -> (BTreeMap<S, u64>, u64) {
    let heard: Vec<Heard<S>> = weights
        .iter()
        .zip(sources)
        .filter(|pair| *pair.0 > 0)
        .map(|(&weight, source)| Heard::of(weight, source, position))
        .collect();
    let exponent = |code: &dyn Fn(&Heard<S>) -> u64| -> u64 {
        heard.iter().map(|heard| heard.weight * code(heard)).sum()
    };
    let symbols: BTreeSet<S> = heard
        .iter()
        .flat_map(|heard| heard.listed.keys().copied())
        .collect();
    let of: BTreeMap<S, u64> = symbols
        .iter()
        .map(|&symbol| {
            let code = |heard: &Heard<S>| *heard.listed.get(&symbol).unwrap_or(&heard.unlisted);
            (symbol, exponent(&code))
        })
        .collect();
    let end = S::HAS_END.then(|| exponent(&|heard| heard.end));
    let (others, nobody) = if S::HAS_END {
        (256 - of.len() as u64, exponent(&|heard| heard.unlisted))
    } else {
        (1, exponent(&|heard| heard.tail))
    };
    let nobody = (others > 0).then_some(nobody);
    let least = of.values().copied().chain(end).chain(nobody).min();
    let least = least.unwrap_or(0);
    let mass = |exponent: u64| u128::from(exp2_minus(u128::from(exponent - least) << 12) >> 30);
    let end = end.map_or(0, mass);
    let total = of.values().map(|&exponent| mass(exponent)).sum::<u128>()
        + end
        + u128::from(others) * nobody.map_or(0, mass);
    let renormalised = |mass: u128| u64::try_from((mass << MASS_BITS) / total).unwrap_or(u64::MAX);
    let fused = of
        .iter()
        .map(|(&symbol, &exponent)| (symbol, renormalised(mass(exponent))))
        .collect();
    (fused, renormalised(end))
}

/// Appends the position that the fused masses make.
fn keep<S: Symbol>(fused: &BTreeMap<S, u64>, end: u64, shape: &RecordShape, out: &mut Records<S>) {
    let mut ranked: Vec<(S, u64)> = fused
        .iter()
        .map(|(&symbol, &mass)| (symbol, mass))
        .collect();
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
