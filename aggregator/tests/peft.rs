//! Adapters are PEFT's: same names and shapes as PEFT writes for the same model, and what PEFT wrote can be merged.

#![cfg(test)]

use std::path::PathBuf;

use consilium_aggregator::fusion::{
    FusionError, MergeInput, MergeOutput, check_adapter, initial_adapter, merge,
};
use consilium_protocol::InstitutionId;
use consilium_protocol::manifest::{Defence, Distillation, MergeRule, Training};
use safetensors::SafeTensors;
use tempfile::NamedTempFile;

fn fixture(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
        .join("../node/tests/fixtures")
        .join(name)
}

fn training(modules_to_save: &[&str]) -> Training {
    let targets = [
        "q_proj",
        "k_proj",
        "v_proj",
        "o_proj",
        "gate_proj",
        "up_proj",
        "down_proj",
    ];
    Training {
        inner_rounds: 1,
        local_steps: 1,
        rows: 1,
        row_tokens: 8,
        learning_rate_micros: 1,
        warmup_permille: 0,
        final_permille: 0,
        cross_entropy_permille: 0,
        rank: 3,
        alpha: 6,
        target_modules: targets.map(str::to_owned).into(),
        modules_to_save: modules_to_save
            .iter()
            .map(|&name| name.to_owned())
            .collect(),
        outer_rate_permille: 1000,
        outer_momentum_permille: 0,
        distillation: Distillation::Trie,
        merge: MergeRule::Product,
        defence: Defence::None,
    }
}

fn layout(bytes: &[u8]) -> Vec<(String, Vec<usize>)> {
    let parsed = SafeTensors::deserialize(bytes).unwrap();
    let mut layout: Vec<_> = parsed
        .tensors()
        .into_iter()
        .map(|(name, view)| (name, view.shape().to_vec()))
        .collect();
    layout.sort();
    layout
}

fn values(parsed: &SafeTensors<'_>, name: &str) -> (usize, Vec<f64>) {
    let view = parsed.tensor(name).unwrap();
    let values = view
        .data()
        .as_chunks()
        .0
        .iter()
        .map(|&b| f64::from(f32::from_le_bytes(b)));
    (*view.shape().last().unwrap(), values.collect())
}

/// `B A` of a layer.
fn product(bytes: &[u8], layer: &str) -> Vec<f64> {
    let parsed = SafeTensors::deserialize(bytes).unwrap();
    let (columns, a) = values(&parsed, &format!("{layer}.lora_A.weight"));
    let (rank, b) = values(&parsed, &format!("{layer}.lora_B.weight"));
    b.chunks(rank)
        .flat_map(|row| {
            (0..columns)
                .map(|j| {
                    row.iter()
                        .enumerate()
                        .map(|(r, b)| b * a[r * columns + j])
                        .sum()
                })
                .collect::<Vec<f64>>()
        })
        .collect()
}

#[test]
fn the_initial_adapter_has_the_layout_that_peft_writes_and_pefts_own_can_be_merged() {
    for (family, saved) in [("llama", &["embed_tokens", "lm_head"][..]), ("qwen2", &[])] {
        let training = training(saved);
        let [start, adapter, momentum] = [(); 3].map(|()| NamedTempFile::new().unwrap());
        initial_adapter(&fixture(family), &training, 7, start.as_file()).unwrap();
        let path = fixture(family).join("adapter/adapter_model.safetensors");
        let theirs = std::fs::read(&path).unwrap();
        let start_bytes = std::fs::read(start.path()).unwrap();
        assert_eq!(layout(&start_bytes), layout(&theirs), "{family}");
        let clinic = InstitutionId::new("clinic").unwrap();
        check_adapter(&training, start.path(), &clinic, &path).unwrap();
        let input = MergeInput {
            training: &training,
            seed: 1,
            start: start.path().into(),
            momentum: None,
            adapters: &[(clinic, path.as_path().into(), 1)],
        };
        let output = MergeOutput {
            adapter: adapter.as_file(),
            momentum: momentum.as_file(),
        };
        merge(input, output).unwrap();
        let merged = std::fs::read(adapter.path()).unwrap();
        assert_eq!(layout(&merged), layout(&theirs), "{family}");
        for (name, _) in layout(&theirs) {
            let (got, expected) = match name.strip_suffix(".lora_A.weight") {
                Some(layer) => (product(&merged, layer), product(&theirs, layer)),
                None if name.ends_with(".lora_B.weight") => continue,
                None => {
                    let of = |bytes| values(&SafeTensors::deserialize(bytes).unwrap(), &name).1;
                    (of(&merged), of(&theirs))
                }
            };
            let norm = expected.iter().map(|v| v * v).sum::<f64>().sqrt();
            let error: f64 = got
                .iter()
                .zip(&expected)
                .map(|(g, e)| (g - e).powi(2))
                .sum();
            assert!(error.sqrt() < 1e-6 * norm, "{family}, {name}: {error}");
        }
    }
}

#[test]
fn a_tied_head_cannot_be_saved_whole() {
    let file = tempfile::tempfile().unwrap();
    let error = initial_adapter(&fixture("qwen2"), &training(&["lm_head"]), 7, &file).unwrap_err();
    assert!(
        matches!(&error, FusionError::Saved(name) if name == "lm_head"),
        "{error}"
    );
}
