//! Linear layers, frozen or trained, with or without low-rank factors (LoRA, Hu et al. 2021).
//!
//! Layers that read the same input (q, k, v; gate, up) are one [`Projection`]: their weights lie one
//! after another in the block's parameters, so one product serves all of them.

use consilium_kernels::layers::{Scratch, bias};
use consilium_kernels::matmul::{View, ViewMut, Write, ab, abt, atb};
use rayon::prelude::*;

use super::frozen::Base;

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
    /// Layers of the block that come before this projection's.
    pub(crate) before: usize,
}

/// Parameters of one block: flat weights and, with adapters, flat factors.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Weights<'a> {
    pub(crate) base: Base<'a>,
    pub(crate) lora: Option<Factors<'a>>,
}

/// Low-rank factors: `W + scale B A`, per projection all `A` `[rank, in]` first, then all `B` `[out, rank]`.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Factors<'a> {
    pub(crate) values: &'a [f32],
    /// One entry for each layer of the block; none where a layer has no factors.
    pub(crate) layers: &'a [Option<Place>],
}

/// Rank and scale of a layer's factors.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Low {
    pub(crate) rank: usize,
    pub(crate) scale: f32,
}

/// A layer's factors and where they lie among the block's.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Place {
    pub(crate) low: Low,
    pub(crate) a: usize,
    pub(crate) b: usize,
}

impl Projection {
    /// Values out of all layers.
    pub(crate) fn width(&self) -> usize {
        self.outputs.iter().sum()
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
        if let Some(at) = self.bias {
            bias::add(weights.base.vector(at, width), y);
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
        for layer in self.layers(lora) {
            let Low { rank, scale } = layer.low;
            let mut down = scratch.take(rows * rank);
            let dy = dy.columns(layer.first, layer.out);
            let rows_down = ViewMut::new(&mut down, rows, rank);
            ab(rows_down, Write::Replace, dy, layer.b, scale);
            let dx = ViewMut::new(dx, rows, inputs);
            ab(dx, Write::Add, View::new(&down, rows, rank), layer.a, 1.0);
            scratch.give(down);
        }
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
        if let Some(at) = self.bias {
            bias::gradient(dy, &mut gradient[at..][..width]);
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
        let is_merged =
            |lora: &Factors<'_>| self.merges(rows) && self.layers(*lora).next().is_some();
        let lora = weights.lora.filter(is_merged);
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
        let inputs = self.inputs;
        let end = first + values.len() / inputs;
        for layer in self.layers(lora) {
            let Low { rank, scale } = layer.low;
            let start = first.max(layer.first);
            let count = end.min(layer.first + layer.out).saturating_sub(start);
            if count > 0 {
                let b = &lora.values[layer.b_at + (start - layer.first) * rank..];
                let w = ViewMut::new(&mut values[(start - first) * inputs..], count, inputs);
                ab(w, Write::Add, View::new(b, count, rank), layer.a, scale);
            }
        }
    }

    fn add_low_rank(&self, lora: Factors<'_>, scratch: &Scratch, x: View<'_>, y: &mut [f32]) {
        let rows = x.rows();
        for layer in self.layers(lora) {
            let Low { rank, scale } = layer.low;
            let mut down = scratch.take(rows * rank);
            let rows_down = ViewMut::new(&mut down, rows, rank);
            abt(rows_down, Write::Replace, x, layer.a, 1.0);
            let y = ViewMut::new(y, rows, self.width()).columns(layer.first, layer.out);
            abt(y, Write::Add, View::new(&down, rows, rank), layer.b, scale);
            scratch.give(down);
        }
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
        let (rows, inputs) = (x.rows(), self.inputs);
        let is_small =
            |layer: Layer<'_>| inputs * layer.out <= 2 * layer.low.rank * (inputs + layer.out);
        if self.layers(lora).all(is_small) {
            return self.factor_gradient_of_weights(lora, scratch, x, dy, gradient);
        }
        let stacked = self.layers(lora).map(|layer| layer.low.rank).sum();
        let a_at = self.layers(lora).next().map_or(0, |layer| layer.a_at);
        let a = View::new(&lora.values[a_at..], stacked, inputs);
        let mut down = scratch.take(rows * stacked);
        abt(
            ViewMut::new(&mut down, rows, stacked),
            Write::Replace,
            x,
            a,
            1.0,
        );
        let mut column = 0;
        for layer in self.layers(lora) {
            let Low { rank, scale } = layer.low;
            let dy = dy.columns(layer.first, layer.out);
            let down = View::new(&down, rows, stacked).columns(column, rank);
            let db = ViewMut::new(&mut gradient[layer.b_at..], layer.out, rank);
            atb(db, Write::Replace, dy, down, scale);
            column += rank;
        }
        let mut column = 0;
        for layer in self.layers(lora) {
            let Low { rank, scale } = layer.low;
            let dy = dy.columns(layer.first, layer.out);
            let up = ViewMut::new(&mut down, rows, stacked).columns(column, rank);
            ab(up, Write::Replace, dy, layer.b, scale);
            column += rank;
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
        let inputs = self.inputs;
        for layer in self.layers(lora) {
            let Low { rank, scale } = layer.low;
            let dy = dy.columns(layer.first, layer.out);
            let mut dw = scratch.take(layer.out * inputs);
            atb(
                ViewMut::new(&mut dw, layer.out, inputs),
                Write::Replace,
                dy,
                x,
                scale,
            );
            let dw_rows = View::new(&dw, layer.out, inputs);
            let db = ViewMut::new(&mut gradient[layer.b_at..], layer.out, rank);
            abt(db, Write::Replace, dw_rows, layer.a, 1.0);
            let da = ViewMut::new(&mut gradient[layer.a_at..], rank, inputs);
            atb(da, Write::Replace, layer.b, dw_rows, 1.0);
            scratch.give(dw);
        }
    }

    /// The layers that have factors.
    fn layers<'a>(&'a self, lora: Factors<'a>) -> impl Iterator<Item = Layer<'a>> {
        let places = &lora.layers[self.before..];
        let mut next = 0;
        let layers = self.outputs.iter().zip(places);
        layers.filter_map(move |(&out, place)| {
            let first = next;
            next += out;
            let Place { low, a, b } = (*place)?;
            Some(Layer {
                first,
                out,
                low,
                a_at: a,
                b_at: b,
                a: View::new(&lora.values[a..], low.rank, self.inputs),
                b: View::new(&lora.values[b..], out, low.rank),
            })
        })
    }
}

/// One layer of a projection: its columns of the output, and its factors.
struct Layer<'a> {
    first: usize,
    out: usize,
    low: Low,
    a_at: usize,
    b_at: usize,
    a: View<'a>,
    b: View<'a>,
}
