//! Final norm and output head, the root of a training graph.

use std::sync::{Mutex, PoisonError};

use candle_core::{CpuStorage, CustomOp1, CustomOp3, DType, Layout, Shape, Tensor, bail};
use consilium_kernels::layers::rows::{gather, scatter};
use consilium_kernels::layers::{Scratch, norm};

use super::parameters::{floats, with_floats};

/// Chosen rows of the residual stream after the final norm.
#[derive(Debug)]
pub(crate) struct Normed {
    pub(crate) chosen: Vec<f32>,
    pub(crate) values: Vec<f32>,
    pub(crate) inverse: Vec<f32>,
}

/// Normalises the `rows` of `x`.
pub(crate) fn normalise(
    scratch: &Scratch,
    x: &[f32],
    rows: &[u32],
    weight: &[f32],
    eps: f32,
) -> Normed {
    let width = weight.len();
    let mut chosen = scratch.take(rows.len() * width);
    gather(x, rows, width, &mut chosen);
    let mut values = scratch.take(chosen.len());
    let mut inverse = scratch.take(rows.len());
    norm::forward(&chosen, weight, eps, &mut values, &mut inverse);
    Normed {
        chosen,
        values,
        inverse,
    }
}

/// Normalised rows, their gradient, and that of a trainable head.
#[derive(Debug)]
pub(crate) struct HeadGradients {
    pub(crate) normed: Normed,
    pub(crate) dnormed: Vec<f32>,
    pub(crate) dhead: Option<Vec<f32>>,
}

/// Root of the graph over (residual stream, norm weight, head): its value is the loss, its backward
/// pass starts from the gradient of the normalised rows.
pub(crate) struct HeadLoss {
    pub(crate) loss: f32,
    pub(crate) rows: Vec<u32>,
    /// Taken by the backward pass.
    pub(crate) state: Mutex<Option<HeadGradients>>,
    pub(crate) scratch: Scratch,
    pub(crate) train_norm: bool,
}

impl CustomOp3 for HeadLoss {
    fn name(&self) -> &'static str {
        "head"
    }

    fn cpu_fwd(
        &self,
        _x: &CpuStorage,
        _x_layout: &Layout,
        _norm: &CpuStorage,
        _norm_layout: &Layout,
        _head: &CpuStorage,
        _head_layout: &Layout,
    ) -> candle_core::Result<(CpuStorage, Shape)> {
        Ok((CpuStorage::F32(vec![self.loss]), Shape::from(())))
    }

    fn bwd(
        &self,
        x: &Tensor,
        norm: &Tensor,
        head: &Tensor,
        _loss: &Tensor,
        _one: &Tensor,
    ) -> candle_core::Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let state = self
            .state
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .take();
        let Some(HeadGradients {
            normed,
            dnormed,
            dhead,
        }) = state
        else {
            bail!("head: backward twice")
        };
        let width = norm.elem_count();
        let mut dchosen = self.scratch.take(dnormed.len());
        dchosen.fill(0.0);
        let mut dnorm = self.train_norm.then(|| vec![0f32; width]);
        with_floats(norm, |weight| {
            let dnorm = dnorm.as_deref_mut();
            norm::backward(
                &normed.chosen,
                weight,
                &normed.inverse,
                &dnormed,
                &mut dchosen,
                dnorm,
            );
        })?;
        let mut dx = vec![0f32; x.elem_count()];
        scatter(&dchosen, &self.rows, width, &mut dx);
        for buffer in [
            dnormed,
            dchosen,
            normed.chosen,
            normed.values,
            normed.inverse,
        ] {
            self.scratch.give(buffer);
        }
        let tensor = |values: Option<Vec<f32>>, like: &Tensor| {
            values
                .map(|values| Tensor::from_vec(values, like.shape(), like.device()))
                .transpose()
        };
        Ok((
            tensor(Some(dx), x)?,
            tensor(dnorm, norm)?,
            tensor(dhead, head)?,
        ))
    }
}

/// Rows of a flat table `[count, width]`: the embedding, or a tied head in rank order.
pub(crate) struct Gather {
    pub(crate) ids: std::sync::Arc<[u32]>,
    pub(crate) width: usize,
}

impl CustomOp1 for Gather {
    fn name(&self) -> &'static str {
        "gather"
    }

    fn cpu_fwd(
        &self,
        table: &CpuStorage,
        layout: &Layout,
    ) -> candle_core::Result<(CpuStorage, Shape)> {
        let mut out = vec![0f32; self.ids.len() * self.width];
        gather(floats(table, layout)?, &self.ids, self.width, &mut out);
        let len = out.len();
        Ok((CpuStorage::F32(out), Shape::from(len)))
    }

    fn bwd(
        &self,
        table: &Tensor,
        _out: &Tensor,
        dout: &Tensor,
    ) -> candle_core::Result<Option<Tensor>> {
        if dout.dtype() != DType::F32 {
            bail!("gather: gradient is not f32");
        }
        let mut gradient = vec![0f32; table.elem_count()];
        with_floats(dout, |dout| {
            scatter(dout, &self.ids, self.width, &mut gradient);
        })?;
        Tensor::from_vec(gradient, table.shape(), table.device()).map(Some)
    }
}
