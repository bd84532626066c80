//! Named f32 tensors and their safetensors form.

use std::borrow::Cow;
use std::collections::{BTreeMap, HashMap};

use consilium_kernels::bytes;
use safetensors::tensor::{Dtype, SafeTensors, TensorView, View};

use super::ModelError;

/// A tensor with its shape, row-major.
#[derive(Debug, Clone, PartialEq)]
pub struct NamedTensor {
    /// Sizes, outermost first.
    pub shape: Vec<usize>,
    /// Values, as many as the product of the sizes.
    pub values: Vec<f32>,
}

/// Tensors by name, in the order of the names.
pub type NamedTensors = BTreeMap<String, NamedTensor>;

/// Reads all tensors of a safetensors file, converted to f32. `origin` is for messages.
pub fn decode(origin: &str, bytes: &[u8]) -> Result<NamedTensors, ModelError> {
    let file = open(origin, bytes)?;
    let mut names = file.names();
    names.sort_unstable();
    let mut tensors = BTreeMap::new();
    for name in names {
        let view = view(origin, &file, name)?;
        let mut values = vec![0f32; view.shape().iter().product()];
        copy_as_f32(origin, name, view.dtype(), view.data(), &mut values)?;
        tensors.insert(
            name.to_owned(),
            NamedTensor {
                shape: view.shape().to_vec(),
                values,
            },
        );
    }
    Ok(tensors)
}

/// Writes tensors as f32 with metadata `format = pt`, which Hugging Face libraries ask for.
pub fn encode(tensors: &NamedTensors) -> Result<Vec<u8>, ModelError> {
    encode_with(tensors, "format", "pt")
}

/// Writes tensors as f32 with one metadata entry (the format keeps entries in no stable order).
pub(crate) fn encode_with(
    tensors: &NamedTensors,
    key: &str,
    value: &str,
) -> Result<Vec<u8>, ModelError> {
    let metadata = HashMap::from([(key.to_owned(), value.to_owned())]);
    safetensors::serialize(
        tensors.iter().map(|(name, tensor)| (name, F32(tensor))),
        Some(metadata),
    )
    .map_err(|source| ModelError::Encode { source })
}

struct F32<'a>(&'a NamedTensor);

impl View for F32<'_> {
    fn dtype(&self) -> Dtype {
        Dtype::F32
    }

    fn shape(&self) -> &[usize] {
        &self.0.shape
    }

    fn data(&self) -> Cow<'_, [u8]> {
        Cow::Owned(bytes::encode(&self.0.values))
    }

    fn data_len(&self) -> usize {
        self.0.values.len() * size_of::<f32>()
    }
}

pub(crate) fn open<'a>(origin: &str, bytes: &'a [u8]) -> Result<SafeTensors<'a>, ModelError> {
    SafeTensors::deserialize(bytes).map_err(|source| ModelError::Decode {
        origin: origin.to_owned(),
        source,
    })
}

fn view<'a>(
    origin: &str,
    file: &SafeTensors<'a>,
    name: &str,
) -> Result<TensorView<'a>, ModelError> {
    file.tensor(name).map_err(|_| ModelError::MissingTensor {
        origin: origin.to_owned(),
        name: name.to_owned(),
    })
}

/// Copies the little-endian values of a tensor of f32, bf16 or f16.
pub(crate) fn copy_as_f32(
    origin: &str,
    name: &str,
    dtype: Dtype,
    stored: &[u8],
    out: &mut [f32],
) -> Result<(), ModelError> {
    let dtype = match dtype {
        Dtype::F32 => consilium_kernels::Dtype::F32,
        Dtype::BF16 => consilium_kernels::Dtype::Bf16,
        Dtype::F16 => consilium_kernels::Dtype::F16,
        other => {
            return Err(ModelError::WrongType {
                origin: origin.to_owned(),
                name: name.to_owned(),
                dtype: format!("{other:?}"),
            });
        }
    };
    bytes::decode(dtype, stored, out);
    Ok(())
}
