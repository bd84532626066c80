//! The second half of a training step: from the loss back to every trained tensor.

use std::sync::Mutex;

use candle_core::{DType, Device, Tensor};
use consilium_kernels::head::Head;
use consilium_kernels::layers::rows;
use consilium_kernels::loss::ItemLoss;
use consilium_kernels::{LossError, Vocab};

use super::device::DevicePass;
use super::head::{HeadGradients, HeadLoss, Normed};
use super::parameters::{Bank, Values, is_plain, with_floats};
use super::{Model, ModelError, Placement};

/// A term of the loss: reads the head and the rows' hidden states, adds its gradient to that of the hidden states and, where it is
/// trained, of the head's rows by rank, and gives its value.
pub(crate) type FurtherLoss<'a> =
    dyn Fn(&Head<'_>, &[f32], &mut [f32], Option<&mut [f32]>) -> Result<f64, LossError> + 'a;

/// A forward pass that waits for its loss.
#[derive(Debug)]
pub struct Pass<'m> {
    model: &'m Model,
    trace: Trace<'m>,
}

/// What the backward pass needs.
#[derive(Debug)]
enum Trace<'m> {
    Host(HostPass),
    Device(&'m Placement, DevicePass),
}

/// A graph of candle whose blocks are operations of our own.
#[derive(Debug)]
struct HostPass {
    hidden: Tensor,
    rows: Vec<u32>,
    normed: Normed,
}

impl<'m> Pass<'m> {
    pub(crate) fn on_host(
        model: &'m Model,
        hidden: Tensor,
        rows: Vec<u32>,
        normed: Normed,
    ) -> Self {
        let trace = Trace::Host(HostPass {
            hidden,
            rows,
            normed,
        });
        Self { model, trace }
    }

    pub(crate) fn on_device(model: &'m Model, placement: &'m Placement, pass: DevicePass) -> Self {
        let trace = Trace::Device(placement, pass);
        Self { model, trace }
    }

    /// Hidden states of the rows after the final norm.
    #[cfg(test)]
    pub(crate) fn hidden_rows(&self) -> Vec<f32> {
        match &self.trace {
            Trace::Host(pass) => pass.normed.values.clone(),
            Trace::Device(_, pass) => {
                let normed = pass.normed().flatten_all().unwrap();
                with_floats(&normed, <[f32]>::to_vec).unwrap()
            }
        }
    }

    /// The loss of `items`, whose rows are those of the pass one after the other, and the gradients of all
    /// trainable tensors. The logits of the batch never exist at once.
    pub fn backward<E: From<ModelError> + From<LossError>>(
        self,
        vocab: &Vocab,
        items: &[ItemLoss<'_>],
    ) -> Result<(f64, Gradients), E> {
        self.backward_with(vocab, items, None)
    }

    /// As [`backward`](Self::backward), with a further term of the loss.
    pub(crate) fn backward_with<E: From<ModelError> + From<LossError>>(
        self,
        vocab: &Vocab,
        items: &[ItemLoss<'_>],
        more: Option<&FurtherLoss<'_>>,
    ) -> Result<(f64, Gradients), E> {
        let model = self.model;
        match self.trace {
            Trace::Host(pass) => pass.backward(model, vocab, items, more),
            Trace::Device(placement, pass) => pass.backward(model, placement, vocab, items, more),
        }
    }
}

impl HostPass {
    fn backward<E: From<ModelError> + From<LossError>>(
        self,
        model: &Model,
        vocab: &Vocab,
        items: &[ItemLoss<'_>],
        more: Option<&FurtherLoss<'_>>,
    ) -> Result<(f64, Gradients), E> {
        let table = model.head_values()?;
        let mut dnormed = model.scratch.take(self.normed.values.len());
        let mut dhead = model.trains_head().then(|| vec![0f32; table.len()]);
        let loss = model.with_head(&table, vocab, |head| {
            let hidden = &self.normed.values;
            let loss = head.loss(hidden, items, &mut dnormed, dhead.as_deref_mut())?;
            let more = match more {
                Some(more) => more(head, hidden, &mut dnormed, dhead.as_deref_mut())?,
                None => 0.0,
            };
            Ok::<f64, LossError>(loss + more)
        })??;
        let gradients = self.gradients(model, loss, &table, dnormed, dhead)?;
        Ok((loss, gradients))
    }

    #[expect(
        clippy::cast_possible_truncation,
        reason = "candle keeps the loss as f32"
    )]
    fn gradients(
        self,
        model: &Model,
        value: f64,
        table: &Values,
        dnormed: Vec<f32>,
        dhead: Option<Vec<f32>>,
    ) -> Result<Gradients, ModelError> {
        let norm = model.norm.tensor()?;
        // A head that is not trained takes no part in the graph.
        let table = match table {
            Values::Floats(table) => table.clone(),
            Values::Frozen(_) => Tensor::zeros(0, DType::F32, &Device::Cpu)?,
        };
        let root = HeadLoss {
            loss: value as f32,
            rows: self.rows,
            state: Mutex::new(Some(HeadGradients {
                normed: self.normed,
                dnormed,
                dhead,
            })),
            scratch: model.scratch.clone(),
            train_norm: model.norm.is_trainable(),
        };
        let loss = self.hidden.apply_op3(norm, &table, root)?;
        let mut store = loss.backward()?;
        let take = |bank: &&Bank| {
            store
                .remove(bank.tensor()?)
                .ok_or_else(|| ModelError::NoGradient {
                    name: bank
                        .slots()
                        .first()
                        .map(|slot| slot.name.clone())
                        .unwrap_or_default(),
                })
        };
        let tensors = model
            .trainable()
            .iter()
            .map(take)
            .collect::<Result<_, _>>()?;
        Ok(Gradients { tensors })
    }
}

/// Gradients of all trainable tensors, in the order of the model's banks.
#[derive(Debug)]
pub struct Gradients {
    pub(crate) tensors: Vec<Tensor>,
}

impl Gradients {
    /// Calls `f` with the name and gradient of each trainable tensor (the head's rows by rank).
    pub fn each(&self, model: &Model, mut f: impl FnMut(&str, &[f32])) -> Result<(), ModelError> {
        for (bank, gradient) in model.trainable().iter().zip(&self.tensors) {
            with_floats(gradient, |gradient| {
                for slot in bank.slots() {
                    f(&slot.name, &gradient[slot.range()]);
                }
            })?;
        }
        Ok(())
    }

    /// Adds the gradients of another batch.
    pub fn add(&mut self, other: &Self) -> Result<(), ModelError> {
        for (sum, term) in self.tensors.iter_mut().zip(&other.tensors) {
            if !is_plain(sum) {
                *sum = (&*sum + term)?;
                continue;
            }
            with_floats(term, |term| super::edit(sum, |sum| rows::add(term, sum)))??;
        }
        Ok(())
    }
}
