//! The layout of an adapter, and whether a contribution has it.

use std::collections::BTreeMap;
use std::path::Path;

use consilium_protocol::InstitutionId;
use consilium_protocol::manifest::{MergeRule, Training};

use super::tensors::{A, B, Content, Tensors, pieces};
use crate::fusion::error::{FusionError, Origin, TensorProblem};

/// Largest magnitude of a contributed value.
const LARGEST: f32 = 10_000.0;
/// Largest rank of a contribution in units of the manifest's: the work of a merge grows with its square.
const MOST_RANKS: usize = 4;

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

    /// Checks names and shapes of all tensors, not their values, and says which rank the matrices have: that of the layout
    /// or, where `rule` takes any, one of at most four times that.
    pub(super) fn check(&self, rule: MergeRule, tensors: &Tensors) -> Result<usize, FusionError> {
        let rank = if rule.takes_any_rank() {
            self.rank_of(tensors)?
        } else {
            self.rank
        };
        for (layer, &[rows, columns]) in &self.matrices {
            tensors.expect(&format!("{layer}{A}"), &[rank, columns])?;
            tensors.expect(&format!("{layer}{B}"), &[rows, rank])?;
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
        Ok(rank)
    }

    /// The rank of the first matrix, which all must have.
    fn rank_of(&self, tensors: &Tensors) -> Result<usize, FusionError> {
        let Some((layer, &[_, columns])) = self.matrices.iter().next() else {
            return Ok(self.rank);
        };
        let name = format!("{layer}{A}");
        let got = *tensors.expect(&name, &[0, columns])?.first().unwrap_or(&0);
        let most = MOST_RANKS.saturating_mul(self.rank);
        if (1..=most).contains(&got) {
            Ok(got)
        } else {
            Err(tensors.error(&name, TensorProblem::Rank { got, most }))
        }
    }
}

/// Whether a contributed adapter can be merged by the manifest's rule: same tensors as `start`, of the same rank where the rule
/// asks for it, with the start's A where the rule keeps that, every value finite and at most 10,000 in magnitude. For
/// admission, before it counts. Both are `adapter_model.safetensors` files; of `start` little more than the header is read,
/// of the other one piece at a time.
///
/// # Errors
/// A file that cannot be read, or the first tensor that is missing, superfluous or malformed, in name order.
pub fn check_adapter(
    training: &Training,
    start: &Path,
    institution: &InstitutionId,
    adapter: &Path,
) -> Result<AdapterLayout, FusionError> {
    let start = Tensors::open_adapter(Origin::Start, start)?;
    let layout = AdapterLayout::of(training, &start)?;
    let origin = Origin::Institution(institution.clone());
    let tensors = Tensors::open_adapter(origin, Content::File(adapter))?;
    layout.check(training.merge, &tensors)?;
    for name in tensors.names() {
        for piece in pieces(tensors.shape(name).unwrap_or(&[])) {
            let values = tensors.values(name, piece.clone())?;
            if let Some(index) = values.iter().position(|value| value.abs() > LARGEST) {
                return Err(tensors.error(name, TensorProblem::TooLarge(piece.start + index)));
            }
        }
        if training.merge.freezes_a() && name.ends_with(A) {
            same(&start, &tensors, name)?;
        }
    }
    Ok(layout)
}

/// Rank of the first matrix of a merged adapter, which is that of all; `None` where it has no matrix.
///
/// # Errors
/// A file that cannot be read.
pub fn adapter_rank(adapter: &Path) -> Result<Option<usize>, FusionError> {
    let tensors = Tensors::open_adapter(Origin::Start, adapter)?;
    let mut factors = tensors.names().filter(|name| name.ends_with(A));
    let shape = factors.next().and_then(|name| tensors.shape(name));
    Ok(shape.and_then(|shape| shape.first().copied()))
}

/// Refuses a tensor that is not the start's, bit by bit but for the sign of zero.
pub(super) fn same(start: &Tensors, tensors: &Tensors, name: &str) -> Result<(), FusionError> {
    for piece in pieces(tensors.shape(name).unwrap_or(&[])) {
        let before = start.values(name, piece.clone())?;
        let now = tensors.values(name, piece.clone())?;
        #[expect(clippy::float_cmp, reason = "a frozen factor is returned as it came")]
        let moved = before.iter().zip(&now).position(|(a, b)| a != b);
        if let Some(index) = moved {
            return Err(tensors.error(name, TensorProblem::Moved(piece.start + index)));
        }
    }
    Ok(())
}
