//! Sorted terms: the largest columns of a row are leaves of their own, all others have one
//! coefficient.
//!
//! `row` is the whole row; `summed` is what the leaves are of, empty where those were summed before.

use std::ops::Range;

use crate::cpu::loss::{Worker, gaps};
use crate::cpu::simd::Level;
use crate::element::Element;
use crate::loss::{Measure, Sorted, slope};

impl Worker {
    /// Loss of the sorted terms of a row whose leaves are summed.
    pub(super) fn sorted<T: Element>(&mut self, level: Level, row: &[T], summed: &[T]) -> f64 {
        self.added.clear();
        self.added.resize(self.top.columns.len(), 0.0);
        let mut loss = 0.0;
        for index in 0..self.groups.sorted.len() {
            loss += match self.groups.sorted[index].measure {
                Measure::Probability { rest } => {
                    self.probabilities(level, row, summed, index, rest)
                }
                Measure::Standardised { temperature } => self.standardised(index, temperature),
            };
        }
        loss
    }

    /// `sum_i |p_i - q_i|` with the rest; its gradient is `p_v (s - sum_i s_i p_i)`, s the signs.
    fn probabilities<T: Element>(
        &mut self,
        level: Level,
        row: &[T],
        summed: &[T],
        index: usize,
        rest: f64,
    ) -> f64 {
        let Self {
            groups,
            leaves,
            top,
            places,
            ..
        } = self;
        let Sorted { target, weight, .. } = &groups.sorted[index];
        let count = target.len().min(top.columns.len());
        let places = &places[..count];
        let all = leaves.all();
        let log_total = leaves.log_mass(level, summed, all.clone());
        let mut ascending: Vec<&Range<u32>> = places.iter().collect();
        ascending.sort_unstable_by_key(|place| place.start);
        let others = gaps(leaves, &all, ascending);
        let logits = top.logits[..count].iter();
        let mut shares: Vec<f64> = logits.map(|logit| (logit - log_total).exp()).collect();
        let mut other = if others.is_empty() {
            0.0
        } else {
            (leaves.log_mass_of(level, summed, &others) - log_total).exp()
        };
        let is_unclear = shares
            .iter()
            .zip(target)
            .chain([(&other, &rest)])
            .any(|(&share, &target)| Sorted::is_unclear(share, target));
        if is_unclear {
            (shares, other) = exact(row, &top.columns[..count]);
        }
        let unmatched: f64 = target[count..].iter().sum();
        let mut loss = (other - rest).abs() + unmatched;
        let mut pull = other * slope(other, rest);
        for ((place, &share), &target) in places.iter().zip(&shares).zip(target) {
            let slope = slope(share, target);
            loss += (share - target).abs();
            pull += share * slope;
            leaves.add(leaves.span(place), weight * slope, log_total);
        }
        for gap in others {
            leaves.add(gap, weight * slope(other, rest), log_total);
        }
        leaves.add(all, -weight * pull, log_total);
        weight * loss
    }

    fn standardised(&mut self, index: usize, temperature: f64) -> f64 {
        let term = &self.groups.sorted[index];
        let logits = &self.top.logits[..term.target.len()];
        let (loss, slopes) = term.standardised_loss(logits, temperature);
        for (added, slope) in self.added.iter_mut().zip(slopes) {
            *added += term.weight * slope;
        }
        term.weight * loss
    }

    /// Puts what standardised terms add into a gradient that was written; each sum is rounded once.
    pub(super) fn add<T: Element>(&self, grad: &mut [T]) {
        let places = self.places.iter().zip(&self.added);
        for (column, (place, &added)) in self.top.columns.iter().zip(places) {
            if added != 0.0 {
                let sum = added + self.leaves.gradient(self.leaves.span(place).start);
                #[expect(clippy::cast_possible_truncation, reason = "gradients are at most f32")]
                let sum = sum as f32;
                grad[column.start as usize] = T::from_f32(sum);
            }
        }
    }
}

fn logit<T: Element>(row: &[T], column: &Range<u32>) -> f64 {
    f64::from(row[column.start as usize].to_f32())
}

/// Shares of columns, the first of which is the largest, and of all others, by a slow pass in `f64`.
fn exact<T: Element>(row: &[T], columns: &[Range<u32>]) -> (Vec<f64>, f64) {
    let largest = columns.first().map_or(0.0, |column| logit(row, column));
    let exp = |logit: &f64| (logit - largest).exp();
    let mut wide: Vec<f64> = row.iter().map(|logit| f64::from(logit.to_f32())).collect();
    let shares: Vec<f64> = columns
        .iter()
        .map(|column| {
            exp(&std::mem::replace(
                &mut wide[column.start as usize],
                f64::NEG_INFINITY,
            ))
        })
        .collect();
    let other: f64 = wide.iter().map(exp).sum();
    let total = shares.iter().sum::<f64>() + other;
    let shares = shares.iter().map(|share| share / total).collect();
    (shares, other / total)
}
