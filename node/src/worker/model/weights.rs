//! Weight files of a model folder, mapped into memory: `model.safetensors`, or the shards of its index.

use std::collections::BTreeMap;
use std::ops::Range;
use std::path::{Component, Path, PathBuf};

use consilium_kernels::bytes;
use consilium_kernels::mapped::MappedFile;
use safetensors::tensor::{Dtype, SafeTensors};
use serde_json::{Map, Value};

use super::config::{ConfigError, read_object};
use super::parameters::Slot;
use super::{ModelError, tensors};

/// One file with all weights.
const WHOLE: &str = "model.safetensors";

/// Which shard holds each tensor, where there are several files.
const INDEX: &str = "model.safetensors.index.json";

/// Length of the number that precedes a header.
const LENGTH: usize = size_of::<u64>();

/// Values that are converted before their pages of the file are given back.
const CHUNK: usize = 1 << 20;

/// All tensors of a folder by name. Headers are read and checked, values are not yet.
#[derive(Debug)]
pub(crate) struct WeightFiles {
    folder: PathBuf,
    files: Vec<(PathBuf, MappedFile)>,
    tensors: BTreeMap<String, Entry>,
}

/// One tensor and where it lies.
#[derive(Debug)]
struct Entry {
    file: usize,
    dtype: Dtype,
    shape: Vec<usize>,
    bytes: Range<usize>,
}

impl WeightFiles {
    /// Maps the files and reads their headers.
    pub(crate) fn open(folder: &Path) -> Result<Self, ModelError> {
        let index = folder.join(INDEX);
        let mut weights = Self {
            folder: folder.into(),
            files: Vec::new(),
            tensors: BTreeMap::new(),
        };
        if folder.join(WHOLE).exists() || !index.exists() {
            weights.add(WHOLE)?;
            return Ok(weights);
        }
        let object = read_object(&index)?;
        let refuse = |reason| ConfigError::Field {
            path: index.clone(),
            field: "weight_map".into(),
            reason,
        };
        let map = object.get("weight_map").and_then(Value::as_object);
        let map = map.ok_or_else(|| refuse("missing or not an object".into()))?;
        for name in shards(map).map_err(refuse)? {
            if !folder.join(&name).exists() {
                let reason = format!(
                    "names `{name}`, which is not in this folder; fetch the model again, it is incomplete"
                );
                return Err(refuse(reason).into());
            }
            weights.add(&name)?;
        }
        let missing = map.keys().find(|name| !weights.tensors.contains_key(*name));
        match missing {
            Some(name) => {
                Err(refuse(format!("names tensor `{name}`, which no shard holds")).into())
            }
            None => Ok(weights),
        }
    }

    fn add(&mut self, name: &str) -> Result<(), ModelError> {
        let path = self.folder.join(name);
        let file = match MappedFile::open(&path) {
            Ok(file) => file,
            Err(source) => return Err(ModelError::Read { path, source }),
        };
        let origin = path.display().to_string();
        let decode = |source| ModelError::Decode {
            origin: origin.clone(),
            source,
        };
        // Checks that the tensors fill the file exactly.
        tensors::open(&origin, file.bytes())?;
        let (header, metadata) = SafeTensors::read_metadata(file.bytes()).map_err(decode)?;
        let data = LENGTH + header;
        let index = self.files.len();
        let sorted: BTreeMap<_, _> = metadata.tensors().into_iter().collect();
        for (name, info) in sorted {
            let (start, end) = info.data_offsets;
            let entry = Entry {
                file: index,
                dtype: info.dtype,
                shape: info.shape.clone(),
                bytes: data + start..data + end,
            };
            if self.tensors.contains_key(&name) {
                return Err(ModelError::TwiceTensor { origin, name });
            }
            self.tensors.insert(name, entry);
        }
        self.files.push((path, file));
        Ok(())
    }

    /// Checks that the files hold exactly the tensors of the model, each in a shape and type that can be used. What is
    /// allocated afterwards is then of the order of the files' own size.
    pub(crate) fn check<'a>(
        &self,
        slots: impl Iterator<Item = &'a Slot>,
        is_ignored: impl Fn(&str) -> bool,
    ) -> Result<(), ModelError> {
        let mut used = Vec::new();
        for slot in slots {
            let entry = self.entry(slot)?;
            if !matches!(entry.dtype, Dtype::F32 | Dtype::BF16 | Dtype::F16) {
                return Err(ModelError::WrongType {
                    origin: self.origin(entry),
                    name: slot.name.clone(),
                    dtype: format!("{:?}", entry.dtype),
                });
            }
            used.push(slot.name.as_str());
        }
        used.sort_unstable();
        let unknown = self
            .tensors
            .iter()
            .find(|(name, _)| used.binary_search(&name.as_str()).is_err() && !is_ignored(name));
        match unknown {
            Some((name, entry)) => Err(ModelError::UnknownTensor {
                origin: self.origin(entry),
                name: name.clone(),
            }),
            None => Ok(()),
        }
    }

    /// Copies a tensor, converted to f32. The pages of the file are given back on the way, so that there is never a second
    /// copy of the model in memory, nor of a large tensor.
    pub(crate) fn fill(&self, slot: &Slot, out: &mut [f32]) -> Result<(), ModelError> {
        let entry = self.entry(slot)?;
        let origin = self.origin(entry);
        let file = &self.files[entry.file].1;
        // The shape was compared, so the bytes are those of as many values.
        let size = entry.bytes.len() / out.len().max(1);
        let mut start = entry.bytes.start;
        for out in out.chunks_mut(CHUNK) {
            let range = start..start + out.len() * size;
            let stored = &file.bytes()[range.clone()];
            tensors::copy_as_f32(&origin, &slot.name, entry.dtype, stored, out)?;
            start = range.end;
            file.forget(range);
        }
        if bytes::are_finite(out) {
            return Ok(());
        }
        Err(ModelError::NotFinite {
            origin,
            name: slot.name.clone(),
        })
    }

    fn entry(&self, slot: &Slot) -> Result<&Entry, ModelError> {
        let Some(entry) = self.tensors.get(&slot.name) else {
            return Err(ModelError::MissingTensor {
                origin: self.folder.display().to_string(),
                name: slot.name.clone(),
            });
        };
        if entry.shape == slot.shape {
            return Ok(entry);
        }
        Err(ModelError::WrongShape {
            origin: self.origin(entry),
            name: slot.name.clone(),
            got: entry.shape.clone(),
            expected: slot.shape.clone(),
        })
    }

    fn origin(&self, entry: &Entry) -> String {
        self.files[entry.file].0.display().to_string()
    }
}

/// File names of an index, sorted; each must lie in the folder itself.
fn shards(map: &Map<String, Value>) -> Result<Vec<String>, String> {
    let mut names = Vec::new();
    for value in map.values() {
        let Some(name) = value.as_str() else {
            return Err(format!("{value} is not a file name"));
        };
        let mut parts = Path::new(name).components();
        if !matches!(
            (parts.next(), parts.next()),
            (Some(Component::Normal(_)), None)
        ) {
            return Err(format!("`{name}` is not a file name in this folder"));
        }
        names.push(name.to_owned());
    }
    names.sort_unstable();
    names.dedup();
    if names.is_empty() {
        return Err("names no file".into());
    }
    Ok(names)
}
