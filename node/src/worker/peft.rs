//! Adapters as a manifest names them and as they travel.

use std::collections::BTreeSet;

use super::error::WorkError;
use super::model::{LoraConfig, SAVED, TARGETS, tensors};
use super::source::LoadedModel;

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
    if !same(target_modules, &TARGETS) {
        return Err(WorkError::Setting {
            field: "target_modules",
            problem: format!("expected {}", TARGETS.join(", ")),
        });
    }
    let embeddings_and_head = same(modules_to_save, &SAVED);
    if !embeddings_and_head && !modules_to_save.is_empty() {
        return Err(WorkError::Setting {
            field: "modules_to_save",
            problem: format!("expected {}, or none", SAVED.join(", ")),
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
}
