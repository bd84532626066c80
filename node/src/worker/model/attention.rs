//! Attention block: `x + O attention(rope(Q, K), V)` of the normalised input.

use consilium_kernels::layers::{Heads, attention, head_norm, norm};
use consilium_kernels::matmul::Write;

use super::block::{Block, Context};
use super::config::ModelConfig;
use super::linear::{Projection, Weights};
use super::parameters::Plan;

/// Shape and places of the parameters.
#[derive(Debug)]
pub(crate) struct AttentionBlock {
    pub(crate) heads: Heads,
    pub(crate) width: usize,
    pub(crate) eps: f32,
    pub(crate) norm: usize,
    /// Where the weights of the queries' and then the keys' norm lie, if heads are normalised.
    pub(crate) head_norm: Option<usize>,
    pub(crate) qkv: Projection,
    pub(crate) output: Projection,
}

/// Rows of queries, keys and values before rotation, and what they were made from.
#[derive(Debug)]
pub(crate) struct Projected {
    inverse: Vec<f32>,
    normed: Vec<f32>,
    /// Also the cache of scoring.
    pub(crate) qkv: Vec<f32>,
    raw: Option<head_norm::Raw>,
}

/// Activations kept for the backward pass.
#[derive(Debug)]
pub(crate) struct Kept {
    projected: Projected,
    mixed: Vec<f32>,
}

impl AttentionBlock {
    /// Plans the parameters of layer `layer`.
    pub(crate) fn plan(config: &ModelConfig, layer: usize) -> (Self, Plan) {
        let width = config.hidden_size;
        let heads = Heads {
            queries: config.heads,
            keys: config.kv_heads,
            dim: config.head_dim,
            window: config.window(layer).unwrap_or(usize::MAX),
        };
        let (q, kv) = (heads.out(), heads.keys * heads.dim);
        let prefix = format!("model.layers.{layer}");
        let mut plan = Plan::default();
        let norm = plan.push(format!("{prefix}.input_layernorm.weight"), &[width]);
        let name = |layer: &str, kind: &str| format!("{prefix}.self_attn.{layer}.{kind}");
        let modules = config.family.attention_modules();
        // A fused layer has the rows of the three one after the other, as three layers have them here.
        let outputs = match modules[0] {
            [_] => vec![heads.row()],
            _ => vec![q, kv, kv],
        };
        let weight = plan.len();
        for (module, &out) in modules[0].iter().zip(&outputs) {
            plan.push(name(module, "weight"), &[out, width]);
        }
        let output = plan.push(name("o_proj", "weight"), &[width, q]);
        let bias = config.qkv_bias.then(|| plan.len());
        for (module, &out) in modules[0].iter().zip(&outputs).filter(|_| config.qkv_bias) {
            plan.push(name(module, "bias"), &[out]);
        }
        let output_bias = config
            .output_bias
            .then(|| plan.push(name("o_proj", "bias"), &[width]));
        let head_norm = config.family.normalises_heads().then(|| {
            let first = plan.push(name("q_norm", "weight"), &[heads.dim]);
            plan.push(name("k_norm", "weight"), &[heads.dim]);
            first
        });
        let qkv = Projection {
            inputs: width,
            outputs,
            weight,
            bias,
            before: 0,
        };
        let output = Projection {
            inputs: q,
            outputs: vec![width],
            weight: output,
            bias: output_bias,
            before: qkv.outputs.len(),
        };
        (
            Self {
                heads,
                width,
                eps: config.eps(),
                norm,
                head_norm,
                qkv,
                output,
            },
            plan,
        )
    }

    /// The rows of queries, keys and values, before rotation.
    pub(crate) fn qkv(&self, context: &Context, weights: Weights<'_>, x: &[f32]) -> Projected {
        let (rows, scratch) = (x.len() / self.width, &context.scratch);
        let mut inverse = scratch.take(rows);
        let mut normed = scratch.take(x.len());
        let weight = weights.base.vector(self.norm, self.width);
        norm::forward(x, weight, self.eps, &mut normed, &mut inverse);
        let mut qkv = scratch.take(rows * self.heads.row());
        self.qkv
            .forward(weights, scratch, &normed, &mut qkv, Write::Replace);
        let raw = self.head_norm.map(|at| {
            let weights = weights.base.vector(at, 2 * self.heads.dim);
            head_norm::forward(self.heads, weights, self.eps, scratch, &mut qkv)
        });
        Projected {
            inverse,
            normed,
            qkv,
            raw,
        }
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

impl Projected {
    /// Gives all buffers but the cache back.
    pub(crate) fn into_cache(self, context: &Context) -> Vec<f32> {
        for buffer in [self.inverse, self.normed] {
            context.scratch.give(buffer);
        }
        if let Some(raw) = self.raw {
            raw.release(&context.scratch);
        }
        self.qkv
    }
}

impl Kept {
    /// Gives all buffers but the cache back.
    pub(crate) fn into_cache(self, context: &Context) -> Vec<f32> {
        context.scratch.give(self.mixed);
        self.projected.into_cache(context)
    }
}

impl Block for AttentionBlock {
    type Kept = Kept;
    const NAME: &'static str = "attention block";

    fn activations(&self, context: &Context, weights: Weights<'_>, x: &[f32]) -> Kept {
        let projected = self.qkv(context, weights, x);
        let rows = x.len() / self.width;
        let mut mixed = context.scratch.take(rows * self.heads.out());
        attention::forward(
            self.heads,
            &context.segments,
            &context.rope,
            &projected.qkv,
            &mut mixed,
        );
        Kept { projected, mixed }
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
        let Kept { projected, mixed } = kept;
        let Projected {
            inverse,
            normed,
            qkv,
            raw,
        } = projected;
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
        if let (Some(raw), Some(at)) = (raw, self.head_norm) {
            let len = 2 * self.heads.dim;
            let dweights = weights.lora.is_none().then(|| &mut gradient[at..][..len]);
            let weights = weights.base.vector(at, len);
            head_norm::backward(self.heads, weights, &raw, scratch, &mut dqkv, dweights);
            raw.release(scratch);
        }
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
