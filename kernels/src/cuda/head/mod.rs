//! The fused head: hidden states to loss and gradient in chunks of rows, so that `[P, V]` never exists.
//!
//! A chunk's logits are f32: a logit of magnitude 16 to 32 rounded to bf16 is off by up to 0.0625, one and a half code
//! steps, while the f32 sums of the product are within 1e-5. The gradient is stored in the weights' type, scaled into
//! the middle of its range for f16, and multiplied with f32 sums.

mod scores;

use std::ops::Range;

use half::{bf16, f16};

use crate::cuda::device::{Buffer, Device, bytes_of, count};
use crate::cuda::gemm::{Product, multiply};
use crate::cuda::loss::{LossJob, Places};
use crate::cuda::raw::{Address, Gemm};
use crate::cuda::rows::width_of;
use crate::cuda::terms::rows_of;
use crate::element::{Dtype, Element};
use crate::error::{CudaError, LossError};
use crate::loss::{ItemLoss, check_length};
use crate::vocab::Vocab;

/// Rows of a chunk: enough to keep every multiprocessor busy with either product.
const CHUNK: usize = 1024;

/// Output head weights `[V, d]` in rank order that stay on the device.
pub struct ResidentHead<'v> {
    device: &'static Device,
    vocab: &'v Vocab,
    weights: Buffer<u8>,
    dtype: Dtype,
    width: usize,
    /// `width` rounded up so that rows start at multiples of 16 bytes.
    stride: usize,
    chunk: usize,
}

impl std::fmt::Debug for ResidentHead<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ResidentHead")
            .field("dtype", &self.dtype)
            .field("width", &self.width)
            .finish_non_exhaustive()
    }
}

/// Hidden states on the device, with room for their gradient.
pub struct Hidden {
    states: States,
    gradient: Buffer<f32>,
    rows: usize,
}

/// Hidden states in the type of the head.
struct States {
    near: Buffer<u8>,
    /// What rounding to that type took, where it took something.
    rest: Option<Buffer<u8>>,
}

impl std::fmt::Debug for Hidden {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Hidden")
            .field("rows", &self.rows)
            .finish_non_exhaustive()
    }
}

impl<'v> ResidentHead<'v> {
    /// Copies weights to the device.
    ///
    /// # Errors
    /// Where `weights` is not `[V, width]`, or the device fails.
    pub fn new<T: Element>(
        device: &'static Device,
        vocab: &'v Vocab,
        weights: &[T],
        width: usize,
    ) -> Result<Self, LossError> {
        check_length("head weights", weights.len(), vocab.len() * width)?;
        Ok(Self::upload(device, vocab, weights, width)?)
    }

    /// As [`Self::new`] of weights whose number is right.
    pub(crate) fn upload<T: Element>(
        device: &'static Device,
        vocab: &'v Vocab,
        weights: &[T],
        width: usize,
    ) -> Result<Self, CudaError> {
        let stride = padded(width, T::DTYPE);
        Ok(Self {
            device,
            vocab,
            weights: upload_padded(device, weights, width, stride)?,
            dtype: T::DTYPE,
            width,
            stride,
            chunk: CHUNK,
        })
    }

    /// Takes this many rows at a time, at least one, instead of 1024; 6 bytes of scratch per row and token.
    #[must_use]
    pub fn with_chunk(self, rows: usize) -> Self {
        Self {
            chunk: rows.max(1),
            ..self
        }
    }

    /// Copies hidden states `[P, width]` to the device.
    ///
    /// # Errors
    /// Where the type or the size does not fit the weights, or the device fails.
    pub fn hidden<T: Element>(&self, states: &[T]) -> Result<Hidden, LossError> {
        if T::DTYPE != self.dtype {
            return Err(CudaError::Unsupported {
                what: "hidden states of another type than the head",
            }
            .into());
        }
        let rows = states.len() / self.width.max(1);
        check_length("hidden states", states.len(), rows * self.width)?;
        Ok(Hidden {
            states: States {
                near: upload_padded(self.device, states, self.width, self.stride)?,
                rest: None,
            },
            gradient: self.device.allocate(rows * self.stride)?,
            rows,
        })
    }

    /// As [`Self::hidden`] for hidden states of single precision before a head of any type.
    ///
    /// Those that a narrower head's type cannot hold become a sum of two matrices of it, so that a hidden state is off
    /// by at most 2^-18 of its size, or by 2^-25 before a head of f16: less than sums in f32 are.
    ///
    /// # Errors
    /// Where the size does not fit, a hidden state is beyond the range of the head's type, or the device fails.
    pub fn wide_hidden(&self, states: &[f32]) -> Result<Hidden, LossError> {
        let rows = states.len() / self.width.max(1);
        check_length("hidden states", states.len(), rows * self.width)?;
        Ok(Hidden {
            states: self.states(states)?,
            gradient: self.device.allocate(rows * self.stride)?,
            rows,
        })
    }

    fn states(&self, states: &[f32]) -> Result<States, CudaError> {
        match self.dtype {
            Dtype::F32 => self.split::<f32>(states),
            Dtype::Bf16 => self.split::<bf16>(states),
            Dtype::F16 => self.split::<f16>(states),
        }
    }

    fn split<T: Element>(&self, states: &[f32]) -> Result<States, CudaError> {
        let near: Vec<T> = states.iter().map(|&state| T::from_f32(state)).collect();
        let pairs = || states.iter().zip(&near);
        if pairs().any(|(state, near)| state.is_finite() && !near.to_f32().is_finite()) {
            return Err(CudaError::Unsupported {
                what: "hidden states beyond the range of the head's type",
            });
        }
        let rest: Vec<T> = pairs()
            .map(|(state, near)| T::from_f32(state - near.to_f32()))
            .collect();
        let is_exact = rest.iter().all(|rest| rest.to_f32() == 0.0);
        let upload = |values: &[T]| upload_padded(self.device, values, self.width, self.stride);
        Ok(States {
            near: upload(&near)?,
            rest: if is_exact { None } else { Some(upload(&rest)?) },
        })
    }

    /// Starts the product of some rows with the weights, `[rows, stride]` at `logits`.
    fn forward(
        &self,
        states: &States,
        rows: &Range<usize>,
        (logits, stride): (Address, usize),
    ) -> Result<(), CudaError> {
        let first = (rows.start * self.stride * width_of(self.dtype)) as u64;
        for (add, part) in (0..).zip(
            [Some(&states.near), states.rest.as_ref()]
                .into_iter()
                .flatten(),
        ) {
            let job = Gemm {
                a: part.address() + first,
                b: self.weights.address(),
                c: logits,
                a_stride: self.stride as u64,
                b_stride: self.stride as u64,
                c_stride: stride as u64,
                m: count(rows.len())?,
                n: count(self.vocab.len())?,
                k: count(self.width)?,
                alpha: 1.0,
                add,
                padding: 0,
            };
            // SAFETY: hidden states and weights have padded rows, the logits a padded row for each of `rows`; all live
            // until the caller has waited.
            unsafe { multiply(self.device, &job, self.dtype, Product::Nt) }?;
        }
        Ok(())
    }

    /// Loss of all items in nats; the gradient of the hidden states is left on the device. Where `weight_gradient` is
    /// given, the gradient of the weights is added to it.
    ///
    /// # Errors
    /// Where sizes disagree, a logit is not finite, or the device fails.
    pub fn loss(
        &self,
        items: &[ItemLoss<'_>],
        hidden: &mut Hidden,
        mut weight_gradient: Option<&mut WeightGradient>,
    ) -> Result<f64, LossError> {
        let all = rows_of(self.vocab, items)?;
        let rows = all.len();
        check_length("rows of hidden states", hidden.rows, rows)?;
        let scratch = Scratch::new(self, rows.min(self.chunk))?;
        // All copies to the device come first: one between two chunks would wait for the first.
        let jobs = all
            .chunks(self.chunk)
            .map(|chunk| LossJob::of_rows(self.device, self.vocab, chunk, scratch.places()))
            .collect::<Result<Vec<_>, _>>()?;
        for (index, job) in jobs.iter().enumerate() {
            let first = index * self.chunk;
            let chunk = first..rows.min(first + self.chunk);
            self.run_chunk(job, hidden, chunk, &scratch, weight_gradient.as_deref_mut())?;
        }
        let mut sum = 0.0;
        for (index, job) in jobs.iter().enumerate() {
            sum += job
                .loss()
                .map_err(|error| at_row(error, index * self.chunk))?;
        }
        Ok(sum)
    }

    /// Copies the gradient of the hidden states `[P, width]` back.
    ///
    /// # Errors
    /// Where sizes disagree, or the device fails.
    pub fn gradient(&self, hidden: &Hidden, to: &mut [f32]) -> Result<(), LossError> {
        check_length("hidden gradient", to.len(), hidden.rows * self.width)?;
        let all = self
            .device
            .download(&hidden.gradient, hidden.rows * self.stride)?;
        for (to, from) in to
            .chunks_exact_mut(self.width.max(1))
            .zip(all.chunks_exact(self.stride.max(1)))
        {
            to.copy_from_slice(&from[..self.width]);
        }
        Ok(())
    }

    /// A gradient of the weights, zero.
    ///
    /// # Errors
    /// Where the device is out of memory or fails.
    pub fn weight_gradient(&self) -> Result<WeightGradient, CudaError> {
        let len = self.vocab.len() * self.stride;
        Ok(WeightGradient {
            values: self.device.filled(len, 0)?,
            len,
        })
    }

    fn run_chunk(
        &self,
        job: &LossJob<'_>,
        hidden: &Hidden,
        rows: Range<usize>,
        scratch: &Scratch,
        weight_gradient: Option<&mut WeightGradient>,
    ) -> Result<(), CudaError> {
        let (stride, wide) = (self.stride as u64, scratch.stride as u64);
        let first = rows.start as u64 * stride;
        self.forward(
            &hidden.states,
            &rows,
            (scratch.logits.address(), scratch.stride),
        )?;
        let (rows, width, tokens) = (
            count(rows.len())?,
            count(self.width)?,
            count(self.vocab.len())?,
        );
        job.run()?;
        let gradient = Gemm {
            a: scratch.gradient_address(),
            b: self.weights.address(),
            c: hidden.gradient.address() + first * 4,
            a_stride: wide,
            b_stride: stride,
            c_stride: stride,
            m: rows,
            n: width,
            k: tokens,
            alpha: 1.0 / scratch.scale,
            add: 0,
            padding: 0,
        };
        // SAFETY: as above; the gradient of the hidden states has their padded rows.
        unsafe { multiply(self.device, &gradient, self.dtype, Product::Nn) }?;
        let Some(weight_gradient) = weight_gradient else {
            return Ok(());
        };
        let weights = Gemm {
            a: scratch.gradient_address(),
            b: hidden.states.near.address() + first * width_of(self.dtype) as u64,
            c: weight_gradient.values.address(),
            a_stride: wide,
            b_stride: stride,
            c_stride: stride,
            m: tokens,
            n: width,
            k: rows,
            alpha: 1.0 / scratch.scale,
            add: 1,
            padding: 0,
        };
        // SAFETY: as above; the gradient of the weights has their padded rows.
        unsafe { multiply(self.device, &weights, self.dtype, Product::Tn) }
    }

    /// Copies the gradient of the weights `[V, width]` back.
    ///
    /// # Errors
    /// Where sizes disagree, or the device fails.
    pub fn download_weights(
        &self,
        gradient: &WeightGradient,
        to: &mut [f32],
    ) -> Result<(), LossError> {
        check_length("weight gradient", to.len(), self.vocab.len() * self.width)?;
        let all = self.device.download(&gradient.values, gradient.len)?;
        for (to, from) in to
            .chunks_exact_mut(self.width.max(1))
            .zip(all.chunks_exact(self.stride.max(1)))
        {
            to.copy_from_slice(&from[..self.width]);
        }
        Ok(())
    }
}

/// Gradient of the head's weights on the device.
pub struct WeightGradient {
    values: Buffer<f32>,
    len: usize,
}

impl std::fmt::Debug for WeightGradient {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("WeightGradient")
            .field("len", &self.len)
            .finish_non_exhaustive()
    }
}

/// Logits of a chunk and their gradient, in place where the type is the same.
struct Scratch {
    logits: Buffer<f32>,
    gradient: Option<Buffer<u8>>,
    dtype: Dtype,
    stride: usize,
    scale: f32,
}

impl Scratch {
    fn new(head: &ResidentHead<'_>, rows: usize) -> Result<Self, CudaError> {
        let stride = head.vocab.len().next_multiple_of(8);
        let cells = rows * stride;
        let bytes = cells * width_of(head.dtype);
        let narrow = head.dtype != Dtype::F32;
        Ok(Self {
            logits: head.device.allocate(cells)?,
            // Zero, so that the padding of rows is no NaN for the product to multiply with.
            gradient: narrow.then(|| head.device.filled(bytes, 0)).transpose()?,
            dtype: head.dtype,
            stride,
            // f16 has no values between 0 and 6e-8.
            scale: if head.dtype == Dtype::F16 {
                1024.0
            } else {
                1.0
            },
        })
    }

    fn gradient_address(&self) -> u64 {
        self.gradient
            .as_ref()
            .map_or_else(|| self.logits.address(), Buffer::address)
    }

    fn places(&self) -> Places {
        Places {
            logits: (self.logits.address(), Dtype::F32),
            gradient: (self.gradient_address(), self.dtype),
            stride: self.stride,
            scale: self.scale,
        }
    }
}

/// Elements of a row whose successor starts at a multiple of 16 bytes.
fn padded(width: usize, dtype: Dtype) -> usize {
    width.next_multiple_of(16 / width_of(dtype))
}

fn upload_padded<T: Element>(
    device: &Device,
    rows: &[T],
    width: usize,
    stride: usize,
) -> Result<Buffer<u8>, CudaError> {
    if width == stride || rows.is_empty() {
        return device.upload(bytes_of(rows));
    }
    let mut padded = vec![T::default(); rows.len() / width * stride];
    for (to, from) in padded
        .chunks_exact_mut(stride)
        .zip(rows.chunks_exact(width))
    {
        to[..width].copy_from_slice(from);
    }
    device.upload(bytes_of(&padded))
}

fn at_row(error: LossError, first: usize) -> LossError {
    match error {
        LossError::NotFinite { row, column } => LossError::NotFinite {
            row: row + first,
            column,
        },
        other => other,
    }
}
