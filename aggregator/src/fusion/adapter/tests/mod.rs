//! The merge against dense arithmetic in `f64`, and everything it promises about order, threads and bad input.

mod bad_input;
mod defence;
mod initial;
mod rules;

use consilium_protocol::manifest::{Defence, Distillation, MergeRule, Training};
use consilium_protocol::{Digest, InstitutionId};
use faer::Mat;
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};
use safetensors::SafeTensors;
use safetensors::tensor::{Dtype, TensorView};

use super::merge::{MergeInput, Merged, merge_in_memory};
use super::tensors::Content;
use crate::fusion::error::FusionError;

const RANK: usize = 4;
const Q: &str = "base_model.model.model.layers.0.self_attn.q_proj";
const UP: &str = "base_model.model.model.layers.0.mlp.up_proj";
const HEAD: &str = "base_model.model.lm_head.weight";
const SHAPES: [(&str, usize, usize); 2] = [(Q, 24, 20), (UP, 40, 20)];
const HEAD_SHAPE: [usize; 2] = [30, 20];

fn training(rate: u32, momentum: u32) -> Training {
    Training {
        inner_rounds: 8,
        local_steps: 1,
        rows: 1,
        row_tokens: 8,
        learning_rate_micros: 10_000,
        warmup_permille: 0,
        final_permille: 0,
        cross_entropy_permille: 0,
        rank: 4,
        alpha: 8,
        target_modules: vec!["q_proj".to_owned(), "up_proj".to_owned()],
        modules_to_save: vec!["lm_head".to_owned()],
        outer_rate_permille: rate,
        outer_momentum_permille: momentum,
        distillation: Distillation::Trie,
        merge: MergeRule::Product,
        defence: Defence::None,
    }
}

fn id(name: &str) -> InstitutionId {
    InstitutionId::new(name).unwrap()
}

fn random(seed: u64, rows: usize, columns: usize, scale: f64) -> Mat<f64> {
    let mut draws = ChaCha8Rng::seed_from_u64(seed);
    Mat::from_fn(rows, columns, |_, _| {
        scale * (f64::from(draws.next_u32()) / f64::from(1_u32 << 31) - 1.0)
    })
}

/// An adapter with A rows of norm about 1, and its seed in every tensor.
fn adapter(seed: u64, b_scale: f64) -> Vec<u8> {
    adapter_of(&SHAPES, RANK, seed, b_scale)
}

fn adapter_of(shapes: &[(&str, usize, usize)], rank: usize, seed: u64, b_scale: f64) -> Vec<u8> {
    let mut outputs = Vec::new();
    for (index, &(layer, rows, columns)) in shapes.iter().enumerate() {
        let seed = seed * 100 + index as u64;
        let a = random(seed, rank, columns, (3.0 / columns as f64).sqrt());
        let b = random(seed + 50, rows, rank, b_scale);
        outputs.push(Tensor::matrix(format!("{layer}.lora_A.weight"), &a));
        outputs.push(Tensor::matrix(format!("{layer}.lora_B.weight"), &b));
    }
    let head = random(seed * 100 + 99, HEAD_SHAPE[0], HEAD_SHAPE[1], 1.0);
    outputs.push(Tensor::matrix(HEAD.to_owned(), &head));
    serialize(&outputs)
}

struct Tensor {
    name: String,
    shape: Vec<usize>,
    data: Vec<u8>,
}

impl Tensor {
    #[expect(
        clippy::cast_possible_truncation,
        reason = "adapters are stored in f32"
    )]
    fn matrix(name: String, values: &Mat<f64>) -> Self {
        let (rows, columns) = values.shape();
        let value = |i: usize| values[(i / columns, i % columns)] as f32;
        Self {
            name,
            shape: vec![rows, columns],
            data: (0..rows * columns)
                .flat_map(|i| value(i).to_le_bytes())
                .collect(),
        }
    }
}

fn serialize(tensors: &[Tensor]) -> Vec<u8> {
    let views = tensors.iter().map(|t| {
        let view = TensorView::new(Dtype::F32, t.shape.clone(), &t.data).unwrap();
        (t.name.as_str(), view)
    });
    safetensors::serialize(views, None).unwrap()
}

fn floats(data: &[u8]) -> Vec<f32> {
    let floats = data.as_chunks().0.iter();
    floats.map(|&bytes| f32::from_le_bytes(bytes)).collect()
}

fn tensor(bytes: &[u8], name: &str) -> Mat<f64> {
    let parsed = SafeTensors::deserialize(bytes).unwrap();
    let view = parsed.tensor(name).unwrap();
    let values = floats(view.data());
    let columns = view.shape()[1];
    Mat::from_fn(view.shape()[0], columns, |i, j| {
        f64::from(values[i * columns + j])
    })
}

fn dense(bytes: &[u8], layer: &str) -> Mat<f64> {
    tensor(bytes, &format!("{layer}.lora_B.weight"))
        * tensor(bytes, &format!("{layer}.lora_A.weight"))
}

fn distance(a: &Mat<f64>, b: &Mat<f64>) -> f64 {
    (a - b).norm_l2() / b.norm_l2()
}

fn merged(
    training: &Training,
    start: &[u8],
    momentum: Option<&[u8]>,
    adapters: &[(&str, &[u8], u32)],
) -> Result<Merged, FusionError> {
    let adapters: Vec<_> = adapters
        .iter()
        .map(|&(name, bytes, weight)| (id(name), Content::Bytes(bytes), weight))
        .collect();
    merge_in_memory(MergeInput {
        training,
        seed: 9,
        start: Content::Bytes(start),
        momentum: momentum.map(Content::Bytes),
        adapters: &adapters,
    })
}

/// Dense reference of one outer step on one matrix.
struct Dense {
    theta: Mat<f64>,
    velocity: Mat<f64>,
}

impl Dense {
    fn step(&mut self, eta: f64, mu: f64, parts: &[(f64, Mat<f64>)]) {
        let mut gradient = self.theta.clone();
        for (share, part) in parts {
            gradient -= faer::Scale(*share) * part;
        }
        self.velocity = faer::Scale(mu) * &self.velocity + &gradient;
        self.theta -= faer::Scale(eta) * (gradient + faer::Scale(mu) * &self.velocity);
    }
}

#[test]
fn one_adapter_without_momentum_comes_back_in_the_coordinates_of_the_start() {
    let t = training(1000, 0);
    let first = merged(&t, &adapter(1, 0.0), None, &[("a", &adapter(2, 0.3), 1)]).unwrap();
    // The second round starts from orthonormal rows; a node moves them a little.
    let start = &first.adapter;
    let moved = {
        let mut outputs = Vec::new();
        for (layer, rows, columns) in SHAPES {
            let name = format!("{layer}.lora_A.weight");
            let a = tensor(start, &name) + random(7, RANK, columns, 0.01);
            outputs.push(Tensor::matrix(name, &a));
            let name = format!("{layer}.lora_B.weight");
            let b = tensor(start, &name) + random(8, rows, RANK, 0.05);
            outputs.push(Tensor::matrix(name, &b));
        }
        outputs.push(Tensor::matrix(HEAD.to_owned(), &tensor(start, HEAD)));
        serialize(&outputs)
    };
    let second = merged(&t, start, Some(&first.momentum), &[("a", &moved, 5)]).unwrap();
    for (layer, _, _) in SHAPES {
        assert!(
            distance(&dense(&second.adapter, layer), &dense(&moved, layer)) < 1e-5,
            "{layer}"
        );
        let name = format!("{layer}.lora_A.weight");
        let a = tensor(&second.adapter, &name);
        let drift = distance(&a, &tensor(start, &name));
        assert!(drift < 0.05, "{layer}: A moved by {drift}");
        let gram = &a * a.transpose();
        assert!(
            distance(&gram, &Mat::identity(RANK, RANK)) < 1e-5,
            "{layer}: {gram:?}"
        );
    }
    assert!(
        second.report.truncation.worst < 1e-7,
        "{:?}",
        second.report.truncation
    );
    assert_eq!(tensor(&second.adapter, HEAD), tensor(&moved, HEAD));
}

#[test]
fn the_merge_is_the_best_approximation_of_the_dense_outer_step() {
    let t = training(700, 700);
    let start = adapter(1, 0.2);
    let parts = [(2, 3_u32), (3, 1), (4, 4)].map(|(seed, weight)| (adapter(seed, 0.3), weight));
    let named: Vec<_> = ["a", "b", "c"]
        .into_iter()
        .zip(&parts)
        .map(|(name, (bytes, weight))| (name, bytes.as_slice(), *weight))
        .collect();
    let one = merged(&t, &start, None, &named).unwrap();
    let two = merged(&t, &one.adapter, Some(&one.momentum), &named).unwrap();
    for (index, (layer, rows, columns)) in SHAPES.into_iter().enumerate() {
        let shares: Vec<_> = parts
            .iter()
            .map(|(bytes, w)| (f64::from(*w) / 8.0, dense(bytes, layer)))
            .collect();
        let mut reference = Dense {
            theta: dense(&start, layer),
            velocity: Mat::zeros(rows, columns),
        };
        for (round, result) in [&one, &two].into_iter().enumerate() {
            reference.step(0.7, 0.7, &shares);
            let svd = reference.theta.thin_svd().unwrap();
            let s = svd.S().column_vector();
            let best = svd.U().get(.., ..RANK)
                * Mat::from_fn(RANK, RANK, |i, j| if i == j { s[i] } else { 0.0 })
                * svd.V().get(.., ..RANK).transpose();
            let got = dense(&result.adapter, layer);
            assert!(
                distance(&got, &best) < 1e-5,
                "{layer} {round}: {}",
                distance(&got, &best)
            );
            let tail: f64 = (RANK..s.nrows()).map(|i| s[i] * s[i]).sum();
            let expected = tail.sqrt() / reference.theta.norm_l2();
            let reported = &result.report.truncation.matrices[usize::from(index == 0)];
            assert_eq!(reported.layer, layer);
            assert!(
                (reported.product - expected).abs() < 1e-5,
                "{reported:?} {expected}"
            );
            // Nodes start from what was kept.
            reference.theta = got;
        }
    }
}

#[test]
fn several_rounds_of_nesterov_are_exact_while_the_rank_suffices() {
    let t = training(700, 700);
    // All products share one column space of rank 2, so every sum fits into rank 4 and no momentum is cut.
    let shared: Vec<_> = SHAPES.map(|(_, rows, _)| random(5, rows, 2, 0.5)).into();
    let member = |seed: u64| {
        let mut outputs = Vec::new();
        for (index, (layer, rows, columns)) in SHAPES.into_iter().enumerate() {
            let b = &shared[index] * random(seed + 1000, 2, RANK, 1.0);
            assert_eq!(b.nrows(), rows);
            let a = random(seed + 2000, RANK, columns, 0.4);
            outputs.push(Tensor::matrix(format!("{layer}.lora_A.weight"), &a));
            outputs.push(Tensor::matrix(format!("{layer}.lora_B.weight"), &b));
        }
        let head = random(seed, HEAD_SHAPE[0], HEAD_SHAPE[1], 1.0);
        outputs.push(Tensor::matrix(HEAD.to_owned(), &head));
        serialize(&outputs)
    };
    let mut state = merged(&t, &adapter(1, 0.0), None, &[("a", &member(1), 1)]).unwrap();
    let mut references: Vec<_> = SHAPES
        .iter()
        .map(|&(_, rows, columns)| Dense {
            theta: Mat::zeros(rows, columns),
            velocity: Mat::zeros(rows, columns),
        })
        .collect();
    let mut head = Dense {
        theta: tensor(&adapter(1, 0.0), HEAD),
        velocity: Mat::zeros(30, 20),
    };
    head.step(0.7, 0.7, &[(1.0, tensor(&member(1), HEAD))]);
    for (reference, (layer, _, _)) in references.iter_mut().zip(SHAPES) {
        reference.step(0.7, 0.7, &[(1.0, dense(&member(1), layer))]);
    }
    for round in 2..6 {
        let parts = [(member(round), 0.25), (member(round + 10), 0.75)];
        let named: Vec<_> = [("x", &parts[0].0, 1), ("y", &parts[1].0, 3)]
            .map(|(name, bytes, weight)| (name, bytes.as_slice(), weight))
            .into();
        state = merged(&t, &state.adapter, Some(&state.momentum), &named).unwrap();
        for (reference, (layer, _, _)) in references.iter_mut().zip(SHAPES) {
            let shares: Vec<_> = parts
                .iter()
                .map(|(b, share)| (*share, dense(b, layer)))
                .collect();
            reference.step(0.7, 0.7, &shares);
            let error = distance(&dense(&state.adapter, layer), &reference.theta);
            assert!(error < 1e-5, "round {round}, {layer}: {error}");
        }
        let shares: Vec<_> = parts
            .iter()
            .map(|(b, share)| (*share, tensor(b, HEAD)))
            .collect();
        head.step(0.7, 0.7, &shares);
        let error = distance(&tensor(&state.adapter, HEAD), &head.theta);
        assert!(error < 1e-6, "round {round}, head: {error}");
        let lost = state
            .report
            .truncation
            .matrices
            .iter()
            .map(|m| m.product.max(m.velocity));
        assert!(
            lost.fold(0.0, f64::max) < 1e-6,
            "round {round}: {:?}",
            state.report.truncation
        );
    }
}

#[test]
fn a_matrix_that_nobody_trained_keeps_its_a() {
    let start = adapter(1, 0.0);
    let result = merged(&training(700, 700), &start, None, &[("a", &start, 1)]).unwrap();
    for (layer, _, _) in SHAPES {
        assert_eq!(dense(&result.adapter, layer).norm_l2().to_bits(), 0);
        let name = format!("{layer}.lora_A.weight");
        let (before, after) = (tensor(&start, &name), tensor(&result.adapter, &name));
        // The polar factor of A: same rows made orthonormal.
        let cosine = (0..RANK).map(|i| {
            let (x, y) = (before.row(i), after.row(i));
            (x * y.transpose()) / (x.norm_l2() * y.norm_l2())
        });
        assert!(cosine.fold(1.0, f64::min) > 0.8, "{layer}");
        assert!(distance(&(&after * after.transpose()), &Mat::identity(RANK, RANK)) < 1e-6);
    }
    assert_eq!(tensor(&result.adapter, HEAD), tensor(&start, HEAD));
}

#[test]
fn order_of_arrival_and_threads_do_not_change_a_bit() {
    // The larger matrices are where a library would begin to share work between threads.
    let large = [(Q, 768, 640), (UP, 512, 768)];
    for (shapes, rank) in [(SHAPES, RANK), (large, 32)] {
        let t = Training {
            rank: u32::try_from(rank).unwrap(),
            ..training(700, 700)
        };
        let start = adapter_of(&shapes, rank, 1, 0.2);
        let parts: Vec<_> = (2..6)
            .map(|seed| adapter_of(&shapes, rank, seed, 0.3))
            .collect();
        let mut named: Vec<_> = ["d", "b", "c", "a"]
            .into_iter()
            .zip(&parts)
            .map(|(name, bytes)| (name, bytes.as_slice(), 3))
            .collect();
        let first = merged(&t, &start, None, &named).unwrap();
        let expected = merged(&t, &first.adapter, Some(&first.momentum), &named).unwrap();
        for threads in [1, 2, 5] {
            named.rotate_left(1);
            let pool = rayon::ThreadPoolBuilder::new()
                .num_threads(threads)
                .build()
                .unwrap();
            let got = pool
                .install(|| merged(&t, &first.adapter, Some(&first.momentum), &named))
                .unwrap();
            assert_eq!(
                [&got.adapter, &got.momentum].map(|b| Digest::of(b)),
                [&expected.adapter, &expected.momentum].map(|b| Digest::of(b)),
                "rank {rank}, {threads} threads"
            );
            assert_eq!(got.report.truncation, expected.report.truncation);
        }
    }
}
