//! Tensors of the pivot, read piece by piece: the aggregator has no model code and never holds the model.

use std::collections::BTreeMap;
use std::path::Path;

use serde::Deserialize;

use super::tensors::Tensors;
use crate::fusion::error::{FusionError, Origin};

const INDEX: &str = "model.safetensors.index.json";
const SINGLE: &str = "model.safetensors";

/// The tensors of a Hugging Face model folder by name.
pub(super) struct Pivot {
    files: Vec<Tensors>,
    /// Which file holds a tensor.
    places: BTreeMap<String, usize>,
}

impl Pivot {
    /// Reads the headers of the folder's safetensors files.
    pub(super) fn open(folder: &Path) -> Result<Self, FusionError> {
        let mut pivot = Self {
            files: Vec::new(),
            places: BTreeMap::new(),
        };
        for name in files(folder)? {
            let path = folder.join(name);
            let file = Tensors::open(Origin::Pivot(path.clone()), &*path)?;
            for name in file.names() {
                let twice = pivot.places.insert(name.to_owned(), pivot.files.len());
                if twice.is_some() {
                    return Err(wrong(
                        &path,
                        format!("tensor {name} is in another file too"),
                    ));
                }
            }
            pivot.files.push(file);
        }
        Ok(pivot)
    }

    pub(super) fn shapes(&self) -> impl Iterator<Item = (&str, &[usize])> {
        self.places
            .iter()
            .filter_map(|(name, &file)| Some((name.as_str(), self.files.get(file)?.shape(name)?)))
    }

    /// The file that holds a tensor of [`Self::shapes`].
    pub(super) fn holder(&self, name: &str) -> Option<&Tensors> {
        self.files.get(*self.places.get(name)?)
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
        let origin = Origin::Pivot(file.to_owned());
        move |source| FusionError::Io { origin, source }
    };
    let index = folder.join(INDEX);
    let mut names: Vec<String> = if index.is_file() {
        let bytes = std::fs::read(&index).map_err(io(&index))?;
        let parsed: Index =
            serde_json::from_slice(&bytes).map_err(|error| wrong(&index, error.to_string()))?;
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
        return Err(wrong(folder, "no safetensors file".to_owned()));
    }
    Ok(names)
}

fn wrong(path: &Path, problem: String) -> FusionError {
    FusionError::Format {
        origin: Origin::Pivot(path.to_owned()),
        problem,
    }
}
