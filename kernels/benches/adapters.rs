//! Merging 8 adapters of a 7B shape on one core, against the copy of all inputs.
//!
//! Twins are numpy and torch on an eighth of the layers, with ours timed on the same.
#![expect(clippy::print_stdout, reason = "a benchmark prints its table")]

use consilium_kernels::adapters::{Magnitudes, Merging, merge};
use consilium_kernels::fusion::Robust;

mod common;

const ADAPTERS: usize = 8;
const RANK: usize = 16;
/// Inputs and outputs of the seven projections of a layer.
const SHAPES: [(usize, usize); 7] = [
    (4096, 4096),
    (4096, 4096),
    (4096, 4096),
    (4096, 4096),
    (4096, 11_008),
    (4096, 11_008),
    (11_008, 4096),
];

fn main() {
    common::one_thread();
    let layer: usize = SHAPES
        .iter()
        .map(|(columns, rows)| RANK * (columns + rows))
        .sum();
    println!(
        "{:<22} {:>8} {:>8} {:>10}",
        "operation", "s", "floor s", "x floor"
    );
    let full = values(32 * layer);
    let mut copy = vec![0.0_f32; full[0].len()];
    for (name, rule) in RULES {
        let inputs: Vec<&[f32]> = full.iter().map(Vec::as_slice).collect();
        let mut out = vec![0.0_f32; inputs[0].len()];
        let compared = common::in_turn(
            || run(rule, &inputs, &mut out),
            || {
                for values in &full {
                    copy.copy_from_slice(std::hint::black_box(values));
                    std::hint::black_box(&copy);
                }
            },
        );
        println!(
            "{name:<22} {:>8.3} {:>8.3} {:>10.2}",
            compared.ours,
            compared.theirs,
            1.0 / compared.ratio
        );
    }
    drop(full);
    let part = values(4 * layer);
    let inputs: Vec<&[f32]> = part.iter().map(Vec::as_slice).collect();
    let mut out = vec![0.0_f32; inputs[0].len()];
    let Some(mut twin) = common::Twin::start("adapters").map(Some) else {
        return;
    };
    println!(
        "{:<22} {:>8} {:>8} {:>10}",
        "4 layers", "s", "twin s", "x twin"
    );
    for library in ["numpy", "torch"] {
        for (name, rule) in RULES {
            let case = format!("{library} {name} {}", inputs[0].len());
            let (seconds, compared) =
                common::against_twin(&mut twin, &case, || run(rule, &inputs, &mut out));
            if let Some(compared) = compared {
                println!(
                    "{:<22} {seconds:>8.3} {:>8.3} {:>10.1}",
                    format!("{name} {library}"),
                    compared.theirs,
                    compared.ratio
                );
            }
        }
    }
}

#[derive(Clone, Copy)]
enum Rule {
    FedAvg,
    Robust(Robust),
    Ties,
}

const RULES: [(&str, Rule); 4] = [
    ("fedavg", Rule::FedAvg),
    ("median", Rule::Robust(Robust::Median)),
    (
        "trimmed",
        Rule::Robust(Robust::TrimmedMean { trim_permille: 125 }),
    ),
    ("ties", Rule::Ties),
];

fn run(rule: Rule, inputs: &[&[f32]], out: &mut [f32]) {
    let weights = [1.0 / ADAPTERS as f64; ADAPTERS];
    let merged = match rule {
        Rule::FedAvg => merge(Merging::Sum { weights: &weights }, inputs, out),
        Rule::Robust(rule) => merge(Merging::Robust(rule), inputs, out),
        Rule::Ties => {
            let thresholds: Vec<f32> = inputs.iter().map(|values| threshold(values)).collect();
            let merging = Merging::Ties {
                weights: &weights,
                thresholds: &thresholds,
            };
            merge(merging, inputs, out)
        }
    };
    merged.expect("finite values of one length");
}

/// Of the largest fifth.
fn threshold(values: &[f32]) -> f32 {
    let mut coarse = Magnitudes::default();
    coarse.observe(values).expect("finite values");
    let mut fine = coarse.narrow(200).expect("a fifth of some values");
    fine.observe(values);
    fine.finish().expect("the same values")
}

/// Bell-shaped values, as training leaves them.
fn values(count: usize) -> Vec<Vec<f32>> {
    let mut state = 1_u64;
    let mut uniform = || {
        state = state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        (state >> 40) as f32 / (1 << 24) as f32
    };
    let mut normal = || (uniform() + uniform() + uniform() + uniform() - 2.0) * 0.035;
    (0..ADAPTERS)
        .map(|_| (0..count).map(|_| normal()).collect())
        .collect()
}
