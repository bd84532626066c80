//! SwiGLU: `a = silu(g) * u` (Shazeer 2020), gate and up side by side in one row.

use super::lanes::{LANES, exp};
use crate::cpu::multiversion::multiversion;

multiversion! {
    /// `gate_up` has rows of `2 width`, `out` rows of `width`.
    pub fn forward(gate_up: &[f32], width: usize, out: &mut [f32]) {
        for (row, out) in gate_up.chunks_exact(2 * width).zip(out.chunks_exact_mut(width)) {
            let (gate, up) = row.split_at(width);
            for ((out, &g), &u) in out.iter_mut().zip(gate).zip(up) {
                *out = g * sigmoid(g) * u;
            }
        }
    }
}

multiversion! {
    /// Turns `gate_up` into its gradient, and `dout`, the gradient of the output, into the output.
    ///
    /// With `s = sigmoid(g)`: `dg = da u (s + g s (1 - s))` and `du = da g s`.
    pub fn backward(gate_up: &mut [f32], width: usize, dout: &mut [f32]) {
        for (row, dout) in gate_up.chunks_exact_mut(2 * width).zip(dout.chunks_exact_mut(width)) {
            let (gate, up) = row.split_at_mut(width);
            let (gates, gate_rest) = gate.as_chunks_mut::<LANES>();
            let (ups, up_rest) = up.as_chunks_mut::<LANES>();
            let (douts, dout_rest) = dout.as_chunks_mut::<LANES>();
            for ((dout, gate), up) in douts.iter_mut().zip(gates).zip(ups) {
                // Whole registers are loaded before any is stored: gate and up are not known apart.
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
