//! AdamW (Loshchilov and Hutter 2019), in place, with clipping by the global norm. What it keeps lies where the weights lie.

use candle_core::{DType, Tensor};
use consilium_kernels::adamw::{Factors, sum_of_squares, update};
use serde::{Deserialize, Serialize};

use super::TrainError;
use crate::worker::model::{Gradients, Model, ModelError, edit, is_plain, with_floats};

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

/// Running means of a gradient and its square, flat.
#[derive(Debug)]
pub(super) struct Moments {
    pub(super) mean: Tensor,
    pub(super) square: Tensor,
}

impl Moments {
    fn zeros(like: &Tensor) -> candle_core::Result<Self> {
        let zeros = || Tensor::zeros(like.elem_count(), DType::F32, like.device());
        Ok(Self {
            mean: zeros()?,
            square: zeros()?,
        })
    }
}

impl AdamW {
    /// A fresh state for what is trainable in `model` now.
    ///
    /// # Errors
    /// The device is out of memory or fails.
    pub fn new(model: &Model, config: AdamWConfig) -> Result<Self, ModelError> {
        let banks = model.trainable();
        let zeros = banks.iter().map(|bank| Moments::zeros(bank.tensor()?));
        Ok(Self {
            config,
            steps: 0,
            moments: zeros.collect::<candle_core::Result<_>>()?,
        })
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
                .all(|(bank, m)| bank.len() == m.mean.elem_count());
        if !fits || gradients.tensors.len() != banks.len() {
            return Err(TrainError::OtherModel);
        }
        self.steps += 1;
        let factors = self.factors(norm, rate);
        for ((bank, gradient), moments) in
            banks.iter().zip(&gradients.tensors).zip(&mut self.moments)
        {
            let weights = bank.tensor().map_err(ModelError::from)?;
            let step = if is_plain(weights) {
                step_on_host(factors, weights, gradient, moments)
            } else {
                step_on_device(factors, weights, gradient, moments)
            };
            step.map_err(ModelError::from)?;
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

fn step_on_host(
    factors: Factors,
    weights: &Tensor,
    gradient: &Tensor,
    Moments { mean, square }: &Moments,
) -> candle_core::Result<()> {
    let (mut inner, mut innermost) = (Ok(()), Ok(()));
    with_floats(gradient, |gradient| {
        edit(mean, |mean| {
            inner = edit(square, |square| {
                innermost = edit(weights, |weights| {
                    update(factors, weights, gradient, mean, square);
                });
            });
        })
    })??;
    inner.and(innermost)
}

/// The same in candle's operations.
fn step_on_device(
    factors: Factors,
    weights: &Tensor,
    gradient: &Tensor,
    moments: &mut Moments,
) -> candle_core::Result<()> {
    let Factors {
        clip,
        beta1,
        beta2,
        rate,
        unbias,
        eps,
        keep,
    } = factors;
    let (beta1, beta2) = (f64::from(beta1), f64::from(beta2));
    let gradient = (gradient * f64::from(clip))?;
    let Moments { mean, square } = moments;
    *mean = ((&*mean * beta1)? + (&gradient * (1.0 - beta1))?)?;
    *square = ((&*square * beta2)? + (gradient.sqr()? * (1.0 - beta2))?)?;
    let root = square.sqrt()?.affine(unbias.into(), eps.into())?;
    let change = ((&*mean * f64::from(rate))? / root)?;
    let changed = ((weights.detach() * f64::from(keep))? - change)?;
    weights.slice_set(&changed, 0, 0)
}

/// Norm over all gradients.
fn gradient_norm(gradients: &Gradients) -> Result<f64, TrainError> {
    let mut sum = 0f64;
    let mut elsewhere = Vec::new();
    for gradient in &gradients.tensors {
        if is_plain(gradient) {
            sum += with_floats(gradient, sum_of_squares).map_err(ModelError::from)?;
        } else {
            elsewhere.push(gradient.sqr().and_then(|squares| squares.sum_all()));
        }
    }
    sum += sum_of_scalars(elsewhere).map_err(ModelError::from)?;
    Ok(sum.sqrt())
}

/// The sum of numbers that a device computes, waited for once.
fn sum_of_scalars(scalars: Vec<candle_core::Result<Tensor>>) -> candle_core::Result<f64> {
    if scalars.is_empty() {
        return Ok(0.0);
    }
    let scalars = scalars
        .into_iter()
        .collect::<candle_core::Result<Vec<_>>>()?;
    let values = Tensor::stack(&scalars, 0)?.to_vec1::<f32>()?;
    Ok(values.into_iter().map(f64::from).sum())
}

#[cfg(test)]
mod tests {
    use candle_core::Device;

    use super::*;

    #[test]
    fn steps_on_a_device_are_those_on_the_host() {
        let values =
            |seed: u32| (0..1000u32).map(move |i| ((i * 37 + seed * 11) % 101) as f32 / 50.0 - 1.0);
        let tensor = |seed| Tensor::from_iter(values(seed), &Device::Cpu).unwrap();
        let weights = [tensor(1), tensor(1)];
        let mut moments = weights.each_ref().map(|like| Moments::zeros(like).unwrap());
        let mut optimiser = AdamW {
            config: AdamWConfig {
                weight_decay: 0.1,
                ..AdamWConfig::default()
            },
            steps: 0,
            moments: Vec::new(),
        };
        for seed in 2..6 {
            optimiser.steps += 1;
            let factors = optimiser.factors(3.0, 1e-2);
            let gradient = tensor(seed);
            step_on_host(factors, &weights[0], &gradient, &moments[0]).unwrap();
            step_on_device(factors, &weights[1], &gradient, &mut moments[1]).unwrap();
        }
        let [host, device] = weights.map(|weights| weights.to_vec1::<f32>().unwrap());
        assert_ne!(host, values(1).collect::<Vec<_>>());
        let pairs = host.iter().zip(&device);
        let worst = pairs.map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
        assert!(worst < 1e-6, "{worst}");
    }
}
