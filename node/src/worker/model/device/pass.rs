//! Forward and backward passes of a training step.

use candle_core::{DType, Device, Tensor};
use consilium_kernels::layers::Heads;
use consilium_kernels::loss::ItemLoss;
use consilium_kernels::{LossError, Vocab};

use super::Placement;
use super::attention::Packing;
use super::blocks::{KeptAttention, KeptFeedForward, Shared};
use super::head;
use super::linear::{BankGradient, BlockTensors};
use super::ops::{Angles, positions, rms_norm, rms_norm_backward};
use crate::worker::model::block::Banks;
use crate::worker::model::decoder::Layer;
use crate::worker::model::parameters::{Bank, Values, with_floats};
use crate::worker::model::pass::Gradients;
use crate::worker::model::{FurtherLoss, Head, Model, ModelError, Packed};

/// A forward pass that waits for its loss.
pub(crate) struct DevicePass {
    shared: Shared,
    /// Ids of all tokens, and rows that predict something.
    tokens: Tensor,
    rows: Tensor,
    layers: Vec<Trace>,
    /// Rows of the residual stream behind the last layer, and the chosen ones before and after the final norm.
    last: (usize, usize),
    chosen: Tensor,
    normed: Tensor,
}

impl std::fmt::Debug for DevicePass {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("DevicePass")
            .field("layers", &self.layers.len())
            .finish_non_exhaustive()
    }
}

/// Inputs of a layer's blocks and, unless they are made again, what their backward passes need.
struct Trace {
    x: Tensor,
    attention: Option<KeptAttention>,
    middle: Tensor,
    feed_forward: Option<KeptFeedForward>,
}

/// Gradient with respect to a block's input, and that of what is trained in the block.
type BlockGradients = (Option<Tensor>, Option<Tensor>);

impl Model {
    /// Runs a checked batch and keeps what a backward pass needs.
    pub(crate) fn forward_on(
        &self,
        placement: &Placement,
        batch: &Packed,
        rows: &[u32],
    ) -> Result<DevicePass, ModelError> {
        let shared = self.shared(placement, batch)?;
        let tokens = ids(&batch.tokens, &placement.device)?;
        let rows = ids(rows, &placement.device)?;
        let keeps = !self.checkpoint_activations;
        let mut x = self.embedded_on(placement, &batch.tokens)?;
        let mut layers = Vec::with_capacity(self.layers.len());
        for (index, layer) in self.layers.iter().enumerate() {
            let (attention, feed_forward) = self.banks(index, layer);
            let weights = BlockTensors::new(attention, placement)?;
            let (middle, kept_attention) = layer.attention.0.forward_on(&shared, &weights, &x)?;
            let weights = BlockTensors::new(feed_forward, placement)?;
            let (y, kept_feed_forward) = layer.feed_forward.0.forward_on(&weights, &middle)?;
            layers.push(Trace {
                x,
                attention: keeps.then_some(kept_attention),
                middle,
                feed_forward: keeps.then_some(kept_feed_forward),
            });
            x = y;
        }
        let chosen = x.index_select(&rows, 0)?;
        let normed = rms_norm(&chosen, &self.norm_on(placement)?, self.config().eps())?;
        Ok(DevicePass {
            shared,
            tokens,
            rows,
            layers,
            last: x.dims2()?,
            chosen,
            normed,
        })
    }

    /// What all layers share in a pass over a batch.
    pub(super) fn shared(
        &self,
        placement: &Placement,
        batch: &Packed,
    ) -> candle_core::Result<Shared> {
        let context = self.context(batch);
        let heads: Vec<Heads> = (self.layers.iter())
            .map(|layer| layer.attention.0.heads)
            .collect();
        let mut windows: Vec<usize> = heads.iter().map(|heads| heads.window).collect();
        windows.sort_unstable();
        windows.dedup();
        let (device, dtype) = (&placement.device, placement.dtype);
        let angles = |scale| {
            let rows = positions(&batch.segments);
            Angles::new(&context.rope, rows, scale, device, dtype)
        };
        let queries = self.config().heads;
        Ok(Shared {
            packing: Packing::new(&batch.segments, queries, &windows, device, dtype)?,
            queries: angles(heads.first().map_or(1.0, |heads| heads.scale()))?,
            keys: angles(1.0)?,
        })
    }

    /// Rows of the embedding.
    pub(super) fn embedded_on(
        &self,
        placement: &Placement,
        tokens: &[u32],
    ) -> Result<Tensor, ModelError> {
        let Placement { device, dtype, .. } = placement;
        let width = self.config().hidden_size;
        let rows = match self.embedding.values() {
            Values::Floats(table) => {
                let table = table.detach().reshape((self.vocabulary(), width))?;
                table.index_select(&ids(tokens, table.device())?, 0)?
            }
            Values::Frozen(_) => {
                let rows = self.embed(tokens)?;
                Tensor::from_vec(rows, (tokens.len(), width), &Device::Cpu)?
            }
        };
        Ok(rows.to_dtype(*dtype)?.to_device(device)?)
    }

    /// Weight of the final norm.
    pub(super) fn norm_on(&self, placement: &Placement) -> candle_core::Result<Tensor> {
        self.norm.values().on(&placement.device, placement.dtype)
    }

    /// The head's rows in rank order, `[vocabulary, width]`.
    fn head_on(&self, placement: &Placement) -> Result<Tensor, ModelError> {
        let table = self.head_values()?.on(&placement.device, placement.dtype)?;
        Ok(table.reshape((self.vocabulary(), self.config().hidden_size))?)
    }

    /// Backward through both blocks of a layer; the blocks' own gradients are added to `gradients`.
    fn layer_backward(
        &self,
        placement: &Placement,
        shared: &Shared,
        (index, layer): (usize, &Layer),
        trace: Trace,
        dy: &Tensor,
        wants_dx: bool,
    ) -> Result<(Option<Tensor>, [Option<Tensor>; 2]), ModelError> {
        let (attention, feed_forward) = self.banks(index, layer);
        let (dmiddle, second) = with_gradient(feed_forward, placement, |weights, gradient| {
            let kept = match trace.feed_forward {
                Some(kept) => kept,
                None => layer.feed_forward.0.forward_on(weights, &trace.middle)?.1,
            };
            let block = &layer.feed_forward.0;
            block.backward_on(weights, (&trace.middle, &kept), dy, gradient)
        })?;
        let dmiddle = dmiddle.ok_or_else(|| self.no_gradient(index))?;
        let (dx, first) = with_gradient(attention, placement, |weights, gradient| {
            let block = &layer.attention.0;
            let kept = match trace.attention {
                Some(kept) => kept,
                None => block.forward_on(shared, weights, &trace.x)?.1,
            };
            let input = (&trace.x, &kept);
            block.backward_on(shared, weights, input, &dmiddle, gradient, wants_dx)
        })?;
        Ok((dx, [first, second]))
    }

    fn no_gradient(&self, layer: usize) -> ModelError {
        ModelError::NoGradient {
            name: format!("model.layers.{layer}"),
        }
    }
}

/// Runs a block backward and puts the gradients of what it trains together.
fn with_gradient(
    banks: Banks<'_>,
    placement: &Placement,
    backward: impl FnOnce(&BlockTensors<'_>, &mut BankGradient) -> candle_core::Result<Option<Tensor>>,
) -> Result<BlockGradients, ModelError> {
    let weights = BlockTensors::new(banks, placement)?;
    let mut gradient = BankGradient::default();
    let dx = backward(&weights, &mut gradient)?;
    let factors = banks.lora.and_then(|lora| lora.bank);
    let mut trained = [Some(banks.base), factors].into_iter().flatten();
    let trained = trained.rfind(|bank| bank.is_trainable());
    let gradient = trained.map(|bank: &Bank| gradient.into_tensor(bank));
    Ok((dx, gradient.transpose()?))
}

impl DevicePass {
    /// The loss of `items`, whose rows are those of the pass, and the gradients of all trainable tensors.
    pub(crate) fn backward<E: From<ModelError> + From<LossError>>(
        mut self,
        model: &Model,
        placement: &Placement,
        vocab: &Vocab,
        items: &[ItemLoss<'_>],
        more: Option<&FurtherLoss<'_>>,
    ) -> Result<(f64, Gradients), E> {
        let table = model.head_on(placement)?;
        let trains_head = model.trains_head();
        let (mut loss, mut dnormed, mut dhead) =
            head::loss::<E>(&table, &self.normed, vocab, items, trains_head)?;
        if let Some(more) = more {
            let (value, by_hidden, by_head) = self.on_host::<E>(model, vocab, more)?;
            loss += value;
            dnormed = (dnormed + by_hidden).map_err(ModelError::from)?;
            if let (Some(sum), Some(by_head)) = (&mut dhead, by_head) {
                *sum = (&*sum + by_head).map_err(ModelError::from)?;
            }
        }
        let layers = std::mem::take(&mut self.layers);
        Ok((
            loss,
            self.gradients(model, placement, layers, &dnormed, dhead)?,
        ))
    }

    /// A further term of the loss, computed on the host, with its gradients by the rows' hidden states and by the head.
    fn on_host<E: From<ModelError> + From<LossError>>(
        &self,
        model: &Model,
        vocab: &Vocab,
        more: &FurtherLoss<'_>,
    ) -> Result<(f64, Tensor, Option<Tensor>), E> {
        let normed = self.normed.flatten_all().map_err(ModelError::from)?;
        let hidden = with_floats(&normed, <[f32]>::to_vec).map_err(ModelError::from)?;
        let mut by_hidden = vec![0f32; hidden.len()];
        let values = model.vocabulary() * model.config().hidden_size;
        let mut by_head = model.trains_head().then(|| vec![0f32; values]);
        let value = model.score_with(vocab, |head| {
            more(head, &hidden, &mut by_hidden, by_head.as_deref_mut())
        })??;
        let back = |values: Vec<f32>, dtype| {
            let width = model.config().hidden_size;
            let shape = (values.len() / width, width);
            let rows = Tensor::from_vec(values, shape, &Device::Cpu)?;
            rows.to_dtype(dtype)?.to_device(self.normed.device())
        };
        let by_hidden = back(by_hidden, self.normed.dtype()).map_err(ModelError::from)?;
        let by_head = by_head.map(|by_head| back(by_head, DType::F32)).transpose();
        Ok((value, by_hidden, by_head.map_err(ModelError::from)?))
    }

    fn gradients(
        &self,
        model: &Model,
        placement: &Placement,
        mut layers: Vec<Trace>,
        dnormed: &Tensor,
        dhead: Option<Tensor>,
    ) -> Result<Gradients, ModelError> {
        let (weight, eps) = (model.norm_on(placement)?, model.config().eps());
        let trains_norm = model.norm.is_trainable();
        let (dchosen, dnorm) = rms_norm_backward(&self.chosen, &weight, eps, dnormed, trains_norm)?;
        let zeros = Tensor::zeros(self.last, placement.dtype, &placement.device)?;
        let mut dx = zeros.index_add(&self.rows, &dchosen, 0)?;
        let trains_embedding = model.embedding.is_trainable();
        let mut reversed = Vec::new();
        for (index, layer) in model.layers.iter().enumerate().rev() {
            let trace = layers.pop().ok_or_else(|| model.no_gradient(index))?;
            let wants_dx = index > 0 || trains_embedding;
            let place = (index, layer);
            let (back, [first, second]) =
                model.layer_backward(placement, &self.shared, place, trace, &dx, wants_dx)?;
            reversed.extend([second, first].into_iter().flatten());
            match back {
                Some(back) => dx = back,
                None if wants_dx => return Err(model.no_gradient(index)),
                None => {}
            }
        }
        let mut tensors = Vec::with_capacity(reversed.len() + 3);
        if trains_embedding {
            tensors.push(self.embedding_gradient(model, &dx, dhead.as_ref())?);
        }
        tensors.extend(reversed.into_iter().rev());
        tensors.extend(dnorm);
        if matches!(model.head, Head::Own(_)) {
            tensors.extend(dhead.map(|dhead| dhead.flatten_all()).transpose()?);
        }
        let expected = model.trainable();
        if let Some(bank) = expected.get(tensors.len()) {
            let name = bank.slots().first().map(|slot| slot.name.clone());
            let name = name.unwrap_or_default();
            return Err(ModelError::NoGradient { name });
        }
        Ok(Gradients { tensors })
    }

    /// Rows that were read, and of a tied head all rows.
    fn embedding_gradient(
        &self,
        model: &Model,
        dx: &Tensor,
        dhead: Option<&Tensor>,
    ) -> Result<Tensor, ModelError> {
        let shape = (model.vocabulary(), model.config().hidden_size);
        let tied = dhead.filter(|_| model.is_tied());
        let start = match tied {
            Some(dhead) => dhead.index_select(&ids(model.rank_of_id(), dx.device())?, 0)?,
            None => Tensor::zeros(shape, DType::F32, dx.device())?,
        };
        let sum = start.index_add(&self.tokens, &dx.to_dtype(DType::F32)?, 0)?;
        Ok(sum.flatten_all()?)
    }

    /// Hidden states of the rows after the final norm.
    #[cfg(test)]
    pub(crate) fn normed(&self) -> &Tensor {
        &self.normed
    }
}

/// Numbers as a tensor on the device.
pub(super) fn ids(numbers: &[u32], device: &Device) -> candle_core::Result<Tensor> {
    Tensor::from_slice(numbers, numbers.len(), device)
}
