//! The second half of a training step: from the loss back to every trained tensor.

use std::sync::Mutex;

use candle_core::{DType, Device, Tensor};
use consilium_kernels::head::Head;
use consilium_kernels::loss::ItemLoss;
use consilium_kernels::{LossError, Vocab};

use super::head::{HeadGradients, HeadLoss, Normed};
use super::parameters::{Bank, Values, with_floats};
use super::{Model, ModelError};

/// A forward pass that waits for its loss.
#[derive(Debug)]
pub struct Pass<'m> {
    pub(crate) model: &'m Model,
    pub(crate) hidden: Tensor,
    pub(crate) rows: Vec<u32>,
    pub(crate) normed: Normed,
}

impl Pass<'_> {
    /// Hidden states of the rows after the final norm.
    #[cfg(test)]
    pub(crate) fn hidden_rows(&self) -> &[f32] {
        &self.normed.values
    }

    /// The loss of `items`, whose rows are those of the pass one after the other, and the gradients of all
    /// trainable tensors. The logits of the batch never exist at once.
    pub fn backward<E: From<ModelError> + From<LossError>>(
        self,
        vocab: &Vocab,
        items: &[ItemLoss<'_>],
    ) -> Result<(f64, Gradients), E> {
        self.backward_with(vocab, items, |_, _, _, _| Ok(0.0))
    }

    /// As [`backward`](Self::backward), and adds what `more` makes of the head and the rows' hidden states: its loss, and
    /// its gradient added to that of the hidden states and, where it is trained, of the head.
    pub(crate) fn backward_with<E: From<ModelError> + From<LossError>>(
        self,
        vocab: &Vocab,
        items: &[ItemLoss<'_>],
        more: impl FnOnce(&Head<'_>, &[f32], &mut [f32], Option<&mut [f32]>) -> Result<f64, LossError>,
    ) -> Result<(f64, Gradients), E> {
        let model = self.model;
        let table = model.head_values()?;
        let mut dnormed = model.scratch.take(self.normed.values.len());
        let mut dhead = model.trains_head().then(|| vec![0f32; table.len()]);
        let loss = model.with_head(&table, vocab, |head| {
            let hidden = &self.normed.values;
            let loss = head.loss(hidden, items, &mut dnormed, dhead.as_deref_mut())?;
            Ok::<f64, LossError>(loss + more(head, hidden, &mut dnormed, dhead.as_deref_mut())?)
        })??;
        let gradients = self.gradients(loss, &table, dnormed, dhead)?;
        Ok((loss, gradients))
    }

    #[expect(
        clippy::cast_possible_truncation,
        reason = "candle keeps the loss as f32"
    )]
    fn gradients(
        self,
        value: f64,
        table: &Values,
        dnormed: Vec<f32>,
        dhead: Option<Vec<f32>>,
    ) -> Result<Gradients, ModelError> {
        let model = self.model;
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
        for (sum, term) in self.tensors.iter().zip(&other.tensors) {
            with_floats(term, |term| {
                super::edit(sum, |sum| {
                    for (sum, term) in sum.iter_mut().zip(term) {
                        *sum += term;
                    }
                })
            })??;
        }
        Ok(())
    }
}
