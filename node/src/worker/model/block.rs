//! A residual block of the decoder as one node of candle's graph.

use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};

use candle_core::{CpuStorage, CustomOp2, Layout, Shape, Tensor, bail};

use super::ops::attention::Segment;
use super::ops::linear::{Factors, Weights};
use super::ops::rope::RopeTable;
use super::ops::scratch::Scratch;
use super::parameters::{Bank, floats, with_floats};

/// What all blocks of one pass share.
#[derive(Debug)]
pub(crate) struct Context {
    pub(crate) segments: Arc<[Segment]>,
    pub(crate) rope: Arc<RopeTable>,
    pub(crate) scratch: Scratch,
}

/// A residual block: values in, values of the same shape out.
pub(crate) trait Block: fmt::Debug + Send + Sync + 'static {
    /// Activations that the backward pass needs.
    type Kept: Send + 'static;

    /// Name in candle's messages.
    const NAME: &'static str;

    /// The block's output, its input included.
    fn forward(&self, context: &Context, weights: Weights<'_>, x: &[f32])
    -> (Vec<f32>, Self::Kept);

    /// The gradient with respect to `x`; that of the trained parameters goes to `gradient`.
    fn backward(
        &self,
        context: &Context,
        weights: Weights<'_>,
        x: &[f32],
        kept: Self::Kept,
        dy: &[f32],
        gradient: &mut [f32],
    ) -> Vec<f32>;
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
        self.base.read(|base| match self.lora {
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

/// Appends a block to the graph. Exactly one of its banks must be trainable.
pub(crate) fn apply<B: Block>(
    block: &Arc<B>,
    context: &Arc<Context>,
    banks: Banks<'_>,
    x: &Tensor,
) -> candle_core::Result<Tensor> {
    let (trained, frozen) = match banks.lora {
        None => (banks.base, None),
        Some((bank, rank, scale)) => (bank, Some((banks.base.tensor().clone(), rank, scale))),
    };
    let op = BlockOp {
        block: Arc::clone(block),
        context: Arc::clone(context),
        frozen,
        kept: Mutex::new(None),
    };
    x.apply_op2(trained.tensor(), op)
}

struct BlockOp<B: Block> {
    block: Arc<B>,
    context: Arc<Context>,
    frozen: Option<(Tensor, usize, f32)>,
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
                base: trained,
                lora: None,
            })),
            Some((base, rank, scale)) => with_floats(base, |base| {
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
        *self.kept.lock().unwrap_or_else(PoisonError::into_inner) = Some(kept);
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
        let Some(kept) = kept else {
            bail!("{}: backward without forward", B::NAME)
        };
        let mut gradient = vec![0f32; trained.elem_count()];
        let dx = with_floats(x, |values| {
            with_floats(dy, |dy| {
                with_floats(trained, |trained| {
                    self.with_weights(trained, |weights| {
                        self.block
                            .backward(&self.context, weights, values, kept, dy, &mut gradient)
                    })
                })
            })
        })????;
        Ok((
            Some(Tensor::from_vec(dx, x.shape(), x.device())?),
            Some(Tensor::from_vec(
                gradient,
                trained.shape(),
                trained.device(),
            )?),
        ))
    }
}
