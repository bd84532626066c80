//! The merge of an inner round: weighted mean, outer Nesterov step and recompression, per matrix in product space.
//!
//! With theta = B A of one matrix (the LoRA scale is the same factor everywhere and cancels):
//!
//! ```text
//! g  = theta_prev - sum p_m theta_m                 p_m = weight_m / sum of weights
//! v' = mu v + g
//! theta' = theta_prev - eta (g + mu v')
//! ```
//!
//! (DiLoCo, arXiv 2311.08105, on products rather than factors, because a mean of factors is not the mean of products.)
//! theta' is a stack of known factors, truncated to the rank of the adapter and rotated onto the previous A. v' is kept
//! as factors of at most four times that rank. Modules that are trained whole take the same step on full tensors.

use consilium_protocol::InstitutionId;
use consilium_protocol::manifest::Training;
use rayon::prelude::*;

use super::check::AdapterLayout;
use super::lowrank::{Factors, Stack, align};
use super::tensors::{A, B, Output, Tensors, serialize};
use crate::fusion::error::{FusionError, Origin, TensorProblem};

const VELOCITY_A: &str = ".velocity_A.weight";
const VELOCITY_B: &str = ".velocity_B.weight";
/// Rank of the outer momentum in units of the adapter's rank.
const VELOCITY_RANK: usize = 4;
/// Elements of a whole tensor that one task takes.
const CHUNK: usize = 1 << 16;

/// One inner round.
#[derive(Debug, Clone, Copy)]
pub struct MergeInput<'a> {
    /// Rank and outer optimiser.
    pub training: &'a Training,
    /// The adapter that the nodes started from.
    pub start: &'a [u8],
    /// Outer optimiser's state after the previous inner round; `None` in the first.
    pub momentum: Option<&'a [u8]>,
    /// Trained adapters with their weights, in any order.
    pub adapters: &'a [(InstitutionId, &'a [u8], u32)],
}

/// What an inner round ends with.
#[derive(Debug, Clone, PartialEq)]
pub struct Merged {
    /// `adapter_model.safetensors` that the next inner round starts from.
    pub adapter: Vec<u8>,
    /// Outer optimiser's state for the next inner round.
    pub momentum: Vec<u8>,
    /// What recompression lost.
    pub truncation: Truncation,
}

/// Norm of what recompression cut off, relative to the norm of the whole.
#[derive(Debug, Clone, PartialEq, serde::Serialize)]
pub struct Truncation {
    /// Mean over the matrices.
    pub mean: f64,
    /// Largest of the matrices.
    pub worst: f64,
    /// Every matrix, in name order.
    pub matrices: Vec<MatrixTruncation>,
}

/// Truncation of one matrix.
#[derive(Debug, Clone, PartialEq, serde::Serialize)]
pub struct MatrixTruncation {
    /// PEFT name of the layer.
    pub layer: String,
    /// Of the merged product.
    pub product: f64,
    /// Of the outer momentum.
    pub velocity: f64,
}

impl Truncation {
    /// The mean in millionths, as logged.
    #[must_use]
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "a share of 0 to 1"
    )]
    pub fn ppm(&self) -> u32 {
        (self.mean.clamp(0.0, 1.0) * 1e6).round() as u32
    }

    fn of(matrices: Vec<MatrixTruncation>) -> Self {
        let count = matrices.len().max(1) as f64;
        Self {
            mean: matrices.iter().map(|m| m.product).sum::<f64>() / count,
            worst: matrices.iter().map(|m| m.product).fold(0.0, f64::max),
            matrices,
        }
    }
}

/// Merges the adapters of one inner round.
///
/// The result is the same bytes for any order of `adapters` and any number of threads.
///
/// # Errors
/// A contribution that lacks a tensor, has one too many, or one of the wrong type, shape or with values that are not
/// finite; the error names contribution and tensor.
pub fn merge(input: MergeInput<'_>) -> Result<Merged, FusionError> {
    let round = Round::new(&input)?;
    let matrices: Vec<_> = round.layout.matrices.iter().collect();
    let merged: Vec<Result<_, FusionError>> = matrices
        .into_par_iter()
        .map(|(layer, &shape)| round.matrix(layer, shape))
        .collect();
    let mut adapter = Vec::new();
    let mut momentum = Vec::new();
    let mut truncations = Vec::new();
    for matrix in merged {
        let (tensors, velocity, truncation) = matrix?;
        adapter.extend(tensors);
        momentum.extend(velocity);
        truncations.push(truncation);
    }
    for (name, shape) in &round.layout.whole {
        let (tensor, velocity) = round.whole(name, shape)?;
        adapter.push(tensor);
        momentum.push(velocity);
    }
    Ok(Merged {
        adapter: serialize(&adapter)?,
        momentum: serialize(&momentum)?,
        truncation: Truncation::of(truncations),
    })
}

/// Coefficients of theta_prev, of the mean and of v in a sum.
struct Step {
    previous: f64,
    mean: f64,
    velocity: f64,
}

struct Round<'a> {
    layout: AdapterLayout,
    start: Tensors<'a>,
    momentum: Option<Tensors<'a>>,
    /// Ascending by institution, shares sum to one.
    adapters: Vec<(f64, Tensors<'a>)>,
    theta: Step,
    velocity: Step,
}

impl<'a> Round<'a> {
    fn new(input: &MergeInput<'a>) -> Result<Self, FusionError> {
        let start = Tensors::parse(Origin::Start, input.start)?;
        let layout = AdapterLayout::of(input.training, &start)?;
        let momentum = input
            .momentum
            .map(|bytes| Tensors::parse(Origin::Momentum, bytes))
            .transpose()?;
        let mut sorted: Vec<_> = input.adapters.iter().collect();
        sorted.sort_by(|a, b| a.0.cmp(&b.0));
        if let Some(pair) = sorted.windows(2).find(|pair| pair[0].0 == pair[1].0) {
            return Err(FusionError::Twice(pair[0].0.clone()));
        }
        let total: u64 = sorted.iter().map(|(_, _, weight)| u64::from(*weight)).sum();
        if total == 0 {
            return Err(FusionError::Nothing);
        }
        let mut adapters = Vec::with_capacity(sorted.len());
        for (institution, bytes, weight) in sorted {
            let tensors = Tensors::parse(Origin::Institution(institution.clone()), bytes)?;
            layout.check(&tensors)?;
            adapters.push((f64::from(*weight) / total as f64, tensors));
        }
        let eta = f64::from(input.training.outer_rate_permille) / 1000.0;
        let mu = f64::from(input.training.outer_momentum_permille) / 1000.0;
        let pull = eta * (1.0 + mu);
        Ok(Self {
            layout,
            start,
            momentum,
            adapters,
            theta: Step {
                previous: 1.0 - pull,
                mean: pull,
                velocity: -eta * mu * mu,
            },
            velocity: Step {
                previous: 1.0,
                mean: -1.0,
                velocity: mu,
            },
        })
    }

    fn matrix(
        &self,
        layer: &str,
        [rows, columns]: [usize; 2],
    ) -> Result<([Output; 2], [Output; 2], MatrixTruncation), FusionError> {
        let rank = self.layout.rank;
        let read = |tensors: &Tensors<'_>, a: &str, b: &str, r: usize| {
            Ok::<_, FusionError>(Factors {
                b: tensors.matrix(&format!("{layer}{b}"), [rows, r], false)?,
                at: tensors.matrix(&format!("{layer}{a}"), [r, columns], true)?,
            })
        };
        let previous = read(&self.start, A, B, rank)?;
        let adapters = self
            .adapters
            .iter()
            .map(|(_, tensors)| read(tensors, A, B, rank))
            .collect::<Result<Vec<_>, FusionError>>()?;
        let velocity = match &self.momentum {
            Some(momentum) => self.read_velocity(momentum, layer, [rows, columns])?,
            None => Factors {
                b: faer::Mat::zeros(rows, 0),
                at: faer::Mat::zeros(columns, 0),
            },
        };
        let mut terms = vec![&previous];
        terms.extend(&adapters);
        terms.push(&velocity);
        let stack = Stack::new(&terms);
        let diverged = || FusionError::Diverged(layer.to_owned());
        let product = stack
            .weighted_sum(&self.coefficients(&self.theta), rank)
            .ok_or_else(diverged)?;
        let moved = stack
            .weighted_sum(&self.coefficients(&self.velocity), VELOCITY_RANK * rank)
            .ok_or_else(diverged)?;
        let new = align(&product, previous.at.as_ref()).ok_or_else(diverged)?;
        Ok((
            [
                Output::matrix(format!("{layer}{A}"), &new.at, true)?,
                Output::matrix(format!("{layer}{B}"), &new.b, false)?,
            ],
            [
                Output::matrix(format!("{layer}{VELOCITY_A}"), &moved.v, true)?,
                Output::matrix(format!("{layer}{VELOCITY_B}"), &moved.us, false)?,
            ],
            MatrixTruncation {
                layer: layer.to_owned(),
                product: product.error,
                velocity: moved.error,
            },
        ))
    }

    fn read_velocity(
        &self,
        momentum: &Tensors<'_>,
        layer: &str,
        [rows, columns]: [usize; 2],
    ) -> Result<Factors, FusionError> {
        let a = format!("{layer}{VELOCITY_A}");
        let b = format!("{layer}{VELOCITY_B}");
        let factors = Factors {
            b: momentum.matrix(&b, [rows, 0], false)?,
            at: momentum.matrix(&a, [0, columns], true)?,
        };
        if factors.at.ncols() != factors.rank() {
            let problem = TensorProblem::Shape {
                got: vec![factors.at.ncols(), columns],
                expected: vec![factors.rank(), columns],
            };
            return Err(momentum.error(&a, problem));
        }
        Ok(factors)
    }

    /// Coefficients of the start, the adapters and the momentum.
    fn coefficients(&self, step: &Step) -> Vec<f64> {
        let mut all = vec![step.previous];
        all.extend(self.adapters.iter().map(|(share, _)| step.mean * share));
        all.push(step.velocity);
        all
    }

    /// The step on a whole tensor, element by element in `f64`.
    fn whole(&self, name: &str, shape: &[usize]) -> Result<(Output, Output), FusionError> {
        let mut sources = vec![(&self.start, self.start.data(name, shape)?)];
        for (_, tensors) in &self.adapters {
            sources.push((tensors, tensors.data(name, shape)?));
        }
        if let Some(momentum) = &self.momentum {
            sources.push((momentum, momentum.data(name, shape)?));
        }
        let theta = self.coefficients(&self.theta);
        let velocity = self.coefficients(&self.velocity);
        let length = sources.first().map_or(0, |(_, data)| data.len());
        let mut new = vec![0; length];
        let mut moved = vec![0; length];
        let failures: Vec<Option<FusionError>> = new
            .par_chunks_mut(4 * CHUNK)
            .zip(moved.par_chunks_mut(4 * CHUNK))
            .enumerate()
            .map(|(index, (new, moved))| {
                let from = index * CHUNK;
                combine(name, &sources, &theta, from, new)
                    .and_then(|()| combine(name, &sources, &velocity, from, moved))
                    .err()
            })
            .collect();
        if let Some(failure) = failures.into_iter().flatten().next() {
            return Err(failure);
        }
        let output = |data| Output {
            name: name.to_owned(),
            shape: shape.to_vec(),
            data,
        };
        Ok((output(new), output(moved)))
    }
}

/// `out[i] = sum of coefficient x source[from + i]`, in the order of the sources.
#[expect(
    clippy::cast_possible_truncation,
    reason = "adapters are stored in f32; overflow is refused"
)]
fn combine(
    name: &str,
    sources: &[(&Tensors<'_>, &[u8])],
    coefficients: &[f64],
    from: usize,
    out: &mut [u8],
) -> Result<(), FusionError> {
    for (offset, to) in out.as_chunks_mut().0.iter_mut().enumerate() {
        let index = from + offset;
        let mut sum = 0.0;
        for ((tensors, data), coefficient) in sources.iter().zip(coefficients) {
            let value = f32::from_le_bytes(data.as_chunks().0[index]);
            if !value.is_finite() {
                return Err(tensors.error(name, TensorProblem::NotFinite(index)));
            }
            sum += coefficient * f64::from(value);
        }
        let value = sum as f32;
        if !value.is_finite() {
            return Err(FusionError::Overflow(name.to_owned()));
        }
        *to = value.to_le_bytes();
    }
    Ok(())
}
