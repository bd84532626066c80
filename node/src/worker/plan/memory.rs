//! Memory of a training step on the processor, in bytes, from the shapes alone.
//!
//! Everything is `f32`. Per token and layer the forward pass keeps the two blocks' inputs, their normalised inputs, queries,
//! keys and values, what attention mixed, and both halves of the feed-forward layer; the backward pass takes them layer by
//! layer, so that its own buffers are those of one layer. Logits never exist at once.

use consilium_kernels::head::SCRATCH_BYTES;
use serde::Serialize;

use crate::worker::model::ModelConfig;

/// Bytes of one value.
const VALUE: usize = size_of::<f32>();

/// The process itself: code, threads, the records that are tokenised at once.
const PROCESS: usize = 40 << 20;

/// Memory of a tokenizer for each byte of its file.
const TOKENIZER: usize = 10;

/// What buffers are longer than what they hold, in percent of the activations.
const SLACK_PERCENT: usize = 12;

/// What is trained.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Trained {
    /// All weights.
    All,
    /// Adapters on all linear layers.
    Adapters {
        /// Rank of the factors.
        rank: usize,
        /// Embedding and head as well.
        embeddings_and_head: bool,
    },
}

impl Trained {
    /// Whether the head gets a gradient.
    #[must_use]
    pub const fn trains_head(self) -> bool {
        matches!(
            self,
            Self::All
                | Self::Adapters {
                    embeddings_and_head: true,
                    ..
                }
        )
    }
}

/// Size of a step.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Shape {
    /// Rows of a batch.
    pub rows: usize,
    /// Tokens of a row.
    pub row_tokens: usize,
    /// Batches of a step.
    pub accumulate: usize,
    /// What is trained.
    pub trained: Trained,
    /// Bytes of the model folder's weights that are in memory while they are read; 0 for a new model.
    pub file_bytes: usize,
    /// Bytes of `tokenizer.json`.
    pub tokenizer_bytes: usize,
}

impl Shape {
    /// Tokens of one batch, if rows are full.
    #[must_use]
    pub const fn tokens(&self) -> usize {
        self.rows.saturating_mul(self.row_tokens)
    }
}

/// Parts of the peak, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Memory {
    /// The model.
    pub weights: usize,
    /// Adapters.
    pub adapters: usize,
    /// Gradients of what is trained.
    pub gradients: usize,
    /// The optimiser's two moments.
    pub optimiser: usize,
    /// What the forward pass keeps for the backward pass, and the backward pass's own buffers.
    pub activations: usize,
    /// Hidden states before the head, their gradients, and a block of logits.
    pub head: usize,
    /// Code, threads, tokenizer, data.
    pub process: usize,
    /// What reading the model takes beside the weights; over before the first step.
    pub loading: usize,
}

/// Numbers of values.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Sizes {
    /// Embedding, and head.
    pub table: usize,
    /// Weights of one layer that are factors of products.
    pub layer_products: usize,
    /// All weights of one layer.
    pub layer: usize,
    /// Query values of a token.
    pub queries: usize,
    /// Query, key and value values of a token.
    pub qkv: usize,
}

impl Sizes {
    /// Of a model.
    #[must_use]
    pub const fn of(config: &ModelConfig) -> Self {
        let queries = config.heads * config.head_dim;
        let qkv = queries + 2 * config.kv_heads * config.head_dim;
        let (width, inner) = (config.hidden_size, config.intermediate_size);
        let layer_products = width * (qkv + queries + 3 * inner);
        Self {
            table: config.vocab_size * width,
            layer_products,
            layer: layer_products + 2 * width + qkv,
            queries,
            qkv,
        }
    }

    const fn base(self, config: &ModelConfig) -> usize {
        let tables = if config.tied { 1 } else { 2 };
        tables * self.table + config.layers * self.layer + config.hidden_size
    }
}

/// Values of the adapters' factors.
#[must_use]
pub const fn factors(config: &ModelConfig, trained: Trained) -> usize {
    match trained {
        Trained::All => 0,
        Trained::Adapters { rank, .. } => {
            let sizes = Sizes::of(config);
            let (width, inner) = (config.hidden_size, config.intermediate_size);
            let attention = 3 * width + sizes.qkv + sizes.queries + width;
            let feed_forward = 2 * (width + inner) + inner + width;
            config.layers * rank * (attention + feed_forward)
        }
    }
}

impl Memory {
    /// The peak of a run.
    #[must_use]
    pub fn of(config: &ModelConfig, shape: &Shape) -> Self {
        let sizes = Sizes::of(config);
        let mut base = sizes.base(config);
        let factors = factors(config, shape.trained);
        let (trained, largest) = match shape.trained {
            Trained::All => (base, sizes.table.max(sizes.layer)),
            Trained::Adapters {
                embeddings_and_head: true,
                ..
            } => (factors + 2 * sizes.table, sizes.table),
            Trained::Adapters { .. } => (factors, factors / config.layers.max(1)),
        };
        if config.tied && shape.trained != Trained::All {
            // The head gets rows of its own, in the order of ranks.
            base += sizes.table;
        }
        // Candle adds to zeros: of the tensor in hand there are three for a moment. A tied table gets two gradients.
        let passing = 2 * largest
            + if config.tied && shape.trained == Trained::All {
                2 * sizes.table
            } else {
                0
            };
        let sums = if shape.accumulate > 1 { trained } else { 0 };
        Self {
            weights: base * VALUE,
            adapters: factors * VALUE,
            gradients: (trained + passing + sums) * VALUE,
            optimiser: 2 * trained * VALUE,
            activations: activations(config, sizes, shape),
            head: 4 * shape.tokens() * config.hidden_size * VALUE + SCRATCH_BYTES,
            process: PROCESS + TOKENIZER * shape.tokenizer_bytes,
            loading: shape.file_bytes + sizes.table * VALUE,
        }
    }

    /// Bytes at the peak: of the first step, or of reading the model.
    #[must_use]
    pub const fn total(&self) -> usize {
        let step = self.adapters + self.gradients + self.optimiser + self.activations + self.head;
        let above = if step > self.loading {
            step
        } else {
            self.loading
        };
        self.weights + self.process + above
    }
}

fn activations(config: &ModelConfig, sizes: Sizes, shape: &Shape) -> usize {
    let (width, inner) = (config.hidden_size, config.intermediate_size);
    let Sizes { queries, qkv, .. } = sizes;
    let kept = 4 * width + qkv + queries + 2 * inner + 2;
    // Of the layer in hand: gradients of its values, and candle's copies of the residual's.
    let passing = 6 * width + qkv.max(inner) + queries + inner;
    let tokens = shape.tokens();
    // Factors are folded into a copy of the weights where that is cheaper than applying them apart.
    let folded = match shape.trained {
        Trained::All => 0,
        Trained::Adapters { .. } => (2 * width * inner).max(width * qkv),
    };
    let values = tokens * (config.layers * kept + passing) + folded;
    values * VALUE / 100 * (100 + SLACK_PERCENT)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::worker::model::{LoraConfig, random};

    #[test]
    fn the_numbers_of_values_are_those_of_the_model() {
        for tied in [false, true] {
            let config = ModelConfig {
                tied,
                kv_heads: 2,
                ..ModelConfig::llama(300, 32, 3, 4, 48)
            };
            let order: Vec<u32> = (0..300).collect();
            let mut model = random(config.clone(), order, 1).unwrap();
            let weights = |model: &crate::worker::model::Model| -> usize {
                let tensors = model.weights().unwrap();
                tensors.values().map(|tensor| tensor.values.len()).sum()
            };
            // Room for biases, which a Llama has not, is counted.
            let biases = 3 * (32 + 2 * 16);
            assert_eq!(Sizes::of(&config).base(&config), weights(&model) + biases);
            let lora = LoraConfig {
                rank: 5,
                alpha: 1.0,
                embeddings_and_head: false,
            };
            model.attach_lora(lora, 1).unwrap();
            let adapter = model.adapter().unwrap();
            let values: usize = adapter.values().map(|tensor| tensor.values.len()).sum();
            let trained = Trained::Adapters {
                rank: 5,
                embeddings_and_head: false,
            };
            assert_eq!(factors(&config, trained), values);
        }
    }
}
