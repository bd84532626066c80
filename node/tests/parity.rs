//! The decoder computes what Python transformers and peft compute: random Llama and Qwen2 folders, with and without adapters.
//!
//! `tests/interop/make_fixtures.py` makes the folders and the expected logits.

#![cfg(test)]

use std::path::{Path, PathBuf};

use consilium_node::worker::model::{Model, Packed, load_adapter, load_folder, save_adapter};
use safetensors::SafeTensors;

/// Bound of the largest difference of a logit.
const TOLERANCE: f32 = 1e-4;

fn fixture(family: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("tests/fixtures")
        .join(family)
}

fn floats(tensors: &SafeTensors<'_>, name: &str) -> Vec<f32> {
    let data = tensors.tensor(name).unwrap().data();
    data.as_chunks()
        .0
        .iter()
        .map(|bytes| f32::from_le_bytes(*bytes))
        .collect()
}

fn logits(model: &Model, ids: &[u32]) -> Vec<f32> {
    let mut batch = Packed::default();
    batch.push(ids.iter().copied());
    let rows: Vec<u32> = (0..).take(ids.len()).collect();
    let pass = model.score(&batch, &rows).unwrap();
    model.logits(&pass.hidden).unwrap()
}

fn assert_close(family: &str, what: &str, got: &[f32], expected: &[f32]) {
    assert_eq!(got.len(), expected.len(), "{family}, {what}");
    let worst = got
        .iter()
        .zip(expected)
        .map(|(a, b)| (a - b).abs())
        .fold(0.0, |a: f32, b| a.max(b));
    assert!(
        worst <= TOLERANCE,
        "{family}, {what}: largest difference {worst}"
    );
}

#[test]
fn logits_equal_those_of_transformers_and_peft() {
    for family in ["llama", "qwen2"] {
        let folder = fixture(family);
        let bytes = std::fs::read(folder.join("expected.safetensors")).unwrap();
        let expected = SafeTensors::deserialize(&bytes).unwrap();
        let ids: Vec<u32> = expected
            .tensor("ids")
            .unwrap()
            .data()
            .as_chunks()
            .0
            .iter()
            .map(|bytes| u32::try_from(i64::from_le_bytes(*bytes)).unwrap())
            .collect();
        let order: Vec<u32> = (0..48).collect();
        let mut model = load_folder(&folder, order.clone()).unwrap();
        assert_close(
            family,
            "base",
            &logits(&model, &ids),
            &floats(&expected, "logits"),
        );

        load_adapter(&mut model, &folder.join("adapter")).unwrap();
        assert_close(
            family,
            "adapter",
            &logits(&model, &ids),
            &floats(&expected, "adapted"),
        );

        let written = tempfile::tempdir().unwrap();
        save_adapter(&model, written.path(), family).unwrap();
        let mut again = load_folder(&folder, order).unwrap();
        load_adapter(&mut again, written.path()).unwrap();
        assert_close(
            family,
            "rewritten",
            &logits(&again, &ids),
            &floats(&expected, "adapted"),
        );
    }
}
