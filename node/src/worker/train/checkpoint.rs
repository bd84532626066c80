//! Checkpoints: everything that a run needs to continue bit for bit.

use std::path::Path;

use safetensors::tensor::SafeTensors;
use serde::{Deserialize, Serialize};

use super::TrainError;
use super::adamw::AdamW;
use crate::worker::data::Cursor;
use crate::worker::files::write_atomic;
use crate::worker::model::tensors::{decode, encode_with};
use crate::worker::model::{Model, ModelError, NamedTensor, NamedTensors};

/// Version of the file's layout.
const VERSION: u32 = 1;

/// Metadata key of the run's place.
const KEY: &str = "consilium.checkpoint";

/// Place of a run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Place {
    version: u32,
    /// Steps of the optimiser.
    pub step: u64,
    /// Place in the data.
    pub cursor: Cursor,
    /// Seed of the data's order.
    pub seed: u64,
}

/// Writes trainable weights, both moments and the place to one safetensors file, atomically.
pub fn save(
    path: &Path,
    model: &Model,
    optimiser: &AdamW,
    cursor: Cursor,
    seed: u64,
) -> Result<(), TrainError> {
    let mut tensors = NamedTensors::new();
    for (bank, moments) in model.trainable().iter().zip(&optimiser.moments) {
        bank.read(|weights| {
            for slot in bank.slots() {
                let parts = [
                    ("weight", weights),
                    ("mean", &moments.mean),
                    ("square", &moments.square),
                ];
                for (part, values) in parts {
                    let values = values[slot.range()].to_vec();
                    let tensor = NamedTensor {
                        shape: slot.shape.clone(),
                        values,
                    };
                    tensors.insert(format!("{part}/{}", slot.name), tensor);
                }
            }
        })
        .map_err(ModelError::from)?;
    }
    let place = Place {
        version: VERSION,
        step: optimiser.steps,
        cursor,
        seed,
    };
    let place = serde_json::to_string(&place).map_err(|error| TrainError::Checkpoint {
        path: path.into(),
        reason: error.to_string(),
    })?;
    let bytes = encode_with(&tensors, KEY, &place)?;
    write_atomic(path, [bytes.as_slice()]).map_err(|source| ModelError::Write {
        path: path.into(),
        source,
    })?;
    Ok(())
}

/// Restores what [`save`] wrote into a model with the same trainable tensors. On error nothing has changed.
pub fn restore(path: &Path, model: &mut Model, optimiser: &mut AdamW) -> Result<Place, TrainError> {
    let refuse = |reason: String| TrainError::Checkpoint {
        path: path.into(),
        reason,
    };
    let bytes = std::fs::read(path).map_err(|source| ModelError::Read {
        path: path.into(),
        source,
    })?;
    let origin = path.display().to_string();
    let tensors = decode(&origin, &bytes)?;
    let (_, metadata) =
        SafeTensors::read_metadata(&bytes).map_err(|error| refuse(error.to_string()))?;
    let place = metadata
        .metadata()
        .as_ref()
        .and_then(|entries| entries.get(KEY));
    let place = place.ok_or_else(|| refuse("not a checkpoint".into()))?;
    let place: Place = serde_json::from_str(place).map_err(|error| refuse(error.to_string()))?;
    if place.version != VERSION {
        return Err(refuse(format!(
            "version {}, expected {VERSION}",
            place.version
        )));
    }
    let banks = model.trainable();
    let mut expected = 0;
    for slot in banks.iter().flat_map(|bank| bank.slots()) {
        for part in ["weight", "mean", "square"] {
            let name = format!("{part}/{}", slot.name);
            expected += 1;
            match tensors.get(&name) {
                Some(tensor) if tensor.shape == slot.shape => {}
                Some(tensor) => {
                    let (got, expected) = (tensor.shape.clone(), slot.shape.clone());
                    return Err(ModelError::WrongShape {
                        origin,
                        name,
                        got,
                        expected,
                    }
                    .into());
                }
                None => return Err(ModelError::MissingTensor { origin, name }.into()),
            }
        }
    }
    if expected != tensors.len() || banks.len() != optimiser.moments.len() {
        return Err(TrainError::OtherModel);
    }
    for (bank, moments) in banks.iter().zip(&mut optimiser.moments) {
        let part = |part: &str, out: &mut [f32]| {
            for slot in bank.slots() {
                let values = &tensors[&format!("{part}/{}", slot.name)].values;
                out[slot.range()].copy_from_slice(values);
            }
        };
        bank.edit(|weights| part("weight", weights))
            .map_err(ModelError::from)?;
        part("mean", &mut moments.mean);
        part("square", &mut moments.square);
    }
    optimiser.steps = place.step;
    Ok(place)
}
