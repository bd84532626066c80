//! The speed of this machine at training: a few steps of a model with the proportions of the one in question, but fewer
//! and narrower layers.

use std::sync::Arc;

use consilium_kernels::{TokenKind, Vocab};
use consilium_protocol::Clock;

use super::memory::{Shape, Sizes, Trained};
use super::operations;
use crate::worker::data::Item;
use crate::worker::error::WorkError;
use crate::worker::model::{self, BaseStorage, LoraConfig, ModelConfig};
use crate::worker::train::{Decay, Schedule, TrainConfig, TrainError, Trainer};

/// Weights of the probe's layers at most, unless one layer of a single head has more, and tokens of its batch.
const WEIGHTS: usize = 8 << 20;
const TOKENS: usize = 512;

/// Tokens of its vocabulary.
const VOCABULARY: std::ops::RangeInclusive<usize> = 16..=1 << 15;

/// Time for the probe, after which it ends with the step in hand.
const MILLIS: u128 = 300;

/// Operations of matrix products that a training step gets done a second, all else that it does included, on the threads of
/// the current pool. The probe's items have `item_tokens`, as those of the data have in the mean: attention is dear where
/// they are long. Wider models are a little faster than their probe.
///
/// # Errors
/// The probe cannot be built or does not run: a fault of ours.
pub fn speed(
    config: &ModelConfig,
    shape: &Shape,
    item_tokens: usize,
    clock: &dyn Clock,
) -> Result<f64, WorkError> {
    let config = narrowed(config);
    let row_tokens = shape.row_tokens.clamp(2, TOKENS);
    let shape = Shape {
        rows: (TOKENS / row_tokens).clamp(1, shape.rows.max(1)),
        row_tokens,
        accumulate: 1,
        ..*shape
    };
    let vocab = vocabulary(config.vocab_size)?;
    let order = vocab.id_of_rank().to_vec();
    let held = shape.held;
    let storage = match shape.trained {
        Trained::All => BaseStorage::default(),
        // A file of weights is read from the system's cache, as one is that memory has room for.
        Trained::Adapters {
            embeddings_and_head,
            ..
        } => held.storage(embeddings_and_head, &std::env::temp_dir())?,
    };
    let mut model = model::random_as(config.clone(), order, 0, &storage)?;
    model.checkpoint_activations(held.checkpoint_activations);
    match shape.trained {
        Trained::All => {
            model.train_all()?;
            if let Some(placement) = held.placement()? {
                model.place(placement)?;
            }
        }
        Trained::Adapters {
            rank,
            embeddings_and_head,
        } => {
            let lora = LoraConfig {
                rank,
                alpha: 1.0,
                embeddings_and_head,
            };
            model.attach_lora(lora, 0)?;
        }
    }
    let run = TrainConfig {
        rows: shape.rows,
        length: shape.row_tokens,
        schedule: Schedule {
            decay: Decay::Constant,
            warmup: 0.0,
            ..Schedule::linear(1e-4, u64::MAX)
        },
        ..TrainConfig::new(u64::MAX, 1e-4, 0)
    };
    let item_tokens = item_tokens.clamp(2, row_tokens);
    let items = items(&shape, item_tokens, config.vocab_size);
    let mut trainer = Trainer::new(model, &vocab, items, 0, run)?;
    // The first step fills the buffers.
    trainer.step()?;
    let start = clock.now();
    let mut steps = 0_u32;
    let millis = loop {
        trainer.step()?;
        steps += 1;
        let millis = clock.now().since(start).as_millis();
        if millis >= MILLIS {
            break millis;
        }
    };
    Ok(operations(&config, &shape, item_tokens) * f64::from(steps) / (millis as f64 / 1000.0))
}

/// Small enough to be made and run in a moment. The vocabulary shrinks with the layers, so that the head keeps its share.
fn narrowed(config: &ModelConfig) -> ModelConfig {
    let head = config.head_dim.max(2);
    let of = |part: usize| {
        let heads = (config.hidden_size / part / head).max(1);
        let inner = (config.intermediate_size / part).max(1);
        let layer = Sizes::of(&ModelConfig::llama(1, heads * head, 1, heads, inner)).layer;
        let layers = (WEIGHTS / layer.max(1)).clamp(1, config.layers.max(1));
        let tokens = config.vocab_size as u128 * (layers * heads * head) as u128
            / (config.layers.max(1) * config.hidden_size.max(1)) as u128;
        let tokens = usize::try_from(tokens).unwrap_or(usize::MAX);
        let tokens = tokens.clamp(*VOCABULARY.start(), *VOCABULARY.end());
        (
            layer,
            ModelConfig::llama(tokens, heads * head, layers, heads, inner),
        )
    };
    (0..usize::BITS)
        .map(|shift| of(1 << shift))
        .find(|(layer, config)| *layer <= WEIGHTS || config.heads == 1)
        .map_or_else(|| of(1).1, |(_, config)| config)
}

/// An end of records, and tokens of two bytes each.
fn vocabulary(tokens: usize) -> Result<Vocab, WorkError> {
    let bytes: Vec<[u8; 2]> = (0..u16::MAX).map(u16::to_be_bytes).collect();
    let spelled = bytes.iter().map(|bytes| TokenKind::Bytes(bytes));
    let kinds = std::iter::once(TokenKind::EndOfRecord).chain(spelled);
    Vocab::new(kinds.take(tokens.max(2))).map_err(|error| {
        TrainError::Model(model::ModelError::BadBatch {
            reason: error.to_string(),
        })
        .into()
    })
}

/// As many as fill the rows.
fn items(shape: &Shape, item_tokens: usize, vocabulary: usize) -> Arc<[Item]> {
    let id = |at: usize| u32::try_from(1 + at * 7919 % vocabulary.saturating_sub(1).max(1));
    let count = shape.rows * (shape.row_tokens / item_tokens).max(1);
    (0..count)
        .map(|item| {
            let ids = (1..item_tokens).map(|at| id(item * item_tokens + at).unwrap_or(1));
            Item::new(Vec::new(), ids.collect())
        })
        .collect()
}
