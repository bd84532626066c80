//! Models from Hugging Face folders and from a seed.

#![expect(
    clippy::cast_possible_truncation,
    reason = "computed in f64, kept in f32"
)]

use std::path::Path;

use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha12Rng;

use super::config::ModelConfig;
use super::frozen::BaseStorage;
use super::weights::WeightFiles;
use super::{Model, ModelError, decoder};

/// Standard deviation of new weights.
const INITIAL_DEVIATION: f64 = 0.02;

/// A model folder whose settings and weight files agree. No weight is in memory yet.
#[derive(Debug)]
pub struct OpenFolder {
    config: ModelConfig,
    weights: WeightFiles,
}

/// Reads `config.json` and the headers of `model.safetensors` (or of the shards of `model.safetensors.index.json`), and
/// checks that the files hold the tensors of such a model and no others.
pub fn open_folder(folder: &Path) -> Result<OpenFolder, ModelError> {
    let config = ModelConfig::load(folder)?;
    let weights = WeightFiles::open(folder)?;
    let slots = decoder::slots(&config);
    let is_ignored = |name: &str| {
        name.ends_with("rotary_emb.inv_freq") || (config.tied && name == "lm_head.weight")
    };
    weights.check(slots.iter(), is_ignored)?;
    Ok(OpenFolder { config, weights })
}

impl OpenFolder {
    /// Shape of the model.
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// Reads the weights. `id_of_rank` orders the head's rows; pass the identity to keep the order of ids.
    pub fn load(self, id_of_rank: Vec<u32>, storage: &BaseStorage) -> Result<Model, ModelError> {
        let weights = self.weights;
        Model::build(self.config, id_of_rank, storage, |slot, out| {
            weights.fill(slot, out)
        })
    }
}

/// Opens a folder and reads its weights.
pub fn load_folder(folder: &Path, id_of_rank: Vec<u32>) -> Result<Model, ModelError> {
    load_folder_as(folder, id_of_rank, &BaseStorage::default())
}

/// [`load_folder`], with weights that will not be trained stored otherwise.
pub fn load_folder_as(
    folder: &Path,
    id_of_rank: Vec<u32>,
    storage: &BaseStorage,
) -> Result<Model, ModelError> {
    open_folder(folder)?.load(id_of_rank, storage)
}

/// A new model: norms one, biases zero, all else normal with deviation 0.02.
pub fn random(config: ModelConfig, id_of_rank: Vec<u32>, seed: u64) -> Result<Model, ModelError> {
    random_as(config, id_of_rank, seed, &BaseStorage::default())
}

/// [`random`], with weights that will not be trained stored otherwise.
pub fn random_as(
    config: ModelConfig,
    id_of_rank: Vec<u32>,
    seed: u64,
    storage: &BaseStorage,
) -> Result<Model, ModelError> {
    let mut rng = ChaCha12Rng::seed_from_u64(seed);
    Model::build(config, id_of_rank, storage, |slot, out| {
        if slot.name.ends_with("norm.weight") {
            out.fill(1.0);
        } else if slot.name.ends_with("bias") {
            out.fill(0.0);
        } else {
            for value in out {
                *value = (normal(&mut rng) * INITIAL_DEVIATION) as f32;
            }
        }
        Ok(())
    })
}

/// One draw of the standard normal distribution (Box and Muller 1958).
fn normal(rng: &mut impl Rng) -> f64 {
    let radius = (-2.0 * (1.0 - unit(rng)).ln()).sqrt();
    radius * (std::f64::consts::TAU * unit(rng)).cos()
}

/// Uniform in `0..1`, 53 bits.
pub(crate) fn unit(rng: &mut impl Rng) -> f64 {
    (rng.next_u64() >> 11) as f64 / (1u64 << 53) as f64
}
