//! The merge of an inner round: what protects it, the rule, the outer step, matrix by matrix.
//!
//! Rules stand in `rules` (products and factors) and `entries` (entry by entry), defences in `defence`. Modules that are trained
//! whole take the same rule on full tensors, with the same shares and scales.

use consilium_protocol::InstitutionId;
use consilium_protocol::manifest::{Defence, Training};
use rayon::prelude::*;

use super::defence::{Exclusion, Gram, Vote, Votes, defend};
use super::entries::Updates;
use super::output::{MemoryFile, Output, Sink};
use super::report::{MatrixTruncation, MemberReport, MergeReport, Truncation};
use super::round::{Round, VELOCITY_A, VELOCITY_B};
use super::rules::{Merger, VELOCITY_RANK};
use super::tensors::{A, B, Content, pieces};
use crate::fusion::error::FusionError;

/// One inner round. All contents are `adapter_model.safetensors` files or of that form.
#[derive(Debug, Clone, Copy)]
pub struct MergeInput<'a> {
    /// Rank, outer optimiser, merge rule and defence.
    pub training: &'a Training,
    /// Seed of what DARE drops: another for each inner round.
    pub seed: u64,
    /// The adapter that the nodes started from.
    pub start: Content<'a>,
    /// Outer optimiser's state after the previous inner round; `None` in the first.
    pub momentum: Option<Content<'a>>,
    /// Trained adapters with their weights, in any order.
    pub adapters: &'a [(InstitutionId, Content<'a>, u32)],
}

/// Empty files for what an inner round ends with.
#[derive(Clone, Copy)]
#[expect(missing_debug_implementations, reason = "a sink shows nothing")]
pub struct MergeOutput<'a> {
    /// `adapter_model.safetensors` that the next inner round starts from.
    pub adapter: &'a dyn Sink,
    /// Outer optimiser's state for the next inner round.
    pub momentum: &'a dyn Sink,
}

/// A merge in memory.
#[derive(Debug, Clone, PartialEq)]
pub struct Merged {
    /// `adapter_model.safetensors`.
    pub adapter: Vec<u8>,
    /// Outer optimiser's state.
    pub momentum: Vec<u8>,
    /// What went in and what was lost.
    pub report: MergeReport,
}

/// [`merge`] into memory.
///
/// # Errors
/// As [`merge`].
pub fn merge_in_memory(input: MergeInput<'_>) -> Result<Merged, FusionError> {
    let [adapter, momentum] = [MemoryFile::default(), MemoryFile::default()];
    let output = MergeOutput {
        adapter: &adapter,
        momentum: &momentum,
    };
    let report = merge(input, output)?;
    Ok(Merged {
        adapter: adapter.into_bytes(),
        momentum: momentum.into_bytes(),
        report,
    })
}

/// Merges the adapters of one inner round by the manifest's rule and defence, and says what went in and what was lost.
///
/// Writes the same bytes for any order of `adapters` and any number of threads. In memory are the factors of one matrix for
/// each thread, of all adapters, with blocks of rows of their products where the rule decides entry by entry, or one piece
/// of a whole tensor: never an adapter, never a product.
///
/// # Errors
/// A contribution that lacks a tensor, has one too many, or one of the wrong type, shape, rank or with values that are not
/// finite; the error names contribution and tensor. Or a file that cannot be read or written.
pub fn merge(input: MergeInput<'_>, output: MergeOutput<'_>) -> Result<MergeReport, FusionError> {
    let round = Round::open(&input)?;
    let gram = round.gram()?;
    let parts: Vec<f64> = round.members.iter().map(|member| member.part).collect();
    let training = input.training;
    let votes = defend(training.defence, training.merge, &gram, &parts);
    let merger = Merger::new(&round, training, &votes, input.seed);
    let mut adapter = Output::begin(output.adapter, round.shapes(A, B, merger.rank()))?;
    let most = VELOCITY_RANK * round.layout.rank;
    let velocities = round.shapes(VELOCITY_A, VELOCITY_B, most);
    let mut momentum = Output::begin(output.momentum, velocities)?;
    let matrices: Vec<_> = round.layout.matrices.iter().collect();
    let mut truncations = Vec::with_capacity(matrices.len());
    let mut bias: Option<[f64; 2]> = None;
    for batch in matrices.chunks(rayon::current_num_threads()) {
        let merged: Vec<Result<_, FusionError>> = batch
            .into_par_iter()
            .map(|(layer, shape)| merger.matrix(layer, **shape))
            .collect();
        for ((layer, _), matrix) in batch.iter().zip(merged) {
            let matrix = matrix?;
            adapter.matrix(&format!("{layer}{A}"), &matrix.new.at, true)?;
            adapter.matrix(&format!("{layer}{B}"), &matrix.new.b, false)?;
            momentum.matrix(&format!("{layer}{VELOCITY_A}"), &matrix.velocity.at, true)?;
            momentum.matrix(&format!("{layer}{VELOCITY_B}"), &matrix.velocity.b, false)?;
            if let Some([difference, all]) = matrix.bias {
                let [differences, norms] = bias.unwrap_or_default();
                bias = Some([differences.hypot(difference), norms.hypot(all)]);
            }
            truncations.push(MatrixTruncation {
                layer: (*layer).clone(),
                product: matrix.lost[0],
                velocity: matrix.lost[1],
                bias: matrix.bias.map(relative),
            });
        }
    }
    for (name, shape) in &round.layout.whole {
        whole(&merger, name, shape, &mut adapter, &mut momentum)?;
    }
    adapter.finish()?;
    momentum.finish()?;
    let truncation = Truncation::of(truncations);
    let report = report(&round, training, &gram, &votes);
    Ok(MergeReport {
        bias: bias.map(relative),
        truncation,
        ..report
    })
}

fn relative([difference, all]: [f64; 2]) -> f64 {
    if all > 0.0 { difference / all } else { 0.0 }
}

impl Round {
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
}

/// The step on a whole tensor, element by element in `f64`.
fn whole(
    merger: &Merger<'_>,
    name: &str,
    shape: &[usize],
    adapter: &mut Output<'_>,
    momentum: &mut Output<'_>,
) -> Result<(), FusionError> {
    let round = merger.round;
    if let Some(momentum) = &round.momentum {
        momentum.expect(name, shape)?;
    }
    let updates = PieceUpdates {
        merger,
        name,
        pieces: pieces(shape).collect(),
    };
    let rule = match merger.entry_rule() {
        Some(rule) if !updates.pieces.is_empty() => {
            let (weights, names) = (merger.entry_weights(), merger.entry_names(name));
            Some(rule.prepare(&weights, &names, &updates)?)
        }
        _ => None,
    };
    let places = [adapter.place(name, shape), momentum.place(name, shape)];
    let (adapter, momentum) = (&*adapter, &*momentum);
    let step = |(index, piece): (usize, &std::ops::Range<usize>)| -> Result<(), FusionError> {
        let mut sources = vec![round.start.values(name, piece.clone())?];
        let [theta, velocity] = if let Some(rule) = &rule {
            let (start, chunk) = updates.chunk(index)?;
            let mut update = rule.merge(start, chunk, name)?;
            scale(&mut update, merger.entry_gain());
            sources.push(update);
            merger.outer.of_update()
        } else {
            for member in merger.members() {
                sources.push(member.tensors.values(name, piece.clone())?);
            }
            let c = merger.coefficients();
            [merger.outer.theta(&c), merger.outer.velocity(&c)]
        };
        if let Some(momentum) = &round.momentum {
            sources.push(momentum.values(name, piece.clone())?);
        }
        adapter.write(places[0], piece.start, &combine(name, &sources, &theta)?)?;
        momentum.write(places[1], piece.start, &combine(name, &sources, &velocity)?)
    };
    let failures: Vec<Option<FusionError>> = updates
        .pieces
        .par_iter()
        .enumerate()
        .map(|piece| step(piece).err())
        .collect();
    failures.into_iter().flatten().next().map_or(Ok(()), Err)
}

impl<'a> Merger<'a> {
    fn members(&self) -> impl Iterator<Item = &'a super::round::Member> + use<'_, 'a> {
        self.voters
            .iter()
            .filter_map(|&index| self.round.members.get(index))
    }
}

/// Updates of a whole tensor, piece by piece.
struct PieceUpdates<'a> {
    merger: &'a Merger<'a>,
    name: &'a str,
    pieces: Vec<std::ops::Range<usize>>,
}

impl Updates for PieceUpdates<'_> {
    fn chunks(&self) -> usize {
        self.pieces.len()
    }

    #[expect(
        clippy::cast_possible_truncation,
        reason = "what does not fit f32 becomes infinite and is refused by the rule"
    )]
    fn chunk(&self, index: usize) -> Result<(usize, Vec<Vec<f32>>), FusionError> {
        let piece = self.pieces.get(index).cloned().unwrap_or_default();
        let start = self.merger.round.start.values(self.name, piece.clone())?;
        let members = self.merger.members().zip(&self.merger.scales);
        let updates = members.map(|(member, scale)| {
            let values = member.tensors.values(self.name, piece.clone())?;
            let update = |(x, before): (&f32, &f32)| scale * (f64::from(*x) - f64::from(*before));
            Ok(values
                .iter()
                .zip(&start)
                .map(|pair| update(pair) as f32)
                .collect())
        });
        Ok((piece.start, updates.collect::<Result<_, FusionError>>()?))
    }
}

#[expect(
    clippy::cast_possible_truncation,
    reason = "what does not fit f32 becomes infinite and is refused when it is added"
)]
fn scale(values: &mut [f32], by: f64) {
    for value in values {
        *value = (f64::from(*value) * by) as f32;
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

/// Members, norms and cosines; what was lost is not known yet.
fn report(round: &Round, training: &Training, gram: &Gram, votes: &Votes) -> MergeReport {
    let institution = |index: usize| round.members.get(index).map(|m| m.institution.as_str());
    let words = |exclusion: Exclusion| match exclusion {
        Exclusion::NoUpdate => "no update: the adapter is the start's".to_owned(),
        Exclusion::CopyOf(index) => {
            format!(
                "the same update as {}",
                institution(index).unwrap_or("another")
            )
        }
        Exclusion::FarFromOthers => "far from the others (multi-Krum)".to_owned(),
    };
    let everybody: Vec<usize> = (0..round.members.len()).collect();
    let flags = gram.suspects().into_iter().zip(gram.alike(&everybody));
    let members = round.members.iter().zip(&votes.votes).zip(flags);
    let describe = |(index, ((member, vote), (suspect, alike))): (
        usize,
        ((&super::round::Member, &Vote), _),
    )| {
        let (suspect, alike): (Option<Exclusion>, Vec<usize>) = (suspect, alike);
        let of_one_text = || {
            let names: Vec<_> = alike
                .iter()
                .filter_map(|&index| institution(index))
                .collect();
            (!names.is_empty()).then(|| format!("nearly the direction of {}", names.join(", ")))
        };
        MemberReport {
            institution: member.institution.clone(),
            rank: member.rank,
            part: member.part,
            share: vote.share,
            scale: vote.scale,
            norm: gram.norm(index),
            flag: suspect.map(words).or_else(of_one_text),
            excluded: vote.excluded.map(words),
        }
    };
    let n = round.members.len();
    MergeReport {
        rule: training.merge.name(),
        defence: training.defence.name(),
        trimmed: if training.defence == Defence::None {
            0
        } else {
            votes.trimmed
        },
        members: members.enumerate().map(describe).collect(),
        cosines: (0..n * n).map(|i| gram.cosine(i / n, i % n)).collect(),
        bias: None,
        truncation: Truncation::of(Vec::new()),
    }
}
