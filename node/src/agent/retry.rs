//! How long to wait before the next attempt: twice as long each time, with jitter, up to a limit.
//!
//! "Full jitter" between half and the whole of the step: nodes that lost the same aggregator do not come back as one.

use std::time::Duration;

use rand::{RngExt as _, SeedableRng as _};
use rand_chacha::ChaCha8Rng;

/// Waits between attempts.
#[derive(Debug, Clone)]
pub struct Backoff {
    first: Duration,
    most: Duration,
    step: Duration,
    generator: ChaCha8Rng,
}

impl Backoff {
    /// Waits that begin at `first` and end at `most`; `seed` decides the jitter.
    #[must_use]
    pub fn new(first: Duration, most: Duration, seed: u64) -> Self {
        Self {
            first,
            most,
            step: first,
            generator: ChaCha8Rng::seed_from_u64(seed),
        }
    }

    /// The wait before the next attempt.
    pub fn next_wait(&mut self) -> Duration {
        let step = self.step.min(self.most);
        self.step = step.saturating_mul(2).min(self.most);
        step.mul_f64(self.generator.random_range(0.5..=1.0))
    }

    /// An attempt succeeded: the next failure begins again at the first step.
    pub const fn reset(&mut self) {
        self.step = self.first;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waits_double_up_to_the_limit_and_begin_again_after_a_success() {
        let (first, most) = (Duration::from_millis(100), Duration::from_secs(5));
        let mut backoff = Backoff::new(first, most, 7);
        let mut step = first;
        for _ in 0..20 {
            let wait = backoff.next_wait();
            assert!(wait >= step / 2 && wait <= step, "{wait:?} of {step:?}");
            step = (step * 2).min(most);
        }
        assert_eq!(step, most);
        backoff.reset();
        assert!(backoff.next_wait() <= first);
    }
}
