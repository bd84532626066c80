//! Integer fusion of three contributions in byte space, 16 slots, on one core.
//!
//! The floor of one source is the copy of its columns; twins are numpy and torch on records of the
//! same statistics.
#![expect(clippy::print_stdout, reason = "a benchmark prints its table")]

use consilium_kernels::fusion::{
    Mixing, Robust, Routing, WEIGHT_UNITY, fuse, item_bits, route, route_causal,
};
use consilium_kernels::{RecordShape, RecordView, Records, code};

mod common;

const POSITIONS: usize = 1 << 16;
const SOURCES: usize = 3;
const SHAPE: RecordShape = RecordShape {
    k: 16,
    fill_permille: 995,
};

fn main() {
    common::one_thread();
    // The word `copy` limits the run to the floor of one source.
    let only_copy = std::env::args().any(|word| word == "copy");
    let target: Vec<u8> = (0..POSITIONS - 1).map(|i| observed(i as u64)).collect();
    let sources: Vec<Records> = (0..SOURCES as u64)
        .map(|seed| records(seed, &target))
        .collect();
    let views: Vec<RecordView<'_>> = sources.iter().map(Records::view).collect();
    if only_copy {
        copy_floor(views[0]);
        return;
    }
    println!(
        "{:<26} {:>9} {:>11} {:>11} {:>8} {:>8}",
        "operation", "ns/pos", "numpy ns", "torch ns", "x numpy", "x torch"
    );
    let only = [WEIGHT_UNITY, 0, 0];
    let weights = [40_000, 20_000, 5_536];
    let causal = route_causal(20, &views, &target).expect("one position per byte and the end");
    let trimmed = Robust::TrimmedMean { trim_permille: 334 };
    let mut twin = common::Twin::start("fusion");
    for (name, case, mixing) in [
        ("minCE", "single", Mixing::Item(&only)),
        ("softmax routing", "weighted", Mixing::Item(&weights)),
        (
            "causal routing, weights given",
            "weighted",
            Mixing::Positions(&causal),
        ),
        ("median", "median", Mixing::Robust(Robust::Median)),
        ("trimmed mean", "trimmed", Mixing::Robust(trimmed)),
    ] {
        let mut out = Records::new(SHAPE.k).expect("16 slots");
        let mut work = || {
            out.clear();
            fuse(mixing, &views, &SHAPE, &mut out).expect("sources fit");
        };
        let mut against = |library| {
            common::against_twin(
                &mut twin,
                &format!("{library} {case} {POSITIONS}"),
                &mut work,
            )
        };
        let (seconds, numpy) = against("numpy");
        let (_, torch) = against("torch");
        let ns = |seconds: f64| seconds / POSITIONS as f64 * 1e9;
        let theirs = |compared: &Option<common::Compared>| {
            compared.map_or(f64::NAN, |compared| ns(compared.theirs))
        };
        let ratio = |compared: &Option<common::Compared>| {
            compared.map_or(f64::NAN, |compared| compared.ratio)
        };
        println!(
            "{name:<26} {:>9.1} {:>11.1} {:>11.1} {:>8.1} {:>8.1}",
            ns(seconds),
            theirs(&numpy),
            theirs(&torch),
            ratio(&numpy),
            ratio(&torch)
        );
    }
    copy_floor(views[0]);
    routing(&views, &target);
}

/// One source of full weight against the copy of its columns, 34 bytes per position, in one run and
/// in items; all far beyond the caches.
fn copy_floor(view: RecordView<'_>) {
    let mut long = Records::new(SHAPE.k).expect("16 slots");
    for _ in 0..16 {
        long.append(view).expect("16 slots");
    }
    let view = long.view();
    let columns = [view.symbols(), view.codes(), view.end(), view.tail()];
    let mut copies = columns.map(<[u8]>::to_vec);
    let mut out = Records::new(SHAPE.k).expect("16 slots");
    let floors = common::Floors::measure();
    for length in [view.positions(), 200] {
        let starts = (0..view.positions()).step_by(length);
        let items: Vec<RecordView<'_>> = starts
            .map(|start| start..(start + length).min(view.positions()))
            .map(|item| view.slice(item).expect("positions that are there"))
            .collect();
        let compared = common::in_turn(
            || {
                out.clear();
                for &item in &items {
                    fuse(Mixing::Item(&[WEIGHT_UNITY]), &[item], &SHAPE, &mut out)
                        .expect("sources fit");
                }
            },
            || {
                for (copy, column) in copies.iter_mut().zip(columns) {
                    copy.copy_from_slice(std::hint::black_box(column));
                }
                std::hint::black_box(&copies);
            },
        );
        let bytes = (2 * columns.iter().map(|column| column.len()).sum::<usize>()) as f64;
        println!(
            "minCE, items of {length} positions: {:.1} ns/pos, {:.2} GB/s read and written: {:.0} % of the copy of the same columns, {:.0} % of the copy bandwidth of {:.1} GB/s",
            compared.ours / view.positions() as f64 * 1e9,
            bytes / compared.ours / 1e9,
            100.0 * compared.ratio,
            100.0 * bytes / compared.ours / floors.copy,
            floors.copy / 1e9,
        );
    }
}

fn routing(views: &[RecordView<'_>], target: &[u8]) {
    let item = common::alone(|| {
        let bits: Vec<_> = views
            .iter()
            .map(|&view| item_bits(view, target, &[]).expect("one position per byte and the end"))
            .collect();
        route(Routing::Softmax { sharpness: 20 }, &bits)
    });
    let causal = common::alone(|| route_causal(20, views, target));
    println!(
        "weights of an item {:.1} ns/pos, of every position {:.1} ns/pos",
        item / POSITIONS as f64 * 1e9,
        causal / POSITIONS as f64 * 1e9
    );
}

/// A letter in proportion to a power law.
#[expect(clippy::cast_possible_truncation, reason = "below 256")]
fn observed(index: u64) -> u8 {
    let u = random(index) % 1000;
    b'a' + ((u * u * 26) / 1_000_000) as u8
}

/// Records of a source that mostly expects what was observed, filled by the honest rule: four used
/// slots on average, as records of trained models have.
fn records(seed: u64, target: &[u8]) -> Records {
    let mut columns = [const { Vec::new() }; 4];
    for position in 0..=target.len() {
        let draw = |slot: u64| random((seed << 40) + ((position as u64) << 6) + slot) % 4096;
        let decay = 0.01 + 0.75 * (draw(63) as f64 / 4096.0).powi(2);
        let mut masses: Vec<(u8, f64)> = Vec::new();
        let mut left = 0.9999;
        let first = target.get(position).copied().unwrap_or(b' ');
        for slot in 0..60_u64 {
            let symbol = if slot == 0 {
                first
            } else {
                b' ' + (draw(slot) % 90) as u8
            };
            if masses.iter().any(|pair| pair.0 == symbol) {
                continue;
            }
            masses.push((symbol, left * (1.0 - decay)));
            left *= decay;
            if masses.len() == SHAPE.k || left < 0.005 {
                break;
            }
        }
        masses.sort_by_key(|pair| pair.0);
        let last = masses[masses.len() - 1].0;
        for slot in 0..SHAPE.k {
            let (symbol, code) = masses
                .get(slot)
                .map_or((last, 255), |&(symbol, mass)| (symbol, code::encode(mass)));
            columns[0].push(symbol);
            columns[1].push(code);
        }
        columns[2].push(code::encode(0.0001));
        columns[3].push(code::encode(left));
    }
    let [symbols, codes, end, tail] = columns;
    Records::from_columns(SHAPE.k, symbols, codes, end, tail).expect("symbols ascend")
}

/// SplitMix64 of an index.
fn random(index: u64) -> u64 {
    let mut z = index
        .wrapping_add(0x9e37_79b9_7f4a_7c15)
        .wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}
