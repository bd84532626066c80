//! Model folders that transformers loads.

use std::path::Path;

use super::tensors::{NamedTensor, NamedTensors, encode};
use super::{Model, ModelError};
use crate::worker::files::write_atomic;

/// Writes `config.json` and `model.safetensors`. Adapters are folded into the weights.
pub fn save_folder(model: &Model, folder: &Path) -> Result<(), ModelError> {
    create(folder)?;
    let mut config = model.config().clone();
    config.tied = model.is_tied();
    write(&folder.join("config.json"), &pretty(&config.to_json()))?;
    write(
        &folder.join("model.safetensors"),
        &encode(&model.weights()?)?,
    )
}

pub(super) fn pretty(value: &serde_json::Value) -> Vec<u8> {
    format!("{value:#}\n").into_bytes()
}

pub(super) fn create(folder: &Path) -> Result<(), ModelError> {
    std::fs::create_dir_all(folder).map_err(|source| ModelError::Write {
        path: folder.into(),
        source,
    })
}

pub(super) fn write(path: &Path, bytes: &[u8]) -> Result<(), ModelError> {
    write_atomic(path, [bytes]).map_err(|source| ModelError::Write {
        path: path.into(),
        source,
    })
}

impl Model {
    /// All weights under their Hugging Face names, adapters folded in, rows in the order of ids.
    pub fn weights(&self) -> Result<NamedTensors, ModelError> {
        let mut tensors = NamedTensors::new();
        for bank in self.base_banks() {
            bank.read(|values| {
                for slot in bank.slots() {
                    let values = values[slot.range()].to_vec();
                    let tensor = NamedTensor {
                        shape: slot.shape.clone(),
                        values,
                    };
                    tensors.insert(slot.name.clone(), tensor);
                }
            })?;
        }
        if let Some(head) = tensors.get_mut("lm_head.weight") {
            head.values = self.in_id_order(&head.values);
        }
        self.fold_adapters(&mut tensors)?;
        Ok(tensors)
    }
}
