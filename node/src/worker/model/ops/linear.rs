//! Linear layers, frozen or trained, with or without low-rank factors (LoRA, Hu et al. 2021).
//!
//! Layers that read the same input (q, k, v; gate, up) are one [`Projection`]: their weights lie one
//! after another in the block's parameters, so one product serves all of them.

use consilium_kernels::matmul::{View, ViewMut, Write, ab, abt, atb};

use rayon::prelude::*;

use super::scratch::Scratch;
use super::simd::wide;
use crate::worker::model::frozen::Base;

/// Weights that are decoded or adapted at a time: half a megabyte, which a core's cache holds.
const PANEL: usize = 1 << 17;

/// Rows of a panel that one task decodes.
const ROWS: usize = 32;

/// Where the weights of layers with one input lie in a block's parameters.
#[derive(Debug, Clone)]
pub(crate) struct Projection {
    /// Values in.
    pub(crate) inputs: usize,
    /// Values out of each layer.
    pub(crate) outputs: Vec<usize>,
    /// Offset of the first weight; each is `[out, in]`.
    pub(crate) weight: usize,
    /// Offset of the biases, one value per output; either all layers have one or none.
    pub(crate) bias: Option<usize>,
    /// Factor values per rank that lie before this projection's factors.
    pub(crate) factors: usize,
}

/// Parameters of one block: flat weights and, with adapters, flat factors.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Weights<'a> {
    pub(crate) base: Base<'a>,
    pub(crate) lora: Option<Factors<'a>>,
}

/// Low-rank factors: `W + scale B A`, per layer all `A` `[rank, in]` first, then all `B` `[out, rank]`.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Factors<'a> {
    pub(crate) values: &'a [f32],
    pub(crate) rank: usize,
    pub(crate) scale: f32,
}

impl Projection {
    /// Values out of all layers.
    pub(crate) fn width(&self) -> usize {
        self.outputs.iter().sum()
    }

    /// Factor values per rank.
    pub(crate) fn factors_per_rank(&self) -> usize {
        self.outputs.len() * self.inputs + self.width()
    }

    /// `y = x W^T + b`, or added to `y`.
    pub(crate) fn forward(
        &self,
        weights: Weights<'_>,
        scratch: &Scratch,
        x: &[f32],
        y: &mut [f32],
        write: Write,
    ) {
        let (rows, width) = (x.len() / self.inputs, self.width());
        let x = View::new(x, rows, self.inputs);
        self.panels(weights, scratch, rows, |first, panel| {
            let y = ViewMut::new(y, rows, width).columns(first, panel.rows());
            abt(y, write, x, panel, 1.0);
        });
        if let Some(lora) = weights.lora.filter(|_| !self.merges(rows)) {
            self.add_low_rank(lora, scratch, x, y);
        }
        if let Some(bias) = self.bias {
            add_bias(weights.base.vector(bias, width), y);
        }
    }

    /// Writes the gradient with respect to `x`: `dx = dy W`.
    pub(crate) fn input_gradient(
        &self,
        weights: Weights<'_>,
        scratch: &Scratch,
        dy: &[f32],
        dx: &mut [f32],
    ) {
        let (width, inputs) = (self.width(), self.inputs);
        let rows = dy.len() / width;
        let dy = View::new(dy, rows, width);
        let mut write = Write::Replace;
        self.panels(weights, scratch, rows, |first, panel| {
            let dy = dy.columns(first, panel.rows());
            ab(ViewMut::new(dx, rows, inputs), write, dy, panel, 1.0);
            write = Write::Add;
        });
        let Some(lora) = weights.lora.filter(|_| !self.merges(rows)) else {
            return;
        };
        let mut down = scratch.take(rows * lora.rank);
        for layer in self.layers(lora) {
            let dy = dy.columns(layer.first, layer.out);
            ab(
                ViewMut::new(&mut down, rows, lora.rank),
                Write::Replace,
                dy,
                layer.b,
                lora.scale,
            );
            let down = View::new(&down, rows, lora.rank);
            ab(
                ViewMut::new(dx, rows, inputs),
                Write::Add,
                down,
                layer.a,
                1.0,
            );
        }
        scratch.give(down);
    }

    /// Writes the gradients of the trained parameters to their places in `gradient`: the factors'
    /// where there are any, else the weights' and biases'.
    pub(crate) fn weight_gradient(
        &self,
        weights: Weights<'_>,
        scratch: &Scratch,
        x: &[f32],
        dy: &[f32],
        gradient: &mut [f32],
    ) {
        let (width, inputs) = (self.width(), self.inputs);
        let rows = dy.len() / width;
        let (x, dy_rows) = (View::new(x, rows, inputs), View::new(dy, rows, width));
        if let Some(lora) = weights.lora {
            self.factor_gradient(lora, scratch, x, dy_rows, gradient);
            return;
        }
        let dw = &mut gradient[self.weight..][..width * inputs];
        atb(
            ViewMut::new(dw, width, inputs),
            Write::Replace,
            dy_rows,
            x,
            1.0,
        );
        if let Some(bias) = self.bias {
            sum_rows(dy, &mut gradient[bias..][..width]);
        }
    }

    /// Folding the factors into the weights costs `rank in out`; applying them apart costs
    /// `rows rank (2 in + out)` more than not having them.
    fn merges(&self, rows: usize) -> bool {
        self.outputs
            .iter()
            .all(|out| rows * (2 * self.inputs + out) > self.inputs * out)
    }

    /// Gives `work` the weights, factors folded in where that is cheaper, with the first output of each
    /// panel: all at once where they exist as they are, else a few rows at a time.
    fn panels(
        &self,
        weights: Weights<'_>,
        scratch: &Scratch,
        rows: usize,
        mut work: impl FnMut(usize, View<'_>),
    ) {
        let (width, inputs) = (self.width(), self.inputs);
        let matrix = weights.base.matrix(self.weight, width, inputs);
        let lora = weights.lora.filter(|_| self.merges(rows));
        if let Some(whole) = matrix.whole().filter(|_| lora.is_none()) {
            return work(0, whole);
        }
        let most = (PANEL / inputs).clamp(1, width);
        let mut panel = scratch.take(most * inputs);
        for first in (0..width).step_by(most) {
            let count = most.min(width - first);
            let values = &mut panel[..count * inputs];
            values
                .par_chunks_mut(ROWS * inputs)
                .enumerate()
                .for_each(|(chunk, values)| {
                    matrix.decode_rows(first + chunk * ROWS, inputs, values);
                });
            if let Some(lora) = lora {
                self.fold(lora, first, values);
            }
            work(first, View::new(values, count, inputs));
        }
        scratch.give(panel);
    }

    /// Adds `scale B A` to the weights of the outputs from `first` on.
    fn fold(&self, lora: Factors<'_>, first: usize, values: &mut [f32]) {
        let (rank, inputs) = (lora.rank, self.inputs);
        let end = first + values.len() / inputs;
        for layer in self.layers(lora) {
            let start = first.max(layer.first);
            let count = end.min(layer.first + layer.out).saturating_sub(start);
            if count > 0 {
                let b = &lora.values[layer.b_at + (start - layer.first) * rank..];
                let w = ViewMut::new(&mut values[(start - first) * inputs..], count, inputs);
                ab(
                    w,
                    Write::Add,
                    View::new(b, count, rank),
                    layer.a,
                    lora.scale,
                );
            }
        }
    }

    fn add_low_rank(&self, lora: Factors<'_>, scratch: &Scratch, x: View<'_>, y: &mut [f32]) {
        let rows = x.rows();
        let mut down = scratch.take(rows * lora.rank);
        for layer in self.layers(lora) {
            abt(
                ViewMut::new(&mut down, rows, lora.rank),
                Write::Replace,
                x,
                layer.a,
                1.0,
            );
            let y = ViewMut::new(y, rows, self.width()).columns(layer.first, layer.out);
            abt(
                y,
                Write::Add,
                View::new(&down, rows, lora.rank),
                layer.b,
                lora.scale,
            );
        }
        scratch.give(down);
    }

    /// `dB = s dy^T (x A^T)`, `dA = s (dy B)^T x`; the `A` of all layers are one matrix.
    ///
    /// Where the weight is small beside the rank, `dW = dy^T x` first is the shorter way.
    fn factor_gradient(
        &self,
        lora: Factors<'_>,
        scratch: &Scratch,
        x: View<'_>,
        dy: View<'_>,
        gradient: &mut [f32],
    ) {
        let (rank, rows, inputs) = (lora.rank, x.rows(), self.inputs);
        let is_small = |out: usize| inputs * out <= 2 * rank * (inputs + out);
        if self.outputs.iter().all(|&out| is_small(out)) {
            return self.factor_gradient_of_weights(lora, scratch, x, dy, gradient);
        }
        let stacked = self.outputs.len() * rank;
        let (a_at, _) = self.factor_offsets(rank, 0);
        let a = View::new(&lora.values[a_at..], stacked, inputs);
        let mut down = scratch.take(rows * stacked);
        abt(
            ViewMut::new(&mut down, rows, stacked),
            Write::Replace,
            x,
            a,
            1.0,
        );
        for (index, layer) in self.layers(lora).enumerate() {
            let dy = dy.columns(layer.first, layer.out);
            let down = View::new(&down, rows, stacked).columns(index * rank, rank);
            let db = ViewMut::new(&mut gradient[layer.b_at..], layer.out, rank);
            atb(db, Write::Replace, dy, down, lora.scale);
        }
        for (index, layer) in self.layers(lora).enumerate() {
            let dy = dy.columns(layer.first, layer.out);
            let up = ViewMut::new(&mut down, rows, stacked).columns(index * rank, rank);
            ab(up, Write::Replace, dy, layer.b, lora.scale);
        }
        let da = ViewMut::new(&mut gradient[a_at..], stacked, inputs);
        atb(da, Write::Replace, View::new(&down, rows, stacked), x, 1.0);
        scratch.give(down);
    }

    /// `dB = s dW A^T`, `dA = s B^T dW`.
    fn factor_gradient_of_weights(
        &self,
        lora: Factors<'_>,
        scratch: &Scratch,
        x: View<'_>,
        dy: View<'_>,
        gradient: &mut [f32],
    ) {
        let (rank, inputs) = (lora.rank, self.inputs);
        for layer in self.layers(lora) {
            let dy = dy.columns(layer.first, layer.out);
            let mut dw = scratch.take(layer.out * inputs);
            atb(
                ViewMut::new(&mut dw, layer.out, inputs),
                Write::Replace,
                dy,
                x,
                lora.scale,
            );
            let dw_rows = View::new(&dw, layer.out, inputs);
            let db = ViewMut::new(&mut gradient[layer.b_at..], layer.out, rank);
            abt(db, Write::Replace, dw_rows, layer.a, 1.0);
            let da = ViewMut::new(&mut gradient[layer.a_at..], rank, inputs);
            atb(da, Write::Replace, layer.b, dw_rows, 1.0);
            scratch.give(dw);
        }
    }

    fn layers<'a>(&'a self, lora: Factors<'a>) -> impl Iterator<Item = Layer<'a>> {
        let mut first = 0;
        self.outputs.iter().enumerate().map(move |(layer, &out)| {
            let (a_at, b_at) = self.factor_offsets(lora.rank, layer);
            let a = View::new(&lora.values[a_at..], lora.rank, self.inputs);
            let b = View::new(&lora.values[b_at..], out, lora.rank);
            let before = first;
            first += out;
            Layer {
                first: before,
                out,
                a_at,
                b_at,
                a,
                b,
            }
        })
    }

    /// Offsets of a layer's `A` and `B` among the block's factors.
    pub(crate) fn factor_offsets(&self, rank: usize, layer: usize) -> (usize, usize) {
        let start = self.factors * rank;
        let a = start + layer * rank * self.inputs;
        let before: usize = self.outputs[..layer].iter().sum();
        let b = start + (self.outputs.len() * self.inputs + before) * rank;
        (a, b)
    }
}

/// One layer of a projection: its columns of the output, and its factors.
struct Layer<'a> {
    first: usize,
    out: usize,
    a_at: usize,
    b_at: usize,
    a: View<'a>,
    b: View<'a>,
}

wide! {
    fn add_bias<'a>(bias: &'a [f32], y: &'a mut [f32]) -> () {
        for row in y.chunks_exact_mut(bias.len()) {
            for (y, b) in row.iter_mut().zip(bias) {
                *y += b;
            }
        }
    }

    fn sum_rows<'a>(rows: &'a [f32], sum: &'a mut [f32]) -> () {
        sum.fill(0.0);
        for row in rows.chunks_exact(sum.len()) {
            for (sum, value) in sum.iter_mut().zip(row) {
                *sum += value;
            }
        }
    }
}
