//! Matrix products of row-major slices.

use faer::linalg::matmul::matmul;
use faer::{Accum, MatMut, MatRef, Par};

/// A row-major matrix inside a slice, rows `stride` values apart.
#[derive(Debug, Clone, Copy)]
pub(crate) struct View<'a> {
    data: &'a [f32],
    rows: usize,
    columns: usize,
    stride: usize,
}

impl<'a> View<'a> {
    /// The whole slice as `rows x columns`.
    pub(crate) fn new(data: &'a [f32], rows: usize, columns: usize) -> Self {
        Self { data: &data[..rows * columns], rows, columns, stride: columns }
    }

    /// Rows of the matrix.
    pub(crate) fn rows(self) -> usize {
        self.rows
    }

    /// Columns `first .. first + columns` of this matrix.
    pub(crate) fn columns(self, first: usize, columns: usize) -> Self {
        let end = if self.rows == 0 { first } else { (self.rows - 1) * self.stride + first + columns };
        Self { data: &self.data[first..end], columns, ..self }
    }

    fn faer(self) -> MatRef<'a, f32> {
        MatRef::from_row_major_slice_with_stride(self.data, self.rows, self.columns, self.stride)
    }
}

/// A row-major matrix to write to.
#[derive(Debug)]
pub(crate) struct ViewMut<'a> {
    data: &'a mut [f32],
    rows: usize,
    columns: usize,
    stride: usize,
}

impl<'a> ViewMut<'a> {
    /// The whole slice as `rows x columns`.
    pub(crate) fn new(data: &'a mut [f32], rows: usize, columns: usize) -> Self {
        Self { data: &mut data[..rows * columns], rows, columns, stride: columns }
    }

    /// Columns `first .. first + columns` of this matrix.
    pub(crate) fn columns(self, first: usize, columns: usize) -> Self {
        let end = if self.rows == 0 { first } else { (self.rows - 1) * self.stride + first + columns };
        Self { data: &mut self.data[first..end], columns, ..self }
    }

    fn faer(self) -> MatMut<'a, f32> {
        MatMut::from_row_major_slice_with_stride_mut(self.data, self.rows, self.columns, self.stride)
    }
}

/// What becomes of the old contents of the destination.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Into {
    Replace,
    Add,
}

/// `out = scale * a b`
pub(crate) fn ab(out: ViewMut<'_>, into: Into, a: View<'_>, b: View<'_>, scale: f32) {
    product(out, into, a.faer(), b.faer(), scale);
}

/// `out = scale * a b^T`
pub(crate) fn abt(out: ViewMut<'_>, into: Into, a: View<'_>, b: View<'_>, scale: f32) {
    product(out, into, a.faer(), b.faer().transpose(), scale);
}

/// `out = scale * a^T b`
pub(crate) fn atb(out: ViewMut<'_>, into: Into, a: View<'_>, b: View<'_>, scale: f32) {
    product(out, into, a.faer().transpose(), b.faer(), scale);
}

fn product(out: ViewMut<'_>, into: Into, a: MatRef<'_, f32>, b: MatRef<'_, f32>, scale: f32) {
    let work = a.nrows() * a.ncols() * b.ncols();
    let accum = match into {
        Into::Replace => Accum::Replace,
        Into::Add => Accum::Add,
    };
    if work == 0 {
        if into == Into::Replace && a.ncols() == 0 {
            out.data.fill(0.0);
        }
        return;
    }
    matmul(out.faer(), accum, a, b, scale, threads(work));
}

/// Threads pay from about a tenth of a millisecond of work.
fn threads(work: usize) -> Par {
    if work < 4 << 20 || rayon::current_num_threads() == 1 { Par::Seq } else { Par::rayon(0) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn products_of_all_shapes_equal_the_plain_sum_and_touch_nothing_else() {
        let values = |len: usize, seed: usize| -> Vec<f32> {
            (0..len).map(|i| ((i * 37 + seed * 11) % 17) as f32 - 8.0).collect()
        };
        let mut bad = vec![];
        for m in [1, 2, 7, 24, 57, 130] {
            for n in [1, 2, 5, 16, 29, 72] {
                for k in [1, 3, 16, 24, 57] {
                    for kind in 0..3 {
                        let (a, b) = (values(m * k, 1), values(k * n, 2));
                        let mut out = vec![1f32; 64 + m * n + 64];
                        let view = ViewMut::new(&mut out[64..], m, n);
                        match kind {
                            0 => ab(view, Into::Add, View::new(&a, m, k), View::new(&b, k, n), 2.0),
                            1 => abt(view, Into::Add, View::new(&a, m, k), View::new(&b, n, k), 2.0),
                            _ => atb(view, Into::Add, View::new(&a, k, m), View::new(&b, k, n), 2.0),
                        }
                        let mut want = vec![1f32; 64 + m * n + 64];
                        for i in 0..m {
                            for j in 0..n {
                                for l in 0..k {
                                    let a = if kind == 2 { a[l * m + i] } else { a[i * k + l] };
                                    let b = if kind == 1 { b[j * k + l] } else { b[l * n + j] };
                                    want[64 + i * n + j] += 2.0 * a * b;
                                }
                            }
                        }
                        if out != want { bad.push((kind, m, n, k, out[..64] != want[..64], out[64+m*n..] != want[64+m*n..])); }
                    }
                }
            }
        }
        assert!(bad.is_empty(), "{bad:?}");
    }
}
