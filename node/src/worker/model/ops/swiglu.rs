//! SwiGLU: `a = silu(g) * u` (Shazeer 2020), gate and up side by side in one row.

use super::simd::{LANES, exp, wide};

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
            let (gates, gate_rest) = gate.as_chunks_mut::<LANES>();
            let (ups, up_rest) = up.as_chunks_mut::<LANES>();
            let (douts, dout_rest) = dout.as_chunks_mut::<LANES>();
            for ((dout, gate), up) in douts.iter_mut().zip(gates).zip(ups) {
                // Whole registers are loaded before any is stored: the three streams are not known apart.
                let (d, g, u) = (*dout, *gate, *up);
                for lane in 0..LANES {
                    (dout[lane], gate[lane], up[lane]) = gradient(d[lane], g[lane], u[lane]);
                }
            }
            for ((dout, gate), up) in dout_rest.iter_mut().zip(gate_rest).zip(up_rest) {
                (*dout, *gate, *up) = gradient(*dout, *gate, *up);
            }
        }
    }
}

/// Output, and gradients of gate and up.
#[inline(always)]
fn gradient(d: f32, gate: f32, up: f32) -> (f32, f32, f32) {
    let s = sigmoid(gate);
    let silu = gate * s;
    (silu * up, d * up * (1.0 - s).mul_add(silu, s), d * silu)
}

#[inline(always)]
fn sigmoid(x: f32) -> f32 {
    1.0 / (1.0 + exp(-x))
}
