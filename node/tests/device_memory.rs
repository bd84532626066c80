//! What a device is estimated to need is what the same code takes of the host's memory, where a model placed there computes.

#![cfg(test)]

use std::process::Command;

use candle_core::{DType, Device};
use consilium_kernels::loss::{ItemLoss, NO_LABEL, Term};
use consilium_kernels::{TokenKind, Vocab};
use consilium_node::config::Memory as Held;
use consilium_node::worker::model::{
    BaseStorage, LoraConfig, ModelConfig, Packed, Placement, random_as,
};
use consilium_node::worker::plan::machine::peak;
use consilium_node::worker::plan::{DeviceMemory, Shape, Trained};
use consilium_node::worker::train::{AdamW, AdamWConfig, TrainError};

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// Tells a process of this test which case it is.
const CASE: &str = "CONSILIUM_TEST_CASE";

/// How far the estimate may be from the measured peak, as a share of it.
const TOLERANCE: f64 = 0.25;

const TOKENS: usize = 2500;
const RANK: usize = 8;

/// Name, rows, tokens of a row, whether activations are computed again, whether all weights are trained.
const CASES: [(&str, usize, usize, bool, bool); 4] = [
    ("kept", 4, 192, false, false),
    ("computed again", 4, 192, true, false),
    ("long rows", 1, 640, false, false),
    ("all weights", 1, 32, false, true),
];

fn model() -> ModelConfig {
    ModelConfig::llama(TOKENS, 384, 4, 6, 1024)
}

fn shape((_, rows, row_tokens, again, all): (&str, usize, usize, bool, bool)) -> Shape {
    Shape {
        rows,
        row_tokens,
        accumulate: 1,
        trained: match all {
            true => Trained::All,
            false => Trained::Adapters {
                rank: RANK,
                embeddings_and_head: false,
            },
        },
        held: Held {
            checkpoint_activations: again,
            ..Held::default()
        },
        tokenizer_bytes: 0,
    }
}

/// Two steps; says what they and the model took.
fn step(shape: &Shape) {
    let spellings: Vec<String> = (1..TOKENS).map(|id| format!("t{id}")).collect();
    let tokens = spellings
        .iter()
        .map(|text| TokenKind::Bytes(text.as_bytes()));
    let vocab = Vocab::new(std::iter::once(TokenKind::EndOfRecord).chain(tokens)).unwrap();
    let order = vocab.id_of_rank().to_vec();
    let before = peak().unwrap();
    let placement = Placement::new(Device::Cpu, DType::F32);
    let storage = BaseStorage {
        placement: Some(placement.clone()),
        tables: shape.trained != Trained::All,
        ..BaseStorage::default()
    };
    let mut model = random_as(model(), order, 1, &storage).unwrap();
    match shape.trained {
        Trained::All => {
            model.train_all().unwrap();
            model.place(placement).unwrap();
        }
        Trained::Adapters { rank, .. } => {
            let lora = LoraConfig {
                rank,
                alpha: 16.0,
                embeddings_and_head: false,
            };
            model.attach_lora(lora, 1).unwrap();
        }
    }
    model.checkpoint_activations(shape.held.checkpoint_activations);
    let mut batch = Packed::default();
    let mut labels = Vec::new();
    for row in 0..shape.rows {
        let id =
            |i: usize| u32::try_from(1 + (row * 7919 + i * i * 31 + i) % (TOKENS - 1)).unwrap();
        batch.push((0..shape.row_tokens).map(id));
        labels.extend((1..shape.row_tokens).map(|i| model.rank_of_id()[id(i) as usize]));
        labels.push(NO_LABEL);
    }
    let terms = [Term::Labels {
        labels: &labels,
        weight: 1.0 / labels.len() as f32,
    }];
    let items = [ItemLoss {
        tokens: &[],
        terms: &terms,
    }];
    let mut optimiser = AdamW::new(&model, AdamWConfig::default()).unwrap();
    for _ in 0..2 {
        let rows = (0u32..).take(batch.tokens.len()).collect();
        let pass = model.forward(&batch, rows).unwrap();
        let (_, gradients) = pass.backward::<TrainError>(&vocab, &items).unwrap();
        optimiser.step(&mut model, &gradients, 1e-4).unwrap();
    }
    println!("took {}", peak().unwrap() - before);
}

#[test]
fn the_estimate_of_a_device_is_what_its_code_takes() {
    if let Ok(case) = std::env::var(CASE) {
        let case = CASES.iter().find(|(name, ..)| *name == case).unwrap();
        return step(&shape(*case));
    }
    for case in CASES {
        let output = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "--nocapture"])
            .arg("the_estimate_of_a_device_is_what_its_code_takes")
            .env(CASE, case.0)
            .env("RAYON_NUM_THREADS", "1")
            .env("CANDLE_NUM_THREADS", "1")
            .output()
            .unwrap();
        let said = String::from_utf8_lossy(&output.stdout);
        let took = said.lines().find_map(|line| line.split("took ").nth(1));
        let took: f64 = took
            .unwrap_or_else(|| panic!("{output:?}"))
            .parse()
            .unwrap();
        let memory = DeviceMemory::of(&model(), &shape(case), size_of::<f32>());
        // The libraries of a device are none of this process.
        let estimate = (memory.total() - memory.process) as f64;
        println!(
            "{}: estimate {estimate}, took {took}, {:.3}",
            case.0,
            estimate / took
        );
        assert!(
            (estimate / took - 1.0).abs() < TOLERANCE,
            "{}: {estimate} for {took}: {memory:?}",
            case.0
        );
    }
}
