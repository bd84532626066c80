//! Causal attention of grouped queries over packed items, rotary embedding included.
//!
//! Rows of `qkv` hold all query heads, then key heads, then value heads. Items see only themselves.
//! Probabilities are recomputed in the backward pass: nothing of size length x length is kept.

use rayon::prelude::*;

use super::rope::RopeTable;
use super::simd::{LANES, exp, wide};

/// Head counts of an attention layer.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Heads {
    pub(crate) queries: usize,
    pub(crate) keys: usize,
    pub(crate) dim: usize,
}

/// Rows of one item in a packed batch; positions restart at its first row.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Segment {
    /// First row.
    pub start: usize,
    /// Rows.
    pub len: usize,
}

/// A token that continues an item's canonical prefix without being seen by it.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Branch {
    /// Segment whose prefix it continues.
    pub(crate) segment: Segment,
    /// Rows of the segment that it sees.
    pub(crate) prefix: usize,
}

impl Heads {
    /// Values in a row of `qkv`.
    pub(crate) fn row(self) -> usize {
        (self.queries + 2 * self.keys) * self.dim
    }

    /// Values in a row of the output.
    pub(crate) fn out(self) -> usize {
        self.queries * self.dim
    }

    fn group(self) -> usize {
        self.queries / self.keys
    }

    fn scale(self) -> f32 {
        1.0 / (self.dim as f32).sqrt()
    }

    fn padded(self) -> usize {
        self.dim.next_multiple_of(LANES)
    }
}

/// `out[row] = softmax(q k^T / sqrt(dim)) v`, per head and segment. Segments tile the rows in order.
pub(crate) fn forward(
    heads: Heads,
    segments: &[Segment],
    rope: &RopeTable,
    qkv: &[f32],
    out: &mut [f32],
) {
    let tasks = split(segments, out, heads.out());
    let run = |buffers: &mut Buffers, (segment, out): (Segment, &mut [f32])| {
        let qkv = &qkv[segment.start * heads.row()..][..segment.len * heads.row()];
        forward_segment(heads, rope, qkv, out, buffers);
    };
    each(tasks, run);
}

/// Gradient of [`forward`] with respect to `qkv`.
pub(crate) fn backward(
    heads: Heads,
    segments: &[Segment],
    rope: &RopeTable,
    qkv: &[f32],
    dout: &[f32],
    dqkv: &mut [f32],
) {
    let tasks = split(segments, dqkv, heads.row());
    let run = |buffers: &mut Buffers, (segment, dqkv): (Segment, &mut [f32])| {
        let qkv = &qkv[segment.start * heads.row()..][..segment.len * heads.row()];
        let dout = &dout[segment.start * heads.out()..][..segment.len * heads.out()];
        backward_segment(heads, rope, qkv, dout, dqkv, buffers);
    };
    each(tasks, run);
}

/// Attention of branch rows over the cached rows of their prefix and over themselves. Branches of one
/// segment must stand together.
pub(crate) fn branches(
    heads: Heads,
    branches: &[Branch],
    rope: &RopeTable,
    cache: &[f32],
    qkv: &[f32],
    out: &mut [f32],
) {
    let mut tasks = Vec::new();
    let (mut rest, mut first) = (out, 0);
    for run in branches.chunk_by(|a, b| a.segment == b.segment) {
        let (head, tail) = rest.split_at_mut(run.len() * heads.out());
        rest = tail;
        tasks.push((
            (run, &qkv[first * heads.row()..][..run.len() * heads.row()]),
            head,
        ));
        first += run.len();
    }
    let run = |buffers: &mut Buffers, ((run, qkv), out): ((&[Branch], &[f32]), &mut [f32])| {
        let segment = run[0].segment;
        let cache = &cache[segment.start * heads.row()..][..segment.len * heads.row()];
        branch_segment(heads, run, rope, cache, qkv, out, buffers);
    };
    each(tasks, run);
}

/// Working space of one task.
#[derive(Default)]
struct Buffers {
    q: Vec<f32>,
    k: Vec<f32>,
    k_columns: Vec<f32>,
    v: Vec<f32>,
    v_columns: Vec<f32>,
    dout: Vec<f32>,
    p: Vec<f32>,
    ds: Vec<f32>,
    dk: Vec<f32>,
    dv: Vec<f32>,
    row: Vec<f32>,
}

fn split<'a>(
    segments: &[Segment],
    mut values: &'a mut [f32],
    width: usize,
) -> Vec<(Segment, &'a mut [f32])> {
    let mut tasks = Vec::with_capacity(segments.len());
    for &segment in segments {
        let (head, tail) = values.split_at_mut(segment.len * width);
        values = tail;
        tasks.push((segment, head));
    }
    tasks
}

fn each<T: Send>(tasks: Vec<T>, run: impl Fn(&mut Buffers, T) + Sync + Send) {
    if rayon::current_num_threads() == 1 || tasks.len() < 2 {
        let mut buffers = Buffers::default();
        for task in tasks {
            run(&mut buffers, task);
        }
    } else {
        tasks.into_par_iter().for_each_init(Buffers::default, run);
    }
}

/// Copies one head of every row, padded; rotated where a table is given.
#[inline(always)]
fn gather(
    rows: &[f32],
    stride: usize,
    first: usize,
    dim: usize,
    padded: usize,
    out: &mut Vec<f32>,
) {
    let len = rows.len() / stride;
    reset(out, len * padded);
    for (row, out) in rows.chunks_exact(stride).zip(out.chunks_exact_mut(padded)) {
        out[..dim].copy_from_slice(&row[first..first + dim]);
    }
}

#[inline(always)]
fn gather_rotated(
    (rows, stride, first): (&[f32], usize, usize),
    (dim, padded): (usize, usize),
    rope: &RopeTable,
    scale: f32,
    out: &mut Vec<f32>,
) {
    let len = rows.len() / stride;
    reset(out, len * padded);
    let pairs = rows.chunks_exact(stride).zip(out.chunks_exact_mut(padded));
    for (position, (row, out)) in pairs.enumerate() {
        rope.rotate(&row[first..first + dim], position, scale, &mut out[..dim]);
    }
}

/// Padding must be zero, and stays zero: only the first `dim` values of a row are ever written.
#[inline(always)]
fn reset(buffer: &mut Vec<f32>, len: usize) {
    buffer.clear();
    buffer.resize(len, 0.0);
}

/// `columns[d][j] = rows[j][d]`, columns padded to a multiple of the lanes.
#[inline(always)]
fn transpose(rows: &[f32], padded: usize, columns: &mut Vec<f32>) {
    let len = rows.len() / padded;
    let stride = len.next_multiple_of(LANES);
    reset(columns, padded * stride);
    for (j, row) in rows.chunks_exact(padded).enumerate() {
        for (d, &value) in row.iter().enumerate() {
            columns[d * stride + j] = value;
        }
    }
}

/// `out[j] = row . rows[j]` for `j < count`, rounded up to whole lanes.
#[inline(always)]
fn scores(row: &[f32], columns: &[f32], stride: usize, count: usize, out: &mut [f32]) {
    for first in (0..count).step_by(LANES) {
        let mut sums = [0f32; LANES];
        for (d, &value) in row.iter().enumerate() {
            let column = &columns[d * stride + first..][..LANES];
            for lane in 0..LANES {
                sums[lane] = column[lane].mul_add(value, sums[lane]);
            }
        }
        out[first..first + LANES].copy_from_slice(&sums);
    }
}

/// `out += sum over j of weights[j * step] rows[j]`
#[inline(always)]
fn mix(weights: &[f32], step: usize, rows: &[f32], padded: usize, out: &mut [f32]) {
    for first in (0..padded).step_by(LANES) {
        let mut sums = [0f32; LANES];
        sums.copy_from_slice(&out[first..first + LANES]);
        for (row, &weight) in rows.chunks_exact(padded).zip(weights.iter().step_by(step)) {
            let row = &row[first..first + LANES];
            for lane in 0..LANES {
                sums[lane] = row[lane].mul_add(weight, sums[lane]);
            }
        }
        out[first..first + LANES].copy_from_slice(&sums);
    }
}

/// Softmax of the first `count` values; the rest of `row` becomes zero.
#[inline(always)]
fn softmax(row: &mut [f32], count: usize) {
    row[count..].fill(f32::NEG_INFINITY);
    let mut peaks = [f32::NEG_INFINITY; LANES];
    for chunk in row.chunks_exact(LANES) {
        for lane in 0..LANES {
            peaks[lane] = peaks[lane].max(chunk[lane]);
        }
    }
    let peak = peaks.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let mut sums = [0f32; LANES];
    for chunk in row.chunks_exact_mut(LANES) {
        for lane in 0..LANES {
            // `exp` clamps: masked places come out near 1e-38, far below rounding.
            let value = exp(chunk[lane] - peak);
            chunk[lane] = value;
            sums[lane] += value;
        }
    }
    let inverse = 1.0 / sums.iter().sum::<f32>();
    for value in row.iter_mut() {
        *value *= inverse;
    }
    row[count..].fill(0.0);
}

wide! {
    fn forward_segment<'a>(
        heads: Heads,
        rope: &'a RopeTable,
        qkv: &'a [f32],
        out: &'a mut [f32],
        buffers: &'a mut Buffers,
    ) -> () {
        let (dim, padded, width) = (heads.dim, heads.padded(), heads.row());
        let len = qkv.len() / width;
        let stride = len.next_multiple_of(LANES);
        let Buffers {
            q,
            k,
            k_columns,
            v,
            p,
            row,
            ..
        } = buffers;
        reset(p, stride);
        for key in 0..heads.keys {
            let key_at = (heads.queries + key) * dim;
            gather_rotated((qkv, width, key_at), (dim, padded), rope, 1.0, k);
            transpose(k, padded, k_columns);
            gather(qkv, width, key_at + heads.keys * dim, dim, padded, v);
            for query in key * heads.group()..(key + 1) * heads.group() {
                gather_rotated(
                    (qkv, width, query * dim),
                    (dim, padded),
                    rope,
                    heads.scale(),
                    q,
                );
                for (i, q) in q.chunks_exact(padded).enumerate() {
                    let seen = (i + 1).next_multiple_of(LANES);
                    scores(q, k_columns, stride, i + 1, &mut p[..seen]);
                    softmax(&mut p[..seen], i + 1);
                    reset(row, padded);
                    mix(&p[..=i], 1, v, padded, row);
                    out[i * heads.out() + query * dim..][..dim].copy_from_slice(&row[..dim]);
                }
            }
        }
    }

    fn backward_segment<'a>(
        heads: Heads,
        rope: &'a RopeTable,
        qkv: &'a [f32],
        dout_rows: &'a [f32],
        dqkv: &'a mut [f32],
        buffers: &'a mut Buffers,
    ) -> () {
        let (dim, padded, width) = (heads.dim, heads.padded(), heads.row());
        let len = qkv.len() / width;
        let stride = len.next_multiple_of(LANES);
        let Buffers {
            q,
            k,
            k_columns,
            v,
            v_columns,
            dout,
            p,
            ds,
            dk,
            dv,
            row,
        } = buffers;
        reset(p, len * stride);
        reset(ds, len * stride);
        for key in 0..heads.keys {
            let key_at = (heads.queries + key) * dim;
            let value_at = key_at + heads.keys * dim;
            gather_rotated((qkv, width, key_at), (dim, padded), rope, 1.0, k);
            transpose(k, padded, k_columns);
            gather(qkv, width, value_at, dim, padded, v);
            transpose(v, padded, v_columns);
            reset(dk, len * padded);
            reset(dv, len * padded);
            for query in key * heads.group()..(key + 1) * heads.group() {
                gather_rotated(
                    (qkv, width, query * dim),
                    (dim, padded),
                    rope,
                    heads.scale(),
                    q,
                );
                gather(dout_rows, heads.out(), query * dim, dim, padded, dout);
                for i in 0..len {
                    let seen = (i + 1).next_multiple_of(LANES);
                    let p = &mut p[i * stride..][..seen];
                    let ds = &mut ds[i * stride..][..seen];
                    scores(&q[i * padded..][..padded], k_columns, stride, i + 1, p);
                    softmax(p, i + 1);
                    scores(&dout[i * padded..][..padded], v_columns, stride, i + 1, ds);
                    let mean = super::simd::dot(p, ds);
                    for (ds, &p) in ds.iter_mut().zip(p.iter()) {
                        *ds = p * (*ds - mean);
                    }
                    reset(row, padded);
                    mix(&ds[..=i], 1, k, padded, row);
                    let dq = &mut dqkv[i * width + query * dim..][..dim];
                    rope.rotate_back(&row[..dim], i, heads.scale(), dq);
                }
                for j in 0..len {
                    let (row, column) = (j * padded, j * stride + j);
                    mix(&ds[column..], stride, &q[row..], padded, &mut dk[row..][..padded]);
                    mix(&p[column..], stride, &dout[row..], padded, &mut dv[row..][..padded]);
                }
            }
            for j in 0..len {
                let row = &mut dqkv[j * width..][..width];
                rope.rotate_back(
                    &dk[j * padded..][..dim],
                    j,
                    1.0,
                    &mut row[key_at..key_at + dim],
                );
                row[value_at..value_at + dim].copy_from_slice(&dv[j * padded..][..dim]);
            }
        }
    }

    fn branch_segment<'a>(
        heads: Heads,
        branches: &'a [Branch],
        rope: &'a RopeTable,
        cache: &'a [f32],
        qkv: &'a [f32],
        out: &'a mut [f32],
        buffers: &'a mut Buffers,
    ) -> () {
        let (dim, padded, width) = (heads.dim, heads.padded(), heads.row());
        let len = cache.len() / width;
        let stride = len.next_multiple_of(LANES);
        let Buffers {
            q,
            k,
            k_columns,
            v,
            p,
            row,
            dk,
            ..
        } = buffers;
        for key in 0..heads.keys {
            let key_at = (heads.queries + key) * dim;
            let value_at = key_at + heads.keys * dim;
            gather_rotated((cache, width, key_at), (dim, padded), rope, 1.0, k);
            transpose(k, padded, k_columns);
            gather(cache, width, value_at, dim, padded, v);
            for query in key * heads.group()..(key + 1) * heads.group() {
                for (b, branch) in branches.iter().enumerate() {
                    let own = &qkv[b * width..][..width];
                    let prefix = branch.prefix;
                    reset(q, padded);
                    rope.rotate(
                        &own[query * dim..][..dim],
                        prefix,
                        heads.scale(),
                        &mut q[..dim],
                    );
                    reset(dk, padded);
                    rope.rotate(&own[key_at..][..dim], prefix, 1.0, &mut dk[..dim]);
                    let seen = (prefix + 1).next_multiple_of(LANES);
                    reset(p, seen.max(stride));
                    scores(q, k_columns, stride, prefix, p);
                    p[prefix] = super::simd::dot(q, dk);
                    softmax(&mut p[..seen], prefix + 1);
                    reset(row, padded);
                    mix(&p[..prefix], 1, v, padded, row);
                    for (sum, &value) in row.iter_mut().zip(&own[value_at..][..dim]) {
                        *sum = value.mul_add(p[prefix], *sum);
                    }
                    out[b * heads.out() + query * dim..][..dim].copy_from_slice(&row[..dim]);
                }
            }
        }
    }
}
