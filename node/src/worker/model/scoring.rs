//! Forward passes for scoring: hidden states of items, then of tokens that branch off them.

use std::sync::Arc;

use candle_core::{DType, Device};
use consilium_kernels::Vocab;
use consilium_kernels::head::Head;
use consilium_kernels::layers::rows::gather;
use consilium_kernels::layers::{Branch, Segment, attention};
use consilium_kernels::matmul::{View, ViewMut, Write, abt};

use super::ModelError;
use super::block::{Block, Context};
use super::decoder::{Layer, Model, Packed};
use super::device::DeviceKeyValues;
use super::feed_forward::FeedForwardBlock;
use super::frozen::BaseMatrix;
use super::head::normalise;
use super::parameters::Values;

/// Hidden states of a batch and what branches of it need.
#[derive(Debug)]
pub struct ScoringPass {
    /// Hidden states after the final norm `[rows, width]`: what the output head reads.
    pub hidden: Vec<f32>,
    /// Keys and values of all layers.
    pub kv: KeyValues,
}

/// Keys and values of a batch, for branches of its items.
#[derive(Debug)]
pub struct KeyValues {
    cache: Cache,
    context: Arc<Context>,
}

/// Keys and values by layer.
#[derive(Debug)]
enum Cache {
    Host(Vec<Vec<f32>>),
    Device(DeviceKeyValues),
}

/// A token after a prefix of an item, in place of the item's own.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BranchToken {
    /// Index of the item in the batch.
    pub item: u32,
    /// Tokens of the item that it sees, the leading end-of-record token included.
    pub prefix: u32,
    /// Id of the token.
    pub token: u32,
}

impl Model {
    /// Hidden states of the given ascending rows of a batch, without a graph.
    pub fn score(&self, batch: &Packed, rows: &[u32]) -> Result<ScoringPass, ModelError> {
        self.check(batch, rows)?;
        let context = self.context(batch);
        if let Some(placement) = &self.placement {
            let (hidden, cache) = self.score_on(placement, batch, rows)?;
            let cache = Cache::Device(cache);
            let kv = KeyValues { cache, context };
            return Ok(ScoringPass { hidden, kv });
        }
        let mut x = self.embed(&batch.tokens)?;
        let mut layers = Vec::with_capacity(self.layers.len());
        for (index, layer) in self.layers.iter().enumerate() {
            let (attention, feed_forward) = self.banks(index, layer);
            let (y, kept) =
                attention.read(|weights| layer.attention.0.forward(&context, weights, &x))?;
            layers.push(kept.into_cache(&context));
            let (y, kept) =
                feed_forward.read(|weights| layer.feed_forward.0.forward(&context, weights, &y))?;
            FeedForwardBlock::release(&context, kept);
            x = y;
        }
        let hidden = self.normed(&x, rows)?;
        Ok(ScoringPass {
            hidden,
            kv: KeyValues {
                cache: Cache::Host(layers),
                context,
            },
        })
    }

    /// Hidden states `[branches, width]` after each branch token, all in one pass: a branch attends to its
    /// item's prefix and to itself. Branches must be ordered by item.
    pub fn branch_hidden(
        &self,
        kv: &KeyValues,
        branches: &[BranchToken],
    ) -> Result<Vec<f32>, ModelError> {
        if branches.is_empty() {
            return Ok(Vec::new());
        }
        let places = self.places(kv, branches)?;
        let tokens: Vec<u32> = branches.iter().map(|branch| branch.token).collect();
        let layers = match (&kv.cache, &self.placement) {
            (Cache::Host(layers), _) => layers,
            (Cache::Device(cache), Some(placement)) => {
                return self.branches_on(placement, cache, &places, &tokens);
            }
            (Cache::Device(_), None) => {
                let reason = "the batch was scored on a device that the model is not on".into();
                return Err(ModelError::BadBatch { reason });
            }
        };
        let mut x = self.embed(&tokens)?;
        for ((index, layer), cache) in self.layers.iter().enumerate().zip(layers) {
            x = self.branch_layer((&kv.context, cache), index, layer, &places, &x)?;
        }
        let rows: Vec<u32> = (0u32..).take(branches.len()).collect();
        self.normed(&x, &rows)
    }

    /// Gives `work` the output head: hidden states in, records, bits or losses out.
    pub fn score_with<R>(
        &self,
        vocab: &Vocab,
        work: impl FnOnce(&Head<'_>) -> R,
    ) -> Result<R, ModelError> {
        self.with_head(&self.head_on_host()?, vocab, work)
    }

    /// The head's rows in rank order, in the host's memory.
    fn head_on_host(&self) -> Result<Values, ModelError> {
        let stays = self.placement.is_none() || self.trains_head();
        if stays {
            return self.head_values();
        }
        if let Some(table) = self.host_head.get() {
            return Ok(table.clone());
        }
        let table = match self.head_values()? {
            Values::Floats(table) => {
                let table = table.detach().to_device(&Device::Cpu)?;
                Values::Floats(table.to_dtype(DType::F32)?)
            }
            packed @ Values::Frozen(_) => packed,
        };
        Ok(self.host_head.get_or_init(|| table).clone())
    }

    /// Logits `[rows, vocabulary]`, columns in rank order, of hidden states: for comparison with other
    /// implementations. Scoring and training never hold them all.
    pub fn logits(&self, hidden: &[f32]) -> Result<Vec<f32>, ModelError> {
        let (width, vocabulary) = (self.config().hidden_size, self.vocabulary());
        let rows = hidden.len() / width;
        let mut out = vec![0f32; rows * vocabulary];
        self.head_values()?.read(|head| {
            let head = View::new(head, vocabulary, width);
            let hidden = View::new(hidden, rows, width);
            let out = ViewMut::new(&mut out, rows, vocabulary);
            abt(out, Write::Replace, hidden, head, 1.0);
        })?;
        Ok(out)
    }

    fn branch_layer(
        &self,
        (context, cache): (&Context, &[f32]),
        index: usize,
        layer: &Layer,
        places: &[Branch],
        x: &[f32],
    ) -> Result<Vec<f32>, ModelError> {
        let (attention, feed_forward) = self.banks(index, layer);
        let y = attention.read(|weights| {
            let block = &layer.attention.0;
            let projected = block.qkv(context, weights, x);
            let mut mixed = context.scratch.take(places.len() * block.heads.out());
            let (rope, qkv) = (&context.rope, &projected.qkv);
            attention::branches(block.heads, places, rope, cache, qkv, &mut mixed);
            let y = block.finish(context, weights, x, &mixed);
            for buffer in [projected.into_cache(context), mixed] {
                context.scratch.give(buffer);
            }
            y
        })?;
        let (y, kept) =
            feed_forward.read(|weights| layer.feed_forward.0.forward(context, weights, &y))?;
        FeedForwardBlock::release(context, kept);
        Ok(y)
    }

    fn places(&self, kv: &KeyValues, branches: &[BranchToken]) -> Result<Vec<Branch>, ModelError> {
        let refuse = |reason: String| ModelError::BadBatch { reason };
        if !branches.is_sorted_by_key(|branch| branch.item) {
            return Err(refuse("branches are not ordered by item".into()));
        }
        let place = |branch: &BranchToken| {
            let segments: &[Segment] = &kv.context.segments;
            let segment = segments.get(branch.item as usize);
            let prefix = branch.prefix as usize;
            match segment {
                Some(&segment)
                    if prefix <= segment.len && (branch.token as usize) < self.vocabulary() =>
                {
                    Ok(Branch { segment, prefix })
                }
                _ => Err(refuse(format!(
                    "{branch:?} is outside of its item or the vocabulary"
                ))),
            }
        };
        branches.iter().map(place).collect()
    }

    /// Rows of the embedding.
    pub(super) fn embed(&self, tokens: &[u32]) -> Result<Vec<f32>, ModelError> {
        let width = self.config().hidden_size;
        let mut x = vec![0f32; tokens.len() * width];
        self.embedding
            .values()
            .lend(|base| match base.matrix(0, self.vocabulary(), width) {
                BaseMatrix::Floats(_, table) => gather(table, tokens, width, &mut x),
                BaseMatrix::Packed(table) => {
                    for (x, &token) in x.chunks_exact_mut(width).zip(tokens) {
                        table.slice(token as usize, 1).decode(x);
                    }
                }
            })?;
        Ok(x)
    }

    /// Chosen rows of the residual stream after the final norm.
    fn normed(&self, x: &[f32], rows: &[u32]) -> Result<Vec<f32>, ModelError> {
        let eps = self.config().eps();
        let normed = self
            .norm
            .read(|weight| normalise(&self.scratch, x, rows, weight, eps))?;
        for buffer in [normed.chosen, normed.inverse] {
            self.scratch.give(buffer);
        }
        Ok(normed.values)
    }
}
