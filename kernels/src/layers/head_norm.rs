//! RMSNorm of each head's queries and keys (Qwen 3; Henry et al. 2020 normalise them likewise).

use super::norm;
use super::{Heads, Scratch};

/// Queries and keys as they were before the norm, all queries first, and the inverse root of each head's mean square.
#[derive(Debug)]
pub struct Raw {
    values: Vec<f32>,
    inverse: Vec<f32>,
}

impl Raw {
    /// Gives the buffers back.
    pub fn release(self, scratch: &Scratch) {
        scratch.give(self.values);
        scratch.give(self.inverse);
    }
}

/// First head and number of heads, of queries and of keys.
fn parts(heads: Heads) -> [(usize, usize); 2] {
    [(0, heads.queries), (heads.queries, heads.keys)]
}

/// Normalises the queries and keys in rows of `qkv`; `weights` holds the weight of queries, then that of keys.
pub fn forward(heads: Heads, weights: &[f32], eps: f32, scratch: &Scratch, qkv: &mut [f32]) -> Raw {
    let normed_heads = qkv.len() / heads.row() * (heads.queries + heads.keys);
    let mut values = scratch.take(normed_heads * heads.dim);
    let mut inverse = scratch.take(normed_heads);
    let mut normed = scratch.take(normed_heads * heads.dim);
    let mut first = 0;
    for (part, weight) in parts(heads)
        .into_iter()
        .zip(weights.chunks_exact(heads.dim))
    {
        let count = qkv.len() / heads.row() * part.1;
        let span = first * heads.dim..(first + count) * heads.dim;
        let (raw, out) = (&mut values[span.clone()], &mut normed[span]);
        each_row(heads, part, qkv, raw, |row, raw| raw.copy_from_slice(row));
        norm::forward(raw, weight, eps, out, &mut inverse[first..first + count]);
        each_row(heads, part, qkv, out, |row, out| row.copy_from_slice(out));
        first += count;
    }
    scratch.give(normed);
    Raw { values, inverse }
}

/// Turns the gradient with respect to normalised queries and keys in `dqkv` into that with respect to raw ones, and
/// adds those of the weights to `dweights`.
pub fn backward(
    heads: Heads,
    weights: &[f32],
    raw: &Raw,
    scratch: &Scratch,
    dqkv: &mut [f32],
    dweights: Option<&mut [f32]>,
) {
    let mut dy = scratch.take(raw.values.len());
    let mut dx = scratch.take(raw.values.len());
    dx.fill(0.0);
    let mut dweights = dweights.map(|dweights| dweights.chunks_exact_mut(heads.dim));
    let mut first = 0;
    for (part, weight) in parts(heads)
        .into_iter()
        .zip(weights.chunks_exact(heads.dim))
    {
        let count = dqkv.len() / heads.row() * part.1;
        let span = first * heads.dim..(first + count) * heads.dim;
        let (dy, dx) = (&mut dy[span.clone()], &mut dx[span.clone()]);
        each_row(heads, part, dqkv, dy, |row, dy| dy.copy_from_slice(row));
        let dweight = dweights.as_mut().and_then(Iterator::next);
        let inverse = &raw.inverse[first..first + count];
        norm::backward(&raw.values[span], weight, inverse, dy, dx, dweight);
        each_row(heads, part, dqkv, dx, |row, dx| row.copy_from_slice(dx));
        first += count;
    }
    scratch.give(dy);
    scratch.give(dx);
}

/// Calls `f` with the heads of a part in each row of `qkv` and their place in `packed`.
fn each_row(
    heads: Heads,
    (first, count): (usize, usize),
    qkv: &mut [f32],
    packed: &mut [f32],
    mut f: impl FnMut(&mut [f32], &mut [f32]),
) {
    let width = count * heads.dim;
    let rows = qkv.chunks_exact_mut(heads.row());
    for (row, packed) in rows.zip(packed.chunks_exact_mut(width)) {
        f(&mut row[first * heads.dim..][..width], packed);
    }
}
