//! Tensors of the pivot, read one by one: the aggregator has no model code and never holds the model.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};

use safetensors::tensor::{Dtype, Metadata};
use serde::Deserialize;

use crate::fusion::error::FusionError;

const INDEX: &str = "model.safetensors.index.json";
const SINGLE: &str = "model.safetensors";
/// Longest header that is read, as in the safetensors crate.
const HEADER: u64 = 100_000_000;

struct Place {
    file: PathBuf,
    dtype: Dtype,
    shape: Vec<usize>,
    start: u64,
    length: usize,
}

/// The tensors of a Hugging Face model folder by name.
pub(super) struct Pivot {
    folder: PathBuf,
    places: BTreeMap<String, Place>,
}

impl Pivot {
    /// Reads the headers of the folder's safetensors files.
    pub(super) fn open(folder: &Path) -> Result<Self, FusionError> {
        let mut pivot = Self {
            folder: folder.to_owned(),
            places: BTreeMap::new(),
        };
        for file in files(folder)? {
            pivot.read_header(&folder.join(file))?;
        }
        Ok(pivot)
    }

    pub(super) fn shapes(&self) -> impl Iterator<Item = (&str, &[usize])> {
        self.places
            .iter()
            .map(|(name, place)| (name.as_str(), place.shape.as_slice()))
    }

    /// Values of one tensor as the little-endian bytes of `f32`.
    pub(super) fn values(&self, name: &str) -> Result<Vec<u8>, FusionError> {
        let place = self.places.get(name).ok_or_else(|| FusionError::Pivot {
            file: self.folder.clone(),
            problem: format!("no tensor {name}"),
        })?;
        let io = |source| FusionError::PivotIo {
            file: place.file.clone(),
            source,
        };
        let mut file = File::open(&place.file).map_err(io)?;
        file.seek(SeekFrom::Start(place.start)).map_err(io)?;
        let mut raw = vec![0; place.length];
        file.read_exact(&mut raw).map_err(io)?;
        let wide: Vec<u8> = match place.dtype {
            Dtype::F32 => raw,
            Dtype::BF16 => raw
                .as_chunks()
                .0
                .iter()
                .flat_map(|&[low, high]| [0, 0, low, high])
                .collect(),
            Dtype::F16 => raw
                .as_chunks()
                .0
                .iter()
                .flat_map(|&half| widen(u16::from_le_bytes(half)).to_le_bytes())
                .collect(),
            other => {
                return Err(FusionError::Pivot {
                    file: place.file.clone(),
                    problem: format!("tensor {name} is {other:?}, expected F32, BF16 or F16"),
                });
            }
        };
        let finite = |&bytes: &[u8; 4]| f32::from_le_bytes(bytes).is_finite();
        if wide.as_chunks().0.iter().all(finite) {
            Ok(wide)
        } else {
            Err(FusionError::Pivot {
                file: place.file.clone(),
                problem: format!("tensor {name} has values that are not finite"),
            })
        }
    }

    fn read_header(&mut self, path: &Path) -> Result<(), FusionError> {
        let io = |source| FusionError::PivotIo {
            file: path.to_owned(),
            source,
        };
        let wrong = |problem: String| FusionError::Pivot {
            file: path.to_owned(),
            problem,
        };
        let mut file = File::open(path).map_err(io)?;
        let mut length = [0; 8];
        file.read_exact(&mut length).map_err(io)?;
        let length = u64::from_le_bytes(length);
        if length > HEADER {
            return Err(wrong(format!("a header of {length} bytes is too long")));
        }
        let mut header = vec![0; usize::try_from(length).unwrap_or(usize::MAX)];
        file.read_exact(&mut header).map_err(io)?;
        let metadata: Metadata =
            serde_json::from_slice(&header).map_err(|error| wrong(error.to_string()))?;
        let expected = u64::try_from(metadata.data_len())
            .ok()
            .and_then(|data| data.checked_add(length.saturating_add(8)));
        let got = file.metadata().map_err(io)?.len();
        if expected != Some(got) {
            return Err(wrong(format!(
                "{got} bytes, the header asks for {expected:?}"
            )));
        }
        for name in metadata.offset_keys() {
            let Some(info) = metadata.info(&name) else {
                continue;
            };
            let (from, to) = info.data_offsets;
            let place = Place {
                file: path.to_owned(),
                dtype: info.dtype,
                shape: info.shape.clone(),
                start: length + 8 + u64::try_from(from).unwrap_or(u64::MAX),
                length: to - from,
            };
            if self.places.insert(name.clone(), place).is_some() {
                return Err(wrong(format!("tensor {name} is in another file too")));
            }
        }
        Ok(())
    }
}

#[derive(Deserialize)]
struct Index {
    weight_map: BTreeMap<String, String>,
}

/// Names of the files that hold the weights: the one file, those of the index, or all.
fn files(folder: &Path) -> Result<Vec<String>, FusionError> {
    if folder.join(SINGLE).is_file() {
        return Ok(vec![SINGLE.to_owned()]);
    }
    let io = |file: &Path| {
        let file = file.to_owned();
        move |source| FusionError::PivotIo { file, source }
    };
    let index = folder.join(INDEX);
    let mut names: Vec<String> = if index.is_file() {
        let bytes = std::fs::read(&index).map_err(io(&index))?;
        let parsed: Index = serde_json::from_slice(&bytes).map_err(|error| FusionError::Pivot {
            file: index,
            problem: error.to_string(),
        })?;
        parsed.weight_map.into_values().collect()
    } else {
        let mut names = Vec::new();
        for entry in std::fs::read_dir(folder).map_err(io(folder))? {
            let name = entry.map_err(io(folder))?.file_name();
            if let Some(name) = name.to_str().filter(|name| name.ends_with(".safetensors")) {
                names.push(name.to_owned());
            }
        }
        names
    };
    names.sort();
    names.dedup();
    if names.is_empty() {
        return Err(FusionError::Pivot {
            file: folder.to_owned(),
            problem: "no safetensors file".to_owned(),
        });
    }
    Ok(names)
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
