//! The adapter that a round's first inner round starts from.

use std::collections::BTreeMap;
use std::fs::File;
use std::path::Path;

use consilium_protocol::manifest::Training;
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};
use sha2::{Digest as _, Sha256};

use super::output::Output;
use super::pivot::Pivot;
use super::tensors::{A, B, PREFIX, pieces};
use crate::fusion::error::FusionError;

const DOMAIN: &[u8] = b"consilium/initial-adapter/1\0";

/// Writes `adapter_model.safetensors` of an untrained adapter on the pivot in `pivot` to an empty file.
///
/// For every `model.layers.*.<target>.weight` [out, in]: A [r, in] uniform in ±sqrt(3 / in), so that its rows have a
/// norm of about 1, B [out, r] zero. The draws depend on the seed and the tensor's name only and are the same on every
/// machine. Modules to save are the pivot's own tensors, widened to `f32`.
///
/// # Errors
/// A folder that cannot be read, a module of the manifest that the pivot does not have, or a file that cannot be written.
pub fn initial_adapter(
    pivot: &Path,
    training: &Training,
    seed: u64,
    file: &File,
) -> Result<(), FusionError> {
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
    let shapes = parts
        .iter()
        .flat_map(|(name, part)| part.shapes(name, rank));
    let mut output = Output::begin(file, shapes)?;
    for (name, part) in &parts {
        part.write(&pivot, name, rank, seed, &mut output)?;
    }
    output.finish()
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
    fn shapes(&self, name: &str, rank: usize) -> Vec<(String, Vec<usize>)> {
        match self {
            Self::Matrix { rows, columns } => {
                let [a, b] = factors(name);
                vec![(a, vec![rank, *columns]), (b, vec![*rows, rank])]
            }
            Self::Whole(shape) => vec![(format!("{PREFIX}{name}"), shape.clone())],
        }
    }

    fn write(
        &self,
        pivot: &Pivot,
        name: &str,
        rank: usize,
        seed: u64,
        output: &mut Output<'_>,
    ) -> Result<(), FusionError> {
        match self {
            Self::Matrix { rows, columns } => {
                let [a, b] = factors(name);
                let place = output.place(&a, &[rank, *columns]);
                output.write(place, 0, &uniform(seed, &a, rank, *columns))?;
                let place = output.place(&b, &[*rows, rank]);
                output.write(place, 0, &vec![0.0; rows * rank])
            }
            Self::Whole(shape) => {
                let place = output.place(&format!("{PREFIX}{name}"), shape);
                let holder = pivot.holder(name);
                let holder = holder.ok_or_else(|| FusionError::Saved(name.to_owned()))?;
                for piece in pieces(shape) {
                    output.write(place, piece.start, &holder.values(name, piece)?)?;
                }
                Ok(())
            }
        }
    }
}

/// PEFT's names of the factors of a layer of the pivot.
fn factors(name: &str) -> [String; 2] {
    let layer = name.strip_suffix(".weight").unwrap_or(name);
    [A, B].map(|factor| format!("{PREFIX}{layer}{factor}"))
}

/// Uniform in ±sqrt(3 / columns): 2^24 equally likely odd multiples of 2^-24, each rounded once.
#[expect(
    clippy::cast_precision_loss,
    clippy::cast_possible_wrap,
    reason = "odd numbers below 2^24 are exact in f32, and lengths beyond 2^24 only round the bound"
)]
fn uniform(seed: u64, name: &str, rows: usize, columns: usize) -> Vec<f32> {
    let mut hash = Sha256::new();
    hash.update(DOMAIN);
    hash.update(seed.to_le_bytes());
    hash.update(name.as_bytes());
    let mut draws = ChaCha8Rng::from_seed(hash.finalize().into());
    let bound = (3.0 / columns as f32).sqrt();
    (0..rows * columns)
        .map(|_| {
            let odd = ((draws.next_u32() >> 8) as i32) * 2 + 1 - (1 << 24);
            odd as f32 / 16_777_216.0 * bound
        })
        .collect()
}
