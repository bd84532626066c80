//! Reading a model takes the memory of the model: the mapped files are never a second copy.

#![cfg(test)]

use std::fs;
use std::path::Path;
use std::process::Command;

use consilium_kernels::quant::Format;
use consilium_node::worker::model::{
    BaseStorage, ModelConfig, NamedTensors, load_folder_as, random, save_folder, tensors,
};
use consilium_node::worker::plan::machine::peak;
use serde_json::json;

const TOKENS: usize = 2000;
const SHARDS: usize = 3;

/// Tells a process of this test to load a folder, and how.
const FOLDER: &str = "CONSILIUM_TEST_FOLDER";
const FORMAT: &str = "CONSILIUM_TEST_FORMAT";

/// Peak of the process over the size of the f32 weights. The head's rows are put in order in place, a tensor in hand is there
/// once more where it is stored otherwise, and the file's pages come and go; a second copy would be 2.
const BOUNDS: [(Format, f64); 3] = [(Format::F32, 1.25), (Format::Int8, 0.6), (Format::Nf4, 0.5)];

/// A model in shards; returns the bytes of its weights.
fn write(folder: &Path) -> u64 {
    let config = ModelConfig::llama(TOKENS, 512, 8, 8, 1536);
    let order = (0..).take(TOKENS).collect();
    save_folder(&random(config, order, 1).unwrap(), folder).unwrap();
    let whole = folder.join("model.safetensors");
    let all = tensors::decode("w", &fs::read(&whole).unwrap()).unwrap();
    fs::remove_file(whole).unwrap();
    let mut shards: [NamedTensors; SHARDS] = Default::default();
    let mut map = serde_json::Map::new();
    let mut bytes = 0;
    for (index, (name, tensor)) in all.into_iter().enumerate() {
        bytes += 4 * tensor.values.len() as u64;
        let shard = index % SHARDS;
        map.insert(name.clone(), json!(format!("{shard}.safetensors")));
        shards[shard].insert(name, tensor);
    }
    for (shard, tensors) in shards.iter().enumerate() {
        let path = folder.join(format!("{shard}.safetensors"));
        fs::write(path, tensors::encode(tensors).unwrap()).unwrap();
    }
    let index = json!({ "weight_map": map }).to_string();
    fs::write(folder.join("model.safetensors.index.json"), index).unwrap();
    bytes
}

/// Loads the folder in this process and says what that took.
fn load(folder: &str) {
    let format = Format::named(&std::env::var(FORMAT).unwrap()).unwrap();
    let storage = BaseStorage {
        format,
        tables: true,
        ..BaseStorage::default()
    };
    let before = peak().unwrap();
    // The last token first, so that the head's rows have to move.
    let order = (0..u32::try_from(TOKENS).unwrap()).rev().collect();
    let model = load_folder_as(Path::new(folder), order, &storage).unwrap();
    assert_eq!(model.vocabulary(), TOKENS);
    println!("took {}", peak().unwrap() - before);
}

#[test]
fn loading_shards_takes_the_memory_of_the_weights_and_no_second_copy() {
    if let Ok(folder) = std::env::var(FOLDER) {
        return load(&folder);
    }
    let folder = tempfile::tempdir().unwrap();
    let bytes = write(folder.path()) as f64;
    for (format, bound) in BOUNDS {
        let output = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "--nocapture"])
            .arg("loading_shards_takes_the_memory_of_the_weights_and_no_second_copy")
            .env(FOLDER, folder.path())
            .env(FORMAT, format.name())
            .output()
            .unwrap();
        let said = String::from_utf8_lossy(&output.stdout);
        let took = said.lines().find_map(|line| line.split("took ").nth(1));
        let took: f64 = took
            .unwrap_or_else(|| panic!("{output:?}"))
            .parse()
            .unwrap();
        println!("{}: {:.3} of {bytes} bytes", format.name(), took / bytes);
        assert!(
            took < bound * bytes,
            "{}: {took} for {bytes}",
            format.name()
        );
    }
}
