//! PEFT adapters: which ones this version can train and apply.

use std::collections::BTreeSet;
use std::path::Path;

use serde::Deserialize;

use super::error::WorkError;
use super::model::{LoraConfig, tensors};
use super::source::LoadedModel;

/// Linear layers that carry adapters, by their PEFT names.
pub const TARGET_MODULES: [&str; 7] = [
    "q_proj",
    "k_proj",
    "v_proj",
    "o_proj",
    "gate_proj",
    "up_proj",
    "down_proj",
];
/// Modules that may be trained whole, both or neither.
pub const MODULES_TO_SAVE: [&str; 2] = ["embed_tokens", "lm_head"];

/// What is read of `adapter_config.json`.
#[derive(Deserialize)]
struct AdapterConfig {
    r: usize,
    lora_alpha: f64,
    target_modules: Vec<String>,
    #[serde(default)]
    modules_to_save: Option<Vec<String>>,
    #[serde(default)]
    use_rslora: bool,
    #[serde(default)]
    use_dora: bool,
}

/// The shape of an adapter that carries these modules.
///
/// # Errors
/// Modules that this version cannot train.
pub fn shape(
    rank: usize,
    alpha: f64,
    target_modules: &[String],
    modules_to_save: &[String],
) -> Result<LoraConfig, WorkError> {
    let same = |got: &[String], expected: &[&str]| {
        let got: BTreeSet<&str> = got.iter().map(String::as_str).collect();
        got == expected.iter().copied().collect()
    };
    if !same(target_modules, &TARGET_MODULES) {
        return Err(WorkError::Setting {
            field: "target_modules",
            problem: format!("expected {}", TARGET_MODULES.join(", ")),
        });
    }
    let embeddings_and_head = same(modules_to_save, &MODULES_TO_SAVE);
    if !embeddings_and_head && !modules_to_save.is_empty() {
        return Err(WorkError::Setting {
            field: "modules_to_save",
            problem: format!("expected {}, or none", MODULES_TO_SAVE.join(", ")),
        });
    }
    Ok(LoraConfig {
        rank,
        alpha,
        embeddings_and_head,
    })
}

impl LoadedModel {
    /// Applies an adapter of this shape, given as the bytes of a PEFT file.
    ///
    /// # Errors
    /// The bytes are no adapter of this model and shape.
    pub fn apply_adapter(&mut self, shape: LoraConfig, adapter: &[u8]) -> Result<(), WorkError> {
        let tensors = tensors::decode("adapter", adapter)?;
        self.model.attach_lora(shape, 0)?;
        Ok(self.model.set_adapter(&tensors)?)
    }

    /// Applies the adapter of a PEFT folder: `adapter_config.json` and `adapter_model.safetensors`.
    ///
    /// # Errors
    /// A file is missing, or the adapter is of a kind that this version cannot apply, or not of this model.
    pub fn apply_adapter_folder(&mut self, folder: &Path) -> Result<(), WorkError> {
        let read = |name: &str| {
            let path = folder.join(name);
            std::fs::read(&path).map_err(|source| WorkError::Read { path, source })
        };
        let config: AdapterConfig =
            serde_json::from_slice(&read("adapter_config.json")?).map_err(|error| {
                WorkError::Setting {
                    field: "adapter_config.json",
                    problem: error.to_string(),
                }
            })?;
        if config.use_rslora || config.use_dora {
            return Err(WorkError::Setting {
                field: "adapter_config.json",
                problem: "rsLoRA and DoRA are not supported".to_owned(),
            });
        }
        let saved = config.modules_to_save.unwrap_or_default();
        let shape = shape(config.r, config.lora_alpha, &config.target_modules, &saved)?;
        self.apply_adapter(shape, &read("adapter_model.safetensors")?)
    }
}
