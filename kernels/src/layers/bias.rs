//! Biases: `y = y + b` of every row.

use crate::cpu::multiversion::multiversion;

multiversion! {
    /// Adds `bias` to every row of `y`.
    pub fn add(bias: &[f32], y: &mut [f32]) {
        for row in y.chunks_exact_mut(bias.len()) {
            for (y, b) in row.iter_mut().zip(bias) {
                *y += b;
            }
        }
    }
}

multiversion! {
    /// Writes the sum of the rows of `dy`, the gradient of [`add`] with respect to the bias.
    pub fn gradient(dy: &[f32], dbias: &mut [f32]) {
        dbias.fill(0.0);
        for row in dy.chunks_exact(dbias.len()) {
            for (sum, value) in dbias.iter_mut().zip(row) {
                *sum += value;
            }
        }
    }
}
