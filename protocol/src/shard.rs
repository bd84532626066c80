//! Shards: records or targets for a range of items, as a safetensors file that anybody can open.
//!
//! | tensor | type | shape | meaning |
//! |---|---|---|---|
//! | `symbols` | U8 (bytes) or U32 (tokens) | `[N, K]` | kept symbols, ascending; unused slots repeat the last one with code 255 |
//! | `codes` | U8 | `[N, K]` | `round(-16 log2 p)` |
//! | `end` | U8 | `[N]` | code of the end of the record |
//! | `tail` | U8 | `[N]` | code of the mass of all other symbols |
//! | `missed` | U8 | `[I, 2]` | per item: codes of the mean unseen mass, short and long tokens |
//! | `offsets` | U64 | `[I+1]` | first position of each item |
//!
//! The metadata has one key, `consilium`, whose value is canonical JSON of [`Header`], so that equal shards are equal bytes.

use std::collections::HashMap;
use std::ops::Range;

use safetensors::tensor::{Dtype, SafeTensors, TensorView};
use serde::{Deserialize, Serialize};

use crate::ids::Digest;
use crate::limits;
use crate::manifest::{SymbolSpace, canonical_json};

const KEY: &str = "consilium";
const FORMAT: u32 = 1;
const QUANTISER: &str = "sixteenth-bits";

/// What a shard says about itself.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Header {
    /// Version of the layout, 1.
    pub format: u32,
    /// Digest of the reference set.
    pub reference: Digest,
    /// First item.
    pub first: u64,
    /// Item after the last.
    pub last: u64,
    /// Alphabet.
    pub space: SymbolSpace,
    /// Slots per position (K).
    pub symbols: u16,
    /// Name of the quantiser: `sixteenth-bits`.
    pub quantiser: String,
}

impl Header {
    /// The header of a shard of `items`.
    #[must_use]
    pub fn new(reference: Digest, items: Range<u64>, space: SymbolSpace, symbols: u16) -> Self {
        Self {
            format: FORMAT,
            reference,
            first: items.start,
            last: items.end,
            space,
            symbols,
            quantiser: QUANTISER.to_owned(),
        }
    }

    /// Items that the shard covers.
    #[must_use]
    pub const fn items(&self) -> Range<u64> {
        self.first..self.last
    }
}

/// Kept symbols of every position.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Symbols {
    /// Byte space.
    Bytes(Vec<u8>),
    /// Token space.
    Tokens(Vec<u32>),
}

/// A shard in memory. Positions of item `i` are `offsets[i]..offsets[i + 1]`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Shard {
    /// What it covers.
    pub header: Header,
    /// `[N, K]` kept symbols.
    pub symbols: Symbols,
    /// `[N, K]` their codes.
    pub codes: Vec<u8>,
    /// `[N]` code of the end of the record.
    pub end: Vec<u8>,
    /// `[N]` code of all other mass.
    pub tail: Vec<u8>,
    /// `[I, 2]` codes of the unseen mass.
    pub missed: Vec<u8>,
    /// `[I + 1]` first position of each item.
    pub offsets: Vec<u64>,
}

/// Why bytes are no shard.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ShardError {
    /// Not safetensors, or not this set of tensors.
    #[error("shard: {0}")]
    Format(String),
    /// A tensor of the wrong type or shape.
    #[error("shard: tensor {tensor} is {got}, expected {expected}")]
    Shape {
        /// Name of the tensor.
        tensor: &'static str,
        /// What was found.
        got: String,
        /// What must be there.
        expected: String,
    },
    /// Symbols of a position that are not ascending or out of range.
    #[error("shard: symbols of position {0} are not ascending or out of range")]
    Symbols(usize),
    /// Offsets that do not start at 0, ascend and end at N.
    #[error("shard: offsets do not cover the positions in order")]
    Offsets,
}

impl Shard {
    /// Positions (N).
    #[must_use]
    pub const fn positions(&self) -> usize {
        self.end.len()
    }

    /// Positions of item `index`, counted within the shard.
    #[must_use]
    pub fn item(&self, index: usize) -> Option<Range<usize>> {
        let from = usize::try_from(*self.offsets.get(index)?).ok()?;
        let to = usize::try_from(*self.offsets.get(index.checked_add(1)?)?).ok()?;
        Some(from..to)
    }

    /// The file's bytes; equal shards give equal bytes.
    ///
    /// # Errors
    /// Inconsistent lengths, or symbols out of order.
    pub fn to_bytes(&self) -> Result<Vec<u8>, ShardError> {
        self.check()?;
        let n = self.positions();
        let k = usize::from(self.header.symbols);
        let items = self.offsets.len().saturating_sub(1);
        let offsets: Vec<u8> = self
            .offsets
            .iter()
            .flat_map(|offset| offset.to_le_bytes())
            .collect();
        let tokens: Vec<u8>;
        let (dtype, symbols) = match &self.symbols {
            Symbols::Bytes(bytes) => (Dtype::U8, bytes.as_slice()),
            Symbols::Tokens(ids) => {
                tokens = ids.iter().flat_map(|id| id.to_le_bytes()).collect();
                (Dtype::U32, tokens.as_slice())
            }
        };
        let format = |error: safetensors::SafeTensorError| ShardError::Format(error.to_string());
        let view = |dtype, shape, data| TensorView::new(dtype, shape, data).map_err(format);
        let tensors = [
            ("symbols", view(dtype, vec![n, k], symbols)?),
            ("codes", view(Dtype::U8, vec![n, k], &self.codes)?),
            ("end", view(Dtype::U8, vec![n], &self.end)?),
            ("tail", view(Dtype::U8, vec![n], &self.tail)?),
            ("missed", view(Dtype::U8, vec![items, 2], &self.missed)?),
            (
                "offsets",
                view(Dtype::U64, vec![items.saturating_add(1)], &offsets)?,
            ),
        ];
        let header =
            canonical_json(&self.header).map_err(|error| ShardError::Format(error.to_string()))?;
        let metadata = HashMap::from([(KEY.to_owned(), header)]);
        safetensors::serialize(tensors, Some(metadata)).map_err(format)
    }

    /// Parses a file and checks everything but the mass of the codes.
    ///
    /// # Errors
    /// The first thing that is wrong.
    pub fn parse(bytes: &[u8]) -> Result<Self, ShardError> {
        let format = |error: safetensors::SafeTensorError| ShardError::Format(error.to_string());
        let (_, metadata) = SafeTensors::read_metadata(bytes).map_err(format)?;
        let header = metadata
            .metadata()
            .as_ref()
            .and_then(|map| map.get(KEY))
            .ok_or_else(|| ShardError::Format(format!("the metadata has no key {KEY:?}")))?;
        let header: Header = serde_json::from_str(header)
            .map_err(|error| ShardError::Format(format!("header: {error}")))?;
        if header.format != FORMAT || header.quantiser != QUANTISER {
            return Err(ShardError::Format(format!(
                "format {} with quantiser {:?} is not supported",
                header.format, header.quantiser
            )));
        }
        let tensors = SafeTensors::deserialize(bytes).map_err(format)?;
        if tensors.len() != 6 {
            return Err(ShardError::Format(format!(
                "{} tensors, expected 6",
                tensors.len()
            )));
        }
        let symbols = match header.space {
            SymbolSpace::Bytes => {
                Symbols::Bytes(bytes_of(&tensors, "symbols", Dtype::U8)?.to_vec())
            }
            SymbolSpace::Tokens { .. } => {
                let raw = bytes_of(&tensors, "symbols", Dtype::U32)?;
                Symbols::Tokens(
                    raw.as_chunks()
                        .0
                        .iter()
                        .map(|c| u32::from_le_bytes(*c))
                        .collect(),
                )
            }
        };
        let offsets = bytes_of(&tensors, "offsets", Dtype::U64)?;
        let shard = Self {
            header,
            symbols,
            codes: bytes_of(&tensors, "codes", Dtype::U8)?.to_vec(),
            end: bytes_of(&tensors, "end", Dtype::U8)?.to_vec(),
            tail: bytes_of(&tensors, "tail", Dtype::U8)?.to_vec(),
            missed: bytes_of(&tensors, "missed", Dtype::U8)?.to_vec(),
            offsets: offsets
                .as_chunks()
                .0
                .iter()
                .map(|c| u64::from_le_bytes(*c))
                .collect(),
        };
        shard.check_shapes(&tensors)?;
        shard.check()?;
        Ok(shard)
    }

    fn check_shapes(&self, tensors: &SafeTensors<'_>) -> Result<(), ShardError> {
        let n = self.positions();
        let k = usize::from(self.header.symbols);
        let items = self.offsets.len().saturating_sub(1);
        let shapes: [(&'static str, Vec<usize>); 6] = [
            ("symbols", vec![n, k]),
            ("codes", vec![n, k]),
            ("end", vec![n]),
            ("tail", vec![n]),
            ("missed", vec![items, 2]),
            ("offsets", vec![items.saturating_add(1)]),
        ];
        for (tensor, expected) in shapes {
            let view = tensors
                .tensor(tensor)
                .map_err(|error| ShardError::Format(error.to_string()))?;
            if view.shape() != expected {
                return Err(ShardError::Shape {
                    tensor,
                    got: format!("{:?}", view.shape()),
                    expected: format!("{expected:?}"),
                });
            }
        }
        Ok(())
    }

    fn check(&self) -> Result<(), ShardError> {
        let n = self.positions();
        let k = usize::from(self.header.symbols);
        let items = usize::try_from(self.header.last.saturating_sub(self.header.first))
            .unwrap_or(usize::MAX);
        let slots = n.saturating_mul(k);
        if !(1..=limits::SYMBOLS).contains(&self.header.symbols) {
            return Err(ShardError::Format(format!("{k} symbols per position")));
        }
        let symbols = match &self.symbols {
            Symbols::Bytes(bytes) => bytes.len(),
            Symbols::Tokens(ids) => ids.len(),
        };
        let lengths = [
            ("symbols", symbols, slots),
            ("codes", self.codes.len(), slots),
            ("tail", self.tail.len(), n),
            ("missed", self.missed.len(), items.saturating_mul(2)),
            ("offsets", self.offsets.len(), items.saturating_add(1)),
        ];
        for (tensor, got, expected) in lengths {
            if got != expected {
                return Err(ShardError::Shape {
                    tensor,
                    got: got.to_string(),
                    expected: expected.to_string(),
                });
            }
        }
        let total = u64::try_from(n).unwrap_or(u64::MAX);
        if self.offsets.first() != Some(&0)
            || self.offsets.last() != Some(&total)
            || !self.offsets.is_sorted_by(|a, b| a < b)
        {
            return Err(ShardError::Offsets);
        }
        match (&self.symbols, self.header.space) {
            (Symbols::Bytes(bytes), SymbolSpace::Bytes) => ascending(bytes, &self.codes, k, None),
            (Symbols::Tokens(ids), SymbolSpace::Tokens { size, .. }) => {
                ascending(ids, &self.codes, k, Some(size))
            }
            _ => Err(ShardError::Format(
                "symbols are of another space".to_owned(),
            )),
        }
    }
}

fn ascending<S: Copy + Ord + Into<u32>>(
    symbols: &[S],
    codes: &[u8],
    k: usize,
    size: Option<u32>,
) -> Result<(), ShardError> {
    for (position, (row, codes)) in symbols
        .chunks_exact(k)
        .zip(codes.chunks_exact(k))
        .enumerate()
    {
        let mut unused = false;
        for ((before, symbol), &code) in
            row.iter().zip(row.iter().skip(1)).zip(codes.iter().skip(1))
        {
            let repeats = before == symbol;
            if symbol < before || (unused && !repeats) || (repeats && code != u8::MAX) {
                return Err(ShardError::Symbols(position));
            }
            unused |= repeats;
        }
        if let (Some(size), Some(&last)) = (size, row.last())
            && last.into() >= size
        {
            return Err(ShardError::Symbols(position));
        }
    }
    Ok(())
}

fn bytes_of<'a>(
    tensors: &SafeTensors<'a>,
    tensor: &'static str,
    dtype: Dtype,
) -> Result<&'a [u8], ShardError> {
    let view = tensors
        .tensor(tensor)
        .map_err(|error| ShardError::Format(error.to_string()))?;
    if view.dtype() != dtype {
        return Err(ShardError::Shape {
            tensor,
            got: format!("{:?}", view.dtype()),
            expected: format!("{dtype:?}"),
        });
    }
    Ok(view.data())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shard() -> Shard {
        let header = Header::new(Digest::of(b"set"), 4..6, SymbolSpace::Bytes, 2);
        Shard {
            header,
            symbols: Symbols::Bytes(vec![97, 98, 97, 97, 10, 97, 0, 255, 1, 1]),
            codes: vec![16, 16, 0, 255, 3, 90, 16, 16, 0, 255],
            end: vec![255, 255, 0, 255, 1],
            tail: vec![255; 5],
            missed: vec![40, 50, 255, 255],
            offsets: vec![0, 3, 5],
        }
    }

    #[test]
    fn equal_shards_are_equal_bytes_and_read_back() {
        let bytes = shard().to_bytes().unwrap();
        assert_eq!(bytes, shard().to_bytes().unwrap());
        assert_eq!(Shard::parse(&bytes).unwrap(), shard());
        assert_eq!(shard().item(1), Some(3..5));
        assert_eq!(
            Digest::of(&bytes).to_string(),
            include_str!("../tests/vectors/shard.sha256").trim()
        );
    }

    #[test]
    fn symbols_out_of_order_and_odd_offsets_are_refused() {
        let mut unsorted = shard();
        unsorted.symbols = Symbols::Bytes(vec![98, 97, 97, 97, 10, 97, 0, 255, 1, 1]);
        assert_eq!(unsorted.to_bytes(), Err(ShardError::Symbols(0)));
        let mut unused = shard();
        unused.codes[3] = 7;
        assert_eq!(unused.to_bytes(), Err(ShardError::Symbols(1)));
        for offsets in [vec![1, 3, 5], vec![0, 3, 4], vec![0, 0, 5]] {
            let odd = Shard { offsets, ..shard() };
            assert_eq!(odd.to_bytes(), Err(ShardError::Offsets));
        }
    }

    #[test]
    fn a_truncated_file_or_a_lying_header_is_refused() {
        let bytes = shard().to_bytes().unwrap();
        for length in 0..bytes.len() {
            assert!(
                Shard::parse(&bytes[..length]).is_err(),
                "{length} bytes were accepted"
            );
        }
        let mut longer = bytes;
        longer.push(0);
        assert!(Shard::parse(&longer).is_err());
    }
}
