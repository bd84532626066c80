//! Final norm and output head, the root of a training graph.

use std::sync::{Mutex, PoisonError};

use candle_core::{CpuStorage, CustomOp1, CustomOp3, DType, Layout, Shape, Tensor, bail};

use super::ops::norm;
use super::ops::scratch::Scratch;
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
    for (chosen, &row) in chosen.chunks_exact_mut(width).zip(rows) {
        chosen.copy_from_slice(&x[row as usize * width..][..width]);
    }
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
        for (dchosen, &row) in dchosen.chunks_exact(width).zip(&self.rows) {
            for (dx, d) in dx[row as usize * width..][..width].iter_mut().zip(dchosen) {
                *dx += d;
            }
        }
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
            for (row, &id) in dout.chunks_exact(self.width).zip(self.ids.iter()) {
                for (sum, d) in gradient[id as usize * self.width..][..self.width]
                    .iter_mut()
                    .zip(row)
                {
                    *sum += d;
                }
            }
        })?;
        Tensor::from_vec(gradient, table.shape(), table.device()).map(Some)
    }
}

/// Copies rows `ids` of `table` to `out`. Ids must be below the number of rows.
pub(crate) fn gather(table: &[f32], ids: &[u32], width: usize, out: &mut [f32]) {
    for (out, &id) in out.chunks_exact_mut(width).zip(ids) {
        out.copy_from_slice(&table[id as usize * width..][..width]);
    }
}

/// Moves row `order[r]` to place `r`, for a permutation, with no second table: each cycle of it is walked once.
pub(crate) fn permute(rows: &mut [f32], order: &[u32], width: usize) {
    let mut first = vec![0f32; width];
    let mut is_placed = vec![false; order.len()];
    for start in 0..order.len() {
        if is_placed[start] {
            continue;
        }
        first.copy_from_slice(&rows[start * width..][..width]);
        let mut at = start;
        loop {
            is_placed[at] = true;
            let from = order[at] as usize;
            if from == start {
                rows[at * width..][..width].copy_from_slice(&first);
                break;
            }
            rows.copy_within(from * width..(from + 1) * width, at * width);
            at = from;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_moved_in_place_are_those_that_a_copy_gathers() {
        let width = 3;
        let order = [4, 1, 0, 5, 2, 3, 6];
        let rows: Vec<f32> = (0..21u8).map(f32::from).collect();
        let mut want = vec![0.0; rows.len()];
        gather(&rows, &order, width, &mut want);
        let mut got = rows;
        permute(&mut got, &order, width);
        assert_eq!(got, want);
    }
}
