//! AdamW (Loshchilov and Hutter 2019), in place, with clipping by the global norm.

use serde::{Deserialize, Serialize};

use super::TrainError;
use crate::worker::model::{Gradients, Model, ModelError, wide, with_floats};

/// Constants of the optimiser.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct AdamWConfig {
    /// Decay of the mean of the gradient.
    pub beta1: f64,
    /// Decay of the mean of its square.
    pub beta2: f64,
    /// Added to the root of the mean square.
    pub eps: f64,
    /// Decay of the weights, times the rate.
    pub weight_decay: f64,
    /// Largest norm of the whole gradient; longer ones are scaled down.
    pub clip: f64,
}

impl Default for AdamWConfig {
    fn default() -> Self {
        Self {
            beta1: 0.9,
            beta2: 0.98,
            eps: 1e-8,
            weight_decay: 0.0,
            clip: 1.0,
        }
    }
}

/// The optimiser's memory of one model's trainable tensors.
#[derive(Debug)]
pub struct AdamW {
    config: AdamWConfig,
    pub(super) steps: u64,
    pub(super) moments: Vec<Moments>,
}

/// Running means of a gradient and its square.
#[derive(Debug, Clone, Default, PartialEq)]
pub(super) struct Moments {
    pub(super) mean: Vec<f32>,
    pub(super) square: Vec<f32>,
}

impl AdamW {
    /// A fresh state for what is trainable in `model` now.
    pub fn new(model: &Model, config: AdamWConfig) -> Self {
        let zeros = |len: usize| Moments {
            mean: vec![0.0; len],
            square: vec![0.0; len],
        };
        let moments = model
            .trainable()
            .iter()
            .map(|bank| zeros(bank.len()))
            .collect();
        Self {
            config,
            steps: 0,
            moments,
        }
    }

    /// Steps taken.
    pub fn steps(&self) -> u64 {
        self.steps
    }

    /// Changes the weights by one step and returns the norm of the gradient before clipping.
    pub fn step(
        &mut self,
        model: &mut Model,
        gradients: &Gradients,
        rate: f64,
    ) -> Result<f64, TrainError> {
        let norm = gradient_norm(gradients)?;
        if !norm.is_finite() {
            return Err(TrainError::NotFinite {
                step: self.steps,
                what: "gradient",
            });
        }
        let banks = model.trainable();
        let fits = banks.len() == self.moments.len()
            && banks
                .iter()
                .zip(&self.moments)
                .all(|(bank, m)| bank.len() == m.mean.len());
        if !fits || gradients.tensors.len() != banks.len() {
            return Err(TrainError::OtherModel);
        }
        self.steps += 1;
        let factors = self.factors(norm, rate);
        for ((bank, gradient), moments) in
            banks.iter().zip(&gradients.tensors).zip(&mut self.moments)
        {
            with_floats(gradient, |gradient| {
                bank.edit(|weights| {
                    let Moments { mean, square } = moments;
                    update(factors, weights, gradient, mean, square);
                })
            })
            .and_then(|inner| inner)
            .map_err(ModelError::from)?;
        }
        Ok(norm)
    }

    #[expect(
        clippy::cast_possible_truncation,
        reason = "computed in f64, applied in f32"
    )]
    fn factors(&self, norm: f64, rate: f64) -> Factors {
        let AdamWConfig {
            beta1,
            beta2,
            eps,
            weight_decay,
            clip,
        } = self.config;
        let steps = i32::try_from(self.steps).unwrap_or(i32::MAX);
        let (first, second) = (1.0 - beta1.powi(steps), 1.0 - beta2.powi(steps));
        Factors {
            clip: if norm > clip { clip / norm } else { 1.0 } as f32,
            beta1: beta1 as f32,
            beta2: beta2 as f32,
            rate: (rate / first) as f32,
            unbias: (1.0 / second).sqrt() as f32,
            eps: eps as f32,
            keep: (1.0 - rate * weight_decay) as f32,
        }
    }
}

#[derive(Clone, Copy)]
struct Factors {
    clip: f32,
    beta1: f32,
    beta2: f32,
    rate: f32,
    unbias: f32,
    eps: f32,
    keep: f32,
}

/// Gradients and means below count as zero: where tokens do not occur, both decay into numbers whose
/// arithmetic takes a hundred times as long, while the root of the mean square is beside an `eps` of 1e-8.
const SMALLEST: f32 = 1e-17;

/// The same for mean squares.
const SMALLEST_SQUARE: f32 = 1e-35;

/// `value`, or zero where it is closer to that than `floor`.
#[inline(always)]
fn from(value: f32, floor: f32) -> f32 {
    if value.abs() < floor { 0.0 } else { value }
}

/// Norm over all gradients: sums of 16 values in f32, the rest in f64, always in the same order.
fn gradient_norm(gradients: &Gradients) -> Result<f64, TrainError> {
    let mut sum = 0f64;
    for gradient in &gradients.tensors {
        sum += with_floats(gradient, sum_of_squares).map_err(ModelError::from)?;
    }
    Ok(sum.sqrt())
}

wide! {
    fn sum_of_squares<'a>(values: &'a [f32]) -> f64 {
        let mut total = 0f64;
        for chunk in values.chunks(1024) {
            let mut sums = [0f32; 16];
            let (lanes, rest) = chunk.as_chunks::<16>();
            for lane in lanes {
                for (sum, value) in sums.iter_mut().zip(lane) {
                    *sum = value.mul_add(*value, *sum);
                }
            }
            let rest: f32 = rest.iter().map(|value| value * value).sum();
            total += f64::from(sums.iter().sum::<f32>() + rest);
        }
        total
    }

    fn update<'a>(
        factors: Factors,
        weights: &'a mut [f32],
        gradient: &'a [f32],
        mean: &'a mut [f32],
        square: &'a mut [f32],
    ) -> () {
        let values = weights.iter_mut().zip(gradient).zip(mean).zip(square);
        for (((weight, &gradient), mean), square) in values {
            let g = from(gradient * factors.clip, SMALLEST);
            *mean = factors.beta1 * from(*mean, SMALLEST) + (1.0 - factors.beta1) * g;
            *square = factors.beta2 * from(*square, SMALLEST_SQUARE) + (1.0 - factors.beta2) * g * g;
            let root = square.sqrt() * factors.unbias + factors.eps;
            *weight = *weight * factors.keep - factors.rate * *mean / root;
        }
    }
}
