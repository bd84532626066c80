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

use std::fs::File;
use std::path::Path;

use consilium_protocol::InstitutionId;
use consilium_protocol::manifest::Training;
use rayon::prelude::*;

use super::check::AdapterLayout;
use super::lowrank::{Factors, Stack, Truncated, align};
use super::output::Output;
use super::tensors::{A, B, Tensors, pieces};
use crate::fusion::error::{FusionError, Origin, TensorProblem};

const VELOCITY_A: &str = ".velocity_A.weight";
const VELOCITY_B: &str = ".velocity_B.weight";
/// Rank of the outer momentum in units of the adapter's rank.
const VELOCITY_RANK: usize = 4;

/// One inner round. All files are `adapter_model.safetensors` files or of that form.
#[derive(Debug, Clone, Copy)]
pub struct MergeInput<'a> {
    /// Rank and outer optimiser.
    pub training: &'a Training,
    /// The adapter that the nodes started from.
    pub start: &'a Path,
    /// Outer optimiser's state after the previous inner round; `None` in the first.
    pub momentum: Option<&'a Path>,
    /// Trained adapters with their weights, in any order.
    pub adapters: &'a [(InstitutionId, &'a Path, u32)],
}

/// Empty files for what an inner round ends with.
#[derive(Debug, Clone, Copy)]
pub struct MergeOutput<'a> {
    /// `adapter_model.safetensors` that the next inner round starts from.
    pub adapter: &'a File,
    /// Outer optimiser's state for the next inner round.
    pub momentum: &'a File,
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

/// Merges the adapters of one inner round and says what recompression lost.
///
/// Writes the same bytes for any order of `adapters` and any number of threads. In memory are the factors of one matrix for
/// each thread, of all adapters, or one piece of a whole tensor: never an adapter.
///
/// # Errors
/// A contribution that lacks a tensor, has one too many, or one of the wrong type, shape or with values that are not
/// finite; the error names contribution and tensor. Or a file that cannot be read or written.
pub fn merge(input: MergeInput<'_>, output: MergeOutput<'_>) -> Result<Truncation, FusionError> {
    let round = Round::new(&input)?;
    let mut adapter = Output::begin(output.adapter, round.shapes(A, B, round.layout.rank))?;
    let most = VELOCITY_RANK * round.layout.rank;
    let velocities = round.shapes(VELOCITY_A, VELOCITY_B, most);
    let mut momentum = Output::begin(output.momentum, velocities)?;
    let matrices: Vec<_> = round.layout.matrices.iter().collect();
    let mut truncations = Vec::with_capacity(matrices.len());
    for batch in matrices.chunks(rayon::current_num_threads()) {
        let merged: Vec<Result<_, FusionError>> = batch
            .into_par_iter()
            .map(|(layer, shape)| round.matrix(layer, **shape))
            .collect();
        for ((layer, _), matrix) in batch.iter().zip(merged) {
            let matrix = matrix?;
            adapter.matrix(&format!("{layer}{A}"), &matrix.new.at, true)?;
            adapter.matrix(&format!("{layer}{B}"), &matrix.new.b, false)?;
            momentum.matrix(&format!("{layer}{VELOCITY_A}"), &matrix.velocity.v, true)?;
            momentum.matrix(&format!("{layer}{VELOCITY_B}"), &matrix.velocity.us, false)?;
            truncations.push(MatrixTruncation {
                layer: (*layer).clone(),
                product: matrix.lost,
                velocity: matrix.velocity.error,
            });
        }
    }
    for (name, shape) in &round.layout.whole {
        round.whole(name, shape, &mut adapter, &mut momentum)?;
    }
    adapter.finish()?;
    momentum.finish()?;
    Ok(Truncation::of(truncations))
}

/// Coefficients of theta_prev, of the mean and of v in a sum.
struct Step {
    previous: f64,
    mean: f64,
    velocity: f64,
}

/// One matrix after the step.
struct MergedMatrix {
    new: Factors,
    velocity: Truncated,
    /// Truncation error of the product.
    lost: f64,
}

struct Round {
    layout: AdapterLayout,
    start: Tensors,
    momentum: Option<Tensors>,
    /// Ascending by institution, shares sum to one.
    adapters: Vec<(f64, Tensors)>,
    theta: Step,
    velocity: Step,
}

impl Round {
    fn new(input: &MergeInput<'_>) -> Result<Self, FusionError> {
        let start = Tensors::open_adapter(Origin::Start, input.start)?;
        let layout = AdapterLayout::of(input.training, &start)?;
        let momentum = input
            .momentum
            .map(|path| Tensors::open_adapter(Origin::Momentum, path))
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
        for (institution, path, weight) in sorted {
            let origin = Origin::Institution(institution.clone());
            let tensors = Tensors::open_adapter(origin, path)?;
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

    /// All tensors of a file whose factors have these endings, with the largest shapes that they can have.
    fn shapes(&self, a: &str, b: &str, most: usize) -> Vec<(String, Vec<usize>)> {
        let factors = self
            .layout
            .matrices
            .iter()
            .flat_map(|(layer, &[rows, columns])| {
                [
                    (format!("{layer}{a}"), vec![most, columns]),
                    (format!("{layer}{b}"), vec![rows, most]),
                ]
            });
        let whole = self.layout.whole.iter();
        let whole = whole.map(|(name, shape)| (name.clone(), shape.clone()));
        factors.chain(whole).collect()
    }

    fn matrix(
        &self,
        layer: &str,
        [rows, columns]: [usize; 2],
    ) -> Result<MergedMatrix, FusionError> {
        let rank = self.layout.rank;
        let read = |tensors: &Tensors, a: &str, b: &str, r: usize| {
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
        Ok(MergedMatrix {
            new,
            velocity: moved,
            lost: product.error,
        })
    }

    fn read_velocity(
        &self,
        momentum: &Tensors,
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
    fn whole(
        &self,
        name: &str,
        shape: &[usize],
        adapter: &mut Output<'_>,
        momentum: &mut Output<'_>,
    ) -> Result<(), FusionError> {
        let mut sources = vec![&self.start];
        sources.extend(self.adapters.iter().map(|(_, tensors)| tensors));
        sources.extend(&self.momentum);
        for source in &sources {
            source.expect(name, shape)?;
        }
        let theta = self.coefficients(&self.theta);
        let velocity = self.coefficients(&self.velocity);
        let places = [adapter.place(name, shape), momentum.place(name, shape)];
        let (adapter, momentum) = (&*adapter, &*momentum);
        let pieces: Vec<_> = pieces(shape).collect();
        let failures: Vec<Option<FusionError>> = pieces
            .into_par_iter()
            .map(|piece| {
                let step = || {
                    let values = sources
                        .iter()
                        .map(|source| source.values(name, piece.clone()))
                        .collect::<Result<Vec<_>, _>>()?;
                    adapter.write(places[0], piece.start, &combine(name, &values, &theta)?)?;
                    momentum.write(places[1], piece.start, &combine(name, &values, &velocity)?)
                };
                step().err()
            })
            .collect();
        failures.into_iter().flatten().next().map_or(Ok(()), Err)
    }
}

/// Sums of coefficient x source, element by element, in the order of the sources.
#[expect(
    clippy::cast_possible_truncation,
    reason = "adapters are stored in f32; overflow is refused"
)]
fn combine(
    name: &str,
    sources: &[Vec<f32>],
    coefficients: &[f64],
) -> Result<Vec<f32>, FusionError> {
    let mut sums = vec![0.0; sources.first().map_or(0, Vec::len)];
    for (source, coefficient) in sources.iter().zip(coefficients) {
        for (sum, &value) in sums.iter_mut().zip(source) {
            *sum += coefficient * f64::from(value);
        }
    }
    let sums: Vec<f32> = sums.into_iter().map(|sum| sum as f32).collect();
    if sums.iter().all(|sum| sum.is_finite()) {
        Ok(sums)
    } else {
        Err(FusionError::Overflow(name.to_owned()))
    }
}
