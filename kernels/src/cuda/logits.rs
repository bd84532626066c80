//! Logits that live on the device.

use crate::cuda::device::{Buffer, Device, bytes_of, bytes_of_mut};
use crate::cuda::raw::Address;
use crate::cuda::rows::width_of;
use crate::element::{Dtype, Element};
use crate::error::CudaError;

/// Rows of logits, or of the gradient that took their place, on the device.
pub struct Logits {
    buffer: Buffer<u8>,
    dtype: Dtype,
    len: usize,
}

impl std::fmt::Debug for Logits {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Logits")
            .field("dtype", &self.dtype)
            .field("len", &self.len)
            .finish_non_exhaustive()
    }
}

impl Logits {
    /// Copies rows to the device.
    ///
    /// # Errors
    /// Where the device is out of memory or fails.
    pub fn upload<T: Element>(device: &Device, logits: &[T]) -> Result<Self, CudaError> {
        Ok(Self {
            buffer: device.upload(bytes_of(logits))?,
            dtype: T::DTYPE,
            len: logits.len(),
        })
    }

    /// Overwrites the rows.
    ///
    /// # Errors
    /// Where the type or the number of elements differs, or the device fails.
    pub fn replace<T: Element>(&mut self, device: &Device, logits: &[T]) -> Result<(), CudaError> {
        self.check::<T>(logits.len())?;
        device.upload_into(bytes_of(logits), &mut self.buffer)
    }

    /// Copies the rows back.
    ///
    /// # Errors
    /// Where the type or the number of elements differs, or the device fails.
    pub fn download<T: Element>(&self, device: &Device, to: &mut [T]) -> Result<(), CudaError> {
        self.check::<T>(to.len())?;
        device.download_into(&self.buffer, bytes_of_mut(to))
    }

    /// Storage type.
    #[must_use]
    pub fn dtype(&self) -> Dtype {
        self.dtype
    }

    /// Number of elements.
    #[must_use]
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there are none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    pub(super) fn address(&self) -> Address {
        self.buffer.address()
    }

    /// Bytes that reading all of them once moves.
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.len * width_of(self.dtype)
    }

    fn check<T: Element>(&self, len: usize) -> Result<(), CudaError> {
        if (T::DTYPE, len) == (self.dtype, self.len) {
            Ok(())
        } else {
            Err(CudaError::Unsupported {
                what: "rows of another type or size than those on the device",
            })
        }
    }
}
