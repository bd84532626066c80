//! Linear layers, frozen or trained, with or without low-rank factors (LoRA, Hu et al. 2021).
//!
//! Layers that read the same input (q, k, v; gate, up) are one [`Projection`]: their weights lie one
//! after another in the block's parameters, so one product serves all of them.

use consilium_kernels::matmul::{View, ViewMut, Write, ab, abt, atb};

use super::scratch::Scratch;
use super::simd::wide;

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
    pub(crate) base: &'a [f32],
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
        match self.merged(weights, scratch, rows) {
            Some(merged) => {
                let w = View::new(&merged, width, self.inputs);
                abt(ViewMut::new(y, rows, width), write, x, w, 1.0);
                scratch.give(merged);
            }
            None => {
                let w = View::new(&weights.base[self.weight..], width, self.inputs);
                abt(ViewMut::new(y, rows, width), write, x, w, 1.0);
                if let Some(lora) = weights.lora {
                    self.add_low_rank(lora, scratch, x, y);
                }
            }
        }
        if let Some(bias) = self.bias {
            add_bias(&weights.base[bias..][..width], y);
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
        if let Some(merged) = self.merged(weights, scratch, rows) {
            let w = View::new(&merged, width, inputs);
            ab(ViewMut::new(dx, rows, inputs), Write::Replace, dy, w, 1.0);
            scratch.give(merged);
            return;
        }
        let w = View::new(&weights.base[self.weight..], width, inputs);
        ab(ViewMut::new(dx, rows, inputs), Write::Replace, dy, w, 1.0);
        let Some(lora) = weights.lora else { return };
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
        if let Some(bias) = self.bias {
            sum_rows(dy, &mut gradient[bias..][..width]);
        }
    }

    /// Folding the factors into the weights costs `rank in out`; applying them apart costs
    /// `rows rank (2 in + out)` more than not having them.
    fn merges(&self, rows: usize, lora: Option<Factors<'_>>) -> bool {
        lora.is_some_and(|lora| self.layers(lora).next().is_some())
            && self
                .outputs
                .iter()
                .all(|out| rows * (2 * self.inputs + out) > self.inputs * out)
    }

    fn merged(&self, weights: Weights<'_>, scratch: &Scratch, rows: usize) -> Option<Vec<f32>> {
        let lora = weights.lora.filter(|_| self.merges(rows, weights.lora))?;
        let mut merged = scratch.take(self.width() * self.inputs);
        merged.copy_from_slice(&weights.base[self.weight..][..self.width() * self.inputs]);
        for layer in self.layers(lora) {
            let w = &mut merged[layer.first * self.inputs..];
            let w = ViewMut::new(w, layer.out, self.inputs);
            ab(w, Write::Add, layer.b, layer.a, layer.low.scale);
        }
        Some(merged)
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

    /// `dB = s dy^T (x A^T)`, `dA = s (dy B)^T x`.
    ///
    /// Where the weight is small beside the rank, `dW = dy^T x` first is the shorter way:
    /// `dB = s dW A^T`, `dA = s B^T dW`.
    fn factor_gradient(
        &self,
        lora: Factors<'_>,
        scratch: &Scratch,
        x: View<'_>,
        dy: View<'_>,
        gradient: &mut [f32],
    ) {
        let (rows, inputs) = (x.rows(), self.inputs);
        for Layer {
            first,
            out,
            low: Low { rank, scale },
            a_at,
            b_at,
            a,
            b,
        } in self.layers(lora)
        {
            let dy = dy.columns(first, out);
            if inputs * out <= 2 * rank * (inputs + out) {
                let mut dw = scratch.take(out * inputs);
                atb(
                    ViewMut::new(&mut dw, out, inputs),
                    Write::Replace,
                    dy,
                    x,
                    scale,
                );
                let dw_rows = View::new(&dw, out, inputs);
                let db = ViewMut::new(&mut gradient[b_at..], out, rank);
                abt(db, Write::Replace, dw_rows, a, 1.0);
                let da = ViewMut::new(&mut gradient[a_at..], rank, inputs);
                atb(da, Write::Replace, b, dw_rows, 1.0);
                scratch.give(dw);
            } else {
                let mut down = scratch.take(rows * rank);
                abt(
                    ViewMut::new(&mut down, rows, rank),
                    Write::Replace,
                    x,
                    a,
                    1.0,
                );
                let db = ViewMut::new(&mut gradient[b_at..], out, rank);
                atb(db, Write::Replace, dy, View::new(&down, rows, rank), scale);
                ab(
                    ViewMut::new(&mut down, rows, rank),
                    Write::Replace,
                    dy,
                    b,
                    scale,
                );
                let da = ViewMut::new(&mut gradient[a_at..], rank, inputs);
                atb(da, Write::Replace, View::new(&down, rows, rank), x, 1.0);
                scratch.give(down);
            }
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
