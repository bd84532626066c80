//! Rules that decide entry by entry: TIES, DARE, SCE and the trimmed mean, on updates that come chunk by chunk.
//!
//! What a rule must know of all entries first (thresholds, weights) it learns by passes over the chunks; the values are those of
//! `consilium_kernels::adapters`. Chunks are blocks of rows of the product, or pieces of a module trained whole.

use consilium_kernels::AdapterError;
use consilium_kernels::adapters::{Magnitudes, Merging, Squares, merge, spreads};
use consilium_kernels::fusion::Robust;
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};
use sha2::{Digest as _, Sha256};

use crate::fusion::error::FusionError;

const DOMAIN: &[u8] = b"consilium/dare/1\0";

/// The updates of some members on one tensor, chunk by chunk.
pub(super) trait Updates {
    fn chunks(&self) -> usize;

    /// Index of the chunk's first entry, and one slice per member.
    fn chunk(&self, index: usize) -> Result<(usize, Vec<Vec<f32>>), FusionError>;
}

/// A rule as the manifest and the defence have it.
#[derive(Debug, Clone, Copy)]
pub(super) enum EntryRule {
    Ties { density_permille: u32 },
    Dare { density_permille: u32 },
    Sce { select_permille: u32 },
    TrimmedMean { dropped: usize },
}

/// A rule that knows what it must of one tensor.
pub(super) enum Ready {
    Ties {
        weights: Vec<f64>,
        thresholds: Vec<f32>,
    },
    Dare {
        weights: Vec<f64>,
        masks: Vec<[u8; 32]>,
        density: f64,
    },
    Sce {
        weights: Vec<f64>,
    },
    TrimmedMean {
        trim_permille: u32,
    },
}

/// Who the updates are of, for the draws of DARE.
pub(super) struct Names<'a> {
    pub(super) tensor: &'a str,
    pub(super) members: &'a [&'a str],
    pub(super) seed: u64,
}

impl EntryRule {
    /// Learns what the rule must know. `weights` are the members' shares.
    pub(super) fn prepare(
        self,
        weights: &[f64],
        names: &Names<'_>,
        updates: &dyn Updates,
    ) -> Result<Ready, FusionError> {
        let weights = weights.to_vec();
        Ok(match self {
            Self::Ties { density_permille } => Ready::Ties {
                thresholds: thresholds(updates, weights.len(), density_permille, names.tensor)?,
                weights,
            },
            Self::Dare { density_permille } => Ready::Dare {
                masks: names
                    .members
                    .iter()
                    .map(|member| key(names, member))
                    .collect(),
                density: f64::from(density_permille) / 1000.0,
                weights,
            },
            Self::Sce { select_permille } => Ready::Sce {
                weights: squares(updates, weights.len(), select_permille, names.tensor)?,
            },
            Self::TrimmedMean { dropped } => Ready::TrimmedMean {
                // The least share of which at least `dropped` values come.
                trim_permille: u32::try_from((1000 * dropped).div_ceil(weights.len().max(1)))
                    .unwrap_or(u32::MAX),
            },
        })
    }
}

impl Ready {
    /// The merged entries of a chunk whose first entry has the index `start`.
    pub(super) fn merge(
        &self,
        start: usize,
        mut chunk: Vec<Vec<f32>>,
        tensor: &str,
    ) -> Result<Vec<f32>, FusionError> {
        let merging = match self {
            Self::Ties {
                weights,
                thresholds,
            } => Merging::Ties {
                weights,
                thresholds,
            },
            Self::Dare {
                weights,
                masks,
                density,
            } => {
                for (values, mask) in chunk.iter_mut().zip(masks) {
                    drop_out(values, *mask, start, *density);
                }
                Merging::Sum { weights }
            }
            Self::Sce { weights } => Merging::Sce { weights },
            Self::TrimmedMean { trim_permille } => Merging::Robust(Robust::TrimmedMean {
                trim_permille: *trim_permille,
            }),
        };
        let views: Vec<&[f32]> = chunk.iter().map(Vec::as_slice).collect();
        let mut out = vec![0.0; views.first().map_or(0, |values| values.len())];
        merge(merging, &views, &mut out).map_err(|source| entries(tensor, source))?;
        Ok(out)
    }
}

fn entries(tensor: &str, source: AdapterError) -> FusionError {
    FusionError::Entries {
        tensor: tensor.to_owned(),
        source,
    }
}

/// Of every member, the magnitude that the largest entries have.
fn thresholds(
    updates: &dyn Updates,
    members: usize,
    density_permille: u32,
    tensor: &str,
) -> Result<Vec<f32>, FusionError> {
    let mut coarse = vec![Magnitudes::default(); members];
    for index in 0..updates.chunks() {
        let (_, chunk) = updates.chunk(index)?;
        for (coarse, values) in coarse.iter_mut().zip(&chunk) {
            coarse
                .observe(values)
                .map_err(|source| entries(tensor, source))?;
        }
    }
    let narrowed = coarse
        .into_iter()
        .map(|coarse| coarse.narrow(density_permille));
    let mut fine = narrowed
        .collect::<Result<Vec<_>, _>>()
        .map_err(|source| entries(tensor, source))?;
    for index in 0..updates.chunks() {
        let (_, chunk) = updates.chunk(index)?;
        for (fine, values) in fine.iter_mut().zip(&chunk) {
            fine.observe(values);
        }
    }
    let finished = fine
        .into_iter()
        .map(consilium_kernels::adapters::Narrowed::finish);
    let finished = finished.collect::<Result<Vec<_>, _>>();
    finished.map_err(|source| entries(tensor, source))
}

/// SCE's weights: shares of the squares where members differ most.
fn squares(
    updates: &dyn Updates,
    members: usize,
    select_permille: u32,
    tensor: &str,
) -> Result<Vec<f64>, FusionError> {
    let failed = |source| entries(tensor, source);
    let spread = |chunk: &[Vec<f32>]| {
        let views: Vec<&[f32]> = chunk.iter().map(Vec::as_slice).collect();
        let mut out = vec![0.0; views.first().map_or(0, |values| values.len())];
        spreads(&views, &mut out).map(|()| out)
    };
    let mut coarse = Magnitudes::default();
    for index in 0..updates.chunks() {
        let out = spread(&updates.chunk(index)?.1).map_err(failed)?;
        coarse.observe(&out).map_err(failed)?;
    }
    let mut fine = coarse.narrow(select_permille).map_err(failed)?;
    for index in 0..updates.chunks() {
        fine.observe(&spread(&updates.chunk(index)?.1).map_err(failed)?);
    }
    let mut squares = Squares::new(members, fine.finish().map_err(failed)?);
    for index in 0..updates.chunks() {
        let (_, chunk) = updates.chunk(index)?;
        let views: Vec<&[f32]> = chunk.iter().map(Vec::as_slice).collect();
        squares.observe(&views).map_err(failed)?;
    }
    Ok(squares.finish())
}

/// Seed of a member's draws on a tensor.
fn key(names: &Names<'_>, member: &str) -> [u8; 32] {
    let mut hash = Sha256::new();
    hash.update(DOMAIN);
    hash.update(names.seed.to_le_bytes());
    hash.update(names.tensor.as_bytes());
    hash.update([0]);
    hash.update(member.as_bytes());
    hash.finalize().into()
}

/// Entry i stays if draw i of the stream is below the density, whatever chunk it comes in.
#[expect(
    clippy::cast_possible_truncation,
    reason = "overflow becomes infinite and is refused by the merge"
)]
fn drop_out(values: &mut [f32], key: [u8; 32], start: usize, density: f64) {
    let mut draws = ChaCha8Rng::from_seed(key);
    draws.set_word_pos(start as u128);
    let below = density * (f64::from(u32::MAX) + 1.0);
    for value in values {
        *value = if f64::from(draws.next_u32()) < below {
            (f64::from(*value) / density) as f32
        } else {
            0.0
        };
    }
}
