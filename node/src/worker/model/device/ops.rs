//! Operations with their gradients: norm, rotation, gated activation.

use candle_core::{D, DType, Device, Result, Tensor};
use candle_nn::ops::sigmoid;
use candle_nn::rotary_emb::rope_thd;
use consilium_kernels::layers::{RopeTable, Segment};

/// `x / rms(x) * weight` over the last dimension.
pub(super) fn rms_norm(x: &Tensor, weight: &Tensor, eps: f32) -> Result<Tensor> {
    candle_nn::ops::rms_norm(&x.contiguous()?, weight, eps)
}

/// Gradients of [`rms_norm`]: with respect to `x`, in its type, and where it is wanted to the weight, f32. With `r = 1 /
/// rms(x)`, `n = x r` and `g = dy weight`: `dx = r (g - n mean(g n))`.
pub(super) fn rms_norm_backward(
    x: &Tensor,
    weight: &Tensor,
    eps: f32,
    dy: &Tensor,
    wants_weight: bool,
) -> Result<(Tensor, Option<Tensor>)> {
    let (wide, dy) = (x.to_dtype(DType::F32)?, dy.to_dtype(DType::F32)?);
    let mean = wide.sqr()?.mean_keepdim(D::Minus1)?;
    let inverse = (mean + f64::from(eps))?.sqrt()?.recip()?;
    let normed = wide.broadcast_mul(&inverse)?;
    let dweight = if wants_weight {
        let width = weight.elem_count();
        let rows = (&dy * &normed)?.reshape(((), width))?;
        Some(rows.sum(0)?)
    } else {
        None
    };
    let g = dy.broadcast_mul(&weight.to_dtype(DType::F32)?)?;
    let mean = (&g * &normed)?.mean_keepdim(D::Minus1)?;
    let dx = (g - normed.broadcast_mul(&mean)?)?.broadcast_mul(&inverse)?;
    Ok((dx.to_dtype(x.dtype())?, dweight))
}

/// `silu(gate) * up`
pub(super) fn swiglu(gate: &Tensor, up: &Tensor) -> Result<Tensor> {
    gate.silu()? * up
}

/// Gradients of [`swiglu`]: with `s = sigmoid(gate)`, `dgate = dy up (s + gate s (1 - s))` and `dup = dy gate s`.
pub(super) fn swiglu_backward(gate: &Tensor, up: &Tensor, dy: &Tensor) -> Result<[Tensor; 2]> {
    let s = sigmoid(gate)?;
    let silu = (gate * &s)?;
    let dup = (dy * &silu)?;
    let slope = ((&silu + &s)? - (silu * s)?)?;
    let dgate = ((dy * up)? * slope)?;
    Ok([dgate, dup])
}

/// Cosines and sines of every row of a batch `[rows, half]`, those of queries with the scale of the scores.
#[derive(Debug)]
pub(super) struct Angles {
    cosines: Tensor,
    sines: Tensor,
    scale: f64,
    /// Values of a head that are turned.
    turned: usize,
}

impl Angles {
    /// Angles of the positions `from(segment) ..` of each segment, as many as its rows, in texts of the length `of(segment)`.
    pub(super) fn new(
        table: &RopeTable,
        rows: impl Iterator<Item = (usize, usize)>,
        scale: f32,
        device: &Device,
        dtype: DType,
    ) -> Result<Self> {
        let (mut cosines, mut sines, mut count, mut half) = (Vec::new(), Vec::new(), 0, 0);
        for (position, len) in rows {
            let (cos, sin) = table.angles(len).at(position);
            cosines.extend(cos.iter().map(|cos| cos * scale));
            sines.extend(sin.iter().map(|sin| sin * scale));
            (count, half) = (count + 1, cos.len());
        }
        let tensor = |values| {
            Tensor::from_vec(values, (count, half), &Device::Cpu)?
                .to_dtype(dtype)?
                .to_device(device)
        };
        Ok(Self {
            cosines: tensor(cosines)?,
            sines: tensor(sines)?,
            scale: f64::from(scale),
            turned: 2 * half,
        })
    }

    /// Scaled and turned heads of every row, `[rows, heads, dim]`.
    pub(super) fn turn(&self, x: &Tensor) -> Result<Tensor> {
        self.apply(x, &self.sines)
    }

    /// The gradient of [`turn`](Self::turn).
    pub(super) fn turn_back(&self, dy: &Tensor) -> Result<Tensor> {
        self.apply(dy, &self.sines.neg()?)
    }

    fn apply(&self, x: &Tensor, sines: &Tensor) -> Result<Tensor> {
        let dim = x.dim(D::Minus1)?;
        let turn =
            |x: &Tensor| rope_thd(&x.contiguous()?.unsqueeze(0)?, &self.cosines, sines)?.squeeze(0);
        if dim == self.turned {
            return turn(x);
        }
        let turned = turn(&x.narrow(D::Minus1, 0, self.turned)?)?;
        let rest = x.narrow(D::Minus1, self.turned, dim - self.turned)?;
        Tensor::cat(&[turned, (rest * self.scale)?], D::Minus1)
    }
}

/// Position and length of the text of every row of a packed batch.
pub(super) fn positions(segments: &[Segment]) -> impl Iterator<Item = (usize, usize)> {
    let rows = |segment: &Segment| {
        let len = segment.len;
        (0..len).map(move |position| (position, len))
    };
    segments.iter().flat_map(rows)
}
