//! Tensors of safetensors files, read piece by piece: a file is never in memory as a whole, unless it was there before.

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;

use consilium_protocol::limits;
use faer::Mat;
use safetensors::tensor::{Dtype, Metadata, TensorInfo};

use crate::fusion::error::{FusionError, Origin, TensorProblem};

/// What PEFT puts before the names of the base model.
pub(super) const PREFIX: &str = "base_model.model.";
pub(super) const A: &str = ".lora_A.weight";
pub(super) const B: &str = ".lora_B.weight";
/// Elements of a whole tensor that are in memory at once.
pub(super) const PIECE: usize = 1 << 16;

/// Where the bytes of an `adapter_model.safetensors` are.
#[derive(Debug, Clone, Copy)]
pub enum Content<'a> {
    /// In a file, of which one piece at a time is read.
    File(&'a Path),
    /// In memory.
    Bytes(&'a [u8]),
}

impl<'a> From<&'a Path> for Content<'a> {
    fn from(path: &'a Path) -> Self {
        Self::File(path)
    }
}

impl<'a> From<&'a [u8]> for Content<'a> {
    fn from(bytes: &'a [u8]) -> Self {
        Self::Bytes(bytes)
    }
}

/// An open file, or a copy of bytes in memory.
enum Source {
    File(File),
    Bytes(Arc<[u8]>),
}

impl Source {
    fn open(content: Content<'_>) -> io::Result<Self> {
        Ok(match content {
            Content::File(path) => Self::File(File::open(path)?),
            Content::Bytes(bytes) => Self::Bytes(bytes.into()),
        })
    }

    fn length(&self) -> io::Result<u64> {
        Ok(match self {
            Self::File(file) => file.metadata()?.len(),
            Self::Bytes(bytes) => as_u64(bytes.len()),
        })
    }

    fn read_exact_at(&self, buffer: &mut [u8], at: u64) -> io::Result<()> {
        match self {
            Self::File(file) => file.read_exact_at(buffer, at),
            Self::Bytes(bytes) => {
                let from = usize::try_from(at).unwrap_or(usize::MAX);
                let part = bytes.get(from..from.saturating_add(buffer.len()));
                buffer.copy_from_slice(part.ok_or(io::ErrorKind::UnexpectedEof)?);
                Ok(())
            }
        }
    }
}

/// A safetensors file whose header was read and checked, with the name of its owner for error messages.
pub(super) struct Tensors {
    pub(super) origin: Origin,
    source: Source,
    /// Where the tensors' bytes begin.
    data: u64,
    tensors: BTreeMap<String, TensorInfo>,
}

impl Tensors {
    /// Reads the header: at most [`limits::TENSOR_HEADER`] bytes, whose tensors fill the file exactly.
    pub(super) fn open<'a>(
        origin: Origin,
        content: impl Into<Content<'a>>,
    ) -> Result<Self, FusionError> {
        match read_header(content.into()) {
            Ok((source, data, tensors)) => Ok(Self {
                origin,
                source,
                data,
                tensors,
            }),
            Err(Unreadable::Io(source)) => Err(FusionError::Io { origin, source }),
            Err(Unreadable::Problem(problem)) => Err(FusionError::Format { origin, problem }),
        }
    }

    /// As [`Self::open`], for a file whose tensors must all be `f32`.
    pub(super) fn open_adapter<'a>(
        origin: Origin,
        content: impl Into<Content<'a>>,
    ) -> Result<Self, FusionError> {
        let tensors = Self::open(origin, content)?;
        for (name, info) in &tensors.tensors {
            if info.dtype != Dtype::F32 {
                let problem = TensorProblem::Type(format!("{:?}", info.dtype), "F32");
                return Err(tensors.error(name, problem));
            }
        }
        Ok(tensors)
    }

    pub(super) fn names(&self) -> impl Iterator<Item = &str> {
        self.tensors.keys().map(String::as_str)
    }

    pub(super) fn shape(&self, name: &str) -> Option<&[usize]> {
        self.tensors.get(name).map(|info| info.shape.as_slice())
    }

    /// Shape of a tensor that must have this one; 0 in `expected` stands for any length.
    pub(super) fn expect(&self, name: &str, expected: &[usize]) -> Result<&[usize], FusionError> {
        let shape = &self.find(name)?.shape;
        let fits = shape.len() == expected.len()
            && shape
                .iter()
                .zip(expected)
                .all(|(got, want)| *want == 0 || got == want);
        if fits {
            Ok(shape)
        } else {
            let problem = TensorProblem::Shape {
                got: shape.clone(),
                expected: expected.to_vec(),
            };
            Err(self.error(name, problem))
        }
    }

    /// Elements `range` of a tensor in row-major order, widened to `f32`; every one is finite.
    pub(super) fn values(&self, name: &str, range: Range<usize>) -> Result<Vec<f32>, FusionError> {
        let info = self.find(name)?;
        let width = match info.dtype {
            Dtype::F32 => 4,
            Dtype::BF16 | Dtype::F16 => 2,
            other => {
                let problem = TensorProblem::Type(format!("{other:?}"), "F32, BF16 or F16");
                return Err(self.error(name, problem));
            }
        };
        let at = info.data_offsets.0.saturating_add(range.start * width);
        let at = self.data.saturating_add(as_u64(at));
        let mut raw = vec![0; range.len() * width];
        self.source
            .read_exact_at(&mut raw, at)
            .map_err(|source| FusionError::Io {
                origin: self.origin.clone(),
                source,
            })?;
        let halves = || {
            raw.as_chunks()
                .0
                .iter()
                .map(|&half| u16::from_le_bytes(half))
        };
        let values: Vec<f32> = match info.dtype {
            Dtype::BF16 => halves()
                .map(|half| f32::from_bits(u32::from(half) << 16))
                .collect(),
            Dtype::F16 => halves().map(widen).collect(),
            _ => {
                let floats = raw.as_chunks().0.iter();
                floats.map(|&bytes| f32::from_le_bytes(bytes)).collect()
            }
        };
        match values.iter().position(|value| !value.is_finite()) {
            Some(index) => Err(self.error(name, TensorProblem::NotFinite(range.start + index))),
            None => Ok(values),
        }
    }

    /// A matrix as stored; the result is transposed for `A`, whose rows then lie in memory one after the other.
    pub(super) fn matrix(
        &self,
        name: &str,
        expected: [usize; 2],
        transposed: bool,
    ) -> Result<Mat<f64>, FusionError> {
        let &[rows, columns] = self.expect(name, &expected)? else {
            return Err(self.error(name, TensorProblem::Missing));
        };
        let values = self.values(name, 0..rows * columns)?;
        let at = |i: usize, j: usize| f64::from(values[i * columns + j]);
        Ok(if transposed {
            Mat::from_fn(columns, rows, |i, j| at(j, i))
        } else {
            Mat::from_fn(rows, columns, at)
        })
    }

    pub(super) fn error(&self, tensor: &str, problem: TensorProblem) -> FusionError {
        FusionError::Tensor {
            origin: self.origin.clone(),
            tensor: tensor.to_owned(),
            problem,
        }
    }

    fn find(&self, name: &str) -> Result<&TensorInfo, FusionError> {
        self.tensors
            .get(name)
            .ok_or_else(|| self.error(name, TensorProblem::Missing))
    }
}

/// Elements of a tensor, piece by piece.
pub(super) fn pieces(shape: &[usize]) -> impl Iterator<Item = Range<usize>> + use<> {
    let elements = shape.iter().product();
    (0..elements)
        .step_by(PIECE)
        .map(move |from| from..elements.min(from + PIECE))
}

enum Unreadable {
    Io(io::Error),
    Problem(String),
}

impl From<io::Error> for Unreadable {
    fn from(error: io::Error) -> Self {
        Self::Io(error)
    }
}

fn read_header(
    content: Content<'_>,
) -> Result<(Source, u64, BTreeMap<String, TensorInfo>), Unreadable> {
    let source = Source::open(content)?;
    let got = source.length()?;
    let mut length = [0; 8];
    if got < as_u64(length.len()) {
        return Err(Unreadable::Problem(format!(
            "{got} bytes are too few for safetensors"
        )));
    }
    source.read_exact_at(&mut length, 0)?;
    let length = u64::from_le_bytes(length);
    if length > limits::TENSOR_HEADER || length > got - 8 {
        let problem = format!("a header of {length} bytes is too long");
        return Err(Unreadable::Problem(problem));
    }
    let mut header = vec![0; usize::try_from(length).unwrap_or(usize::MAX)];
    source.read_exact_at(&mut header, 8)?;
    // Parsing checks that the tensors lie one after the other and have the bytes that their shapes ask for.
    let metadata: Metadata = serde_json::from_slice(&header)
        .map_err(|error| Unreadable::Problem(format!("header: {error}")))?;
    let data = length + 8;
    let expected = data.saturating_add(as_u64(metadata.data_len()));
    if expected != got {
        return Err(Unreadable::Problem(format!(
            "{got} bytes, the header asks for {expected}"
        )));
    }
    let tensors = metadata
        .tensors()
        .into_iter()
        .map(|(name, info)| (name, info.clone()))
        .collect();
    Ok((source, data, tensors))
}

pub(super) fn as_u64(length: usize) -> u64 {
    u64::try_from(length).unwrap_or(u64::MAX)
}

/// The `f32` of an IEEE half.
fn widen(half: u16) -> f32 {
    let sign = u32::from(half >> 15) << 31;
    let exponent = u32::from(half >> 10) & 0x1f;
    let fraction = u32::from(half) & 0x3ff;
    match (exponent, fraction) {
        (0, _) => {
            // Exact: at most ten significant bits times a power of two.
            let magnitude = f32::from(half & 0x3ff) * f32::from_bits(103 << 23);
            f32::from_bits(sign | magnitude.to_bits())
        }
        (0x1f, _) => f32::from_bits(sign | 0x7f80_0000 | (fraction << 13)),
        _ => f32::from_bits(sign | ((exponent + 112) << 23) | (fraction << 13)),
    }
}

#[cfg(test)]
mod tests {
    use super::widen;

    #[test]
    fn halves_widen_exactly() {
        for (half, value) in [
            (0x0000, 0.0),
            (0x3c00, 1.0),
            (0xc000, -2.0),
            (0x7bff, 65_504.0),
            (0x0400, 1.0 / 16_384.0),
            (0x0001, 5.960_464_5e-8),
            (0x83ff, -6.097_555e-5),
            (0x3555, 0.333_251_95),
        ] {
            assert_eq!(widen(half).to_bits(), f32::to_bits(value), "{half:#06x}");
        }
        assert!(widen(0x7c00).is_infinite() && widen(0x7e00).is_nan());
    }
}
