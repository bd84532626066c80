//! What a training run will need, before anything starts: memory, tokens, time.

mod device;
pub mod fit;
pub mod machine;
pub mod memory;
mod probe;
mod room;

use std::time::Duration;

use serde::Serialize;

use super::model::ModelConfig;

pub use device::{DeviceMemory, HostMemory};
pub use machine::Budget;
pub use memory::{Memory, Shape, Trained};
pub use probe::speed;
pub use room::{DeviceRoom, Estimate, Granted, Room};

/// How long a run takes.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Time {
    /// Steps of the optimiser.
    pub steps: u64,
    /// Tokens of one step, if rows are full.
    pub tokens_per_step: u64,
    /// Floating-point operations of one step's matrix products.
    pub operations_per_step: f64,
    /// Operations a second of measured steps of a small model, all else that a step does included.
    pub operations_per_second: f64,
    /// Seconds of one step.
    pub seconds_per_step: f64,
    /// Seconds of all steps, without checkpoints and measurements on held-out items.
    pub seconds: f64,
}

impl Time {
    /// From the size of a run, the mean tokens of an item, and what [`speed`] measured.
    #[must_use]
    pub fn of(
        config: &ModelConfig,
        shape: &Shape,
        item_tokens: usize,
        steps: u64,
        operations_per_second: f64,
    ) -> Self {
        let operations = operations(config, shape, item_tokens);
        let seconds_per_step = operations / operations_per_second.max(1.0);
        Self {
            steps,
            tokens_per_step: (shape.tokens() * shape.accumulate) as u64,
            operations_per_step: operations,
            operations_per_second,
            seconds_per_step,
            seconds: seconds_per_step * steps as f64,
        }
    }

    /// Time of all steps.
    #[must_use]
    pub fn total(&self) -> Duration {
        Duration::try_from_secs_f64(self.seconds).unwrap_or(Duration::MAX)
    }
}

/// Operations of a step's matrix products, two for each weight and token: forward, once more where activations are computed
/// again, the gradient of the input, and where the weights are trained theirs; the head's logits are made twice.
fn operations(config: &ModelConfig, shape: &Shape, item_tokens: usize) -> f64 {
    let tokens = shape.tokens() as f64;
    let sizes = memory::Sizes::of(config);
    let trains_layers = matches!(shape.trained, Trained::All);
    let trains_head = shape.trained.trains_head();
    let again = if shape.held.checkpoint_activations {
        1.0
    } else {
        0.0
    };
    let passes = again + if trains_layers { 3.0 } else { 2.0 };
    let layers = (config.layers * sizes.layer_products) as f64 * passes;
    let head = sizes.table as f64 * if trains_head { 4.0 } else { 3.0 };
    let factors = 6.0 * memory::factors(config, shape.trained) as f64;
    // Scores and mixing of all pairs that see each other, half of the square; two products forward, five backward.
    let pairs = item_tokens as f64 / 2.0;
    let attention = (7.0 + 2.0 * again) * (config.layers * sizes.queries) as f64 * pairs;
    2.0 * tokens * shape.accumulate as f64 * (layers + head + attention)
        + factors * tokens * shape.accumulate as f64
}
