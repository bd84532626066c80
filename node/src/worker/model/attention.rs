//! Attention block: `x + O attention(rope(Q, K), V)` of the normalised input.

use super::block::{Block, Context};
use super::config::ModelConfig;
use super::ops::attention::{self, Heads};
use super::ops::linear::{Projection, Weights};
use super::ops::norm;
use super::parameters::Plan;
use consilium_kernels::matmul::Write;

/// Shape and places of the parameters.
#[derive(Debug)]
pub(crate) struct AttentionBlock {
    pub(crate) heads: Heads,
    width: usize,
    eps: f32,
    norm: usize,
    pub(crate) qkv: Projection,
    pub(crate) output: Projection,
}

/// Activations kept for the backward pass; `qkv` is also the cache of scoring.
#[derive(Debug)]
pub(crate) struct Kept {
    inverse: Vec<f32>,
    normed: Vec<f32>,
    pub(crate) qkv: Vec<f32>,
    mixed: Vec<f32>,
}

/// Names of the layers, grouped by input.
pub(crate) const LAYERS: [&[&str]; 2] = [&["q_proj", "k_proj", "v_proj"], &["o_proj"]];

impl AttentionBlock {
    /// Plans the parameters of layer `layer`.
    pub(crate) fn plan(config: &ModelConfig, layer: usize) -> (Self, Plan) {
        let width = config.hidden_size;
        let heads = Heads {
            queries: config.heads,
            keys: config.kv_heads,
            dim: config.head_dim,
        };
        let (q, kv) = (heads.out(), heads.keys * heads.dim);
        let prefix = format!("model.layers.{layer}");
        let mut plan = Plan::default();
        let norm = plan.push(format!("{prefix}.input_layernorm.weight"), &[width]);
        let name = |layer: &str, kind: &str| format!("{prefix}.self_attn.{layer}.{kind}");
        let weight = plan.push(name("q_proj", "weight"), &[q, width]);
        plan.push(name("k_proj", "weight"), &[kv, width]);
        plan.push(name("v_proj", "weight"), &[kv, width]);
        let output = plan.push(name("o_proj", "weight"), &[width, q]);
        let bias = config.qkv_bias.then(|| {
            let bias = plan.push(name("q_proj", "bias"), &[q]);
            plan.push(name("k_proj", "bias"), &[kv]);
            plan.push(name("v_proj", "bias"), &[kv]);
            bias
        });
        let output_bias = config
            .output_bias
            .then(|| plan.push(name("o_proj", "bias"), &[width]));
        let qkv = Projection {
            inputs: width,
            outputs: vec![q, kv, kv],
            weight,
            bias,
            factors: 0,
        };
        let output = Projection {
            inputs: q,
            outputs: vec![width],
            weight: output,
            bias: output_bias,
            factors: qkv.factors_per_rank(),
        };
        (
            Self {
                heads,
                width,
                eps: config.eps(),
                norm,
                qkv,
                output,
            },
            plan,
        )
    }

    /// The rows of queries, keys and values, before rotation.
    pub(crate) fn qkv(
        &self,
        context: &Context,
        weights: Weights<'_>,
        x: &[f32],
    ) -> (Vec<f32>, Vec<f32>, Vec<f32>) {
        let rows = x.len() / self.width;
        let mut inverse = context.scratch.take(rows);
        let mut normed = context.scratch.take(x.len());
        let weight = weights.base.vector(self.norm, self.width);
        norm::forward(x, weight, self.eps, &mut normed, &mut inverse);
        let mut qkv = context.scratch.take(rows * self.heads.row());
        self.qkv
            .forward(weights, &context.scratch, &normed, &mut qkv, Write::Replace);
        (inverse, normed, qkv)
    }

    /// `x + O mixed`
    pub(crate) fn finish(
        &self,
        context: &Context,
        weights: Weights<'_>,
        x: &[f32],
        mixed: &[f32],
    ) -> Vec<f32> {
        let mut y = x.to_vec();
        self.output
            .forward(weights, &context.scratch, mixed, &mut y, Write::Add);
        y
    }
}

impl Kept {
    /// Gives all buffers but the cache back.
    pub(crate) fn into_cache(self, context: &Context) -> Vec<f32> {
        for buffer in [self.inverse, self.normed, self.mixed] {
            context.scratch.give(buffer);
        }
        self.qkv
    }
}

impl Block for AttentionBlock {
    type Kept = Kept;
    const NAME: &'static str = "attention block";

    fn activations(&self, context: &Context, weights: Weights<'_>, x: &[f32]) -> Kept {
        let (inverse, normed, qkv) = self.qkv(context, weights, x);
        let rows = x.len() / self.width;
        let mut mixed = context.scratch.take(rows * self.heads.out());
        attention::forward(
            self.heads,
            &context.segments,
            &context.rope,
            &qkv,
            &mut mixed,
        );
        Kept {
            inverse,
            normed,
            qkv,
            mixed,
        }
    }

    fn output(&self, context: &Context, weights: Weights<'_>, x: &[f32], kept: &Kept) -> Vec<f32> {
        self.finish(context, weights, x, &kept.mixed)
    }

    fn release(context: &Context, kept: Kept) {
        let qkv = kept.into_cache(context);
        context.scratch.give(qkv);
    }

    fn backward(
        &self,
        context: &Context,
        weights: Weights<'_>,
        x: &[f32],
        kept: Kept,
        dy: &[f32],
        gradient: &mut [f32],
        wants_dx: bool,
    ) -> Option<Vec<f32>> {
        let Kept {
            inverse,
            normed,
            qkv,
            mixed,
        } = kept;
        let scratch = &context.scratch;
        let mut dmixed = scratch.take(mixed.len());
        self.output
            .input_gradient(weights, scratch, dy, &mut dmixed);
        self.output
            .weight_gradient(weights, scratch, &mixed, dy, gradient);
        scratch.give(mixed);
        let mut dqkv = scratch.take(qkv.len());
        attention::backward(
            self.heads,
            &context.segments,
            &context.rope,
            &qkv,
            &dmixed,
            &mut dqkv,
        );
        scratch.give(dmixed);
        scratch.give(qkv);
        self.qkv
            .weight_gradient(weights, scratch, &normed, &dqkv, gradient);
        // The gradient of the norm's weight needs that of its output.
        let dx = (wants_dx || weights.lora.is_none()).then(|| {
            let mut dnormed = scratch.take(normed.len());
            self.qkv
                .input_gradient(weights, scratch, &dqkv, &mut dnormed);
            let mut dx = dy.to_vec();
            let dnorm = weights
                .lora
                .is_none()
                .then(|| &mut gradient[self.norm..][..self.width]);
            let weight = weights.base.vector(self.norm, self.width);
            norm::backward(x, weight, &inverse, &dnormed, &mut dx, dnorm);
            scratch.give(dnormed);
            dx
        });
        for buffer in [inverse, normed, dqkv] {
            scratch.give(buffer);
        }
        dx
    }
}
