//! PEFT folders: `adapter_config.json` and `adapter_model.safetensors`.

use std::path::Path;

use super::adapter_config::AdapterConfig;
use super::config::ConfigError;
use super::save::{create, pretty, write};
use super::tensors::{decode, encode};
use super::{Model, ModelError, NamedTensors};

/// The settings of an adapter.
const CONFIG: &str = "adapter_config.json";

/// Its tensors.
const TENSORS: &str = "adapter_model.safetensors";

/// Reads a PEFT folder into a model, in place of its adapters if it has the same kind, else as new ones.
pub fn load_adapter(model: &mut Model, folder: &Path) -> Result<(), ModelError> {
    let config_path = folder.join(CONFIG);
    let config = AdapterConfig::load(&config_path)?;
    let path = folder.join(TENSORS);
    let bytes = std::fs::read(&path);
    let bytes = bytes.map_err(|source| ModelError::Read {
        path: path.clone(),
        source,
    })?;
    let origin = path.display().to_string();
    let tensors: NamedTensors = decode(&origin, &bytes)?;
    let in_config = |error| match error {
        ModelError::BadLora { field, reason } => ModelError::Config(ConfigError::Field {
            path: config_path.clone(),
            field: field.into(),
            reason,
        }),
        other => other,
    };
    if !model.has_adapter_like(&config).map_err(in_config)? {
        model.attach_lora(config, 0).map_err(in_config)?;
    }
    model.set_adapter_from(&origin, &tensors)
}

/// Writes `adapter_config.json` and `adapter_model.safetensors`. `base` is the name or path of the base
/// model that readers should fetch.
pub fn save_adapter(model: &Model, folder: &Path, base: &str) -> Result<(), ModelError> {
    let config = model.lora().ok_or(ModelError::NoAdapter)?;
    create(folder)?;
    let config = config.to_json(model.config().family, base);
    write(&folder.join(CONFIG), &pretty(&config))?;
    write(&folder.join(TENSORS), &encode(&model.adapter()?)?)
}
