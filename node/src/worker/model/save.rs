//! Model and adapter folders that transformers and peft load.

use std::path::Path;

use serde_json::json;

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

/// Writes `adapter_config.json` and `adapter_model.safetensors`. `base` is the name or path of the base
/// model that readers should fetch.
pub fn save_adapter(model: &Model, folder: &Path, base: &str) -> Result<(), ModelError> {
    let shape = model.lora().ok_or(ModelError::NoAdapter)?;
    create(folder)?;
    let modules_to_save = if shape.embeddings_and_head {
        json!(["embed_tokens", "lm_head"])
    } else {
        json!(null)
    };
    let config = json!({
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": shape.rank,
        "lora_alpha": shape.alpha,
        "lora_dropout": 0.0,
        "target_modules":
            ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
        "modules_to_save": modules_to_save,
        "bias": "none",
        "fan_in_fan_out": false,
        "use_rslora": false,
        "use_dora": false,
        "init_lora_weights": true,
        "inference_mode": true,
    });
    write(&folder.join("adapter_config.json"), &pretty(&config))?;
    write(
        &folder.join("adapter_model.safetensors"),
        &encode(&model.adapter()?)?,
    )
}

fn pretty(value: &serde_json::Value) -> Vec<u8> {
    format!("{value:#}\n").into_bytes()
}

fn create(folder: &Path) -> Result<(), ModelError> {
    std::fs::create_dir_all(folder).map_err(|source| ModelError::Write {
        path: folder.into(),
        source,
    })
}

fn write(path: &Path, bytes: &[u8]) -> Result<(), ModelError> {
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
