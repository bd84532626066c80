//! Learning rate over the steps of a run.

use serde::{Deserialize, Serialize};

/// How the rate falls after the warm-up.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Decay {
    /// Not at all.
    Constant,
    /// In a straight line to the floor.
    Linear,
    /// Along half a cosine to the floor.
    Cosine,
}

/// Warm-up from zero, then decay to a floor.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Schedule {
    /// Highest rate.
    pub rate: f64,
    /// Part of all steps spent on the warm-up, 0 to 1.
    pub warmup: f64,
    /// Shape of the decay.
    pub decay: Decay,
    /// Rate at the end, as a part of the highest.
    pub floor: f64,
    /// Steps of the whole run.
    pub steps: u64,
}

impl Schedule {
    /// Warm-up over 5 % of the steps, then linear decay to 2 %.
    pub fn linear(rate: f64, steps: u64) -> Self {
        Self {
            rate,
            warmup: 0.05,
            decay: Decay::Linear,
            floor: 0.02,
            steps,
        }
    }

    /// The rate of step `step`, counted from 0.
    pub fn at(&self, step: u64) -> f64 {
        let steps = self.steps.max(1) as f64;
        let warmup = (self.warmup * steps).round();
        let done = step as f64;
        if done < warmup {
            return self.rate * (done + 1.0) / warmup;
        }
        let progress = ((done - warmup) / (steps - warmup).max(1.0)).clamp(0.0, 1.0);
        let height = match self.decay {
            Decay::Constant => return self.rate,
            Decay::Linear => 1.0 - progress,
            Decay::Cosine => 0.5 * (1.0 + (std::f64::consts::PI * progress).cos()),
        };
        self.rate * (self.floor + (1.0 - self.floor) * height)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_rate_rises_to_the_peak_and_falls_to_the_floor() {
        for decay in [Decay::Linear, Decay::Cosine] {
            let schedule = Schedule {
                decay,
                ..Schedule::linear(1.0, 100)
            };
            let close = |step, rate: f64| (schedule.at(step) - rate).abs() < 1e-12;
            assert!(close(0, 0.2));
            assert!(close(4, 1.0));
            assert!(close(5, 1.0));
            assert!((5..99).all(|step| schedule.at(step + 1) < schedule.at(step)));
            assert!((schedule.at(100) - 0.02).abs() < 1e-12);
            assert!(
                (schedule.at(1_000) - 0.02).abs() < 1e-12,
                "stays at the floor"
            );
        }
    }
}
