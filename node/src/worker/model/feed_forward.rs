//! Feed-forward block: `x + D swiglu(G, U)` of the normalised input.

use consilium_kernels::layers::{norm, swiglu};
use consilium_kernels::matmul::Write;

use super::block::{Block, Context};
use super::config::ModelConfig;
use super::linear::{Projection, Weights};
use super::parameters::Plan;

/// Shape and places of the parameters.
#[derive(Debug)]
pub(crate) struct FeedForwardBlock {
    pub(crate) width: usize,
    pub(crate) inner: usize,
    pub(crate) eps: f32,
    pub(crate) norm: usize,
    pub(crate) gate_up: Projection,
    pub(crate) down: Projection,
}

/// Activations kept for the backward pass.
#[derive(Debug)]
pub(crate) struct Kept {
    inverse: Vec<f32>,
    normed: Vec<f32>,
    gate_up: Vec<f32>,
}

impl FeedForwardBlock {
    /// Plans the parameters of layer `layer`.
    pub(crate) fn plan(config: &ModelConfig, layer: usize) -> (Self, Plan) {
        let (width, inner) = (config.hidden_size, config.intermediate_size);
        let prefix = format!("model.layers.{layer}");
        let mut plan = Plan::default();
        let norm = plan.push(
            format!("{prefix}.post_attention_layernorm.weight"),
            &[width],
        );
        let name = |layer: &str| format!("{prefix}.mlp.{layer}.weight");
        let modules = config.family.feed_forward_modules();
        // A fused layer has the rows of the gate, then those of the other.
        let outputs = match modules[0] {
            [_] => vec![2 * inner],
            _ => vec![inner; 2],
        };
        let weight = plan.len();
        for (module, &out) in modules[0].iter().zip(&outputs) {
            plan.push(name(module), &[out, width]);
        }
        let down = plan.push(name("down_proj"), &[width, inner]);
        let gate_up = Projection {
            inputs: width,
            outputs,
            weight,
            bias: None,
            before: 0,
        };
        let down = Projection {
            inputs: inner,
            outputs: vec![width],
            weight: down,
            bias: None,
            before: gate_up.outputs.len(),
        };
        (
            Self {
                width,
                inner,
                eps: config.eps(),
                norm,
                gate_up,
                down,
            },
            plan,
        )
    }
}

impl Block for FeedForwardBlock {
    type Kept = Kept;
    const NAME: &'static str = "feed-forward block";

    fn activations(&self, context: &Context, weights: Weights<'_>, x: &[f32]) -> Kept {
        let scratch = &context.scratch;
        let rows = x.len() / self.width;
        let mut inverse = scratch.take(rows);
        let mut normed = scratch.take(x.len());
        let weight = weights.base.vector(self.norm, self.width);
        norm::forward(x, weight, self.eps, &mut normed, &mut inverse);
        let mut gate_up = scratch.take(rows * 2 * self.inner);
        self.gate_up
            .forward(weights, scratch, &normed, &mut gate_up, Write::Replace);
        Kept {
            inverse,
            normed,
            gate_up,
        }
    }

    fn output(&self, context: &Context, weights: Weights<'_>, x: &[f32], kept: &Kept) -> Vec<f32> {
        let scratch = &context.scratch;
        let mut active = scratch.take(kept.gate_up.len() / 2);
        swiglu::forward(&kept.gate_up, self.inner, &mut active);
        let mut y = x.to_vec();
        self.down
            .forward(weights, scratch, &active, &mut y, Write::Add);
        scratch.give(active);
        y
    }

    fn release(context: &Context, kept: Kept) {
        for buffer in [kept.inverse, kept.normed, kept.gate_up] {
            context.scratch.give(buffer);
        }
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
            mut gate_up,
        } = kept;
        let scratch = &context.scratch;
        let rows = x.len() / self.width;
        let mut active = scratch.take(rows * self.inner);
        self.down.input_gradient(weights, scratch, dy, &mut active);
        swiglu::backward(&mut gate_up, self.inner, &mut active);
        self.down
            .weight_gradient(weights, scratch, &active, dy, gradient);
        scratch.give(active);
        self.gate_up
            .weight_gradient(weights, scratch, &normed, &gate_up, gradient);
        // The gradient of the norm's weight needs that of its output.
        let dx = (wants_dx || weights.lora.is_none()).then(|| {
            let mut dnormed = scratch.take(normed.len());
            self.gate_up
                .input_gradient(weights, scratch, &gate_up, &mut dnormed);
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
        for buffer in [inverse, normed, gate_up] {
            scratch.give(buffer);
        }
        dx
    }
}
