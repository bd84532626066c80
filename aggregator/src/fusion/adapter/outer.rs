//! The outer step of a merge (DiLoCo, arXiv 2311.08105) as coefficients of known terms.

use consilium_protocol::manifest::Training;

/// A sum of shares that differs from one by less is one.
const ROUNDING: f64 = 1e-12;

/// The outer optimiser's eta and mu.
#[derive(Debug, Clone, Copy)]
pub(super) struct Outer {
    rate: f64,
    momentum: f64,
}

impl Outer {
    pub(super) fn of(training: &Training) -> Self {
        Self {
            rate: f64::from(training.outer_rate_permille) / 1000.0,
            momentum: f64::from(training.outer_momentum_permille) / 1000.0,
        }
    }

    pub(super) fn pull(&self) -> f64 {
        self.rate * (1.0 + self.momentum)
    }

    /// Coefficients of the start, the members and v in theta'.
    pub(super) fn theta(&self, members: &[f64]) -> Vec<f64> {
        let start = 1.0 - self.pull() * total(members);
        let members = members.iter().map(|c| self.pull() * c);
        let velocity = -self.rate * self.momentum * self.momentum;
        std::iter::once(start)
            .chain(members)
            .chain([velocity])
            .collect()
    }

    /// Coefficients of the start, the members and v in v'.
    pub(super) fn velocity(&self, members: &[f64]) -> Vec<f64> {
        let negative = members.iter().map(|c| -c);
        std::iter::once(total(members))
            .chain(negative)
            .chain([self.momentum])
            .collect()
    }

    /// Coefficients of the start, an update and v, for a rule on entries.
    pub(super) fn of_update(&self) -> [Vec<f64>; 2] {
        let velocity = -self.rate * self.momentum * self.momentum;
        [
            vec![1.0, self.pull(), velocity],
            vec![0.0, -1.0, self.momentum],
        ]
    }
}

/// A sum of coefficients, one where only rounding keeps it from that.
pub(super) fn total(coefficients: &[f64]) -> f64 {
    let total: f64 = coefficients.iter().sum();
    if (total - 1.0).abs() < ROUNDING {
        1.0
    } else {
        total
    }
}
