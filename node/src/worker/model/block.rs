//! A residual block of the decoder as one node of candle's graph.
//!
//! What it is made of are `consilium_kernels::layers` and the projections: candle's own backward allocates and adds once
//! per edge of the graph, computes gradients of frozen weights, and drops the gradient of its fused operations without a
//! word.

use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};

use candle_core::{CpuStorage, CustomOp1, CustomOp2, Layout, Shape, Tensor, bail};
use consilium_kernels::layers::{RopeTable, Scratch, Segment};

use super::frozen::Base;
use super::linear::{Factors, Place, Weights};
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
    pub(crate) lora: Option<Adapted<'a>>,
}

/// Factors of a block; no bank where none of its layers has any.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Adapted<'a> {
    pub(crate) bank: Option<&'a Bank>,
    pub(crate) places: &'a Arc<[Option<Place>]>,
}

impl Banks<'_> {
    /// Lends the weights.
    pub(crate) fn read<R>(self, f: impl FnOnce(Weights<'_>) -> R) -> candle_core::Result<R> {
        self.base.values().lend(|base| {
            let Some(Adapted { bank, places }) = self.lora else {
                return Ok(f(Weights { base, lora: None }));
            };
            let with = |values: &[f32]| {
                let lora = Factors {
                    values,
                    layers: places,
                };
                f(Weights {
                    base,
                    lora: Some(lora),
                })
            };
            match bank {
                Some(bank) => bank.read(with),
                None => Ok(with(&[])),
            }
        })?
    }
}

/// Appends a block to the graph. At most one of its banks may be trainable: the factors if there are any, else the
/// weights of a block without an adapter. `wants_dx` is false where nothing before the block is trained.
pub(crate) fn apply<B: Block>(
    block: &Arc<B>,
    context: &Arc<Context>,
    banks: Banks<'_>,
    x: &Tensor,
    wants_dx: bool,
) -> candle_core::Result<Tensor> {
    let frozen = banks
        .lora
        .map(|lora| (banks.base.values().clone(), Arc::clone(lora.places)));
    let op = BlockOp {
        block: Arc::clone(block),
        context: Arc::clone(context),
        frozen,
        wants_dx,
        kept: Mutex::new(None),
    };
    match banks.lora {
        None => x.apply_op2(banks.base.tensor()?, op),
        Some(Adapted {
            bank: Some(factors),
            ..
        }) => x.apply_op2(factors.tensor()?, op),
        Some(Adapted { bank: None, .. }) => x.apply_op1(op),
    }
}

struct BlockOp<B: Block> {
    block: Arc<B>,
    context: Arc<Context>,
    frozen: Option<(Values, Arc<[Option<Place>]>)>,
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
            Some((base, places)) => base.lend(|base| {
                let lora = Factors {
                    values: trained,
                    layers: places,
                };
                f(Weights {
                    base,
                    lora: Some(lora),
                })
            }),
        }
    }

    fn run(
        &self,
        x: &CpuStorage,
        layout: &Layout,
        trained: &[f32],
    ) -> candle_core::Result<(CpuStorage, Shape)> {
        let x = floats(x, layout)?;
        let (y, kept) = self.with_weights(trained, |weights| {
            self.block.forward(&self.context, weights, x)
        })?;
        if self.context.checkpoint {
            B::release(&self.context, kept);
        } else {
            *self.kept.lock().unwrap_or_else(PoisonError::into_inner) = Some(kept);
        }
        Ok((CpuStorage::F32(y), layout.shape().clone()))
    }

    /// The gradient with respect to `x`, if it is wanted; that of the trained parameters goes to `gradient`.
    fn run_back(
        &self,
        x: &Tensor,
        trained: &[f32],
        dy: &Tensor,
        gradient: &mut [f32],
    ) -> candle_core::Result<Option<Tensor>> {
        let kept = self
            .kept
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .take();
        if kept.is_none() && !self.context.checkpoint {
            bail!("{}: backward twice", B::NAME)
        }
        let (block, context) = (&self.block, &*self.context);
        let dx = with_floats(x, |values| {
            with_floats(dy, |dy| {
                self.with_weights(trained, |weights| {
                    let again = || block.activations(context, weights, values);
                    let kept = kept.unwrap_or_else(again);
                    block.backward(context, weights, values, kept, dy, gradient, self.wants_dx)
                })
            })
        })???;
        let dx = dx.map(|dx| Tensor::from_vec(dx, x.shape(), x.device()));
        dx.transpose()
    }
}

impl<B: Block> CustomOp1 for BlockOp<B> {
    fn name(&self) -> &'static str {
        B::NAME
    }

    fn cpu_fwd(&self, x: &CpuStorage, layout: &Layout) -> candle_core::Result<(CpuStorage, Shape)> {
        self.run(x, layout, &[])
    }

    fn bwd(&self, x: &Tensor, _y: &Tensor, dy: &Tensor) -> candle_core::Result<Option<Tensor>> {
        self.run_back(x, &[], dy, &mut [])
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
        self.run(x, x_layout, floats(trained, trained_layout)?)
    }

    fn bwd(
        &self,
        x: &Tensor,
        trained: &Tensor,
        _y: &Tensor,
        dy: &Tensor,
    ) -> candle_core::Result<(Option<Tensor>, Option<Tensor>)> {
        let mut gradient = vec![0f32; trained.elem_count()];
        let dx = with_floats(trained, |values| {
            self.run_back(x, values, dy, &mut gradient)
        })??;
        let gradient = Tensor::from_vec(gradient, trained.shape(), trained.device())?;
        Ok((dx, Some(gradient)))
    }
}
