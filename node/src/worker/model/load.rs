//! Models from Hugging Face folders and from a seed.

#![expect(
    clippy::cast_possible_truncation,
    reason = "computed in f64, kept in f32"
)]

use std::collections::BTreeMap;
use std::path::{Component, Path, PathBuf};
use std::rc::Rc;

use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha12Rng;
use safetensors::tensor::SafeTensors;

use super::config::{ModelConfig, read_object};
use super::frozen::BaseStorage;
use super::parameters::Slot;
use super::{Model, ModelError, tensors};

/// Standard deviation of new weights.
const INITIAL_DEVIATION: f64 = 0.02;

/// Loads `config.json` and `model.safetensors` (or the shards of `model.safetensors.index.json`).
/// `id_of_rank` orders the head's rows; pass the identity to keep the order of ids.
pub fn load_folder(folder: &Path, id_of_rank: Vec<u32>) -> Result<Model, ModelError> {
    load_folder_as(folder, id_of_rank, &BaseStorage::default())
}

/// [`load_folder`], with weights that will not be trained stored otherwise.
pub fn load_folder_as(
    folder: &Path,
    id_of_rank: Vec<u32>,
    storage: &BaseStorage,
) -> Result<Model, ModelError> {
    let config = ModelConfig::load(folder)?;
    let shards = Shards::read(folder)?;
    let files = shards.open()?;
    let tied = config.tied;
    let mut used = Vec::new();
    let model = Model::build(config, id_of_rank, storage, |slot, out| {
        used.push(slot.name.clone());
        fill(&files, folder, slot, out)
    })?;
    used.sort_unstable();
    for (name, (path, _)) in &files {
        let known = used.binary_search_by(|used| used.cmp(name)).is_ok()
            || name.ends_with("rotary_emb.inv_freq")
            || (tied && name == "lm_head.weight");
        if !known {
            return Err(ModelError::UnknownTensor {
                origin: path.display().to_string(),
                name: name.clone(),
            });
        }
    }
    Ok(model)
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

fn fill(
    files: &OpenFiles<'_>,
    folder: &Path,
    slot: &Slot,
    out: &mut [f32],
) -> Result<(), ModelError> {
    let Some((path, file)) = files.get(slot.name.as_str()) else {
        return Err(ModelError::MissingTensor {
            origin: folder.display().to_string(),
            name: slot.name.clone(),
        });
    };
    let origin = path.display().to_string();
    let view = tensors::view(&origin, file, &slot.name)?;
    if view.shape() != slot.shape {
        return Err(ModelError::WrongShape {
            origin,
            name: slot.name.clone(),
            got: view.shape().to_vec(),
            expected: slot.shape.clone(),
        });
    }
    tensors::copy_as_f32(&origin, &slot.name, &view, out)?;
    if out.iter().any(|value| !value.is_finite()) {
        return Err(ModelError::NotFinite {
            origin,
            name: slot.name.clone(),
        });
    }
    Ok(())
}

/// The weight files of a folder, in memory.
struct Shards(Vec<(PathBuf, Vec<u8>)>);

/// Each tensor's file, by the tensor's name.
type OpenFiles<'a> = BTreeMap<String, (&'a Path, Rc<SafeTensors<'a>>)>;

impl Shards {
    fn read(folder: &Path) -> Result<Self, ModelError> {
        let index = folder.join("model.safetensors.index.json");
        let names = if folder.join("model.safetensors").exists() || !index.exists() {
            vec!["model.safetensors".to_owned()]
        } else {
            shard_names(&index)?
        };
        let read = |name: String| {
            let path = folder.join(name);
            match std::fs::read(&path) {
                Ok(bytes) => Ok((path, bytes)),
                Err(source) => Err(ModelError::Read { path, source }),
            }
        };
        names
            .into_iter()
            .map(read)
            .collect::<Result<_, _>>()
            .map(Self)
    }

    fn open(&self) -> Result<OpenFiles<'_>, ModelError> {
        let mut files = BTreeMap::new();
        for (path, bytes) in &self.0 {
            let origin = path.display().to_string();
            let file = Rc::new(tensors::open(&origin, bytes)?);
            for name in file.names() {
                files.insert(name.to_owned(), (path.as_path(), Rc::clone(&file)));
            }
        }
        Ok(files)
    }
}

/// File names of an index, sorted; each must lie in the folder itself.
fn shard_names(index: &Path) -> Result<Vec<String>, ModelError> {
    let object = read_object(index)?;
    let refuse = |reason: String| super::config::ConfigError::Field {
        path: index.into(),
        field: "weight_map".into(),
        reason,
    };
    let map = object
        .get("weight_map")
        .and_then(serde_json::Value::as_object)
        .ok_or_else(|| refuse("missing or not an object".into()))?;
    let mut names = Vec::new();
    for value in map.values() {
        let name = value
            .as_str()
            .ok_or_else(|| refuse(format!("{value} is not a file name")))?;
        let mut parts = Path::new(name).components();
        if !matches!(
            (parts.next(), parts.next()),
            (Some(Component::Normal(_)), None)
        ) {
            return Err(refuse(format!("`{name}` is not a file name in this folder")).into());
        }
        names.push(name.to_owned());
    }
    names.sort_unstable();
    names.dedup();
    Ok(names)
}
