//! Tensors of adapter files: `f32`, little-endian, row-major.

use std::collections::{BTreeMap, HashMap};

use faer::Mat;
use safetensors::SafeTensors;
use safetensors::tensor::{Dtype, TensorView};

use crate::fusion::error::{FusionError, Origin, TensorProblem};

/// What PEFT puts before the names of the base model.
pub(super) const PREFIX: &str = "base_model.model.";
pub(super) const A: &str = ".lora_A.weight";
pub(super) const B: &str = ".lora_B.weight";

/// A parsed file with the name of its owner for error messages.
pub(super) struct Tensors<'a> {
    pub(super) origin: Origin,
    views: BTreeMap<String, TensorView<'a>>,
}

impl<'a> Tensors<'a> {
    pub(super) fn parse(origin: Origin, bytes: &'a [u8]) -> Result<Self, FusionError> {
        let parsed = match SafeTensors::deserialize(bytes) {
            Ok(parsed) => parsed,
            Err(error) => {
                return Err(FusionError::Format {
                    origin,
                    problem: error.to_string(),
                });
            }
        };
        let views: BTreeMap<_, _> = parsed.tensors().into_iter().collect();
        let tensors = Self { origin, views };
        for (name, view) in &tensors.views {
            if view.dtype() != Dtype::F32 {
                let problem = TensorProblem::Type(format!("{:?}", view.dtype()));
                return Err(tensors.error(name, problem));
            }
        }
        Ok(tensors)
    }

    pub(super) fn names(&self) -> impl Iterator<Item = &str> {
        self.views.keys().map(String::as_str)
    }

    pub(super) fn shape(&self, name: &str) -> Option<&[usize]> {
        self.views.get(name).map(TensorView::shape)
    }

    /// Bytes of a tensor of this shape; 0 in `expected` stands for any length.
    pub(super) fn data(&self, name: &str, expected: &[usize]) -> Result<&'a [u8], FusionError> {
        let view = self
            .views
            .get(name)
            .ok_or_else(|| self.error(name, TensorProblem::Missing))?;
        let fits = view.shape().len() == expected.len()
            && view
                .shape()
                .iter()
                .zip(expected)
                .all(|(got, want)| *want == 0 || got == want);
        if fits {
            Ok(view.data())
        } else {
            let problem = TensorProblem::Shape {
                got: view.shape().to_vec(),
                expected: expected.to_vec(),
            };
            Err(self.error(name, problem))
        }
    }

    /// A matrix as stored; the result is transposed for `A`, whose rows then lie in memory one after the other.
    pub(super) fn matrix(
        &self,
        name: &str,
        expected: [usize; 2],
        transposed: bool,
    ) -> Result<Mat<f64>, FusionError> {
        let data = self.data(name, &expected)?;
        let shape = self.shape(name).unwrap_or(&[]);
        let &[rows, columns] = shape else {
            return Err(self.error(name, TensorProblem::Missing));
        };
        let values = floats(data);
        if let Some(index) = values.iter().position(|value| !value.is_finite()) {
            return Err(self.error(name, TensorProblem::NotFinite(index)));
        }
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
}

/// Values of a tensor's bytes.
pub(super) fn floats(data: &[u8]) -> Vec<f32> {
    data.as_chunks()
        .0
        .iter()
        .map(|&bytes| f32::from_le_bytes(bytes))
        .collect()
}

/// A tensor to be written.
pub(super) struct Output {
    pub(super) name: String,
    pub(super) shape: Vec<usize>,
    pub(super) data: Vec<u8>,
}

impl Output {
    /// A matrix in `f32`; with `transposed` the file holds the transpose of `values`.
    #[expect(
        clippy::cast_possible_truncation,
        reason = "adapters are stored in f32; overflow is refused"
    )]
    pub(super) fn matrix(
        name: String,
        values: &Mat<f64>,
        transposed: bool,
    ) -> Result<Self, FusionError> {
        let values = if transposed {
            values.transpose()
        } else {
            values.as_ref()
        };
        let (rows, columns) = values.shape();
        let mut data = Vec::with_capacity(rows * columns * 4);
        for i in 0..rows {
            for j in 0..columns {
                let value = values[(i, j)] as f32;
                if !value.is_finite() {
                    return Err(FusionError::Overflow(name));
                }
                data.extend_from_slice(&value.to_le_bytes());
            }
        }
        Ok(Self {
            name,
            shape: vec![rows, columns],
            data,
        })
    }
}

/// A safetensors file; equal tensors give equal bytes.
pub(super) fn serialize(outputs: &[Output]) -> Result<Vec<u8>, FusionError> {
    let encode = |error: safetensors::SafeTensorError| FusionError::Encode(error.to_string());
    let views = outputs
        .iter()
        .map(|output| {
            let view = TensorView::new(Dtype::F32, output.shape.clone(), &output.data)?;
            Ok((output.name.as_str(), view))
        })
        .collect::<Result<Vec<_>, _>>()
        .map_err(encode)?;
    // One key only: the order of a map's keys would reach the bytes.
    let metadata = HashMap::from([("format".to_owned(), "pt".to_owned())]);
    safetensors::serialize(views, Some(metadata)).map_err(encode)
}
