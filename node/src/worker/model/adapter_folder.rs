//! PEFT folders: `adapter_config.json` and `adapter_model.safetensors`.

use std::path::Path;

use serde_json::{Value, json};

use super::config::{ConfigError, Fields, read_object};
use super::save::{create, pretty, write};
use super::tensors::{decode, encode};
use super::{LoraConfig, Model, ModelError};

/// Layers that carry factors.
pub(crate) const TARGETS: [&str; 7] = [
    "q_proj",
    "k_proj",
    "v_proj",
    "o_proj",
    "gate_proj",
    "up_proj",
    "down_proj",
];

/// Full weights that travel with them.
pub(crate) const SAVED: [&str; 2] = ["embed_tokens", "lm_head"];

/// Reads a PEFT folder into a model, in place of its adapters if it has the same kind, else as new ones.
pub fn load_adapter(model: &mut Model, folder: &Path) -> Result<(), ModelError> {
    let path = folder.join("adapter_config.json");
    let config = parse(&path)?;
    let path = folder.join("adapter_model.safetensors");
    let bytes = std::fs::read(&path);
    let bytes = bytes.map_err(|source| ModelError::Read {
        path: path.clone(),
        source,
    })?;
    let tensors = decode(&path.display().to_string(), &bytes)?;
    if model.lora() != Some(config) {
        model.attach_lora(config, 0)?;
    }
    model.set_adapter(&tensors)
}

/// Writes `adapter_config.json` and `adapter_model.safetensors`. `base` is the name or path of the base
/// model that readers should fetch.
pub fn save_adapter(model: &Model, folder: &Path, base: &str) -> Result<(), ModelError> {
    let shape = model.lora().ok_or(ModelError::NoAdapter)?;
    create(folder)?;
    let modules_to_save = if shape.embeddings_and_head {
        json!(SAVED)
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
        "target_modules": TARGETS,
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

/// Refuses what this decoder does not implement, rather than ignoring it.
fn parse(path: &Path) -> Result<LoraConfig, ConfigError> {
    let object = read_object(path)?;
    let fields = Fields {
        path,
        object: &object,
    };
    match fields.text("peft_type")? {
        "LORA" => {}
        other => return Err(fields.refuse("peft_type", format!("`{other}`, expected `LORA`"))),
    }
    for field in ["use_dora", "use_rslora", "fan_in_fan_out"] {
        fields.must_not_be_true(field)?;
    }
    for field in ["rank_pattern", "alpha_pattern", "layers_to_transform"] {
        let is_empty = |value: &Value| value.as_object().is_some_and(serde_json::Map::is_empty);
        if fields.present(field).is_some_and(|value| !is_empty(value)) {
            return Err(fields.refuse(field, "not supported; all layers share one rank"));
        }
    }
    if fields.present("bias").is_some_and(|bias| bias != "none") {
        return Err(fields.refuse("bias", "only `none` is supported"));
    }
    if names(&fields, "target_modules") != sorted(&TARGETS) {
        return Err(fields.refuse("target_modules", format!("expected all of {TARGETS:?}")));
    }
    let saved = names(&fields, "modules_to_save");
    if !saved.is_empty() && saved != sorted(&SAVED) {
        return Err(fields.refuse("modules_to_save", format!("expected none or {SAVED:?}")));
    }
    Ok(LoraConfig {
        rank: fields.count("r", 1 << 16)?,
        alpha: fields.real("lora_alpha", 0.0, 1e6)?,
        embeddings_and_head: !saved.is_empty(),
    })
}

fn names<'a>(fields: &Fields<'a>, field: &str) -> Vec<&'a str> {
    let list = fields.present(field).and_then(Value::as_array);
    let names: Vec<&str> = list
        .into_iter()
        .flatten()
        .filter_map(Value::as_str)
        .collect();
    sorted(&names)
}

fn sorted<'a>(names: &[&'a str]) -> Vec<&'a str> {
    let mut names = names.to_vec();
    names.sort_unstable();
    names
}
