//! Sorted terms of one row: what is compared with the largest logits of the student.

use crate::loss::probability;
use crate::records::RecordView;

/// Added to the deviation of logits, in nats. Codes resolve 1/16 bit, so a spread far below that says
/// nothing; without it the slopes of a flat row have no bound.
pub(crate) const EPSILON: f64 = 1e-3;

/// Shares that differ by less, relative to the target's, are equal: the slope of their distance is
/// zero.
pub(crate) const EQUAL: f64 = 1e-9;

/// What the fast paths find of a share is off by less, relative to it.
const UNCLEAR: f64 = 4e-6;

/// A sorted term at one row.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Sorted {
    /// The target's shares, largest first; as many of the student's logits count.
    pub(crate) target: Vec<f64>,
    pub(crate) measure: Measure,
    pub(crate) weight: f64,
}

/// What is compared.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Measure {
    /// Probabilities; all that is not among the largest is one more, with this target.
    Probability { rest: f64 },
    /// The softmax over the largest logits, standardised.
    Standardised { temperature: f64 },
}

impl Sorted {
    /// `None` where the target has no mass.
    pub(crate) fn probability(
        target: &RecordView<'_, u32>,
        position: usize,
        weight: f32,
    ) -> Option<Self> {
        let listed = target.listed(position).map(|(_, code)| probability(code));
        let mut shares: Vec<f64> = listed.collect();
        let rest = probability(target.tail()[position]);
        let total = shares.iter().sum::<f64>() + rest;
        if total <= 0.0 {
            return None;
        }
        shares.sort_unstable_by(|a, b| b.total_cmp(a));
        shares.iter_mut().for_each(|share| *share /= total);
        let rest = rest / total;
        Some(Self {
            target: shares,
            measure: Measure::Probability { rest },
            weight: f64::from(weight),
        })
    }

    /// For a student of `live` tokens, which may have fewer than the target lists.
    pub(crate) fn standardised(
        target: &RecordView<'_, u32>,
        position: usize,
        weight: f32,
        temperature: f32,
        live: usize,
    ) -> Self {
        let temperature = f64::from(temperature);
        let mut codes: Vec<u8> = target.listed(position).map(|(_, code)| code).collect();
        codes.sort_unstable();
        codes.truncate(live);
        let nats = std::f64::consts::LN_2 / 16.0;
        let logits: Vec<f64> = codes.iter().map(|&code| -nats * f64::from(code)).collect();
        Self {
            target: Standard::of(&logits, temperature).shares,
            measure: Measure::Standardised { temperature },
            weight: f64::from(weight),
        }
    }

    /// Whether the slope of a share's distance hangs on less than a fast path can tell. A share of
    /// nearly nothing or nearly all moves no logit, whatever its slope.
    pub(crate) fn is_unclear(share: f64, target: f64) -> bool {
        (share - target).abs() <= UNCLEAR * target && share * (1.0 - share) > UNCLEAR / 4.0
    }

    /// Distance of the student's largest logits, in descending order, from a standardised target,
    /// and its slope in each.
    pub(crate) fn standardised_loss(&self, logits: &[f64], temperature: f64) -> (f64, Vec<f64>) {
        let Standard {
            values,
            deviation,
            shares,
        } = Standard::of(logits, temperature);
        let pairs = || shares.iter().zip(&self.target);
        let distance = pairs().map(|(share, target)| (share - target).abs()).sum();
        let pull: f64 = pairs().map(|(p, target)| p * slope(*p, *target)).sum();
        let mut slopes: Vec<f64> = pairs()
            .map(|(p, target)| p * (slope(*p, *target) - pull) / temperature)
            .collect();
        let count = slopes.len().max(1) as f64;
        let mean = slopes.iter().sum::<f64>() / count;
        let product: f64 = slopes.iter().zip(&values).map(|(a, b)| a * b).sum();
        let spread = if deviation > 0.0 {
            product / count / deviation
        } else {
            0.0
        };
        for (slope, value) in slopes.iter_mut().zip(&values) {
            *slope = (*slope - mean) / (deviation + EPSILON) - value * spread;
        }
        (distance, slopes)
    }
}

/// Slope of the distance of a share from its target: a sign.
pub(crate) fn slope(share: f64, target: f64) -> f64 {
    if (share - target).abs() <= EQUAL * target {
        0.0
    } else {
        (share - target).signum()
    }
}

/// Logits standardised, and their softmax.
struct Standard {
    values: Vec<f64>,
    deviation: f64,
    shares: Vec<f64>,
}

impl Standard {
    fn of(logits: &[f64], temperature: f64) -> Self {
        let count = logits.len().max(1) as f64;
        let mean = logits.iter().sum::<f64>() / count;
        let squares = logits.iter().map(|logit| (logit - mean).powi(2));
        let deviation = (squares.sum::<f64>() / count).sqrt();
        let standard = |logit: &f64| (logit - mean) / (deviation + EPSILON);
        let values: Vec<f64> = logits.iter().map(standard).collect();
        let largest = values.first().copied().unwrap_or_default();
        let exp = |value: &f64| ((value - largest) / temperature).exp();
        let mut shares: Vec<f64> = values.iter().map(exp).collect();
        let total: f64 = shares.iter().sum();
        shares.iter_mut().for_each(|share| *share /= total);
        Self {
            values,
            deviation,
            shares,
        }
    }
}
