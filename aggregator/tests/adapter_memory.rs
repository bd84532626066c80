//! No merge rule ever forms a product: memory stays far below that of one matrix of [out, in].
//!
//! The peak is that of a process of its own (`VmHWM`), which this test starts from its own program.

#![cfg(test)]

use std::process::Command;

use consilium_aggregator::fusion::{Content, MergeInput, merge_in_memory};
use consilium_aggregator::rounds::request::OpenRequest;
use consilium_protocol::InstitutionId;
use consilium_protocol::manifest::{Defence, MergeRule};
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};
use safetensors::tensor::{Dtype, TensorView};

const CHILD: &str = "CONSILIUM_TEST_ADAPTER_MEMORY";
const RANK: usize = 8;
const WIDE: usize = 16_384;
const NARROW: usize = 5120;
const LAYER: &str = "base_model.model.model.layers.0.self_attn.q_proj";

#[test]
fn no_rule_needs_the_memory_of_a_product() {
    if std::env::var(CHILD).is_ok() {
        return merge_by_every_kind_of_rule();
    }
    let output = Command::new(std::env::current_exe().unwrap())
        .args([
            "--exact",
            "no_rule_needs_the_memory_of_a_product",
            "--nocapture",
        ])
        .env(CHILD, "1")
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    let errors = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success(), "{said}{errors}");
    let peak = said.split_once("peak ").unwrap().1;
    let peak: usize = peak.split_whitespace().next().unwrap().parse().unwrap();
    let product = 4 * NARROW * NARROW;
    println!("peak {peak} bytes, the smaller product in f32 {product}");
    assert!(peak < product, "{peak} {product}");
}

fn merge_by_every_kind_of_rule() {
    let ties = MergeRule::Ties {
        density_permille: 200,
        scale_permille: 1000,
    };
    for (rule, width) in [
        (MergeRule::Product, WIDE),
        (MergeRule::Factors, WIDE),
        (MergeRule::Stack, WIDE),
        (MergeRule::Residual, WIDE),
        (ties, NARROW),
    ] {
        let mut training = OpenRequest::default().training;
        training.rank = u32::try_from(RANK).unwrap();
        training.merge = rule;
        training.defence = Defence::Standard;
        training.outer_rate_permille = 1000;
        training.outer_momentum_permille = 0;
        let [start, a, b, c] = [1, 2, 3, 4].map(|seed| adapter(width, seed));
        let members = [("bank", &a), ("clinic", &b), ("insurer", &c)];
        let adapters = members.map(|(name, bytes)| {
            let name = InstitutionId::new(name).unwrap();
            (name, Content::Bytes(bytes), 1)
        });
        let input = MergeInput {
            training: &training,
            seed: 1,
            start: Content::Bytes(&start),
            momentum: None,
            adapters: &adapters,
        };
        let merged = merge_in_memory(input).unwrap();
        assert!(merged.adapter.len() > start.len() / 2);
    }
    println!("peak {}", peak());
}

fn adapter(width: usize, seed: u64) -> Vec<u8> {
    let mut draws = ChaCha8Rng::seed_from_u64(seed);
    let mut bytes = || -> Vec<u8> {
        (0..RANK * width)
            .flat_map(|_| {
                let value = u16::try_from(draws.next_u32() >> 16).unwrap();
                ((f32::from(value) / 32_768.0 - 1.0) / 64.0).to_le_bytes()
            })
            .collect()
    };
    let [a, b] = [bytes(), bytes()];
    let view = |shape: [usize; 2], data| TensorView::new(Dtype::F32, shape.to_vec(), data).unwrap();
    let tensors = [
        (format!("{LAYER}.lora_A.weight"), view([RANK, width], &a)),
        (format!("{LAYER}.lora_B.weight"), view([width, RANK], &b)),
    ];
    safetensors::serialize(tensors, None).unwrap()
}

/// The most memory that this process had, in bytes.
fn peak() -> usize {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|line| line.starts_with("VmHWM:"));
    let kibibytes = line.unwrap().split_whitespace().nth(1).unwrap();
    1024 * kibibytes.parse::<usize>().unwrap()
}
