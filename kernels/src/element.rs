//! What logits and head weights are stored as; arithmetic is in `f32` and `f64`.

use std::fmt;

use half::{bf16, f16};

mod sealed {
    #[expect(
        unnameable_types,
        reason = "keeps the storage types to those that every backend reads"
    )]
    pub trait Sealed {}
    impl Sealed for f32 {}
    impl Sealed for half::bf16 {}
    impl Sealed for half::f16 {}
}

/// Name of an [`Element`], for code that learns it at run time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Dtype {
    /// IEEE single precision.
    F32,
    /// The upper half of an `f32`.
    Bf16,
    /// IEEE half precision.
    F16,
}

/// A storage type of logits, gradients and head weights.
pub trait Element: Copy + Default + fmt::Debug + Send + Sync + 'static + sealed::Sealed {
    /// Its name.
    const DTYPE: Dtype;

    /// The value, exactly.
    fn to_f32(self) -> f32;

    /// The nearest value, ties to even.
    fn from_f32(value: f32) -> Self;
}

impl Element for f32 {
    const DTYPE: Dtype = Dtype::F32;

    #[inline]
    fn to_f32(self) -> f32 {
        self
    }

    #[inline]
    fn from_f32(value: f32) -> Self {
        value
    }
}

impl Element for bf16 {
    const DTYPE: Dtype = Dtype::Bf16;

    #[inline]
    fn to_f32(self) -> f32 {
        f32::from_bits(u32::from(self.to_bits()) << 16)
    }

    #[inline]
    fn from_f32(value: f32) -> Self {
        Self::from_f32(value)
    }
}

impl Element for f16 {
    const DTYPE: Dtype = Dtype::F16;

    #[inline]
    fn to_f32(self) -> f32 {
        Self::to_f32(self)
    }

    #[inline]
    fn from_f32(value: f32) -> Self {
        Self::from_f32(value)
    }
}
