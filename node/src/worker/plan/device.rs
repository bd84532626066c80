//! Memory of a training step beside an NVIDIA device: bytes there, and bytes of the host, from the shapes alone.
//!
//! Frozen weights and activations have the placement's type, what is trained is `f32`. Probabilities of attention are kept, as
//! many as if each row were one item. Weights in fewer bits and offloaded layers lie in the host's memory; of them one layer is
//! on the device at a time.

use consilium_kernels::quant::Format;
use serde::Serialize;

use super::memory::{LOADED, PROCESS, SLACK_PERCENT, Shape, Sizes, TOKENIZER, Trained, factors};
use crate::worker::model::{BaseStorage, DEVICE_LOGITS, ModelConfig};

/// Bytes of a value of what is trained, its gradient and the optimiser's state.
const TRAINED: usize = size_of::<f32>();

/// Room for what CUDA's libraries and the kernels' code take of the device once they are used. The context itself is there when
/// free memory is asked for. An allowance.
const LIBRARIES: usize = 256 << 20;

/// The same in the host's memory: libraries, context, staging buffers.
const HOST_LIBRARIES: usize = 512 << 20;

/// Tokens that are measured at a time on what is held out.
const MEASURED: usize = 2048;

/// Parts of the device's peak, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct DeviceMemory {
    /// The model, as far as it stays there.
    pub weights: usize,
    /// Weights that are there for a while: of one layer that lies elsewhere or has another type, and of the head.
    pub buffers: usize,
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
    /// Code and workspaces of libraries.
    pub process: usize,
    /// What a step of the optimiser, or a measurement on what is held out, takes after the backward pass.
    pub after: usize,
}

/// Parts of the host's peak beside a device, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct HostMemory {
    /// Weights that lie here: offloaded, or in fewer bits.
    pub weights: usize,
    /// One layer, or the head, decoded on its way to the device.
    pub buffers: usize,
    /// Code, threads, tokenizer, data, CUDA's libraries.
    pub process: usize,
    /// What reading the model takes beside the weights; over before the first step.
    pub loading: usize,
}

/// How the weights are held.
struct Held {
    trains_all: bool,
    trains_tables: bool,
    /// Embedding and head, as rows of their own or one.
    tables: usize,
    /// Whether the layers' weights lie in the host's memory, and embedding and head.
    layers_away: bool,
    tables_away: bool,
    layers: Format,
    table: Format,
}

impl Held {
    fn of(config: &ModelConfig, shape: &Shape) -> Self {
        let trains_all = shape.trained == Trained::All;
        let trains_tables = shape.trained.trains_head();
        let layers = match shape.held.base {
            Format::Bf16 => Format::F32,
            format => format,
        };
        let storage = BaseStorage {
            format: layers,
            tables: !trains_tables,
            ..BaseStorage::default()
        };
        let table = storage.table_format();
        Self {
            trains_all,
            trains_tables,
            // A tied head that is not trained gets rows of its own, in the order of ranks.
            tables: if config.tied && trains_all { 1 } else { 2 },
            layers_away: layers != Format::F32 || (shape.held.offload && !trains_all),
            tables_away: table != Format::F32,
            layers,
            table,
        }
    }
}

impl DeviceMemory {
    /// The peak of a run whose frozen weights and activations take `value` bytes each.
    #[must_use]
    pub fn of(config: &ModelConfig, shape: &Shape, value: usize) -> Self {
        let sizes = Sizes::of(config);
        let held = Held::of(config, shape);
        let factors = factors(config, shape.trained);
        let layer_factors = factors / config.layers.max(1);
        let is_narrow = value < TRAINED;
        let of_layers = if held.trains_all { TRAINED } else { value };
        let of_tables = if held.trains_tables { TRAINED } else { value };
        let mut weights = config.hidden_size * of_layers;
        if !held.layers_away {
            weights += config.layers * sizes.layer * of_layers;
        }
        if !held.tables_away {
            weights += held.tables * sizes.table * of_tables;
        }

        let mut buffers = 0;
        if held.layers_away || (held.trains_all && is_narrow) {
            buffers += sizes.layer * value;
        }
        if is_narrow {
            buffers += layer_factors * value;
        }
        if held.tables_away || (held.trains_tables && is_narrow) {
            buffers += sizes.table * value;
        }
        if held.trains_all && config.tied {
            buffers += sizes.table * TRAINED;
        }

        let (trained, largest) = match shape.trained {
            Trained::All => (sizes.base(config), sizes.table.max(sizes.layer)),
            Trained::Adapters { .. } if held.trains_tables => {
                (factors + 2 * sizes.table, sizes.table)
            }
            Trained::Adapters { .. } => (factors, layer_factors),
        };
        // Of a table there are for a moment the product, the sum and its start; of a bank its parts beside the whole.
        let passing = if held.trains_tables { 3 } else { 1 } * largest;
        let sums = if shape.accumulate > 1 { trained } else { 0 };
        let (kept, in_hand) = activations(config, sizes, shape, value);
        let head = head(config, shape, value);
        let (activations, head) = match shape.held.checkpoint_activations {
            // The head is over before a layer is computed again.
            true => (kept + in_hand, head.saturating_sub(in_hand)),
            false => (kept + in_hand, head),
        };
        let measured = (sizes.table + MEASURED * (config.hidden_size + sizes.qkv)) * TRAINED;
        Self {
            weights,
            buffers,
            adapters: factors * TRAINED,
            gradients: (trained + passing + sums) * TRAINED,
            optimiser: 2 * trained * TRAINED,
            activations,
            head,
            process: LIBRARIES,
            after: (trained + sums + 6 * largest).max(measured / TRAINED) * TRAINED,
        }
    }

    /// Bytes at the peak: of the backward pass, or of what follows it.
    #[must_use]
    pub const fn total(&self) -> usize {
        let step = self.buffers + self.gradients + self.activations + self.head;
        let above = if step > self.after { step } else { self.after };
        self.weights + self.adapters + self.optimiser + self.process + above
    }
}

/// Bytes of what is kept, and of the layer in hand.
fn activations(config: &ModelConfig, sizes: Sizes, shape: &Shape, value: usize) -> (usize, usize) {
    let (width, inner) = (config.hidden_size, config.intermediate_size);
    let Sizes { queries, qkv, .. } = sizes;
    let probabilities = config.heads * shape.row_tokens;
    let inputs = 2 * width;
    let within = 2 * width + qkv + 2 * queries + probabilities + 2 * inner;
    let (kept, again) = match shape.held.checkpoint_activations {
        true => (config.layers * inputs, within),
        false => (config.layers * (inputs + within), 0),
    };
    // Gradients of the block in hand; those of the norms' inputs are f32.
    let attention = 3 * probabilities + 4 * qkv;
    let feed_forward = 8 * inner;
    let passing = attention.max(feed_forward) * value + 8 * width * TRAINED;
    let bytes = |of_token: usize| shape.tokens() * of_token / 100 * (100 + SLACK_PERCENT);
    (bytes(kept * value), bytes(again * value + passing))
}

/// Hidden states, their gradients, and the logits that exist at a time: with probabilities, gradient and one sum in f32.
fn head(config: &ModelConfig, shape: &Shape, value: usize) -> usize {
    let tokens = shape.tokens();
    let rows = tokens.min((DEVICE_LOGITS / config.vocab_size.max(1)).max(1));
    let narrow = if value < TRAINED { 2 * value } else { 0 };
    rows * config.vocab_size * (4 * TRAINED + narrow) + 4 * tokens * config.hidden_size * value
}

impl HostMemory {
    /// The host's part of a run whose device keeps `value` bytes for a weight.
    #[must_use]
    pub fn of(config: &ModelConfig, shape: &Shape, value: usize) -> Self {
        let sizes = Sizes::of(config);
        let held = Held::of(config, shape);
        let (rows, columns) = (config.vocab_size, config.hidden_size);
        let table = rows * held.table.row_bytes(columns) + held.table.scale_bytes(rows, columns);
        let (scales, codes) = sizes.stored(held.layers);
        let vectors = (sizes.layer - sizes.layer_products) * TRAINED;
        let layer = match (held.layers_away, held.layers) {
            (false, _) => 0,
            (true, Format::F32) => sizes.layer * value,
            (true, _) => scales + codes.iter().sum::<usize>() + vectors,
        };
        let tables = if held.tables_away {
            held.tables * table
        } else {
            0
        };
        // Decoded as f32, then of the device's type.
        let decoded = |values: usize| values * (TRAINED + value);
        let buffers = match (
            held.tables_away,
            held.layers_away && held.layers != Format::F32,
        ) {
            (true, _) => decoded(sizes.table.max(sizes.layer)),
            (false, true) => decoded(sizes.layer),
            (false, false) => 0,
        };
        // Weights that are all trained are read as they are before the first one moves; embedding and head until the last layer has.
        let read = if held.trains_all {
            sizes.base(config)
        } else if held.tables_away {
            sizes.table + sizes.layer
        } else {
            held.tables * sizes.table + sizes.layer
        };
        Self {
            weights: config.layers * layer + tables,
            buffers,
            process: PROCESS + HOST_LIBRARIES + TOKENIZER * shape.tokenizer_bytes,
            loading: read * TRAINED + LOADED,
        }
    }

    /// Bytes at the peak: of reading the model, or of a step.
    #[must_use]
    pub const fn total(&self) -> usize {
        let above = if self.buffers > self.loading {
            self.buffers
        } else {
            self.loading
        };
        self.weights + self.process + above
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config;

    /// Bytes of a value in bf16.
    const BF16: usize = 2;

    /// A Llama of about a billion weights, and a LoRA step of 8 rows of 1024 tokens.
    fn billion() -> (ModelConfig, Shape) {
        let config = ModelConfig {
            kv_heads: 4,
            ..ModelConfig::llama(32_000, 2048, 22, 32, 5632)
        };
        let shape = Shape {
            rows: 8,
            row_tokens: 1024,
            accumulate: 1,
            trained: Trained::Adapters {
                rank: 16,
                embeddings_and_head: false,
            },
            held: config::Memory::default(),
            tokenizer_bytes: 1 << 20,
        };
        (config, shape)
    }

    fn held(base: Format, checkpoint_activations: bool, offload: bool) -> config::Memory {
        config::Memory {
            base,
            checkpoint_activations,
            offload,
            ..config::Memory::default()
        }
    }

    #[test]
    fn weights_are_where_the_settings_leave_them() {
        let (config, shape) = billion();
        let of = |held| {
            let shape = Shape { held, ..shape };
            let device = DeviceMemory::of(&config, &shape, BF16);
            (device, HostMemory::of(&config, &shape, BF16))
        };
        let values = 2 * 32_000 * 2048 + 22 * Sizes::of(&config).layer;
        let (all, none) = of(held(Format::F32, false, false));
        assert!(all.weights.abs_diff(values * BF16) < 1 << 20, "{all:?}");
        assert_eq!((none.weights, none.buffers), (0, 0));
        assert_eq!(of(held(Format::Bf16, false, false)), (all, none));

        let tables = 2 * 32_000 * 2048 * BF16;
        let (left, here) = of(held(Format::F32, false, true));
        assert!(left.weights.abs_diff(tables) < 1 << 20, "{left:?}");
        let layers = 22 * Sizes::of(&config).layer * BF16;
        assert_eq!(here.weights, layers);
        assert!(left.buffers >= all.buffers + layers / 22, "{left:?}");
        assert_eq!(left.activations, all.activations);

        let (left, here) = of(held(Format::Int8, false, false));
        assert!(left.weights < 1 << 20, "{left:?}");
        let int8 = here.weights as f64 / values as f64;
        assert!((0.99..1.1).contains(&int8), "{int8}");
        assert!(left.buffers > 32_000 * 2048 * BF16, "the head: {left:?}");
        let (_, smaller) = of(held(Format::Nf4, false, false));
        assert!(smaller.weights < here.weights * 2 / 3, "{smaller:?}");
    }

    #[test]
    fn activations_computed_again_are_those_of_one_layer_and_inputs_of_all() {
        let (config, shape) = billion();
        let again = Shape {
            held: held(Format::F32, true, false),
            ..shape
        };
        let [kept, again] = [shape, again].map(|shape| DeviceMemory::of(&config, &shape, BF16));
        assert!(again.activations * 5 < kept.activations);
        assert!(again.activations > 8 * 1024 * 22 * 2 * 2048 * BF16);
        assert_eq!(again.weights, kept.weights);
        let long = Shape {
            rows: 1,
            row_tokens: 8 * 1024,
            ..shape
        };
        // Probabilities grow with the square of a row.
        let long = DeviceMemory::of(&config, &long, BF16).activations - kept.activations;
        assert!(long > 22 * 32 * 7 * 1024 * 8 * 1024 * BF16, "{long}");
    }

    #[test]
    fn what_is_trained_is_f32_with_its_gradient_and_two_moments() {
        let (config, shape) = billion();
        let adapters = DeviceMemory::of(&config, &shape, BF16);
        let values = factors(&config, shape.trained);
        assert_eq!(adapters.adapters, 4 * values);
        assert_eq!(adapters.optimiser, 8 * values);
        let all = Shape {
            trained: Trained::All,
            accumulate: 2,
            ..shape
        };
        let device = DeviceMemory::of(&config, &all, BF16);
        let values = Sizes::of(&config).base(&config);
        assert!(device.weights.abs_diff(4 * values) < 1 << 20, "{device:?}");
        assert_eq!(device.optimiser, 8 * values);
        assert!(device.gradients > 8 * values, "a sum beside the new ones");
        // The whole model is read as f32 before it moves.
        assert!(HostMemory::of(&config, &all, BF16).loading > 4 * values);
    }
}
