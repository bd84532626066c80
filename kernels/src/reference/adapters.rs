//! The merging rules value by value, as their formulas read.

use crate::adapters::Merging;
use crate::element::Element;

pub(crate) fn merge<T: Element>(merging: Merging<'_>, adapters: &[&[T]], out: &mut [f32]) {
    for (index, out) in out.iter_mut().enumerate() {
        let values: Vec<f64> = adapters
            .iter()
            .map(|values| f64::from(values[index].to_f32()))
            .collect();
        #[expect(
            clippy::cast_possible_truncation,
            reason = "overflow becomes infinite and is refused by the caller"
        )]
        {
            *out = value(merging, values) as f32;
        }
    }
}

fn value(merging: Merging<'_>, mut values: Vec<f64>) -> f64 {
    let product = |(weight, value): (&f64, &f64)| weight * value;
    match merging {
        Merging::Sum { weights } => weights.iter().zip(&values).map(product).sum(),
        Merging::Robust(rule) => {
            values.sort_by(f64::total_cmp);
            let dropped = rule.dropped(values.len());
            let rest = &values[dropped..values.len() - dropped];
            rest.iter().sum::<f64>() / rest.len() as f64
        }
        Merging::Ties {
            weights,
            thresholds,
        } => {
            for (value, &threshold) in values.iter_mut().zip(thresholds) {
                if value.abs() < f64::from(threshold) {
                    *value = 0.0;
                }
            }
            mean_of_sign(magnitudes(&values, weights), &values, weights)
        }
        Merging::Sce { weights } => {
            let votes = vec![1.0; values.len()];
            mean_of_sign(magnitudes(&values, &votes), &values, weights)
        }
    }
}

/// Weighted magnitude of the positive values, less that of the negative ones.
fn magnitudes(values: &[f64], weights: &[f64]) -> f64 {
    let side = |belongs: fn(f64) -> bool| {
        let members = values.iter().zip(weights).filter(|pair| belongs(*pair.0));
        members.map(|(value, weight)| weight * value).sum::<f64>()
    };
    side(|value| value > 0.0) + side(|value| value < 0.0)
}

fn mean_of_sign(balance: f64, values: &[f64], weights: &[f64]) -> f64 {
    let elected: Vec<(f64, f64)> = values
        .iter()
        .zip(weights)
        .filter(|(value, _)| **value * balance.signum() > 0.0)
        .map(|(&value, &weight)| (value, weight))
        .collect();
    let weight: f64 = elected.iter().map(|(_, weight)| weight).sum();
    if balance == 0.0 || weight == 0.0 {
        return 0.0;
    }
    elected
        .iter()
        .map(|(value, weight)| weight * value)
        .sum::<f64>()
        / weight
}
