//! The graph term of InfiGFusion (arXiv 2505.13893): how the largest logits move together over an item.
//!
//! With `d_t` the K largest logits of row t, in descending order, less the largest and divided by
//! their (population) deviation plus 0.001, the K places are the nodes of a graph whose edges are
//! `C = (1/T) sum_t d_t d_t^T`; the feature of a node is the mean of its edges, `f_i = (1/K) sum_j
//! C_ij`. The loss is `sum_i |f_(i) - f'_(i)|` between the features of both models, each sorted: the
//! first lower bound of the Gromov-Wasserstein distance of the two graphs (Mémoli), so zero does not
//! mean equal graphs. Both are means over positions, which therefore need no alignment, and nothing
//! K x K is formed: `f_i = (1/KT) sum_t d_ti S_t` with `S_t = sum_j d_tj`.
//!
//! What the authors did to the logits before is not public. Z-scores would not do: they sum to zero at
//! every position, and with them every feature. Differences to the largest do not change with a
//! constant either, and the deviation takes the scale of a model out.
//!
//! Gradient, with `s_i` the sign of the difference at the place of node i:
//! `df/dd_ti = (1/KT) (s_i S_t + sum_n s_n d_tn)`, then through the deviation. Which columns are the
//! largest is held fixed.

use super::{EPSILON, check_length, slope};
use crate::error::LossError;

/// Loss in nats-free units, and its gradient in each of the student's logits `[T, K]`.
///
/// `student` and `teacher` hold the K largest logits of each row in descending order, `[T, K]` and
/// `[T', K]`; log-probabilities will do, which are logits less a constant. Without rows on one side
/// the loss is zero.
///
/// # Errors
/// Where `k` is zero or does not divide a length, or a logit is not finite.
pub fn graph(student: &[f32], teacher: &[f32], k: usize) -> Result<(f64, Vec<f32>), LossError> {
    let ours = Features::of("student's logits", student, k)?;
    let theirs = Features::of("teacher's logits", teacher, k)?;
    if ours.rows.is_empty() || theirs.rows.is_empty() {
        return Ok((0.0, vec![0.0; student.len()]));
    }
    let (order, other) = (descending(&ours.values), descending(&theirs.values));
    let mut signs = vec![0.0; k];
    let mut loss = 0.0;
    for (&node, &theirs_at) in order.iter().zip(&other) {
        let (f, target) = (ours.values[node], theirs.values[theirs_at]);
        loss += (f - target).abs();
        // Features may be negative; the margin of equality is one of magnitudes.
        signs[node] = if f.is_sign_negative() == target.is_sign_negative() {
            f.signum() * slope(f.abs(), target.abs())
        } else {
            (f - target).signum()
        };
    }
    let mut slopes = Vec::with_capacity(student.len());
    let scale = 1.0 / (k as f64 * ours.rows.len() as f64);
    for row in &ours.rows {
        slopes.extend(row.slopes(&signs, scale));
    }
    Ok((loss, slopes))
}

/// The rows of one model and the features of the nodes.
struct Features {
    rows: Vec<Row>,
    values: Vec<f64>,
}

/// One row's logits, standardised.
struct Row {
    /// z-scores.
    scores: Vec<f64>,
    /// z-scores less the largest.
    differences: Vec<f64>,
    deviation: f64,
}

impl Features {
    fn of(what: &'static str, logits: &[f32], k: usize) -> Result<Self, LossError> {
        let rows = logits.len().checked_div(k).unwrap_or(0);
        check_length(what, logits.len(), rows * k)?;
        if let Some(at) = logits.iter().position(|logit| !logit.is_finite()) {
            let (row, column) = (at / k, at % k);
            return Err(LossError::NotFinite { row, column });
        }
        let rows: Vec<Row> = logits.chunks_exact(k.max(1)).map(Row::of).collect();
        let mut values = vec![0.0; k];
        let scale = 1.0 / (k as f64 * rows.len().max(1) as f64);
        for row in &rows {
            let sum: f64 = row.differences.iter().sum();
            for (value, difference) in values.iter_mut().zip(&row.differences) {
                *value += scale * difference * sum;
            }
        }
        Ok(Self { rows, values })
    }
}

impl Row {
    fn of(logits: &[f32]) -> Self {
        let logits: Vec<f64> = logits.iter().copied().map(f64::from).collect();
        let count = logits.len().max(1) as f64;
        let mean = logits.iter().sum::<f64>() / count;
        let squares = logits.iter().map(|logit| (logit - mean).powi(2));
        let deviation = (squares.sum::<f64>() / count).sqrt();
        let scores: Vec<f64> = logits
            .iter()
            .map(|logit| (logit - mean) / (deviation + EPSILON))
            .collect();
        let largest = scores.first().copied().unwrap_or_default();
        let differences = scores.iter().map(|score| score - largest).collect();
        Self {
            scores,
            differences,
            deviation,
        }
    }

    /// Slope of the loss in each logit of the row.
    #[expect(clippy::cast_possible_truncation, reason = "gradients are f32")]
    fn slopes(&self, signs: &[f64], scale: f64) -> Vec<f32> {
        let sum: f64 = self.differences.iter().sum();
        let pairs = signs.iter().zip(&self.differences);
        let pull: f64 = pairs.map(|(sign, difference)| sign * difference).sum();
        let mut slopes: Vec<f64> = signs
            .iter()
            .map(|sign| scale * (sign * sum + pull))
            .collect();
        // Of the differences, then of the z-scores: all differences hang on the largest.
        let all: f64 = slopes.iter().sum();
        if let Some(first) = slopes.first_mut() {
            *first -= all;
        }
        let count = slopes.len().max(1) as f64;
        let product: f64 = slopes.iter().zip(&self.scores).map(|(a, b)| a * b).sum();
        let spread = if self.deviation > 0.0 {
            product / count / self.deviation
        } else {
            0.0
        };
        slopes
            .iter()
            .zip(&self.scores)
            .map(|(slope, score)| (slope / (self.deviation + EPSILON) - score * spread) as f32)
            .collect()
    }
}

/// Places, the largest value first, the earlier place on a tie.
fn descending(values: &[f64]) -> Vec<usize> {
    let mut order: Vec<usize> = (0..values.len()).collect();
    order.sort_by(|&a, &b| values[b].total_cmp(&values[a]));
    order
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::Random;

    fn rows(random: &mut Random, rows: usize, k: usize) -> Vec<f32> {
        let mut logits = Vec::new();
        for _ in 0..rows {
            let mut row = random.logits(k, 3.0);
            row.sort_unstable_by(|a, b| b.total_cmp(a));
            logits.extend(row);
        }
        logits
    }

    /// The definition, with C formed.
    fn by_hand(student: &[f32], teacher: &[f32], k: usize) -> f64 {
        let features = |logits: &[f32]| {
            let mut edges = vec![vec![0.0; k]; k];
            let count = (logits.len() / k) as f64;
            for row in logits.chunks_exact(k) {
                let row: Vec<f64> = row.iter().copied().map(f64::from).collect();
                let mean = row.iter().sum::<f64>() / k as f64;
                let variance = row.iter().map(|l| (l - mean) * (l - mean)).sum::<f64>() / k as f64;
                let d: Vec<f64> = row
                    .iter()
                    .map(|l| (l - row[0]) / (variance.sqrt() + 1e-3))
                    .collect();
                for i in 0..k {
                    for j in 0..k {
                        edges[i][j] += d[i] * d[j] / count;
                    }
                }
            }
            let mut features: Vec<f64> = edges
                .iter()
                .map(|row| row.iter().sum::<f64>() / k as f64)
                .collect();
            features.sort_by(|a, b| b.total_cmp(a));
            features
        };
        let pairs = features(student).into_iter().zip(features(teacher));
        pairs.map(|(a, b)| (a - b).abs()).sum()
    }

    #[test]
    fn the_loss_is_the_definition_and_the_gradient_its_finite_differences() {
        let mut random = Random(7);
        for (k, ours, theirs) in [(2, 1, 1), (4, 3, 5), (10, 7, 4), (1, 3, 3)] {
            let student = rows(&mut random, ours, k);
            let teacher = rows(&mut random, theirs, k);
            let (loss, slopes) = graph(&student, &teacher, k).unwrap();
            assert!((loss - by_hand(&student, &teacher, k)).abs() < 1e-9, "{k}");
            let step = 2e-3_f32;
            for at in 0..student.len() {
                let moved = |by: f32| {
                    let mut student = student.clone();
                    student[at] += by;
                    by_hand(&student, &teacher, k)
                };
                let slope = (moved(step) - moved(-step)) / f64::from(2.0 * step);
                let got = f64::from(slopes[at]);
                assert!(
                    (slope - got).abs() < 2e-3 * (1.0 + got.abs()),
                    "k {k}, logit {at}: {got}, by differences {slope}"
                );
            }
        }
    }

    #[test]
    fn a_constant_or_a_scale_of_either_model_changes_nothing_and_one_against_itself_is_zero() {
        let mut random = Random(8);
        let (k, student) = (6, rows(&mut random, 5, 6));
        let teacher = rows(&mut random, 3, k);
        let (loss, _) = graph(&student, &teacher, k).unwrap();
        assert!(loss > 0.1);
        let moved: Vec<f32> = teacher.iter().map(|logit| 4.0 * logit + 7.0).collect();
        let (same, _) = graph(&student, &moved, k).unwrap();
        assert!((loss - same).abs() < 1e-2 * loss, "{loss} and {same}");
        let (none, slopes) = graph(&student, &student, k).unwrap();
        assert_eq!(none.to_bits(), 0.0_f64.to_bits());
        assert!(slopes.iter().all(|slope| slope.to_bits() << 1 == 0));
    }

    #[test]
    fn what_is_no_matrix_or_not_finite_is_refused() {
        assert!(graph(&[1.0, 0.0, 3.0], &[1.0, 0.0], 2).is_err());
        assert!(graph(&[1.0], &[], 0).is_err());
        let bad = LossError::NotFinite { row: 1, column: 0 };
        assert_eq!(
            graph(&[1.0, 0.0, f32::NAN, 0.0], &[1.0, 0.0], 2).unwrap_err(),
            bad
        );
        let (loss, slopes) = graph(&[1.0, 0.0], &[], 2).unwrap();
        assert_eq!((loss.to_bits(), slopes), (0, vec![0.0, 0.0]));
    }
}
