//! The layout of an adapter, and whether a contribution has it.

use std::collections::BTreeMap;
use std::path::Path;

use consilium_protocol::InstitutionId;
use consilium_protocol::manifest::Training;

use super::tensors::{A, B, Tensors, pieces};
use crate::fusion::error::{FusionError, Origin, TensorProblem};

/// Largest magnitude of a contributed value.
const LARGEST: f32 = 10_000.0;

/// Matrices and whole tensors of an adapter.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AdapterLayout {
    /// Rank of every matrix.
    pub rank: usize,
    /// Linear layers by the part of their PEFT name before `.lora_A.weight`, with [out, in].
    pub matrices: BTreeMap<String, [usize; 2]>,
    /// Tensors that are trained whole, by their PEFT names, with their shapes.
    pub whole: BTreeMap<String, Vec<usize>>,
}

impl AdapterLayout {
    /// Layout of the adapter that an inner round starts from.
    pub(super) fn of(training: &Training, start: &Tensors) -> Result<Self, FusionError> {
        let rank = usize::try_from(training.rank).unwrap_or(usize::MAX);
        let mut matrices = BTreeMap::new();
        let mut whole = BTreeMap::new();
        for name in start.names() {
            let shape = start.shape(name).unwrap_or(&[]);
            if let Some(layer) = name.strip_suffix(A) {
                let b = format!("{layer}{B}");
                start.expect(name, &[rank, 0])?;
                start.expect(&b, &[0, rank])?;
                if let (&[_, columns], Some(&[rows, _])) = (shape, start.shape(&b)) {
                    matrices.insert(layer.to_owned(), [rows, columns]);
                }
            } else if let Some(layer) = name.strip_suffix(B) {
                start.expect(&format!("{layer}{A}"), &[rank, 0])?;
            } else {
                whole.insert(name.to_owned(), shape.to_vec());
            }
        }
        Ok(Self {
            rank,
            matrices,
            whole,
        })
    }

    /// Checks names and shapes of all tensors, not their values.
    pub(super) fn check(&self, tensors: &Tensors) -> Result<(), FusionError> {
        for (layer, &[rows, columns]) in &self.matrices {
            tensors.expect(&format!("{layer}{A}"), &[self.rank, columns])?;
            tensors.expect(&format!("{layer}{B}"), &[rows, self.rank])?;
        }
        for (name, shape) in &self.whole {
            tensors.expect(name, shape)?;
        }
        for name in tensors.names() {
            let layer = name.strip_suffix(A).or_else(|| name.strip_suffix(B));
            let known = layer.is_some_and(|layer| self.matrices.contains_key(layer))
                || self.whole.contains_key(name);
            if !known {
                return Err(tensors.error(name, TensorProblem::Unexpected));
            }
        }
        Ok(())
    }
}

/// Whether a contributed adapter can be merged: same tensors as `start`, every value finite and at most 10,000 in
/// magnitude. For admission, before it counts. Both are `adapter_model.safetensors` files; of `start` only the header is
/// read, of the other one piece at a time.
///
/// # Errors
/// A file that cannot be read, or the first tensor that is missing, superfluous or malformed, in name order.
pub fn check_adapter(
    training: &Training,
    start: &Path,
    institution: &InstitutionId,
    adapter: &Path,
) -> Result<AdapterLayout, FusionError> {
    let layout = AdapterLayout::of(training, &Tensors::open_adapter(Origin::Start, start)?)?;
    let tensors = Tensors::open_adapter(Origin::Institution(institution.clone()), adapter)?;
    layout.check(&tensors)?;
    for name in tensors.names() {
        for piece in pieces(tensors.shape(name).unwrap_or(&[])) {
            let values = tensors.values(name, piece.clone())?;
            if let Some(index) = values.iter().position(|value| value.abs() > LARGEST) {
                return Err(tensors.error(name, TensorProblem::TooLarge(piece.start + index)));
            }
        }
    }
    Ok(layout)
}
