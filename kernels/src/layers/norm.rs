//! RMSNorm: `y = w * x / sqrt(mean(x^2) + eps)` (Zhang and Sennrich 2019).

use super::lanes::{dot, dot3};
use crate::cpu::multiversion::multiversion;

multiversion! {
    /// Normalises each row of `x`, as long as `weight`; `inverse` receives `1 / sqrt(mean(x^2) + eps)` of each row.
    pub fn forward(x: &[f32], weight: &[f32], eps: f32, y: &mut [f32], inverse: &mut [f32]) {
        let d = weight.len();
        for ((x, y), inverse) in x.chunks_exact(d).zip(y.chunks_exact_mut(d)).zip(inverse) {
            let r = 1.0 / (dot(x, x) / d as f32 + eps).sqrt();
            *inverse = r;
            for ((y, &x), &w) in y.iter_mut().zip(x).zip(weight) {
                *y = x * r * w;
            }
        }
    }
}

/// Adds the gradient with respect to `x` to `dx`, and with respect to the weight to `dweight`.
///
/// `dx = r (w dy) - x r^3 mean(x w dy)`, `dw = sum over rows of dy x r`.
pub fn backward(
    x: &[f32],
    weight: &[f32],
    inverse: &[f32],
    dy: &[f32],
    dx: &mut [f32],
    dweight: Option<&mut [f32]>,
) {
    backward_rows(x, weight, inverse, dy, dx);
    if let Some(dweight) = dweight {
        backward_weight(x, inverse, dy, dweight);
    }
}

multiversion! {
    fn backward_rows(x: &[f32], weight: &[f32], inverse: &[f32], dy: &[f32], dx: &mut [f32]) {
        let d = weight.len();
        let rows = x.chunks_exact(d).zip(dy.chunks_exact(d)).zip(dx.chunks_exact_mut(d));
        for (((x, dy), dx), &r) in rows.zip(inverse) {
            let pull = r * r * r * dot3(x, dy, weight) / d as f32;
            for (((dx, &x), &dy), &w) in dx.iter_mut().zip(x).zip(dy).zip(weight) {
                *dx += (dy * w).mul_add(r, -(x * pull));
            }
        }
    }
}

multiversion! {
    fn backward_weight(x: &[f32], inverse: &[f32], dy: &[f32], dweight: &mut [f32]) {
        let d = dweight.len();
        for ((x, dy), &r) in x.chunks_exact(d).zip(dy.chunks_exact(d)).zip(inverse) {
            for ((dw, &x), &dy) in dweight.iter_mut().zip(x).zip(dy) {
                *dw += dy * x * r;
            }
        }
    }
}
