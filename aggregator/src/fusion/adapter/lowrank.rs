//! Low-rank products `B A` that are added, truncated and rotated without ever being multiplied out.
//!
//! A sum of products is the product of the stacked factors. With thin QR of both stacks its singular values are those
//! of a small core, and truncating there is the best approximation of that rank (Eckart-Young). The factors of a
//! product are only known up to a rotation; orthogonal Procrustes picks the one whose A is closest to the A before, so
//! that the optimiser states that nodes keep for A and B still fit.

use faer::{Mat, MatRef};

use super::linalg::{product, thin_qr, thin_svd};

/// Singular values below this share of the largest are rounding.
const RANK_FLOOR: f64 = 1e-12;
/// Directions of the previous A with less than this share of its norm left are not worth keeping.
const DIRECTION_FLOOR: f64 = 1e-6;

/// The product `b at^T`: `b` is [out, r], `at` is A transposed, [in, r].
pub(super) struct Factors {
    pub(super) b: Mat<f64>,
    pub(super) at: Mat<f64>,
}

impl Factors {
    /// The product of zero.
    pub(super) fn zero([rows, columns]: [usize; 2], rank: usize) -> Self {
        Self {
            b: Mat::zeros(rows, rank),
            at: Mat::zeros(columns, rank),
        }
    }

    /// All columns of some factors beside each other, those of the i-th with B times `coefficients[i]`: the sum of their
    /// products, of `rank` at least.
    pub(super) fn beside(terms: &[(f64, &Self)], shape: [usize; 2], rank: usize) -> Self {
        let total = terms.iter().map(|(_, factors)| factors.rank()).sum();
        let mut stacked = Self::zero(shape, rank.max(total));
        let mut next = 0;
        for (coefficient, factors) in terms {
            for column in 0..factors.rank() {
                let place = stacked.b.col_as_slice_mut(next);
                for (place, value) in place.iter_mut().zip(factors.b.col_as_slice(column)) {
                    *place = coefficient * value;
                }
                let place = stacked.at.col_as_slice_mut(next);
                place.copy_from_slice(factors.at.col_as_slice(column));
                next += 1;
            }
        }
        stacked
    }

    /// Sums of coefficient x factor, A and B apart, with zeros beyond the rank of a term.
    pub(super) fn means(terms: &[(f64, &Self)], shape: [usize; 2]) -> Self {
        let rank = terms.iter().map(|(_, factors)| factors.rank()).max();
        let mut mean = Self::zero(shape, rank.unwrap_or(0));
        for (coefficient, factors) in terms {
            for column in 0..factors.rank() {
                add(
                    mean.b.col_as_slice_mut(column),
                    *coefficient,
                    factors.b.col_as_slice(column),
                );
                add(
                    mean.at.col_as_slice_mut(column),
                    *coefficient,
                    factors.at.col_as_slice(column),
                );
            }
        }
        mean
    }

    pub(super) fn rank(&self) -> usize {
        self.b.ncols()
    }
}

fn add(sums: &mut [f64], coefficient: f64, values: &[f64]) {
    for (sum, value) in sums.iter_mut().zip(values) {
        *sum += coefficient * value;
    }
}

/// The leading part `U diag(s) V^T` of a product: `us` = U diag(s), `v` with orthonormal columns.
pub(super) struct Truncated {
    pub(super) us: Mat<f64>,
    pub(super) v: Mat<f64>,
    /// Norm of what was cut off relative to the whole; 0 for a product of zero.
    pub(super) error: f64,
    /// Norm of the whole.
    pub(super) norm: f64,
}

/// Orthonormal bases of the stacked factors of some products. Every weighted sum of the products lies in them, so the
/// decompositions whose cost grows with the matrices are made once.
pub(super) struct Stack {
    ranks: Vec<usize>,
    q_b: Mat<f64>,
    r_b: Mat<f64>,
    q_a: Mat<f64>,
    r_a: Mat<f64>,
}

impl Stack {
    /// `terms` have the same [out, in] and are not empty.
    pub(super) fn new(terms: &[&Factors]) -> Self {
        let stacked = |side: fn(&Factors) -> &Mat<f64>| {
            let rows = terms.first().map_or(0, |f| side(f).nrows());
            let columns = terms.iter().map(|f| f.rank()).sum();
            let mut stack = Mat::zeros(rows, columns);
            let mut next = 0;
            for factors in terms {
                for column in 0..factors.rank() {
                    stack
                        .col_as_slice_mut(next)
                        .copy_from_slice(side(factors).col_as_slice(column));
                    next += 1;
                }
            }
            thin_qr(stack)
        };
        let (q_b, r_b) = stacked(|factors| &factors.b);
        let (q_a, r_a) = stacked(|factors| &factors.at);
        Self {
            ranks: terms.iter().map(|factors| factors.rank()).collect(),
            q_b,
            r_b,
            q_a,
            r_a,
        }
    }

    /// Frobenius norm of `sum of c_i B_i A_i`.
    pub(super) fn norm(&self, coefficients: &[f64]) -> f64 {
        product(self.scaled(coefficients).as_ref(), self.r_a.transpose()).norm_l2()
    }

    /// The core factor of B with every term's columns times its coefficient.
    fn scaled(&self, coefficients: &[f64]) -> Mat<f64> {
        let mut scaled = self.r_b.clone();
        let columns = self
            .ranks
            .iter()
            .zip(coefficients)
            .flat_map(|(&rank, &c)| std::iter::repeat_n(c, rank));
        for (column, coefficient) in columns.enumerate() {
            for value in scaled.col_as_slice_mut(column) {
                *value *= coefficient;
            }
        }
        scaled
    }

    /// The best approximation of rank `most` of `sum of c_i B_i A_i`, or the sum itself where its rank is lower. `None`: no
    /// convergence.
    pub(super) fn weighted_sum(&self, coefficients: &[f64], most: usize) -> Option<Truncated> {
        let scaled = self.scaled(coefficients);
        let core = thin_svd(product(scaled.as_ref(), self.r_a.transpose()).as_ref())?;
        let largest = core.s.first().copied().unwrap_or(0.0);
        let rank = core
            .s
            .iter()
            .take_while(|&&s| s > RANK_FLOOR * largest)
            .count();
        let keep = rank.min(most);
        let mut us = product(self.q_b.as_ref(), core.u.get(.., ..keep));
        for (column, &s) in core.s.iter().take(keep).enumerate() {
            for value in us.col_as_slice_mut(column) {
                *value *= s;
            }
        }
        let squares = |values: &[f64]| values.iter().rev().map(|s| s * s).sum::<f64>();
        let all = squares(&core.s);
        let error = if all > 0.0 {
            (squares(core.s.get(keep..rank).unwrap_or(&[])) / all).sqrt()
        } else {
            0.0
        };
        Some(Truncated {
            us,
            v: product(self.q_a.as_ref(), core.v.get(.., ..keep)),
            error,
            norm: all.sqrt(),
        })
    }
}

/// Rotates a truncated product so that its A comes closest to `previous` (A transposed, [in, r]).
///
/// A gets r orthonormal rows (r at most its columns), B the scale. Where the product has a lower rank, directions of
/// the previous A fill up, with zeros in B: a matrix that has not moved yet keeps its A.
pub(super) fn align(new: &Truncated, previous: MatRef<'_, f64>) -> Option<Factors> {
    let rank = previous.ncols();
    let missing = rank.saturating_sub(new.v.ncols());
    let fill = remaining_directions(&new.v, previous, missing)?;
    let columns = new.v.ncols() + fill.ncols();
    let at = Mat::from_fn(new.v.nrows(), columns, |i, j| {
        j.checked_sub(new.v.ncols())
            .map_or_else(|| new.v[(i, j)], |j| fill[(i, j)])
    });
    let us = Mat::from_fn(new.us.nrows(), columns, |i, j| {
        if j < new.us.ncols() {
            new.us[(i, j)]
        } else {
            0.0
        }
    });
    let overlap = thin_svd(product(previous.transpose(), at.as_ref()).as_ref())?;
    let rotation = product(overlap.u.as_ref(), overlap.v.transpose());
    Some(Factors {
        b: product(us.as_ref(), rotation.transpose()),
        at: product(at.as_ref(), rotation.transpose()),
    })
}

/// At most `count` orthonormal directions of `previous` that are orthogonal to `taken`.
fn remaining_directions(
    taken: &Mat<f64>,
    previous: MatRef<'_, f64>,
    count: usize,
) -> Option<Mat<f64>> {
    if count == 0 {
        return Some(Mat::zeros(previous.nrows(), 0));
    }
    let norm = previous.norm_l2();
    let mut rest = previous.to_owned();
    // Twice is enough: one projection leaves rounding of the size of what it removed.
    for _ in 0..2 {
        rest -= product(
            taken.as_ref(),
            product(taken.transpose(), rest.as_ref()).as_ref(),
        );
    }
    let (q, r) = thin_qr(rest);
    let directions = thin_svd(r.as_ref())?;
    let keep = directions
        .s
        .iter()
        .take(count)
        .take_while(|&&s| s > DIRECTION_FLOOR * norm)
        .count();
    Some(product(q.as_ref(), directions.u.get(.., ..keep)))
}
