//! SwiGLU: `a = silu(g) * u` (Shazeer 2020), gate and up side by side in one row.

use super::simd::{exp, wide};

wide! {
    /// `gate_up` has rows of `2 width`, `out` rows of `width`.
    pub(crate) fn forward<'a>(gate_up: &'a [f32], width: usize, out: &'a mut [f32]) -> () {
        for (row, out) in gate_up.chunks_exact(2 * width).zip(out.chunks_exact_mut(width)) {
            let (gate, up) = row.split_at(width);
            for ((out, &g), &u) in out.iter_mut().zip(gate).zip(up) {
                *out = g * sigmoid(g) * u;
            }
        }
    }

    /// Turns `gate_up` into its gradient, and `dout`, the gradient of the output, into the output.
    pub(crate) fn backward<'a>(
        gate_up: &'a mut [f32],
        width: usize,
        dout: &'a mut [f32],
    ) -> () {
        for (row, dout) in gate_up.chunks_exact_mut(2 * width).zip(dout.chunks_exact_mut(width)) {
            let (gate, up) = row.split_at_mut(width);
            for ((dout, g), u) in dout.iter_mut().zip(gate).zip(up) {
                let (d, gate, up) = (*dout, *g, *u);
                let s = sigmoid(gate);
                let silu = gate * s;
                *dout = silu * up;
                *g = d * up * (1.0 - s).mul_add(silu, s);
                *u = d * silu;
            }
        }
    }
}

#[inline(always)]
fn sigmoid(x: f32) -> f32 {
    1.0 / (1.0 + exp(-x))
}
