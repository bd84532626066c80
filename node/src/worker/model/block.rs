//! A residual block of the decoder as one node of candle's graph.

use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};

use candle_core::{CpuStorage, CustomOp2, Layout, Shape, Tensor, bail};

use super::frozen::Base;
use super::ops::attention::Segment;
use super::ops::linear::{Factors, Weights};
use super::ops::rope::RopeTable;
use super::ops::scratch::Scratch;
use super::parameters::{Bank, Values, floats, with_floats};

/// What all blocks of one pass share.
#[derive(Debug)]
pub(crate) struct Context {
    pub(crate) segments: Arc<[Segment]>,
    pub(crate) rope: Arc<RopeTable>,
    pub(crate) scratch: Scratch,
    /// Whether activations are computed again in the backward pass (Chen et al. 2016) rather than kept.
    pub(crate) checkpoint: bool,
}

/// A residual block: values in, values of the same shape out.
pub(crate) trait Block: fmt::Debug + Send + Sync + 'static {
    /// Activations that the backward pass needs.
    type Kept: Send + 'static;

    /// Name in candle's messages.
    const NAME: &'static str;

    /// What the output is made of.
    fn activations(&self, context: &Context, weights: Weights<'_>, x: &[f32]) -> Self::Kept;

    /// The block's output, its input included.
    fn output(
        &self,
        context: &Context,
        weights: Weights<'_>,
        x: &[f32],
        kept: &Self::Kept,
    ) -> Vec<f32>;

    /// Gives all buffers back.
    fn release(context: &Context, kept: Self::Kept);

    /// Output and activations.
    fn forward(
        &self,
        context: &Context,
        weights: Weights<'_>,
        x: &[f32],
    ) -> (Vec<f32>, Self::Kept) {
        let kept = self.activations(context, weights, x);
        (self.output(context, weights, x, &kept), kept)
    }

    /// The gradient with respect to `x`, unless nobody wants it; that of the trained parameters goes to
    /// `gradient`.
    fn backward(
        &self,
        context: &Context,
        weights: Weights<'_>,
        x: &[f32],
        kept: Self::Kept,
        dy: &[f32],
        gradient: &mut [f32],
        wants_dx: bool,
    ) -> Option<Vec<f32>>;
}

/// A block's weights and, with adapters, its factors.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Banks<'a> {
    pub(crate) base: &'a Bank,
    pub(crate) lora: Option<(&'a Bank, usize, f32)>,
}

impl Banks<'_> {
    /// Lends the weights.
    pub(crate) fn read<R>(self, f: impl FnOnce(Weights<'_>) -> R) -> candle_core::Result<R> {
        self.base.values().lend(|base| match self.lora {
            None => Ok(f(Weights { base, lora: None })),
            Some((bank, rank, scale)) => bank.read(|values| {
                f(Weights {
                    base,
                    lora: Some(Factors {
                        values,
                        rank,
                        scale,
                    }),
                })
            }),
        })?
    }
}

/// Appends a block to the graph. Exactly one of its banks must be trainable. `wants_dx` is false where
/// nothing before the block is trained.
pub(crate) fn apply<B: Block>(
    block: &Arc<B>,
    context: &Arc<Context>,
    banks: Banks<'_>,
    x: &Tensor,
    wants_dx: bool,
) -> candle_core::Result<Tensor> {
    let (trained, frozen) = match banks.lora {
        None => (banks.base, None),
        Some((bank, rank, scale)) => (bank, Some((banks.base.values().clone(), rank, scale))),
    };
    let op = BlockOp {
        block: Arc::clone(block),
        context: Arc::clone(context),
        frozen,
        wants_dx,
        kept: Mutex::new(None),
    };
    x.apply_op2(trained.tensor()?, op)
}

struct BlockOp<B: Block> {
    block: Arc<B>,
    context: Arc<Context>,
    frozen: Option<(Values, usize, f32)>,
    wants_dx: bool,
    kept: Mutex<Option<B::Kept>>,
}

impl<B: Block> BlockOp<B> {
    fn with_weights<R>(
        &self,
        trained: &[f32],
        f: impl FnOnce(Weights<'_>) -> R,
    ) -> candle_core::Result<R> {
        match &self.frozen {
            None => Ok(f(Weights {
                base: Base::Floats(trained),
                lora: None,
            })),
            Some((base, rank, scale)) => base.lend(|base| {
                let lora = Factors {
                    values: trained,
                    rank: *rank,
                    scale: *scale,
                };
                f(Weights {
                    base,
                    lora: Some(lora),
                })
            }),
        }
    }
}

impl<B: Block> CustomOp2 for BlockOp<B> {
    fn name(&self) -> &'static str {
        B::NAME
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        x_layout: &Layout,
        trained: &CpuStorage,
        trained_layout: &Layout,
    ) -> candle_core::Result<(CpuStorage, Shape)> {
        let (x, trained) = (floats(x, x_layout)?, floats(trained, trained_layout)?);
        let (y, kept) = self.with_weights(trained, |weights| {
            self.block.forward(&self.context, weights, x)
        })?;
        if self.context.checkpoint {
            B::release(&self.context, kept);
        } else {
            *self.kept.lock().unwrap_or_else(PoisonError::into_inner) = Some(kept);
        }
        Ok((CpuStorage::F32(y), x_layout.shape().clone()))
    }

    fn bwd(
        &self,
        x: &Tensor,
        trained: &Tensor,
        _y: &Tensor,
        dy: &Tensor,
    ) -> candle_core::Result<(Option<Tensor>, Option<Tensor>)> {
        let kept = self
            .kept
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .take();
        if kept.is_none() && !self.context.checkpoint {
            bail!("{}: backward twice", B::NAME)
        }
        let (block, context) = (&self.block, &*self.context);
        let mut gradient = vec![0f32; trained.elem_count()];
        let dx = with_floats(x, |values| {
            with_floats(dy, |dy| {
                with_floats(trained, |trained| {
                    self.with_weights(trained, |weights| {
                        let again = || block.activations(context, weights, values);
                        let kept = kept.unwrap_or_else(again);
                        let gradient = &mut gradient;
                        block.backward(context, weights, values, kept, dy, gradient, self.wants_dx)
                    })
                })
            })
        })????;
        let dx = dx.map(|dx| Tensor::from_vec(dx, x.shape(), x.device()));
        Ok((
            dx.transpose()?,
            Some(Tensor::from_vec(
                gradient,
                trained.shape(),
                trained.device(),
            )?),
        ))
    }
}
