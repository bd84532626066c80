//! Adapters as a manifest names them and as they travel.

use std::collections::BTreeSet;

use super::error::WorkError;
use super::model::{AdapterConfig, LoraConfig, Targets, tensors};
use super::source::LoadedModel;

/// Full weights that may travel with the factors, both or none.
const SAVED: [&str; 2] = ["embed_tokens", "lm_head"];

const A: &str = ".lora_A.weight";

/// The shape of an adapter that carries these modules. Whether the pivot has them shows when it is attached.
///
/// # Errors
/// Modules that this version cannot train.
pub fn shape(
    rank: usize,
    alpha: f64,
    target_modules: &[String],
    modules_to_save: &[String],
) -> Result<AdapterConfig, WorkError> {
    if target_modules.is_empty() {
        return Err(WorkError::Setting {
            field: "target_modules",
            problem: "names no linear layer of the pivot".to_owned(),
        });
    }
    let saved: BTreeSet<&str> = modules_to_save.iter().map(String::as_str).collect();
    let embeddings_and_head = saved == BTreeSet::from(SAVED);
    if !embeddings_and_head && !saved.is_empty() {
        return Err(WorkError::Setting {
            field: "modules_to_save",
            problem: format!("expected {}, or none", SAVED.join(", ")),
        });
    }
    let plain = LoraConfig {
        rank,
        alpha,
        embeddings_and_head,
    };
    Ok(AdapterConfig {
        targets: Targets::Names(target_modules.to_vec()),
        ..plain.into()
    })
}

impl LoadedModel {
    /// Applies an adapter of this shape, given as the bytes of a PEFT file. Its matrices may have another rank than the shape says,
    /// all the same one, as merge rules have it that stack factors; the scale of the product stays.
    ///
    /// # Errors
    /// The bytes are no adapter of this model and shape.
    pub fn apply_adapter(
        &mut self,
        mut shape: AdapterConfig,
        adapter: &[u8],
    ) -> Result<(), WorkError> {
        let tensors = tensors::decode("adapter", adapter)?;
        let mut factors = tensors.iter().filter(|(name, _)| name.ends_with(A));
        let rank = factors.next().and_then(|(_, a)| a.shape.first().copied());
        if let Some(rank) = rank.filter(|&rank| rank > 0 && shape.rank > 0) {
            shape.alpha *= rank as f64 / shape.rank as f64;
            shape.rank = rank;
        }
        self.model.attach_lora(shape, 0)?;
        Ok(self.model.set_adapter(&tensors)?)
    }
}
