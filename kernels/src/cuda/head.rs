//! The fused head: hidden states to loss and gradient in chunks of rows, so that `[P, V]` never exists.
//!
//! A chunk's logits are f32: a logit of magnitude 16 to 32 rounded to bf16 is off by up to 0.0625, one and a half code
//! steps, while the f32 sums of the product are within 1e-5. The gradient is stored in the weights' type, scaled into
//! the middle of its range for f16, and multiplied with f32 sums.

use crate::cuda::device::{Buffer, Device, bytes_of, count};
use crate::cuda::gemm::{Product, multiply};
use crate::cuda::loss::{LossJob, Places, rows_of};
use crate::cuda::raw::Gemm;
use crate::cuda::rows::width_of;
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
    states: Buffer<u8>,
    gradient: Buffer<f32>,
    rows: usize,
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
            states: upload_padded(self.device, states, self.width, self.stride)?,
            gradient: self.device.allocate(rows * self.stride)?,
            rows,
        })
    }

    /// Loss of all items in nats; the gradient of the hidden states is left on the device. Where `weight_gradient` is
    /// given, the gradient of the weights is added to it.
    ///
    /// # Errors
    /// Where sizes disagree, a label cannot be used (see [`LossJob::new`]), a logit is not finite, or the device fails.
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
        rows: std::ops::Range<usize>,
        scratch: &Scratch,
        weight_gradient: Option<&mut WeightGradient>,
    ) -> Result<(), CudaError> {
        let bytes = width_of(self.dtype) as u64;
        let (stride, wide) = (self.stride as u64, scratch.stride as u64);
        let first = rows.start as u64 * stride;
        let states = hidden.states.address() + first * bytes;
        let (rows, width, tokens) = (
            count(rows.len())?,
            count(self.width)?,
            count(self.vocab.len())?,
        );
        let logits = Gemm {
            a: states,
            b: self.weights.address(),
            c: scratch.logits.address(),
            a_stride: stride,
            b_stride: stride,
            c_stride: wide,
            m: rows,
            n: tokens,
            k: width,
            alpha: 1.0,
            add: 0,
            padding: 0,
        };
        // SAFETY: hidden states and weights have padded rows, the scratch has a chunk's rows of padded logits; all live
        // until `loss` has waited.
        unsafe { multiply(self.device, &logits, self.dtype, Product::Nt) }?;
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
            b: states,
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
