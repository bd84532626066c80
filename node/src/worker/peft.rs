//! Adapters as a manifest names them and as they travel.

use super::error::WorkError;
use super::model::{AdapterConfig, LoraConfig, Targets, tensors};
use super::source::LoadedModel;

/// Full weights that may travel with the factors. Beside a tied head the embedding is trained alone: the head stays what it was.
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
    let is_known = |module: &&String| SAVED.contains(&module.as_str());
    if let Some(unknown) = modules_to_save.iter().find(|module| !is_known(module)) {
        return Err(WorkError::Setting {
            field: "modules_to_save",
            problem: format!("{unknown}, expected any of {}", SAVED.join(", ")),
        });
    }
    let [saves_embedding, saves_head] =
        SAVED.map(|name| modules_to_save.iter().any(|module| module == name));
    let plain = LoraConfig {
        rank,
        alpha,
        embeddings_and_head: false,
    };
    Ok(AdapterConfig {
        targets: Targets::Names(target_modules.to_vec()),
        saves_embedding,
        saves_head,
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::worker::testing;

    /// Names of the whole matrices of an adapter.
    fn whole(saved: &[&str]) -> Vec<String> {
        let saved: Vec<String> = saved.iter().map(ToString::to_string).collect();
        let shape = shape(2, 4.0, &["q_proj".to_owned()], &saved).unwrap();
        let mut model = testing::model(1).model;
        model.attach_lora(shape, 1).unwrap();
        let names = model.adapter().unwrap().into_keys();
        names.filter(|name| !name.contains("lora_")).collect()
    }

    #[test]
    fn an_adapter_carries_the_modules_that_the_manifest_names_and_others_are_refused() {
        let (embedding, head) = (
            "base_model.model.model.embed_tokens.weight",
            "base_model.model.lm_head.weight",
        );
        assert_eq!(whole(&[]), [""; 0]);
        assert_eq!(whole(&["embed_tokens"]), [embedding]);
        assert_eq!(whole(&["lm_head"]), [head]);
        assert_eq!(whole(&["lm_head", "embed_tokens"]), [head, embedding]);
        let saved = ["score".to_owned()];
        let error = shape(2, 4.0, &["q_proj".to_owned()], &saved).unwrap_err();
        let error = error.to_string();
        assert!(
            error.contains("modules_to_save: score, expected any of embed_tokens, lm_head"),
            "{error}"
        );
    }
}
