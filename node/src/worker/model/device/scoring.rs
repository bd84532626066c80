//! Forward passes for scoring.

use candle_core::{D, DType, Tensor};
use candle_nn::ops::softmax_last_dim;
use consilium_kernels::layers::{Branch, Heads};

use super::Placement;
use super::linear::BlockTensors;
use super::ops::{Angles, rms_norm};
use super::pass::ids;
use crate::worker::model::parameters::with_floats;
use crate::worker::model::{Model, ModelError, Packed};

/// Turned keys, and values, of all rows of a batch by layer, `[rows, keys, dim]`.
#[derive(Debug)]
pub(crate) struct DeviceKeyValues {
    layers: Vec<(Tensor, Tensor)>,
}

impl Model {
    /// Hidden states of the given rows of a checked batch after the final norm, `[rows, width]`.
    pub(crate) fn score_on(
        &self,
        placement: &Placement,
        batch: &Packed,
        rows: &[u32],
    ) -> Result<(Vec<f32>, DeviceKeyValues), ModelError> {
        let shared = self.shared(placement, batch)?;
        let mut x = self.embedded_on(placement, &batch.tokens)?;
        let mut layers = Vec::with_capacity(self.layers.len());
        for (index, layer) in self.layers.iter().enumerate() {
            let (attention, feed_forward) = self.banks(index, layer);
            let weights = BlockTensors::new(attention, placement)?;
            let block = &layer.attention.0;
            let projected = block.project(&shared.queries, &shared.keys, &weights, &x)?;
            let (q, k, v) = (&projected.q, &projected.k, &projected.v);
            let (mixed, _) = shared.packing.forward(block.heads, q, k, v)?;
            x = block.close(&weights, &x, &mixed)?;
            layers.push((projected.k, projected.v));
            let weights = BlockTensors::new(feed_forward, placement)?;
            x = layer.feed_forward.0.forward_on(&weights, &x)?.0;
        }
        let chosen = x.index_select(&ids(rows, &placement.device)?, 0)?;
        Ok((
            self.hidden_of(placement, &chosen)?,
            DeviceKeyValues { layers },
        ))
    }

    /// Hidden states of tokens that branch off the items of a scored batch; branches of one item stand together.
    pub(crate) fn branches_on(
        &self,
        placement: &Placement,
        kv: &DeviceKeyValues,
        branches: &[Branch],
        tokens: &[u32],
    ) -> Result<Vec<f32>, ModelError> {
        let (device, dtype) = (&placement.device, placement.dtype);
        let longest = branches.iter().map(|branch| branch.segment.len).max();
        let table = self.rope(longest.unwrap_or(0) + 1);
        let angles = |scale| {
            let rows = branches
                .iter()
                .map(|branch| (branch.prefix, branch.segment.len));
            Angles::new(&table, rows, scale, device, dtype)
        };
        let scale = self
            .layers
            .first()
            .map_or(1.0, |layer| layer.attention.0.heads.scale());
        let (queries, keys) = (angles(scale)?, angles(1.0)?);
        let mut x = self.embedded_on(placement, tokens)?;
        for ((index, layer), kv) in self.layers.iter().enumerate().zip(&kv.layers) {
            let (attention, feed_forward) = self.banks(index, layer);
            let weights = BlockTensors::new(attention, placement)?;
            let block = &layer.attention.0;
            let projected = block.project(&queries, &keys, &weights, &x)?;
            let own = [&projected.q, &projected.k, &projected.v];
            let mixed = branch_attention(block.heads, branches, kv, own)?;
            x = block.close(&weights, &x, &mixed)?;
            let weights = BlockTensors::new(feed_forward, placement)?;
            x = layer.feed_forward.0.forward_on(&weights, &x)?.0;
        }
        self.hidden_of(placement, &x)
    }

    /// Rows after the final norm, on the host.
    fn hidden_of(&self, placement: &Placement, x: &Tensor) -> Result<Vec<f32>, ModelError> {
        let normed = rms_norm(x, &self.norm_on(placement)?, self.config().eps())?;
        Ok(with_floats(&normed.flatten_all()?, <[f32]>::to_vec)?)
    }
}

/// Outputs `[branches, queries * dim]` of attention to the prefix of each branch and to itself.
fn branch_attention(
    heads: Heads,
    branches: &[Branch],
    kv: &(Tensor, Tensor),
    own: [&Tensor; 3],
) -> candle_core::Result<Tensor> {
    let mut outputs = Vec::new();
    let mut first = 0;
    for run in branches.chunk_by(|a, b| a.segment == b.segment) {
        let own = own.map(|own| own.narrow(0, first, run.len()));
        let [q, k, v] = own;
        outputs.push(of_item(heads, run, kv, [q?, k?, v?])?);
        first += run.len();
    }
    Tensor::cat(&outputs, 0)
}

/// The same of branches of one item.
fn of_item(
    heads: Heads,
    branches: &[Branch],
    (keys, values): &(Tensor, Tensor),
    own: [Tensor; 3],
) -> candle_core::Result<Tensor> {
    let (count, group) = (branches.len(), heads.queries / heads.keys);
    let [q, k, v] = own;
    // By key head: queries `[keys, count * group, dim]`, what is seen `[keys, len, dim]`.
    let by_head = |x: &Tensor| {
        let (rows, all, dim) = x.dims3()?;
        x.contiguous()?
            .reshape((rows, heads.keys, all / heads.keys, dim))?
            .permute((1, 0, 2, 3))?
            .contiguous()
    };
    let Some(segment) = branches.first().map(|branch| branch.segment) else {
        candle_core::bail!("no branch")
    };
    let cached = |x: &Tensor| {
        by_head(&x.narrow(0, segment.start, segment.len)?)?.reshape((
            heads.keys,
            segment.len,
            heads.dim,
        ))
    };
    let (keys, values) = (cached(keys)?, cached(values)?);
    let (q, k, v) = (by_head(&q)?, by_head(&k)?, by_head(&v)?);
    let rows = q.reshape((heads.keys, count * group, heads.dim))?;
    let scores = rows.matmul(&keys.t()?)?;
    let seen = seen(heads, branches, segment.len);
    let seen = Tensor::from_vec(seen, (1, count, 1, segment.len), &candle_core::Device::Cpu)?;
    let seen = seen.to_dtype(scores.dtype())?.to_device(scores.device())?;
    let scores = scores
        .reshape((heads.keys, count, group, segment.len))?
        .broadcast_add(&seen)?;
    let itself = q.broadcast_mul(&k)?.to_dtype(DType::F32)?;
    let itself = itself.sum_keepdim(D::Minus1)?.to_dtype(scores.dtype())?;
    let p = softmax_last_dim(&Tensor::cat(&[scores, itself], D::Minus1)?)?;
    let cached = p
        .narrow(D::Minus1, 0, segment.len)?
        .contiguous()?
        .reshape((heads.keys, count * group, segment.len))?
        .matmul(&values)?
        .reshape((heads.keys, count, group, heads.dim))?;
    let itself = p.narrow(D::Minus1, segment.len, 1)?.broadcast_mul(&v)?;
    (cached + itself)?
        .permute((1, 0, 2, 3))?
        .contiguous()?
        .reshape((count, heads.out()))
}

/// What is added to the scores of each branch: nothing where it sees a position, else minus infinity.
fn seen(heads: Heads, branches: &[Branch], len: usize) -> Vec<f32> {
    let mut out = Vec::with_capacity(branches.len() * len);
    for branch in branches {
        let window = heads.seen(branch.prefix);
        let row = (0..len).map(|position| {
            let is_seen = position < branch.prefix && window.contains(&position);
            if is_seen { 0.0 } else { f32::NEG_INFINITY }
        });
        out.extend(row);
    }
    out
}
