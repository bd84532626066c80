//! Rotary position embedding (Su et al. 2021), the half-split pairing of Hugging Face models.

#![expect(
    clippy::cast_possible_truncation,
    reason = "computed in f64, kept in f32"
)]

use crate::worker::model::config::{Rope, RopeScaling};

/// Cosines and sines of every position up to a length. Where frequencies depend on a text's length, `long` has those
/// of texts longer than `limit`.
#[derive(Debug)]
pub(crate) struct RopeTable {
    short: Angles,
    long: Option<Angles>,
    limit: usize,
}

/// Cosines and sines of every position, for texts of one kind.
#[derive(Debug)]
pub(crate) struct Angles {
    half: usize,
    cosines: Vec<f32>,
    sines: Vec<f32>,
}

impl RopeTable {
    /// Angles of positions `0..positions` for heads of `head_dim` values.
    pub(crate) fn new(rope: &Rope, head_dim: usize, positions: usize) -> Self {
        let rotated = rope.rotated(head_dim);
        let frequency = |pair: usize| rope.theta.powf(-2.0 * pair as f64 / rotated as f64);
        let plain = (0..rotated / 2).map(frequency);
        let angles = |frequencies: Vec<f64>, factor| Angles::new(&frequencies, factor, positions);
        let divided = |divisors: &[f64]| {
            let pairs = plain.clone().zip(divisors);
            pairs
                .map(|(frequency, divisor)| frequency / divisor)
                .collect()
        };
        match &rope.scaling {
            Some(RopeScaling::Long {
                short,
                long,
                original,
                attention,
            }) => Self {
                short: angles(divided(short), *attention),
                long: (positions > *original).then(|| angles(divided(long), *attention)),
                limit: *original,
            },
            scaling => {
                let frequencies = plain.map(|frequency| scaled(frequency, scaling.as_ref()));
                Self {
                    short: angles(frequencies.collect(), 1.0),
                    long: None,
                    limit: usize::MAX,
                }
            }
        }
    }

    /// Positions covered.
    pub(crate) fn positions(&self) -> usize {
        self.short.cosines.len() / self.short.half
    }

    /// Angles in a text of `len` tokens.
    pub(crate) fn angles(&self, len: usize) -> &Angles {
        match &self.long {
            Some(long) if len > self.limit => long,
            _ => &self.short,
        }
    }
}

impl Angles {
    fn new(frequencies: &[f64], factor: f64, positions: usize) -> Self {
        let mut cosines = Vec::with_capacity(positions * frequencies.len());
        let mut sines = Vec::with_capacity(positions * frequencies.len());
        for position in 0..positions {
            for &frequency in frequencies {
                // Hugging Face computes the angle in f32; the same rounding keeps logits equal.
                let angle = position as f32 * frequency as f32;
                cosines.push(angle.cos() * factor as f32);
                sines.push(angle.sin() * factor as f32);
            }
        }
        Self {
            half: frequencies.len(),
            cosines,
            sines,
        }
    }

    /// Cosines and sines of a position, one for each pair of turned values.
    pub(crate) fn at(&self, position: usize) -> (&[f32], &[f32]) {
        let pairs = position * self.half..(position + 1) * self.half;
        (&self.cosines[pairs.clone()], &self.sines[pairs])
    }

    /// `out = scale * R(position) head`; values past the turned ones are only scaled.
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
        let (head, rest) = head.split_at(2 * self.half);
        let (out, out_rest) = out.split_at_mut(2 * self.half);
        let (first, second) = head.split_at(self.half);
        let (out_first, out_second) = out.split_at_mut(self.half);
        let angles = cosines.iter().zip(sines);
        let pairs = first.iter().zip(second).zip(out_first).zip(out_second);
        for ((((&a, &b), out_a), out_b), (&c, &s)) in pairs.zip(angles) {
            let (c, s) = (c * scale, s * (sign * scale));
            *out_a = a * c - b * s;
            *out_b = b * c + a * s;
        }
        for (out, &value) in out_rest.iter_mut().zip(rest) {
            *out = value * scale;
        }
    }
}

fn scaled(frequency: f64, scaling: Option<&RopeScaling>) -> f64 {
    match scaling {
        None | Some(RopeScaling::Long { .. }) => frequency,
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
