//! Linear layers with low-rank factors.

use candle_core::{DType, Result, Tensor};

use crate::worker::model::ModelError;
use crate::worker::model::block::Banks;
use crate::worker::model::linear::{Place, Projection};
use crate::worker::model::parameters::Bank;

use super::Placement;

/// The tensors of one block on the device, flat.
pub(super) struct BlockTensors<'a> {
    base: Tensor,
    factors: Option<(Tensor, &'a [Option<Place>])>,
    trains_base: bool,
}

impl<'a> BlockTensors<'a> {
    /// Copies what is elsewhere.
    pub(super) fn new(banks: Banks<'a>, placement: &Placement) -> Result<Self> {
        let Placement { device, dtype, .. } = placement;
        let factors = match banks.lora {
            Some(lora) => lora
                .bank
                .map(|bank| {
                    Ok::<_, candle_core::Error>((bank.values().on(device, *dtype)?, &**lora.places))
                })
                .transpose()?,
            None => None,
        };
        Ok(Self {
            base: banks.base.values().on(device, *dtype)?,
            factors,
            trains_base: banks.base.is_trainable(),
        })
    }

    /// Whether gradients of the weights are wanted.
    pub(super) fn trains_base(&self) -> bool {
        self.trains_base
    }

    /// The vector at an offset.
    pub(super) fn vector(&self, at: usize, len: usize) -> Result<Tensor> {
        self.base.narrow(0, at, len)
    }

    /// The layers of a projection.
    pub(super) fn layers(&self, projection: &Projection) -> Result<Vec<Linear>> {
        let inputs = projection.inputs;
        let mut first = 0;
        let mut layers = Vec::with_capacity(projection.outputs.len());
        for (index, &out) in projection.outputs.iter().enumerate() {
            let weight_at = projection.weight + first * inputs;
            let bias_at = projection.bias.map(|bias| bias + first);
            let factors = self.factors.as_ref();
            let low = factors.and_then(|(values, places)| {
                let place = *places.get(projection.before + index)?;
                place.map(|place| LowRank::new(values, place, inputs, out))
            });
            layers.push(Linear {
                weight: matrix(&self.base, weight_at, out, inputs)?,
                bias: bias_at.map(|at| self.vector(at, out)).transpose()?,
                low: low.transpose()?,
                trained: self.trains_base.then_some((weight_at, bias_at)),
            });
            first += out;
        }
        Ok(layers)
    }
}

fn matrix(values: &Tensor, at: usize, rows: usize, columns: usize) -> Result<Tensor> {
    values
        .narrow(0, at, rows * columns)?
        .reshape((rows, columns))
}

/// `y = x W^T + b + s (x A^T) B^T`
pub(super) struct Linear {
    weight: Tensor,
    bias: Option<Tensor>,
    low: Option<LowRank>,
    /// Offsets of weight and bias, where these are trained.
    trained: Option<(usize, Option<usize>)>,
}

struct LowRank {
    a: Tensor,
    b: Tensor,
    scale: f64,
    a_at: usize,
    b_at: usize,
}

impl LowRank {
    fn new(values: &Tensor, place: Place, inputs: usize, out: usize) -> Result<Self> {
        let Place { low, a, b } = place;
        Ok(Self {
            a: matrix(values, a, low.rank, inputs)?,
            b: matrix(values, b, out, low.rank)?,
            scale: f64::from(low.scale),
            a_at: a,
            b_at: b,
        })
    }

    /// `s x A^T`
    fn down(&self, x: &Tensor) -> Result<Tensor> {
        x.matmul(&self.a.t()?)? * self.scale
    }
}

impl Linear {
    /// The output of every row of `x`.
    pub(super) fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let mut y = x.matmul(&self.weight.t()?)?;
        if let Some(bias) = &self.bias {
            y = y.broadcast_add(bias)?;
        }
        match &self.low {
            Some(low) => y + low.down(x)?.matmul(&low.b.t()?)?,
            None => Ok(y),
        }
    }

    /// The gradient with respect to `x`, where it is wanted; those of trained tensors go to `gradient`.
    pub(super) fn backward(
        &self,
        x: &Tensor,
        dy: &Tensor,
        gradient: &mut BankGradient,
        wants_dx: bool,
    ) -> Result<Option<Tensor>> {
        if let Some((weight, bias)) = self.trained {
            gradient.push(weight, &dy.t()?.matmul(x)?)?;
            if let Some(bias) = bias {
                gradient.push(bias, &dy.to_dtype(DType::F32)?.sum(0)?)?;
            }
        }
        let mut dx = wants_dx.then(|| dy.matmul(&self.weight)).transpose()?;
        if let Some(low) = &self.low {
            let up = (dy.matmul(&low.b)? * low.scale)?;
            gradient.push(low.a_at, &up.t()?.matmul(x)?)?;
            gradient.push(low.b_at, &dy.t()?.matmul(&low.down(x)?)?)?;
            if let Some(dx) = &mut dx {
                *dx = (&*dx + up.matmul(&low.a)?)?;
            }
        }
        Ok(dx)
    }
}

/// Gradients of one bank's tensors, until all of them are there.
#[derive(Default)]
pub(super) struct BankGradient {
    parts: Vec<(usize, Tensor)>,
}

impl BankGradient {
    /// Adds the gradient of the tensor at an offset.
    pub(super) fn push(&mut self, at: usize, gradient: &Tensor) -> Result<()> {
        let flat = gradient.to_dtype(DType::F32)?.flatten_all()?;
        self.parts.push((at, flat));
        Ok(())
    }

    /// The flat gradient of the whole bank, f32; every tensor of the bank must have one.
    pub(super) fn into_tensor(mut self, bank: &Bank) -> std::result::Result<Tensor, ModelError> {
        self.parts.sort_by_key(|(at, _)| *at);
        let mut parts = self.parts.into_iter();
        let mut flat = Vec::with_capacity(bank.slots().len());
        for slot in bank.slots() {
            match parts.next() {
                Some((at, part)) if at == slot.start && part.elem_count() == slot.range().len() => {
                    flat.push(part);
                }
                _ => {
                    let name = slot.name.clone();
                    return Err(ModelError::NoGradient { name });
                }
            }
        }
        Ok(Tensor::cat(&flat, 0)?)
    }
}
