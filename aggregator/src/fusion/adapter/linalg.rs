//! Thin decompositions on the calling thread alone: faer's own solvers take the process-wide parallelism, and sums
//! would then depend on the number of threads.

use faer::dyn_stack::{MemBuffer, MemStack};
use faer::linalg::{householder, matmul, qr, svd};
use faer::{Accum, Conj, Mat, MatRef, Par};

/// `a b`.
pub(super) fn product(a: MatRef<'_, f64>, b: MatRef<'_, f64>) -> Mat<f64> {
    let mut out = Mat::zeros(a.nrows(), b.ncols());
    matmul::matmul(out.as_mut(), Accum::Replace, a, b, 1.0, Par::Seq);
    out
}

/// `out += a b`.
pub(super) fn add_product(out: &mut Mat<f64>, a: MatRef<'_, f64>, b: MatRef<'_, f64>) {
    matmul::matmul(out.as_mut(), Accum::Add, a, b, 1.0, Par::Seq);
}

/// `a = Q R` with min(rows, columns) orthonormal columns in Q, also where `a` lacks rank.
pub(super) fn thin_qr(a: Mat<f64>) -> (Mat<f64>, Mat<f64>) {
    let (rows, columns) = a.shape();
    let size = rows.min(columns);
    if size == 0 {
        return (Mat::zeros(rows, 0), Mat::zeros(0, columns));
    }
    let mut factors = a;
    let block = qr::no_pivoting::factor::recommended_block_size::<f64>(rows, columns);
    let mut coefficients = Mat::zeros(block, size);
    qr::no_pivoting::factor::qr_in_place(
        factors.as_mut(),
        coefficients.as_mut(),
        Par::Seq,
        MemStack::new(&mut MemBuffer::new(
            qr::no_pivoting::factor::qr_in_place_scratch::<f64>(
                rows,
                columns,
                block,
                Par::Seq,
                Default::default(),
            ),
        )),
        Default::default(),
    );
    let upper = Mat::from_fn(
        size,
        columns,
        |i, j| if i <= j { factors[(i, j)] } else { 0.0 },
    );
    let mut q = Mat::identity(rows, size);
    householder::apply_block_householder_sequence_on_the_left_in_place_with_conj(
        factors.get(.., ..size),
        coefficients.as_ref(),
        Conj::No,
        q.as_mut(),
        Par::Seq,
        MemStack::new(&mut MemBuffer::new(
            householder::apply_block_householder_sequence_on_the_left_in_place_scratch::<f64>(
                rows, block, size,
            ),
        )),
    );
    (q, upper)
}

/// Thin singular value decomposition `a = U diag(s) V^T`, values descending.
pub(super) struct Svd {
    pub(super) u: Mat<f64>,
    pub(super) s: Vec<f64>,
    pub(super) v: Mat<f64>,
}

/// `None` where the iteration does not converge.
pub(super) fn thin_svd(a: MatRef<'_, f64>) -> Option<Svd> {
    let (rows, columns) = a.shape();
    let size = rows.min(columns);
    if size == 0 {
        return Some(Svd {
            u: Mat::zeros(rows, 0),
            s: Vec::new(),
            v: Mat::zeros(columns, 0),
        });
    }
    let mut u = Mat::zeros(rows, size);
    let mut v = Mat::zeros(columns, size);
    let mut s = Mat::<f64>::zeros(size, 1);
    let vectors = svd::ComputeSvdVectors::Thin;
    svd::svd(
        a,
        s.as_mut().col_mut(0).as_diagonal_mut(),
        Some(u.as_mut()),
        Some(v.as_mut()),
        Par::Seq,
        MemStack::new(&mut MemBuffer::new(svd::svd_scratch::<f64>(
            rows,
            columns,
            vectors,
            vectors,
            Par::Seq,
            Default::default(),
        ))),
        Default::default(),
    )
    .ok()?;
    Some(Svd {
        u,
        s: s.col_as_slice(0).to_vec(),
        v,
    })
}
