//! The low-rank form of a matrix that only exists as blocks of rows, one at a time.
//!
//! A randomised range finder with power steps (Halko, Martinsson, Tropp, arXiv 0909.4061, algorithm 4.4) needs nothing but
//! products with the matrix from either side, which are sums over its blocks of rows. So a matrix of [out, in] costs passes over
//! blocks and never memory for all of it. The test matrix is of signs that follow from the layer's name alone.

use faer::Mat;
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};
use sha2::{Digest as _, Sha256};

use super::linalg::{add_product, product, thin_qr};
use super::lowrank::Factors;
use crate::fusion::error::FusionError;

const DOMAIN: &[u8] = b"consilium/sketch/1\0";
/// Power steps: each squares the share of what lies outside of the range that was found.
const POWER_STEPS: usize = 2;

/// A matrix of [out, in], block by block.
pub(super) trait RowBlocks {
    /// [out, in].
    fn shape(&self) -> [usize; 2];

    /// Blocks that its rows make.
    fn blocks(&self) -> usize;

    /// The first row of a block, and its rows as the columns of a matrix. The same at every call.
    fn block(&self, index: usize) -> Result<(usize, Mat<f64>), FusionError>;
}

/// `b at^T` close to the matrix; `b` has orthonormal columns.
pub(super) struct Sketch {
    pub(super) factors: Factors,
    /// Norm of what it lacks.
    pub(super) lost: f64,
}

/// The projection of the matrix onto about its `rank` leading directions.
pub(super) fn sketch(
    matrix: &dyn RowBlocks,
    rank: usize,
    name: &str,
) -> Result<Sketch, FusionError> {
    let [rows, columns] = matrix.shape();
    let rank = rank.min(rows).min(columns);
    let mut right = signs(name, columns, rank);
    let mut left = Mat::zeros(rows, rank);
    let mut norm = 0.0;
    for step in 0..=POWER_STEPS {
        if step > 0 {
            (right, _) = thin_qr(right);
        }
        for index in 0..matrix.blocks() {
            let (from, block) = matrix.block(index)?;
            let part = product(block.transpose(), right.as_ref());
            left.get_mut(from..from + part.nrows(), ..).copy_from(&part);
        }
        (left, _) = thin_qr(left);
        right = Mat::zeros(columns, left.ncols());
        norm = 0.0;
        for index in 0..matrix.blocks() {
            let (from, block) = matrix.block(index)?;
            norm += block.squared_norm_l2();
            add_product(
                &mut right,
                block.as_ref(),
                left.get(from..from + block.ncols(), ..),
            );
        }
    }
    Ok(Sketch {
        lost: (norm - right.squared_norm_l2()).max(0.0).sqrt(),
        factors: Factors { b: left, at: right },
    })
}

fn signs(name: &str, rows: usize, columns: usize) -> Mat<f64> {
    let mut hash = Sha256::new();
    hash.update(DOMAIN);
    hash.update(name.as_bytes());
    let mut draws = ChaCha8Rng::from_seed(hash.finalize().into());
    Mat::from_fn(rows, columns, |_, _| {
        if draws.next_u32() >> 31 == 0 {
            1.0
        } else {
            -1.0
        }
    })
}
