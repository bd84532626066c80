//! Causal attention of grouped queries (Ainslie et al. 2023) over packed items, rotary embedding included.
//!
//! Rows of `qkv` hold all query heads, then key heads, then value heads. Items see only themselves, and of themselves
//! only the last `window` positions (Beltagy et al. 2020, section 3.1) where a layer has one.
//! Probabilities are recomputed in the backward pass: nothing of size length x length is kept.

mod rows;

use std::ops::Range;

use rayon::prelude::*;

use super::lanes::{LANES, dot};
use super::rope::{Angles, RopeTable};
use crate::cpu::multiversion::multiversion;
use rows::{gather, gather_rotated, mix, reset, scores, softmax_of, transpose, whole};

/// Head counts of an attention layer.
#[derive(Debug, Clone, Copy)]
pub struct Heads {
    /// Heads of queries, a multiple of those of keys.
    pub queries: usize,
    /// Heads of keys, and of values.
    pub keys: usize,
    /// Values of a head.
    pub dim: usize,
    /// Positions that each sees, its own included; `usize::MAX` for all earlier ones.
    pub window: usize,
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
pub struct Branch {
    /// Segment whose prefix it continues.
    pub segment: Segment,
    /// Rows of the segment that it sees.
    pub prefix: usize,
}

impl Heads {
    /// Values in a row of `qkv`.
    #[must_use]
    pub fn row(self) -> usize {
        (self.queries + 2 * self.keys) * self.dim
    }

    /// Values in a row of the output.
    #[must_use]
    pub fn out(self) -> usize {
        self.queries * self.dim
    }

    fn group(self) -> usize {
        self.queries / self.keys
    }

    /// Factor of all scores.
    #[must_use]
    pub fn scale(self) -> f32 {
        1.0 / (self.dim as f32).sqrt()
    }

    fn padded(self) -> usize {
        self.dim.next_multiple_of(LANES)
    }

    /// Keys that position `i` sees.
    #[must_use]
    pub fn seen(self, i: usize) -> Range<usize> {
        (i + 1).saturating_sub(self.window)..i + 1
    }
}

/// `out[row] = softmax(q k^T / sqrt(dim)) v`, per head and segment. Segments tile the rows in order.
pub fn forward(heads: Heads, segments: &[Segment], rope: &RopeTable, qkv: &[f32], out: &mut [f32]) {
    let tasks = split(segments, out, heads.out());
    let run = |buffers: &mut Buffers, (segment, out): (Segment, &mut [f32])| {
        let qkv = &qkv[segment.start * heads.row()..][..segment.len * heads.row()];
        forward_segment(heads, rope.angles(segment.len), qkv, out, buffers);
    };
    each(tasks, run);
}

/// Gradient of [`forward`] with respect to `qkv`.
pub fn backward(
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
        backward_segment(heads, rope.angles(segment.len), qkv, dout, dqkv, buffers);
    };
    each(tasks, run);
}

/// Attention of branch rows over the cached rows of their prefix and over themselves. Branches of one
/// segment must stand together; they are turned by the angles of that segment's length.
pub fn branches(
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
        branch_segment(
            heads,
            run,
            rope.angles(segment.len),
            cache,
            qkv,
            out,
            buffers,
        );
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

multiversion! {
    fn forward_segment(
        heads: Heads,
        rope: &Angles,
        qkv: &[f32],
        out: &mut [f32],
        buffers: &mut Buffers,
    ) {
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
                    let keys = heads.seen(i);
                    let p = &mut p[..(i + 1).next_multiple_of(LANES)];
                    scores(q, k_columns, stride, keys.clone(), p);
                    softmax_of(p, keys.clone());
                    reset(row, padded);
                    mix(&p[keys.clone()], 1, &v[keys.start * padded..], padded, row);
                    out[i * heads.out() + query * dim..][..dim].copy_from_slice(&row[..dim]);
                }
            }
        }
    }
}

multiversion! {
    fn backward_segment(
        heads: Heads,
        rope: &Angles,
        qkv: &[f32],
        dout_rows: &[f32],
        dqkv: &mut [f32],
        buffers: &mut Buffers,
    ) {
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
                    let keys = heads.seen(i);
                    let end = (i + 1).next_multiple_of(LANES);
                    let p = &mut p[i * stride..][..end];
                    let ds = &mut ds[i * stride..][..end];
                    scores(&q[i * padded..][..padded], k_columns, stride, keys.clone(), p);
                    softmax_of(p, keys.clone());
                    scores(&dout[i * padded..][..padded], v_columns, stride, keys.clone(), ds);
                    let (p, whole_ds) = (&p[whole(keys.start)..], &mut ds[whole(keys.start)..]);
                    let mean = dot(p, whole_ds);
                    for (ds, &p) in whole_ds.iter_mut().zip(p.iter()) {
                        *ds = p * (*ds - mean);
                    }
                    reset(row, padded);
                    mix(&ds[keys.clone()], 1, &k[keys.start * padded..], padded, row);
                    let dq = &mut dqkv[i * width + query * dim..][..dim];
                    rope.rotate_back(&row[..dim], i, heads.scale(), dq);
                }
                for j in 0..len {
                    let (row, column) = (j * padded, j * stride + j);
                    let rows = row..j.saturating_add(heads.window).min(len) * padded;
                    mix(&ds[column..], stride, &q[rows.clone()], padded, &mut dk[row..][..padded]);
                    mix(&p[column..], stride, &dout[rows], padded, &mut dv[row..][..padded]);
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
}

multiversion! {
    fn branch_segment(
        heads: Heads,
        branches: &[Branch],
        rope: &Angles,
        cache: &[f32],
        qkv: &[f32],
        out: &mut [f32],
        buffers: &mut Buffers,
    ) {
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
                    let keys = heads.seen(prefix);
                    let end = (prefix + 1).next_multiple_of(LANES);
                    reset(p, end.max(stride));
                    scores(q, k_columns, stride, keys.start..prefix, p);
                    p[prefix] = dot(q, dk);
                    softmax_of(&mut p[..end], keys.clone());
                    reset(row, padded);
                    let cached = keys.start..prefix;
                    mix(&p[cached.clone()], 1, &v[cached.start * padded..], padded, row);
                    for (sum, &value) in row.iter_mut().zip(&own[value_at..][..dim]) {
                        *sum = value.mul_add(p[prefix], *sum);
                    }
                    out[b * heads.out() + query * dim..][..dim].copy_from_slice(&row[..dim]);
                }
            }
        }
    }
}
