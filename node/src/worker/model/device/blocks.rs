//! The two blocks of a layer with their gradients.

use candle_core::{D, Result, Tensor};

use super::attention::{self, Packing};
use super::linear::{BankGradient, BlockTensors, Linear};
use super::ops::{Angles, rms_norm, rms_norm_backward, swiglu, swiglu_backward};
use crate::worker::model::attention::AttentionBlock;
use crate::worker::model::feed_forward::FeedForwardBlock;

/// What all layers of one pass share.
#[derive(Debug)]
pub(super) struct Shared {
    pub(super) packing: Packing,
    /// Angles of queries, scaled.
    pub(super) queries: Angles,
    pub(super) keys: Angles,
}

/// Queries, keys and values of every row, `[rows, heads, dim]`, turned.
pub(super) struct Projected {
    pub(super) q: Tensor,
    pub(super) k: Tensor,
    pub(super) v: Tensor,
    normed: Tensor,
    /// Queries and keys before their norms, where they have any.
    raw: Option<[Tensor; 2]>,
}

/// What the backward pass of an attention block needs.
pub(super) struct KeptAttention {
    normed: Tensor,
    raw: Option<[Tensor; 2]>,
    groups: Vec<attention::Kept>,
    mixed: Tensor,
}

impl AttentionBlock {
    /// Queries, keys and values of `x`, `[rows, width]`.
    pub(super) fn project(
        &self,
        queries: &Angles,
        keys: &Angles,
        weights: &BlockTensors<'_>,
        x: &Tensor,
    ) -> Result<Projected> {
        let normed = rms_norm(x, &weights.vector(self.norm, self.width)?, self.eps)?;
        let outputs = forward_all(&weights.layers(&self.qkv)?, &normed)?;
        let [mut q, mut k, v] = self.split(&outputs)?;
        let raw = match self.head_norms(weights)? {
            None => None,
            Some([query, key]) => {
                let raw = [q, k];
                q = rms_norm(&raw[0], &query, self.eps)?;
                k = rms_norm(&raw[1], &key, self.eps)?;
                Some(raw)
            }
        };
        Ok(Projected {
            q: queries.turn(&q)?,
            k: keys.turn(&k)?,
            v,
            normed,
            raw,
        })
    }

    /// `x + O mixed`
    pub(super) fn close(
        &self,
        weights: &BlockTensors<'_>,
        x: &Tensor,
        mixed: &Tensor,
    ) -> Result<Tensor> {
        let mut output = forward_all(&weights.layers(&self.output)?, mixed)?;
        x + output.pop().ok_or_else(lost)?
    }

    /// The output of the block.
    pub(super) fn forward_on(
        &self,
        shared: &Shared,
        weights: &BlockTensors<'_>,
        x: &Tensor,
    ) -> Result<(Tensor, KeptAttention)> {
        let Projected {
            q,
            k,
            v,
            normed,
            raw,
        } = self.project(&shared.queries, &shared.keys, weights, x)?;
        let (mixed, groups) = shared.packing.forward(self.heads, &q, &k, &v)?;
        let y = self.close(weights, x, &mixed)?;
        let kept = KeptAttention {
            normed,
            raw,
            groups,
            mixed,
        };
        Ok((y, kept))
    }

    /// The gradient with respect to `x`, where it is wanted; those of trained tensors go to `gradient`.
    pub(super) fn backward_on(
        &self,
        shared: &Shared,
        weights: &BlockTensors<'_>,
        (x, kept): (&Tensor, &KeptAttention),
        dy: &Tensor,
        gradient: &mut BankGradient,
        wants_dx: bool,
    ) -> Result<Option<Tensor>> {
        let trains_base = weights.trains_base();
        let output = weights.layers(&self.output)?;
        let dmixed = backward_all(
            &output,
            &kept.mixed,
            std::slice::from_ref(dy),
            gradient,
            true,
        )?;
        let dmixed = dmixed.ok_or_else(lost)?;
        let [dq, dk, dv] = shared.packing.backward(self.heads, &kept.groups, &dmixed)?;
        let (mut dq, mut dk) = (shared.queries.turn_back(&dq)?, shared.keys.turn_back(&dk)?);
        if let (Some([q, k]), Some([query, key]), Some(at)) =
            (&kept.raw, self.head_norms(weights)?, self.head_norm)
        {
            let (q, dquery) = rms_norm_backward(q, &query, self.eps, &dq, trains_base)?;
            let (k, dkey) = rms_norm_backward(k, &key, self.eps, &dk, trains_base)?;
            (dq, dk) = (q, k);
            for (at, dweight) in [(at, dquery), (at + self.heads.dim, dkey)] {
                if let Some(dweight) = dweight {
                    gradient.push(at, &dweight)?;
                }
            }
        }
        let rows = x.dim(0)?;
        let [dq, dk, dv] = [dq, dk, dv].map(|d| d.reshape((rows, ())));
        let outputs = self.joined(&[dq?, dk?, dv?])?;
        let wants = wants_dx || trains_base;
        let dnormed = backward_all(
            &weights.layers(&self.qkv)?,
            &kept.normed,
            &outputs,
            gradient,
            wants,
        )?;
        let norm = (self.norm, self.width, self.eps);
        through_norm(weights, norm, x, dy, dnormed, gradient)
    }

    fn head_norms(&self, weights: &BlockTensors<'_>) -> Result<Option<[Tensor; 2]>> {
        let dim = self.heads.dim;
        let of = |at: usize| Ok([weights.vector(at, dim)?, weights.vector(at + dim, dim)?]);
        self.head_norm.map(of).transpose()
    }

    /// Queries, keys and values, `[rows, heads, dim]`, of the outputs of one fused layer or three.
    fn split(&self, outputs: &[Tensor]) -> Result<[Tensor; 3]> {
        let heads = self.heads;
        let shape = |x: &Tensor, count: usize| x.reshape((x.dim(0)?, count, heads.dim));
        if let [q, k, v] = outputs {
            return Ok([
                shape(q, heads.queries)?,
                shape(k, heads.keys)?,
                shape(v, heads.keys)?,
            ]);
        }
        let fused = outputs.first().ok_or_else(lost)?;
        let (q, kv) = (heads.out(), heads.keys * heads.dim);
        let part = |first, len, count| shape(&fused.narrow(1, first, len)?.contiguous()?, count);
        Ok([
            part(0, q, heads.queries)?,
            part(q, kv, heads.keys)?,
            part(q + kv, kv, heads.keys)?,
        ])
    }

    /// The inverse of [`split`](Self::split), rows flat.
    fn joined(&self, parts: &[Tensor; 3]) -> Result<Vec<Tensor>> {
        match self.qkv.outputs.len() {
            1 => Ok(vec![Tensor::cat(parts, 1)?]),
            _ => Ok(parts.to_vec()),
        }
    }
}

/// What the backward pass of a feed-forward block needs.
pub(super) struct KeptFeedForward {
    normed: Tensor,
    gate: Tensor,
    up: Tensor,
}

impl FeedForwardBlock {
    /// The output of the block.
    pub(super) fn forward_on(
        &self,
        weights: &BlockTensors<'_>,
        x: &Tensor,
    ) -> Result<(Tensor, KeptFeedForward)> {
        let normed = rms_norm(x, &weights.vector(self.norm, self.width)?, self.eps)?;
        let outputs = forward_all(&weights.layers(&self.gate_up)?, &normed)?;
        let (gate, up) = match outputs.as_slice() {
            [gate, up] => (gate.clone(), up.clone()),
            outputs => {
                let fused = outputs.first().ok_or_else(lost)?;
                let half = |index: usize| fused.narrow(1, index * self.inner, self.inner);
                (half(0)?.contiguous()?, half(1)?.contiguous()?)
            }
        };
        let active = swiglu(&gate, &up)?;
        let mut output = forward_all(&weights.layers(&self.down)?, &active)?;
        let y = (x + output.pop().ok_or_else(lost)?)?;
        Ok((y, KeptFeedForward { normed, gate, up }))
    }

    /// The gradient with respect to `x`; those of trained tensors go to `gradient`.
    pub(super) fn backward_on(
        &self,
        weights: &BlockTensors<'_>,
        (x, kept): (&Tensor, &KeptFeedForward),
        dy: &Tensor,
        gradient: &mut BankGradient,
    ) -> Result<Option<Tensor>> {
        let KeptFeedForward { normed, gate, up } = kept;
        let active = swiglu(gate, up)?;
        let down = weights.layers(&self.down)?;
        let dactive = backward_all(&down, &active, std::slice::from_ref(dy), gradient, true)?;
        let halves = swiglu_backward(gate, up, &dactive.ok_or_else(lost)?)?;
        let outputs = match self.gate_up.outputs.len() {
            1 => vec![Tensor::cat(&halves, D::Minus1)?],
            _ => halves.to_vec(),
        };
        let layers = weights.layers(&self.gate_up)?;
        let dnormed = backward_all(&layers, normed, &outputs, gradient, true)?;
        let norm = (self.norm, self.width, self.eps);
        through_norm(weights, norm, x, dy, dnormed, gradient)
    }
}

/// `dy` and what comes back through the norm of `x`; none where nobody wants it.
fn through_norm(
    weights: &BlockTensors<'_>,
    (at, width, eps): (usize, usize, f32),
    x: &Tensor,
    dy: &Tensor,
    dnormed: Option<Tensor>,
    gradient: &mut BankGradient,
) -> Result<Option<Tensor>> {
    let Some(dnormed) = dnormed else {
        return Ok(None);
    };
    let weight = weights.vector(at, width)?;
    let (dx, dweight) = rms_norm_backward(x, &weight, eps, &dnormed, weights.trains_base())?;
    if let Some(dweight) = dweight {
        gradient.push(at, &dweight)?;
    }
    Ok(Some((dy + dx)?))
}

fn forward_all(layers: &[Linear], x: &Tensor) -> Result<Vec<Tensor>> {
    layers.iter().map(|layer| layer.forward(x)).collect()
}

/// The sum of what comes back through layers with one input.
fn backward_all(
    layers: &[Linear],
    x: &Tensor,
    outputs: &[Tensor],
    gradient: &mut BankGradient,
    wants_dx: bool,
) -> Result<Option<Tensor>> {
    let mut sum: Option<Tensor> = None;
    for (layer, dy) in layers.iter().zip(outputs) {
        let dx = layer.backward(x, dy, gradient, wants_dx)?;
        sum = match (sum, dx) {
            (Some(sum), Some(dx)) => Some((sum + dx)?),
            (sum, dx) => sum.or(dx),
        };
    }
    Ok(sum)
}

fn lost() -> candle_core::Error {
    candle_core::Error::msg("a layer of the block has no output")
}
