//! The inputs of one merge, opened and checked: the start, the outer momentum, and the members in institution order.

use consilium_protocol::InstitutionId;
use consilium_protocol::manifest::Training;
use rayon::prelude::*;

use super::check::{AdapterLayout, same};
use super::defence::Gram;
use super::lowrank::Factors;
use super::merge::MergeInput;
use super::tensors::{A, B, Tensors, pieces};
use crate::fusion::error::{FusionError, Origin, TensorProblem};
use consilium_kernels::adapters::product::{self, gram};

pub(super) const VELOCITY_A: &str = ".velocity_A.weight";
pub(super) const VELOCITY_B: &str = ".velocity_B.weight";

pub(super) struct Member {
    pub(super) institution: InstitutionId,
    /// What its part gives it; the parts sum to one.
    pub(super) part: f64,
    pub(super) rank: usize,
    pub(super) tensors: Tensors,
}

pub(super) struct Round {
    pub(super) layout: AdapterLayout,
    pub(super) start: Tensors,
    pub(super) momentum: Option<Tensors>,
    /// Ascending by institution.
    pub(super) members: Vec<Member>,
    /// LoRA scale, alpha / rank, of all products.
    scale: f64,
}

/// Factors of one matrix.
pub(super) struct MatrixInputs {
    pub(super) previous: Factors,
    pub(super) members: Vec<Factors>,
    pub(super) velocity: Factors,
}

impl Round {
    pub(super) fn open(input: &MergeInput<'_>) -> Result<Self, FusionError> {
        let training = input.training;
        let start = Tensors::open_adapter(Origin::Start, input.start)?;
        let layout = AdapterLayout::of(training, &start)?;
        let momentum = input.momentum;
        let momentum = momentum.map(|content| Tensors::open_adapter(Origin::Momentum, content));
        let momentum = momentum.transpose()?;
        let mut sorted: Vec<_> = input.adapters.iter().collect();
        sorted.sort_by(|a, b| a.0.cmp(&b.0));
        if let Some(pair) = sorted.windows(2).find(|pair| pair[0].0 == pair[1].0) {
            return Err(FusionError::Twice(pair[0].0.clone()));
        }
        let total: u64 = sorted.iter().map(|(_, _, weight)| u64::from(*weight)).sum();
        if total == 0 {
            return Err(FusionError::Nothing);
        }
        let mut members = Vec::with_capacity(sorted.len());
        for (institution, content, weight) in sorted {
            let origin = Origin::Institution(institution.clone());
            let tensors = Tensors::open_adapter(origin, *content)?;
            members.push(Member {
                institution: institution.clone(),
                part: f64::from(*weight) / total as f64,
                rank: layout.check(training.merge, &tensors)?,
                tensors,
            });
        }
        let round = Self {
            layout,
            start,
            momentum,
            members,
            scale: scale(training),
        };
        round.check_frozen(training)?;
        Ok(round)
    }

    /// Where the rule keeps the start's A, everybody must have done so.
    fn check_frozen(&self, training: &Training) -> Result<(), FusionError> {
        if !training.merge.freezes_a() {
            return Ok(());
        }
        for member in &self.members {
            for layer in self.layout.matrices.keys() {
                same(&self.start, &member.tensors, &format!("{layer}{A}"))?;
            }
        }
        Ok(())
    }

    /// Factors of one matrix, of the members with these indices.
    pub(super) fn matrix(
        &self,
        layer: &str,
        shape: [usize; 2],
        members: &[usize],
    ) -> Result<MatrixInputs, FusionError> {
        let [rows, columns] = shape;
        let read = |tensors: &Tensors, rank: usize| {
            Ok::<_, FusionError>(Factors {
                b: tensors.matrix(&format!("{layer}{B}"), [rows, rank], false)?,
                at: tensors.matrix(&format!("{layer}{A}"), [rank, columns], true)?,
            })
        };
        let velocity = match &self.momentum {
            Some(momentum) => read_velocity(momentum, layer, shape)?,
            None => Factors::zero(shape, 0),
        };
        Ok(MatrixInputs {
            previous: read(&self.start, self.layout.rank)?,
            members: members
                .iter()
                .filter_map(|&index| self.members.get(index))
                .map(|member| read(&member.tensors, member.rank))
                .collect::<Result<_, FusionError>>()?,
            velocity,
        })
    }

    /// Inner products of all updates. Reads every adapter once, a few matrices or pieces at a time.
    pub(super) fn gram(&self) -> Result<Gram, FusionError> {
        let members = self.members.len();
        let mut sums = vec![0.0; members * members];
        let mut add = |parts: Vec<Result<Vec<f64>, FusionError>>| {
            for part in parts {
                for (sum, value) in sums.iter_mut().zip(part?) {
                    *sum += value;
                }
            }
            Ok::<_, FusionError>(())
        };
        let at_once = rayon::current_num_threads();
        let matrices: Vec<_> = self.layout.matrices.iter().collect();
        for batch in matrices.chunks(at_once) {
            let parts = batch.into_par_iter();
            add(parts
                .map(|(layer, shape)| self.gram_of_matrix(layer, **shape))
                .collect())?;
        }
        for (name, shape) in &self.layout.whole {
            let pieces: Vec<_> = pieces(shape).collect();
            for batch in pieces.chunks(at_once) {
                let parts = batch.into_par_iter();
                add(parts
                    .map(|piece| self.gram_of_piece(name, piece.clone()))
                    .collect())?;
            }
        }
        Gram::new(members, sums)
            .ok_or_else(|| FusionError::Overflow("all of the adapters".to_owned()))
    }

    /// `<theta_i - theta_0, theta_j - theta_0>` from the inner products of the products.
    fn gram_of_matrix(
        &self,
        layer: &str,
        [rows, columns]: [usize; 2],
    ) -> Result<Vec<f64>, FusionError> {
        let read = |tensors: &Tensors, rank: usize| {
            let b = tensors.values(&format!("{layer}{B}"), 0..rows * rank)?;
            let a = tensors.values(&format!("{layer}{A}"), 0..rank * columns)?;
            Ok::<_, FusionError>((b, a, rank))
        };
        let mut owned = vec![read(&self.start, self.layout.rank)?];
        for member in &self.members {
            owned.push(read(&member.tensors, member.rank)?);
        }
        let factors: Vec<product::Factors<'_, f32>> = owned
            .iter()
            .map(|(b, a, rank)| product::Factors {
                b,
                a,
                rank: *rank,
                scale: self.scale,
            })
            .collect();
        let all = gram(&factors, rows, columns).map_err(|source| FusionError::Entries {
            tensor: layer.to_owned(),
            source,
        })?;
        let n = factors.len();
        let at = |i: usize, j: usize| all[i * n + j];
        let update = |i: usize, j: usize| at(i, j) - at(i, 0) - at(0, j) + at(0, 0);
        Ok((1..n)
            .flat_map(|i| (1..n).map(move |j| (i.min(j), i.max(j))))
            .map(|(i, j)| update(i, j))
            .collect())
    }

    fn gram_of_piece(
        &self,
        name: &str,
        piece: std::ops::Range<usize>,
    ) -> Result<Vec<f64>, FusionError> {
        let start = self.start.values(name, piece.clone())?;
        let updates = self
            .members
            .iter()
            .map(|member| {
                let values = member.tensors.values(name, piece.clone())?;
                let updates = values.iter().zip(&start);
                Ok(updates
                    .map(|(x, before)| f64::from(*x) - f64::from(*before))
                    .collect())
            })
            .collect::<Result<Vec<Vec<f64>>, FusionError>>()?;
        let inner = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>();
        Ok(updates
            .iter()
            .flat_map(|a| updates.iter().map(|b| inner(a, b)))
            .collect())
    }
}

fn scale(training: &Training) -> f64 {
    f64::from(training.alpha) / f64::from(training.rank.max(1))
}

fn read_velocity(
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
