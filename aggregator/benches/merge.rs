//! Merging 8 adapters of one matrix of a 7B model (4096 x 4096, rank 16) by every rule, on one core, against the copy of all inputs.
#![expect(clippy::print_stdout, reason = "a benchmark prints its table")]

use std::hint::black_box;

use consilium_aggregator::fusion::{Content, MergeInput, merge_in_memory};
use consilium_aggregator::rounds::request::OpenRequest;
use consilium_protocol::InstitutionId;
use consilium_protocol::manifest::{Defence, MergeRule, Training};
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};
use safetensors::tensor::{Dtype, TensorView};

const ADAPTERS: u64 = 8;
const RANK: usize = 16;
const WIDTH: usize = 4096;
const LAYER: &str = "base_model.model.model.layers.0.self_attn.q_proj";
const REPEATS: usize = 3;

fn main() {
    let pool = rayon::ThreadPoolBuilder::new().num_threads(1).build();
    pool.expect("one thread").install(run);
}

fn run() {
    let start = adapter(0, true);
    let files: Vec<Vec<u8>> = (1..=ADAPTERS).map(|seed| adapter(seed, false)).collect();
    let adapters: Vec<_> = files
        .iter()
        .zip('a'..)
        .map(|(bytes, name)| {
            let name = InstitutionId::new(&name.to_string()).expect("a letter");
            (name, Content::Bytes(bytes), 1)
        })
        .collect();
    let mut copy = vec![0_u8; start.len()];
    println!(
        "{:<30} {:>9} {:>9} {:>9} {:>10}",
        "rule, defence", "s", "floor s", "x floor", "truncation"
    );
    for (name, merge, defence) in rules() {
        let training = training(merge, defence);
        let mut best = [f64::INFINITY; 2];
        let mut lost = 0.0;
        for _ in 0..REPEATS {
            let input = MergeInput {
                training: &training,
                seed: 1,
                start: Content::Bytes(&start),
                momentum: None,
                adapters: &adapters,
            };
            let (seconds, merged) = timed(|| merge_in_memory(input).expect("adapters that merge"));
            lost = merged.report.truncation.worst;
            best[0] = seconds.min(best[0]);
            let (seconds, ()) = timed(|| {
                for bytes in &files {
                    copy.copy_from_slice(black_box(bytes));
                    black_box(&copy);
                }
            });
            best[1] = seconds.min(best[1]);
        }
        let [ours, floor] = best;
        println!(
            "{name:<30} {ours:>9.4} {floor:>9.5} {:>9.0} {lost:>10.3}",
            ours / floor
        );
    }
}

#[expect(clippy::disallowed_methods, reason = "a benchmark reads the clock")]
fn timed<T>(work: impl FnOnce() -> T) -> (f64, T) {
    let begun = std::time::Instant::now();
    let result = work();
    (begun.elapsed().as_secs_f64(), result)
}

fn rules() -> Vec<(&'static str, MergeRule, Defence)> {
    let ties = MergeRule::Ties {
        density_permille: 200,
        scale_permille: 1000,
    };
    let dare = MergeRule::Dare {
        density_permille: 500,
        scale_permille: 125,
    };
    let sce = MergeRule::Sce {
        select_permille: 100,
    };
    let arithmetic = MergeRule::TaskArithmetic {
        scale_permille: 125,
    };
    vec![
        ("product", MergeRule::Product, Defence::None),
        ("factors", MergeRule::Factors, Defence::None),
        ("stack", MergeRule::Stack, Defence::None),
        ("residual", MergeRule::Residual, Defence::None),
        ("task_arithmetic", arithmetic, Defence::None),
        ("ties", ties, Defence::None),
        ("dare", dare, Defence::None),
        ("sce", sce, Defence::None),
        (
            "product, geometric_median",
            MergeRule::Product,
            Defence::GeometricMedian { iterations: 8 },
        ),
        (
            "product, trimmed_mean",
            MergeRule::Product,
            Defence::TrimmedMean { byzantine: 1 },
        ),
    ]
}

fn training(merge: MergeRule, defence: Defence) -> Training {
    Training {
        rank: 16,
        alpha: 32,
        merge,
        defence,
        outer_rate_permille: 1000,
        outer_momentum_permille: 0,
        ..OpenRequest::default().training
    }
}

/// Bell-shaped values, half of them shared by all, as one task leaves them; the start has a B of zeros.
fn adapter(seed: u64, zero: bool) -> Vec<u8> {
    let mut own = ChaCha8Rng::seed_from_u64(seed);
    let mut all = ChaCha8Rng::seed_from_u64(u64::MAX);
    let mut normal = || {
        let unit = |draws: &mut ChaCha8Rng| (draws.next_u32() >> 8) as f32 / (1 << 24) as f32;
        let sum = |draws: &mut ChaCha8Rng| unit(draws) + unit(draws) + unit(draws) - 1.5;
        (sum(&mut own) + sum(&mut all)) * 0.03
    };
    let mut bytes = |scale: f32| -> Vec<u8> {
        (0..RANK * WIDTH)
            .flat_map(|_| (scale * normal()).to_le_bytes())
            .collect()
    };
    let [a, b] = [bytes(1.0), bytes(if zero { 0.0 } else { 1.0 })];
    let view = |shape: [usize; 2], data| TensorView::new(Dtype::F32, shape.to_vec(), data);
    let tensors = [
        (format!("{LAYER}.lora_A.weight"), view([RANK, WIDTH], &a)),
        (format!("{LAYER}.lora_B.weight"), view([WIDTH, RANK], &b)),
    ];
    let tensors = tensors.map(|(name, view)| (name, view.expect("bytes of the shape")));
    safetensors::serialize(tensors, None).expect("two tensors")
}
