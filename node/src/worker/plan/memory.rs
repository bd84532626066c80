//! Memory of a training step on the processor, in bytes, from the shapes alone.
//!
//! Values are `f32`, but for weights that are not trained, which the settings may store in fewer bits or in a file. Per token
//! and layer the forward pass keeps the two blocks' inputs, their normalised inputs, queries, keys and values, what attention
//! mixed, and both halves of the feed-forward layer; where activations are computed again, the two inputs alone. The backward
//! pass goes layer by layer, so that its own buffers are those of one layer. Logits never exist at once.

use consilium_kernels::head::SCRATCH_BYTES;
use consilium_kernels::quant::Format;
use serde::Serialize;

use crate::config;
use crate::worker::model::{BaseStorage, ModelConfig};

/// Bytes of one value.
const VALUE: usize = size_of::<f32>();

/// The process itself: code, threads, the records that are tokenised at once.
pub(super) const PROCESS: usize = 40 << 20;

/// Pages of a weight file that are in memory while it is read, and buffers of the reader.
pub(super) const LOADED: usize = 8 << 20;

/// Memory of a tokenizer for each byte of its file.
pub(super) const TOKENIZER: usize = 10;

/// What buffers are longer than what they hold, in percent of the activations.
pub(super) const SLACK_PERCENT: usize = 12;

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
    /// How the model is held.
    pub held: config::Memory,
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
    /// The model, as far as it is in memory.
    pub weights: usize,
    /// Weights that stay in a file.
    pub offloaded: usize,
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
    /// Rows and columns of the matrices of the attention block, and of the feed-forward block.
    matrices: [[(usize, usize); 2]; 2],
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
            matrices: [
                [(qkv, width), (width, queries)],
                [(2 * inner, width), (width, inner)],
            ],
        }
    }

    /// Bytes of the matrices of one layer: scales, and the codes of the two blocks.
    pub(super) fn stored(&self, format: Format) -> (usize, [usize; 2]) {
        let scales = |&(rows, columns): &(usize, usize)| format.scale_bytes(rows, columns);
        let codes = |block: &[(usize, usize); 2]| {
            let bytes = block.iter();
            let bytes = bytes.map(|(rows, columns)| rows * format.row_bytes(*columns));
            bytes.sum::<usize>()
        };
        let scales = self.matrices.iter().flatten().map(scales).sum();
        (scales, self.matrices.each_ref().map(codes))
    }

    pub(super) const fn base(self, config: &ModelConfig) -> usize {
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
        let factors = factors(config, shape.trained);
        let (trained, largest) = match shape.trained {
            Trained::All => (sizes.base(config), sizes.table.max(sizes.layer)),
            Trained::Adapters {
                embeddings_and_head: true,
                ..
            } => (factors + 2 * sizes.table, sizes.table),
            Trained::Adapters { .. } => (factors, factors / config.layers.max(1)),
        };
        // Candle adds to zeros: of the tensor in hand there are three for a moment. A tied table gets two gradients.
        let passing = 2 * largest
            + if config.tied && shape.trained == Trained::All {
                2 * sizes.table
            } else {
                0
            };
        let sums = if shape.accumulate > 1 { trained } else { 0 };
        let (weights, offloaded) = weights(config, sizes, shape);
        // Beside the weights there are for a moment a tensor as f32, and, where it is stored otherwise, a block of one layer.
        let tensor = sizes.table.max(sizes.layer);
        Self {
            weights,
            offloaded,
            adapters: factors * VALUE,
            gradients: (trained + passing + sums) * VALUE,
            optimiser: 2 * trained * VALUE,
            activations: activations(config, sizes, shape),
            head: 4 * shape.tokens() * config.hidden_size * VALUE + SCRATCH_BYTES,
            process: PROCESS + TOKENIZER * shape.tokenizer_bytes,
            loading: tensor * VALUE + LOADED,
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

/// Bytes of the weights in memory, and in a file.
fn weights(config: &ModelConfig, sizes: Sizes, shape: &Shape) -> (usize, usize) {
    let held = shape.held;
    let storage = BaseStorage {
        format: held.base,
        tables: !shape.trained.trains_head(),
        ..BaseStorage::default()
    };
    let table = storage.table_format();
    let (rows, columns) = (config.vocab_size, config.hidden_size);
    let table = rows * table.row_bytes(columns) + table.scale_bytes(rows, columns);
    // A tied head that is not trained gets rows of its own, in the order of ranks.
    let tables = if config.tied && shape.trained == Trained::All {
        1
    } else {
        2
    };
    let vectors =
        (config.layers * (sizes.layer - sizes.layer_products) + config.hidden_size) * VALUE;
    let (scales, codes) = sizes.stored(held.base);
    let of_layers = config.layers * codes.iter().sum::<usize>();
    let always = tables * table + vectors + config.layers * scales;
    if held.offload {
        // One block is read at a time.
        (always + codes[0].max(codes[1]), of_layers)
    } else {
        (always + of_layers, 0)
    }
}

fn activations(config: &ModelConfig, sizes: Sizes, shape: &Shape) -> usize {
    let (width, inner) = (config.hidden_size, config.intermediate_size);
    let Sizes { queries, qkv, .. } = sizes;
    let inputs = 2 * width;
    let within = 2 * width + qkv + queries + 2 * inner + 2;
    let kept = if shape.held.checkpoint_activations {
        config.layers * inputs + within
    } else {
        config.layers * (inputs + within)
    };
    // Of the layer in hand: gradients of its values, and candle's copies of the residual's.
    let passing = 6 * width + qkv.max(inner) + queries + inner;
    let tokens = shape.tokens();
    // Factors are folded into a copy of the weights where that is cheaper than applying them apart.
    let folded = match shape.trained {
        Trained::All => 0,
        Trained::Adapters { .. } => (2 * width * inner).max(width * qkv),
    };
    let values = tokens * (kept + passing) + folded;
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
