//! Sorted L1 losses, over a row that is sorted whole.

use crate::loss::{EPSILON, probability, slope};
use crate::records::RecordView;

/// `sum_i |p_(i) - q_(i)| + |rest - rest'|`, K listed symbols each; adds its gradient to `grad`.
pub(crate) fn probabilities(
    target: RecordView<'_, u32>,
    position: usize,
    weight: f64,
    row: &[f64],
    grad: &mut [f64],
) -> f64 {
    let mut q: Vec<f64> = target
        .listed(position)
        .map(|(_, code)| probability(code))
        .collect();
    q.sort_by(|a, b| b.total_cmp(a));
    q.push(probability(target.tail()[position]));
    let total: f64 = q.iter().sum();
    if total <= 0.0 {
        return 0.0;
    }
    let k = q.len() - 1;
    let order = descending(row);
    let max = row[order[0]];
    let mass: f64 = row.iter().map(|logit| (logit - max).exp()).sum();
    let p = |rank: usize| (row[rank] - max).exp() / mass;
    let mut sorted: Vec<f64> = order.iter().take(k).map(|&rank| p(rank)).collect();
    sorted.resize(k, 0.0);
    sorted.push(order.iter().skip(k).map(|&rank| p(rank)).sum());
    let (mut loss, mut pull, mut slopes) = (0.0, 0.0, Vec::new());
    for (p, q) in sorted.iter().zip(q.iter().map(|q| q / total)) {
        loss += (p - q).abs();
        slopes.push(slope(*p, q));
        pull += p * slope(*p, q);
    }
    for (place, &rank) in order.iter().enumerate() {
        grad[rank] += weight * p(rank) * (slopes[place.min(k)] - pull);
    }
    weight * loss
}

/// `sum_k |softmax(z(l) / T)_k - softmax(z(l') / T)_k|` of the K largest logits, z the z-score over
/// them; adds its gradient to `grad`.
pub(crate) fn standardised(
    target: RecordView<'_, u32>,
    position: usize,
    weight: f64,
    temperature: f64,
    row: &[f64],
    grad: &mut [f64],
) -> f64 {
    let codes = target.listed(position).map(|(_, code)| f64::from(code));
    let mut theirs: Vec<f64> = codes.map(|code| (2.0_f64).ln() * -code / 16.0).collect();
    theirs.sort_by(|a, b| b.total_cmp(a));
    let order = descending(row);
    let k = theirs.len().min(order.len());
    let ours: Vec<f64> = order[..k].iter().map(|&rank| row[rank]).collect();
    let (_, _, q) = standard(&theirs[..k], temperature);
    let (z, deviation, p) = standard(&ours, temperature);
    let loss: f64 = p.iter().zip(&q).map(|(p, q)| (p - q).abs()).sum();
    // The chain: distance to softmax, softmax to z-scores, z-scores to logits.
    let by_p: Vec<f64> = p.iter().zip(&q).map(|(&p, &q)| slope(p, q)).collect();
    for i in 0..k {
        let mut by_logit = 0.0;
        for j in 0..k {
            let mut by_z = 0.0;
            for l in 0..k {
                let own = f64::from(u8::from(j == l));
                by_z += by_p[l] * p[l] * (own - p[j]) / temperature;
            }
            let own = f64::from(u8::from(i == j)) - 1.0 / k as f64;
            let by_deviation = if deviation > 0.0 {
                z[i] * (deviation + EPSILON) / (k as f64 * deviation)
            } else {
                0.0
            };
            by_logit += by_z * (own - z[j] * by_deviation) / (deviation + EPSILON);
        }
        grad[order[i]] += weight * by_logit;
    }
    weight * loss
}

/// z-scores, deviation and softmax of the z-scores.
fn standard(logits: &[f64], temperature: f64) -> (Vec<f64>, f64, Vec<f64>) {
    let count = logits.len() as f64;
    let mean = logits.iter().sum::<f64>() / count;
    let variance = logits.iter().map(|l| (l - mean) * (l - mean)).sum::<f64>() / count;
    let deviation = variance.sqrt();
    let z: Vec<f64> = logits
        .iter()
        .map(|l| (l - mean) / (deviation + EPSILON))
        .collect();
    let exp: Vec<f64> = z
        .iter()
        .map(|value| ((value - z[0]) / temperature).exp())
        .collect();
    let total: f64 = exp.iter().sum();
    let p = exp.iter().map(|exp| exp / total).collect();
    (z, deviation, p)
}

/// Ranks, the largest logit first, the lower rank on a tie.
fn descending(row: &[f64]) -> Vec<usize> {
    let mut order: Vec<usize> = (0..row.len()).collect();
    order.sort_by(|&a, &b| {
        row[b]
            .partial_cmp(&row[a])
            .unwrap_or(std::cmp::Ordering::Equal)
    });
    order
}
