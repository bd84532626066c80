//! The adapter that a round's first inner round starts from.

use std::collections::BTreeMap;
use std::path::Path;

use consilium_protocol::manifest::Training;
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};
use rayon::prelude::*;
use sha2::{Digest as _, Sha256};

use super::pivot::Pivot;
use super::tensors::{A, B, Output, PREFIX, serialize};
use crate::fusion::error::FusionError;

const DOMAIN: &[u8] = b"consilium/initial-adapter/1\0";

/// `adapter_model.safetensors` of an untrained adapter on the pivot in `pivot`.
///
/// For every `model.layers.*.<target>.weight` [out, in]: A [r, in] uniform in ±sqrt(3 / in), so that its rows have a
/// norm of about 1, B [out, r] zero. The draws depend on the seed and the tensor's name only and are the same on every
/// machine. Modules to save are the pivot's own tensors, widened to `f32`.
///
/// # Errors
/// A folder that cannot be read, or a module of the manifest that the pivot does not have.
pub fn initial_adapter(
    pivot: &Path,
    training: &Training,
    seed: u64,
) -> Result<Vec<u8>, FusionError> {
    let pivot = Pivot::open(pivot)?;
    let mut parts = BTreeMap::new();
    for target in &training.target_modules {
        let suffix = format!(".{target}.weight");
        let before = parts.len();
        for (name, shape) in pivot.shapes() {
            if let (true, Some(_), &[rows, columns]) = (
                name.starts_with("model.layers."),
                name.strip_suffix(suffix.as_str()),
                shape,
            ) {
                parts.insert(name.to_owned(), Part::Matrix { rows, columns });
            }
        }
        if parts.len() == before {
            return Err(FusionError::Target(target.clone()));
        }
    }
    for module in &training.modules_to_save {
        let mut found = false;
        for (name, shape) in pivot.shapes() {
            if is_of_module(name, module) {
                parts.insert(name.to_owned(), Part::Whole(shape.to_vec()));
                found |= name.ends_with(".weight");
            }
        }
        if !found {
            return Err(FusionError::Saved(module.clone()));
        }
    }
    let rank = usize::try_from(training.rank).unwrap_or(usize::MAX);
    let outputs: Vec<Result<Vec<Output>, FusionError>> = parts
        .into_par_iter()
        .map(|(name, part)| part.tensors(&pivot, &name, rank, seed))
        .collect();
    let mut all = Vec::new();
    for output in outputs {
        all.extend(output?);
    }
    serialize(&all)
}

/// Whether a tensor is a parameter of a module with this name, such as `model.embed_tokens.weight` of `embed_tokens`.
fn is_of_module(tensor: &str, module: &str) -> bool {
    tensor
        .rsplit_once('.')
        .and_then(|(path, _)| path.strip_suffix(module))
        .is_some_and(|path| path.is_empty() || path.ends_with('.'))
}

enum Part {
    Matrix { rows: usize, columns: usize },
    Whole(Vec<usize>),
}

impl Part {
    fn tensors(
        self,
        pivot: &Pivot,
        name: &str,
        rank: usize,
        seed: u64,
    ) -> Result<Vec<Output>, FusionError> {
        match self {
            Self::Matrix { rows, columns } => {
                let layer = name.strip_suffix(".weight").unwrap_or(name);
                let a = format!("{PREFIX}{layer}{A}");
                Ok(vec![
                    Output {
                        data: uniform(seed, &a, rank, columns),
                        name: a,
                        shape: vec![rank, columns],
                    },
                    Output {
                        name: format!("{PREFIX}{layer}{B}"),
                        shape: vec![rows, rank],
                        data: vec![0; rows * rank * 4],
                    },
                ])
            }
            Self::Whole(shape) => Ok(vec![Output {
                name: format!("{PREFIX}{name}"),
                shape,
                data: pivot.values(name)?,
            }]),
        }
    }
}

/// Uniform in ±sqrt(3 / columns): 2^24 equally likely odd multiples of 2^-24, each rounded once.
#[expect(
    clippy::cast_precision_loss,
    clippy::cast_possible_wrap,
    reason = "odd numbers below 2^24 are exact in f32, and lengths beyond 2^24 only round the bound"
)]
fn uniform(seed: u64, name: &str, rows: usize, columns: usize) -> Vec<u8> {
    let mut hash = Sha256::new();
    hash.update(DOMAIN);
    hash.update(seed.to_le_bytes());
    hash.update(name.as_bytes());
    let mut draws = ChaCha8Rng::from_seed(hash.finalize().into());
    let bound = (3.0 / columns as f32).sqrt();
    (0..rows * columns)
        .flat_map(|_| {
            let odd = ((draws.next_u32() >> 8) as i32) * 2 + 1 - (1 << 24);
            (odd as f32 / 16_777_216.0 * bound).to_le_bytes()
        })
        .collect()
}
