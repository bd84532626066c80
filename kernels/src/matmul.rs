//! Products of row-major f32 matrices that lie inside slices.
//!
//! `out = scale a b`, with either factor transposed, replacing or adding. The inner loops are those
//! of the gemm crate; sums run in the same order for any number of threads.

use gemm::{Parallelism, gemm};

/// Multiply-adds from which threads pay: about a tenth of a millisecond of one core.
const WORTH_THREADS: usize = 4 << 20;

/// A row-major matrix inside a slice, rows `stride` values apart.
#[derive(Debug, Clone, Copy)]
pub struct View<'a> {
    data: &'a [f32],
    rows: usize,
    columns: usize,
    stride: usize,
}

/// A row-major matrix to write to.
#[derive(Debug)]
pub struct ViewMut<'a> {
    data: &'a mut [f32],
    rows: usize,
    columns: usize,
    stride: usize,
}

/// What becomes of the old contents of the destination.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Write {
    /// They are overwritten.
    Replace,
    /// The product is added to them.
    Add,
}

impl<'a> View<'a> {
    /// The first `rows * columns` values.
    ///
    /// # Panics
    /// Where the slice is shorter.
    pub fn new(data: &'a [f32], rows: usize, columns: usize) -> Self {
        Self {
            data: &data[..rows * columns],
            rows,
            columns,
            stride: columns,
        }
    }

    /// Number of rows.
    pub fn rows(self) -> usize {
        self.rows
    }

    /// Columns `first .. first + columns` of this matrix.
    ///
    /// # Panics
    /// Where the matrix has fewer.
    pub fn columns(self, first: usize, columns: usize) -> Self {
        assert!(
            first + columns <= self.columns,
            "columns {first} + {columns} of {}",
            self.columns
        );
        Self {
            data: &self.data[first.min(self.data.len())..],
            columns,
            ..self
        }
    }
}

impl<'a> ViewMut<'a> {
    /// The first `rows * columns` values.
    ///
    /// # Panics
    /// Where the slice is shorter.
    pub fn new(data: &'a mut [f32], rows: usize, columns: usize) -> Self {
        Self {
            data: &mut data[..rows * columns],
            rows,
            columns,
            stride: columns,
        }
    }

    /// Columns `first .. first + columns` of this matrix.
    ///
    /// # Panics
    /// Where the matrix has fewer.
    pub fn columns(self, first: usize, columns: usize) -> Self {
        assert!(
            first + columns <= self.columns,
            "columns {first} + {columns} of {}",
            self.columns
        );
        let first = first.min(self.data.len());
        Self {
            data: &mut self.data[first..],
            columns,
            ..self
        }
    }
}

/// `out = scale * a b`
///
/// # Panics
/// Where the shapes do not fit, like its neighbours.
pub fn ab(mut out: ViewMut<'_>, write: Write, a: View<'_>, b: View<'_>, scale: f32) {
    product(&mut out, write, Factor::plain(a), Factor::plain(b), scale);
}

/// `out = scale * a b^T`
///
/// # Panics
/// Where the shapes do not fit.
pub fn abt(mut out: ViewMut<'_>, write: Write, a: View<'_>, b: View<'_>, scale: f32) {
    product(
        &mut out,
        write,
        Factor::plain(a),
        Factor::transposed(b),
        scale,
    );
}

/// `out = scale * a^T b`
///
/// # Panics
/// Where the shapes do not fit.
pub fn atb(mut out: ViewMut<'_>, write: Write, a: View<'_>, b: View<'_>, scale: f32) {
    product(
        &mut out,
        write,
        Factor::transposed(a),
        Factor::plain(b),
        scale,
    );
}

/// A matrix by its shape and steps.
#[derive(Clone, Copy)]
struct Factor<'a> {
    data: &'a [f32],
    rows: usize,
    columns: usize,
    row_step: usize,
    column_step: usize,
}

impl<'a> Factor<'a> {
    fn plain(
        View {
            data,
            rows,
            columns,
            stride,
        }: View<'a>,
    ) -> Self {
        Self {
            data,
            rows,
            columns,
            row_step: stride,
            column_step: 1,
        }
    }

    fn transposed(
        View {
            data,
            rows,
            columns,
            stride,
        }: View<'a>,
    ) -> Self {
        Self {
            data,
            rows: columns,
            columns: rows,
            row_step: 1,
            column_step: stride,
        }
    }

    /// Whether the last value lies inside the slice.
    fn is_inside(&self) -> bool {
        let last = (self.rows - 1) * self.row_step + (self.columns - 1) * self.column_step;
        last < self.data.len()
    }
}

fn product(out: &mut ViewMut<'_>, write: Write, a: Factor<'_>, b: Factor<'_>, scale: f32) {
    let (m, n, k) = (out.rows, out.columns, a.columns);
    assert!(
        a.rows == m && b.columns == n && b.rows == k,
        "{}x{} = {}x{} {}x{}",
        m,
        n,
        a.rows,
        k,
        b.rows,
        b.columns
    );
    if m == 0 || n == 0 {
        return;
    }
    if k == 0 {
        if write == Write::Replace {
            for row in out.data.chunks_mut(out.stride) {
                row[..n].fill(0.0);
            }
        }
        return;
    }
    let last = (m - 1) * out.stride + n - 1;
    assert!(
        last < out.data.len() && a.is_inside() && b.is_inside(),
        "matrix outside of its slice"
    );
    let parallelism = if m * n * k < WORTH_THREADS || rayon::current_num_threads() == 1 {
        Parallelism::None
    } else {
        Parallelism::Rayon(0)
    };
    #[expect(unsafe_code, reason = "the gemm crate takes pointers and steps")]
    // SAFETY: every step is positive and the last value of each matrix was checked to lie inside its
    // slice; `out` is borrowed exclusively, so it overlaps neither factor.
    unsafe {
        gemm(
            m,
            n,
            k,
            out.data.as_mut_ptr(),
            1,
            out.stride.cast_signed(),
            write == Write::Add,
            a.data.as_ptr(),
            a.column_step.cast_signed(),
            a.row_step.cast_signed(),
            b.data.as_ptr(),
            b.column_step.cast_signed(),
            b.row_step.cast_signed(),
            1.0,
            scale,
            false,
            false,
            false,
            parallelism,
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn values(len: usize, seed: usize) -> Vec<f32> {
        (0..len)
            .map(|i| ((i * 37 + seed * 11) % 17) as f32 - 8.0)
            .collect()
    }

    /// All three products of one shape, written to columns 3.. of a wider matrix between guards.
    fn check(m: usize, n: usize, k: usize, kind: usize, write: Write) {
        const GUARD: usize = 64;
        let (a, b, wide) = (values(m * k, 1), values(k * n, 2), n + 5);
        let mut out = vec![1f32; GUARD + m * wide + GUARD];
        let mut want = out.clone();
        let view = ViewMut::new(&mut out[GUARD..], m, wide).columns(3, n);
        match kind {
            0 => ab(view, write, View::new(&a, m, k), View::new(&b, k, n), 2.0),
            1 => abt(view, write, View::new(&a, m, k), View::new(&b, n, k), 2.0),
            _ => atb(view, write, View::new(&a, k, m), View::new(&b, k, n), 2.0),
        }
        for i in 0..m {
            for j in 0..n {
                let place = &mut want[GUARD + i * wide + 3 + j];
                if write == Write::Replace {
                    *place = 0.0;
                }
                for l in 0..k {
                    let a = if kind == 2 {
                        a[l * m + i]
                    } else {
                        a[i * k + l]
                    };
                    let b = if kind == 1 {
                        b[j * k + l]
                    } else {
                        b[l * n + j]
                    };
                    *place += 2.0 * a * b;
                }
            }
        }
        assert!(out == want, "kind {kind}, {m}x{k} {k}x{n}, {write:?}");
    }

    #[test]
    fn products_of_odd_shapes_equal_the_plain_sum_and_touch_nothing_else() {
        for m in [0, 1, 2, 7, 24, 57, 130] {
            for n in [1, 2, 5, 16, 29, 72] {
                for k in [0, 1, 3, 16, 24, 57] {
                    for kind in 0..3 {
                        check(m, n, k, kind, Write::Add);
                        check(m, n, k, kind, Write::Replace);
                    }
                }
            }
        }
    }
}
