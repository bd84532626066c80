//! The decoder and its training pass.

use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use candle_core::{Device, Tensor};
use consilium_kernels::Vocab;
use consilium_kernels::head::{self, Weights};
use consilium_kernels::layers::{RopeTable, Scratch, Segment, rows};

use super::attention::AttentionBlock;
use super::block::{Banks, Context, apply};
use super::config::ModelConfig;
use super::feed_forward::FeedForwardBlock;
use super::frozen::{BaseMatrix, BaseStorage};
use super::head::{Gather, normalise};
use super::lora::{BlockFactors, Lora};
use super::parameters::{Bank, Plan, Slot, Values, with_floats};
use super::pass::Pass;
use super::{ModelError, NamedTensors, Placement, rope};

/// A decoder with its weights and, after [`attach_lora`](Model::attach_lora), its adapters.
#[derive(Debug)]
pub struct Model {
    config: ModelConfig,
    id_of_rank: Arc<[u32]>,
    rank_of_id: Vec<u32>,
    pub(crate) embedding: Bank,
    pub(crate) layers: Vec<Layer>,
    pub(crate) norm: Bank,
    pub(crate) head: Head,
    pub(crate) lora: Option<Lora>,
    pub(crate) scratch: Scratch,
    pub(crate) checkpoint_activations: bool,
    rope: Mutex<Arc<RopeTable>>,
    /// Where the model computes, if not with the host's own operations.
    pub(crate) placement: Option<Placement>,
    /// A frozen head of a model on a device, in the host's memory, once scoring has asked for it.
    pub(crate) host_head: OnceLock<Values>,
}

/// Blocks of a layer with their weights.
#[derive(Debug)]
pub(crate) struct Layer {
    pub(crate) attention: (Arc<AttentionBlock>, Bank),
    pub(crate) feed_forward: (Arc<FeedForwardBlock>, Bank),
}

/// Output head, rows in rank order.
#[derive(Debug)]
pub(crate) enum Head {
    Own(Bank),
    /// The embedding; while that is frozen, `ordered` holds its rows in rank order.
    Tied {
        ordered: Option<Values>,
    },
}

/// Items one after another; each sees only itself, and its positions start at zero.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Packed {
    /// Token ids of all items.
    pub tokens: Vec<u32>,
    /// Rows of each item; together all of `tokens`, in order.
    pub segments: Vec<Segment>,
}

impl Packed {
    /// Appends an item.
    pub fn push(&mut self, tokens: impl IntoIterator<Item = u32>) -> Segment {
        let start = self.tokens.len();
        self.tokens.extend(tokens);
        let segment = Segment {
            start,
            len: self.tokens.len() - start,
        };
        self.segments.push(segment);
        segment
    }
}

impl Model {
    /// Builds all banks, `fill` writes each tensor (the head in the order of ids). Each bank is stored as it
    /// is built, so that only one of them is there as f32 and otherwise at a time.
    pub(crate) fn build(
        config: ModelConfig,
        id_of_rank: Vec<u32>,
        storage: &BaseStorage,
        mut fill: impl FnMut(&Slot, &mut [f32]) -> Result<(), ModelError>,
    ) -> Result<Self, ModelError> {
        config
            .check()
            .map_err(|(field, reason)| super::config::ConfigError::Field {
                path: "config.json".into(),
                field: field.into(),
                reason,
            })?;
        let rank_of_id = inverse(&id_of_rank, config.vocab_size)?;
        let table = [config.vocab_size, config.hidden_size];
        let tables = storage.table_format();
        let (format, file) = (storage.format, storage.offload.as_ref());
        let mut embedding = single("model.embed_tokens.weight", &table).build(&mut fill)?;
        let mut head = None;
        if config.tied {
            let ordered = ordered(&embedding, &id_of_rank, config.hidden_size)?;
            let ordered = ordered.stored(embedding.slots(), tables, None)?;
            let ordered = Some(ordered);
            head = Some(Head::Tied { ordered });
        }
        embedding.store(tables, None)?;
        let mut layers = Vec::with_capacity(config.layers);
        for index in 0..config.layers {
            let (attention, attention_plan) = AttentionBlock::plan(&config, index);
            let (feed_forward, feed_forward_plan) = FeedForwardBlock::plan(&config, index);
            layers.push(Layer {
                attention: (Arc::new(attention), attention_plan.build(&mut fill)?),
                feed_forward: (Arc::new(feed_forward), feed_forward_plan.build(&mut fill)?),
            });
            if let Some(layer) = layers.last_mut() {
                layer.attention.1.store(format, file)?;
                layer.feed_forward.1.store(format, file)?;
                if let Some(placement) = &storage.placement {
                    placement.take_layer(&mut layer.attention.1)?;
                    placement.take_layer(&mut layer.feed_forward.1)?;
                }
            }
        }
        let norm = single("model.norm.weight", &[config.hidden_size]).build(&mut fill)?;
        let head = match head {
            Some(tied) => tied,
            None => {
                let plan = single("lm_head.weight", &table);
                let mut head = plan.build(|slot, out| {
                    fill(slot, out)?;
                    rows::permute(out, &id_of_rank, config.hidden_size);
                    Ok::<_, ModelError>(())
                })?;
                head.store(tables, None)?;
                Head::Own(head)
            }
        };
        let rope = rope::table(&config.rope, config.head_dim, 128.min(config.max_positions));
        let mut model = Self {
            config,
            id_of_rank: id_of_rank.into(),
            rank_of_id,
            embedding,
            layers,
            norm,
            head,
            lora: None,
            scratch: Scratch::default(),
            checkpoint_activations: false,
            rope: Mutex::new(Arc::new(rope)),
            placement: storage.placement.clone(),
            host_head: OnceLock::new(),
        };
        // Tables that are to be trained stay as they are until they are.
        if storage.tables {
            model.follow_placement()?;
        }
        Ok(model)
    }

    /// Shape of the decoder.
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// Rows of the embedding and columns of the logits.
    pub fn vocabulary(&self) -> usize {
        self.config.vocab_size
    }

    /// Rank of each id in the byte-sorted vocabulary.
    pub fn rank_of_id(&self) -> &[u32] {
        &self.rank_of_id
    }

    /// Id of each rank.
    pub fn id_of_rank(&self) -> &[u32] {
        &self.id_of_rank
    }

    /// Whether the head is the embedding.
    pub fn is_tied(&self) -> bool {
        matches!(self.head, Head::Tied { .. })
    }

    /// Whether training computes the activations of a block again in the backward pass (Chen et al. 2016):
    /// memory for a block's activations instead of all, for a forward pass more.
    pub fn checkpoint_activations(&mut self, again: bool) {
        self.checkpoint_activations = again;
    }

    /// Bytes of all weights without adapters, those in a file included.
    pub fn base_bytes(&self) -> usize {
        let ordered = match &self.head {
            Head::Tied {
                ordered: Some(values),
            } => values.bytes(),
            _ => 0,
        };
        let banks = self.base_banks();
        banks
            .iter()
            .map(|bank| bank.values().bytes())
            .sum::<usize>()
            + ordered
    }

    /// A copy that shares nothing that can change.
    pub fn duplicate(&self) -> Result<Self, ModelError> {
        let layer = |layer: &Layer| {
            Ok::<_, candle_core::Error>(Layer {
                attention: (
                    Arc::clone(&layer.attention.0),
                    layer.attention.1.duplicate()?,
                ),
                feed_forward: (
                    Arc::clone(&layer.feed_forward.0),
                    layer.feed_forward.1.duplicate()?,
                ),
            })
        };
        let pair = |[a, f]: &[BlockFactors; 2]| {
            Ok::<_, candle_core::Error>([a.duplicate()?, f.duplicate()?])
        };
        let lora = match &self.lora {
            None => None,
            Some(lora) => Some(Lora {
                config: lora.config.clone(),
                blocks: lora.blocks.iter().map(pair).collect::<Result<_, _>>()?,
            }),
        };
        let head = match &self.head {
            Head::Own(bank) => Head::Own(bank.duplicate()?),
            Head::Tied { .. } => Head::Tied { ordered: None },
        };
        let rope = Arc::clone(&self.rope.lock().unwrap_or_else(PoisonError::into_inner));
        let mut copy = Self {
            config: self.config.clone(),
            id_of_rank: Arc::clone(&self.id_of_rank),
            rank_of_id: self.rank_of_id.clone(),
            embedding: self.embedding.duplicate()?,
            layers: self.layers.iter().map(layer).collect::<Result<_, _>>()?,
            norm: self.norm.duplicate()?,
            head,
            lora,
            scratch: Scratch::default(),
            checkpoint_activations: self.checkpoint_activations,
            rope: Mutex::new(rope),
            placement: self.placement.clone(),
            host_head: OnceLock::new(),
        };
        copy.order_tied_head()?;
        copy.follow_placement()?;
        Ok(copy)
    }

    /// Makes every weight trainable and folds adapters, if any, into the weights.
    pub fn train_all(&mut self) -> Result<(), ModelError> {
        if self.lora.is_some() {
            let weights = self.weights()?;
            self.lora = None;
            self.set_weights(&weights)?;
        }
        self.embedding.train()?;
        self.norm.train()?;
        for layer in &mut self.layers {
            layer.attention.1.train()?;
            layer.feed_forward.1.train()?;
        }
        match &mut self.head {
            Head::Own(bank) => bank.train()?,
            Head::Tied { ordered } => *ordered = None,
        }
        self.follow_placement()
    }

    /// Runs a batch and keeps what a backward pass needs. The `rows` of the batch, which must be ascending,
    /// are those that predict something.
    pub fn forward(&self, batch: &Packed, rows: Vec<u32>) -> Result<Pass<'_>, ModelError> {
        if self.trainable().is_empty() {
            return Err(ModelError::Frozen);
        }
        self.check(batch, &rows)?;
        if let Some(placement) = &self.placement {
            let pass = self.forward_on(placement, batch, &rows)?;
            return Ok(Pass::on_device(self, placement, pass));
        }
        let context = self.context(batch);
        let trains_embedding = self.embedding.is_trainable();
        let mut x = self.embedded(batch)?;
        for (index, layer) in self.layers.iter().enumerate() {
            let (attention, feed_forward) = self.banks(index, layer);
            let wants_dx = index > 0 || trains_embedding;
            x = apply(&layer.attention.0, &context, attention, &x, wants_dx)?;
            x = apply(&layer.feed_forward.0, &context, feed_forward, &x, true)?;
        }
        let eps = self.config.eps();
        let normed = with_floats(&x, |x| {
            self.norm
                .read(|weight| normalise(&self.scratch, x, &rows, weight, eps))
        })??;
        Ok(Pass::on_host(self, x, rows, normed))
    }

    /// Rows of the embedding, in the graph where that is trained.
    fn embedded(&self, batch: &Packed) -> Result<Tensor, ModelError> {
        let width = self.config.hidden_size;
        if self.embedding.is_trainable() {
            let ids = batch.tokens.as_slice().into();
            return Ok(self.embedding.tensor()?.apply_op1(Gather { ids, width })?);
        }
        let rows = self.embed(&batch.tokens)?;
        let len = rows.len();
        Ok(Tensor::from_vec(rows, len, &Device::Cpu)?)
    }

    /// Trainable tensors in a fixed order: the order of [`Gradients`].
    pub(crate) fn trainable(&self) -> Vec<&Bank> {
        let mut banks = vec![&self.embedding];
        for (index, layer) in self.layers.iter().enumerate() {
            banks.extend([&layer.attention.1, &layer.feed_forward.1]);
            if let Some(lora) = &self.lora {
                let blocks = lora.blocks[index].iter();
                banks.extend(blocks.filter_map(|block| block.bank.as_ref()));
            }
        }
        banks.push(&self.norm);
        if let Head::Own(head) = &self.head {
            banks.push(head);
        }
        banks.retain(|bank| bank.is_trainable());
        banks
    }

    /// All weights without adapters.
    pub(crate) fn base_banks(&self) -> Vec<&Bank> {
        let mut banks = vec![&self.embedding];
        for layer in &self.layers {
            banks.extend([&layer.attention.1, &layer.feed_forward.1]);
        }
        banks.push(&self.norm);
        if let Head::Own(head) = &self.head {
            banks.push(head);
        }
        banks
    }

    /// Rows of a head in the order of ids, from rank order.
    pub(crate) fn in_id_order(&self, by_rank: &[f32]) -> Vec<f32> {
        permuted(by_rank, &self.rank_of_id, self.config.hidden_size)
    }

    /// Rows of a head in rank order, from the order of ids.
    pub(crate) fn in_rank_order(&self, by_id: &[f32]) -> Vec<f32> {
        permuted(by_id, &self.id_of_rank, self.config.hidden_size)
    }

    pub(crate) fn trains_head(&self) -> bool {
        match &self.head {
            Head::Own(bank) => bank.is_trainable(),
            Head::Tied { .. } => self.embedding.is_trainable(),
        }
    }

    pub(crate) fn freeze(&mut self) {
        self.embedding.freeze();
        self.norm.freeze();
        for layer in &mut self.layers {
            layer.attention.1.freeze();
            layer.feed_forward.1.freeze();
        }
        if let Head::Own(head) = &mut self.head {
            head.freeze();
        }
    }

    /// Gives a tied head rows of its own.
    pub(crate) fn untie(&mut self) -> Result<(), ModelError> {
        if !self.is_tied() {
            return Ok(());
        }
        let values = self.embedding.read(|values| self.in_rank_order(values))?;
        let plan = single(
            "lm_head.weight",
            &[self.config.vocab_size, self.config.hidden_size],
        );
        let head = plan.build(|_, out| {
            out.copy_from_slice(&values);
            Ok::<_, ModelError>(())
        })?;
        self.head = Head::Own(head);
        self.config.tied = false;
        Ok(())
    }

    pub(crate) fn order_tied_head(&mut self) -> Result<(), ModelError> {
        if self.is_tied() && !self.embedding.is_trainable() {
            let values = ordered(&self.embedding, &self.id_of_rank, self.config.hidden_size)?;
            self.head = Head::Tied {
                ordered: Some(values),
            };
        }
        Ok(())
    }

    /// The head's rows in rank order.
    pub(crate) fn head_values(&self) -> Result<Values, ModelError> {
        Ok(match &self.head {
            Head::Own(bank) => bank.values().clone(),
            Head::Tied {
                ordered: Some(ordered),
            } => ordered.clone(),
            Head::Tied { ordered: None } if self.placement.is_some() => {
                let table = self.embedding.tensor()?.detach();
                let ids = Tensor::new(&*self.id_of_rank, table.device())?;
                let rows = table.reshape(((), self.config.hidden_size))?;
                Values::Floats(rows.index_select(&ids, 0)?.flatten_all()?)
            }
            Head::Tied { ordered: None } => {
                let ids = Arc::clone(&self.id_of_rank);
                Values::Floats(self.embedding.tensor()?.apply_op1(Gather {
                    ids,
                    width: self.config.hidden_size,
                })?)
            }
        })
    }

    /// The head's table with a vocabulary: hidden states in, losses or records out.
    pub(crate) fn with_head<R>(
        &self,
        table: &Values,
        vocab: &Vocab,
        work: impl FnOnce(&head::Head<'_>) -> R,
    ) -> Result<R, ModelError> {
        let width = self.config.hidden_size;
        table.lend(|base| {
            let weights = match base.matrix(0, self.config.vocab_size, width) {
                BaseMatrix::Floats(_, table) => Weights::F32(table),
                BaseMatrix::Packed(matrix) => Weights::Packed(matrix),
            };
            Ok(work(&head::Head::best(vocab, weights, width)?))
        })?
    }

    pub(crate) fn banks<'a>(&'a self, index: usize, layer: &'a Layer) -> (Banks<'a>, Banks<'a>) {
        let lora = |part: usize| Some(self.lora.as_ref()?.blocks[index][part].lend());
        (
            Banks {
                base: &layer.attention.1,
                lora: lora(0),
            },
            Banks {
                base: &layer.feed_forward.1,
                lora: lora(1),
            },
        )
    }

    pub(crate) fn context(&self, batch: &Packed) -> Arc<Context> {
        let longest = batch
            .segments
            .iter()
            .map(|segment| segment.len)
            .max()
            .unwrap_or(0);
        // One more position, for branches that continue a whole item.
        let rope = self.rope(longest + 1);
        let segments = batch.segments.as_slice().into();
        Arc::new(Context {
            segments,
            rope,
            scratch: self.scratch.clone(),
            checkpoint: self.checkpoint_activations,
        })
    }

    pub(crate) fn rope(&self, positions: usize) -> Arc<RopeTable> {
        let mut table = self.rope.lock().unwrap_or_else(PoisonError::into_inner);
        if table.positions() < positions {
            let positions = positions.next_power_of_two();
            *table = Arc::new(rope::table(
                &self.config.rope,
                self.config.head_dim,
                positions,
            ));
        }
        Arc::clone(&table)
    }

    pub(crate) fn check(&self, batch: &Packed, rows: &[u32]) -> Result<(), ModelError> {
        let refuse = |reason: String| Err(ModelError::BadBatch { reason });
        let vocabulary = self.vocabulary();
        if let Some(id) = batch.tokens.iter().find(|&&id| id as usize >= vocabulary) {
            return refuse(format!(
                "token {id} is not below the vocabulary size {vocabulary}"
            ));
        }
        let mut end = 0;
        for segment in &batch.segments {
            if segment.start != end || segment.len == 0 {
                return refuse(format!(
                    "item at row {} does not follow row {end}",
                    segment.start
                ));
            }
            if segment.len > self.config.max_positions {
                return refuse(format!(
                    "item of {} tokens, the model's limit is {}",
                    segment.len, self.config.max_positions
                ));
            }
            end += segment.len;
        }
        if end == 0 || end != batch.tokens.len() {
            return refuse(format!(
                "items cover {end} of {} tokens",
                batch.tokens.len()
            ));
        }
        if !rows.is_sorted_by(|a, b| a < b) || rows.last().is_none_or(|&row| row as usize >= end) {
            return refuse(
                "rows of logits must be ascending rows of the batch, at least one".into(),
            );
        }
        Ok(())
    }

    fn set_weights(&self, weights: &NamedTensors) -> Result<(), ModelError> {
        for bank in self.base_banks() {
            bank.edit(|out| {
                for slot in bank.slots() {
                    out[slot.range()].copy_from_slice(&weights[&slot.name].values);
                }
            })?;
        }
        if let Head::Own(head) = &self.head {
            let by_rank = self.in_rank_order(&weights["lm_head.weight"].values);
            head.edit(|out| out.copy_from_slice(&by_rank))?;
        }
        Ok(())
    }
}

/// Every tensor of a model of this shape, by name and shape.
pub(crate) fn slots(config: &ModelConfig) -> Vec<Slot> {
    let table = [config.vocab_size, config.hidden_size];
    let mut slots = single("model.embed_tokens.weight", &table).into_slots();
    for layer in 0..config.layers {
        slots.extend(AttentionBlock::plan(config, layer).1.into_slots());
        slots.extend(FeedForwardBlock::plan(config, layer).1.into_slots());
    }
    slots.extend(single("model.norm.weight", &[config.hidden_size]).into_slots());
    if !config.tied {
        slots.extend(single("lm_head.weight", &table).into_slots());
    }
    slots
}

fn single(name: &str, shape: &[usize]) -> Plan {
    let mut plan = Plan::default();
    plan.push(name.to_owned(), shape);
    plan
}

/// The embedding's rows in rank order.
fn ordered(embedding: &Bank, id_of_rank: &[u32], width: usize) -> Result<Values, ModelError> {
    let values = embedding.read(|values| permuted(values, id_of_rank, width))?;
    let len = values.len();
    Ok(Values::Floats(Tensor::from_vec(values, len, &Device::Cpu)?))
}

fn permuted(table: &[f32], order: &[u32], width: usize) -> Vec<f32> {
    let mut out = vec![0f32; table.len()];
    rows::gather(table, order, width, &mut out);
    out
}

fn inverse(id_of_rank: &[u32], vocab_size: usize) -> Result<Vec<u32>, ModelError> {
    let bad = || ModelError::BadOrder { vocab_size };
    if id_of_rank.len() != vocab_size {
        return Err(bad());
    }
    let mut rank_of_id = vec![u32::MAX; vocab_size];
    for (rank, &id) in (0u32..).zip(id_of_rank) {
        match rank_of_id.get_mut(id as usize) {
            Some(place) if *place == u32::MAX => *place = rank,
            _ => return Err(bad()),
        }
    }
    Ok(rank_of_id)
}
