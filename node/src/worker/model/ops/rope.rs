//! Rotary position embedding (Su et al. 2021), the half-split pairing of Hugging Face models.

#![expect(
    clippy::cast_possible_truncation,
    reason = "computed in f64, kept in f32"
)]

use crate::worker::model::config::{Rope, RopeScaling};

/// Cosines and sines of every position up to a length.
#[derive(Debug)]
pub(crate) struct RopeTable {
    half: usize,
    cosines: Vec<f32>,
    sines: Vec<f32>,
}

impl RopeTable {
    /// Angles of positions `0..positions` for heads of `head_dim` values.
    pub(crate) fn new(rope: &Rope, head_dim: usize, positions: usize) -> Self {
        let half = head_dim / 2;
        let frequencies: Vec<f64> = (0..half)
            .map(|pair| rope.theta.powf(-2.0 * pair as f64 / head_dim as f64))
            .map(|frequency| scaled(frequency, rope.scaling.as_ref()))
            .collect();
        let mut cosines = Vec::with_capacity(positions * half);
        let mut sines = Vec::with_capacity(positions * half);
        for position in 0..positions {
            for &frequency in &frequencies {
                // Hugging Face computes the angle in f32; the same rounding keeps logits equal.
                let angle = position as f32 * frequency as f32;
                cosines.push(angle.cos());
                sines.push(angle.sin());
            }
        }
        Self {
            half,
            cosines,
            sines,
        }
    }

    /// Positions covered.
    pub(crate) fn positions(&self) -> usize {
        self.cosines.len() / self.half
    }

    /// `out = scale * R(position) head`
    #[inline(always)]
    pub(crate) fn rotate(&self, head: &[f32], position: usize, scale: f32, out: &mut [f32]) {
        self.turn(head, position, scale, 1.0, out);
    }

    /// `out = scale * R(position)^T head`: the gradient of [`rotate`](Self::rotate).
    #[inline(always)]
    pub(crate) fn rotate_back(&self, head: &[f32], position: usize, scale: f32, out: &mut [f32]) {
        self.turn(head, position, scale, -1.0, out);
    }

    #[inline(always)]
    fn turn(&self, head: &[f32], position: usize, scale: f32, sign: f32, out: &mut [f32]) {
        let cosines = &self.cosines[position * self.half..][..self.half];
        let sines = &self.sines[position * self.half..][..self.half];
        let (first, second) = head.split_at(self.half);
        let (out_first, out_second) = out.split_at_mut(self.half);
        let angles = cosines.iter().zip(sines);
        let pairs = first.iter().zip(second).zip(out_first).zip(out_second);
        for ((((&a, &b), out_a), out_b), (&c, &s)) in pairs.zip(angles) {
            let (c, s) = (c * scale, s * (sign * scale));
            *out_a = a * c - b * s;
            *out_b = b * c + a * s;
        }
    }
}

fn scaled(frequency: f64, scaling: Option<&RopeScaling>) -> f64 {
    match scaling {
        None => frequency,
        Some(RopeScaling::Linear { factor }) => frequency / factor,
        Some(RopeScaling::Llama3 {
            factor,
            low,
            high,
            original,
        }) => {
            let wavelength = std::f64::consts::TAU / frequency;
            if wavelength < original / high {
                frequency
            } else if wavelength > original / low {
                frequency / factor
            } else {
                let smooth = (original / wavelength - low) / (high - low);
                (1.0 - smooth) * frequency / factor + smooth * frequency
            }
        }
    }
}
