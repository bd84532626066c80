//! A PEFT folder that somebody else wrote: whether it is the adapter that was asked for, of the model that was named.
//!
//! The model's weights are not read, only the headers of their files; the adapter's values are read in pieces. So a model
//! larger than this machine's memory can be checked.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io::{Read as _, Seek as _, SeekFrom};
use std::path::Path;

use consilium_kernels::bytes;
use safetensors::tensor::{Dtype, Metadata, TensorInfo};
use serde_json::Value;

use super::{ExternalError, ExternalRun};

/// Longest JSON file in bytes.
const JSON: u64 = 64 << 20;
/// Longest header of a safetensors file in bytes, as its own library has it.
const HEADER: u64 = 100_000_000;
/// Bytes of values that are looked at together; a multiple of every width.
const PIECE: usize = 1 << 20;
/// What PEFT puts before the name of a layer.
const PREFIX: &str = "base_model.model.";

/// What an adapter holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct AdapterSummary {
    /// Layers with factors.
    pub layers: usize,
    /// Values in all factors.
    pub parameters: u64,
}

/// Shapes of tensors by name.
type Shapes = BTreeMap<String, Vec<usize>>;

/// Checks a folder against what was asked for.
///
/// # Errors
/// The first thing that is wrong, with file and key.
pub fn check_adapter(folder: &Path, run: &ExternalRun) -> Result<AdapterSummary, ExternalError> {
    check_config(&folder.join("adapter_config.json"), run)?;
    let path = folder.join("adapter_model.safetensors");
    let base = base_shapes(&run.base)?;
    let (metadata, start) = header(&path)?;
    let wrong = |field: &str, problem: String| adapter(&path, field, problem);
    let mut layers: BTreeMap<String, BTreeSet<char>> = BTreeMap::new();
    let mut parameters = 0_u64;
    for (name, info) in tensors(&metadata) {
        let (layer, side) = factor(&name).ok_or_else(|| {
            wrong(
                &name,
                format!("expected {PREFIX}<layer>.lora_A.weight or .lora_B.weight"),
            )
        })?;
        let last = layer.rsplit('.').next().unwrap_or_default();
        if !run.target_modules.iter().any(|module| module == last) {
            let modules = run.target_modules.join(", ");
            return Err(wrong(
                &name,
                format!("is of layer {last}, expected {modules}"),
            ));
        }
        let shape = base.get(&format!("{layer}.weight"));
        let Some(&[out, width]) = shape.map(Vec::as_slice) else {
            let problem = "the base model has no matrix of this layer".to_owned();
            return Err(wrong(&name, problem));
        };
        let expected = match side {
            'A' => [run.rank, width],
            _ => [out, run.rank],
        };
        if info.shape != expected {
            return Err(wrong(
                &name,
                format!("has shape {:?}, expected {expected:?}", info.shape),
            ));
        }
        if !matches!(info.dtype, Dtype::F32 | Dtype::F16 | Dtype::BF16) {
            return Err(wrong(
                &name,
                format!("is {:?}, expected F32, F16 or BF16", info.dtype),
            ));
        }
        parameters += expected.iter().map(|&size| size as u64).product::<u64>();
        layers.entry(layer.to_owned()).or_default().insert(side);
    }
    if let Some((layer, _)) = layers.iter().find(|(_, sides)| sides.len() < 2) {
        return Err(wrong(layer, "has only one of its two factors".to_owned()));
    }
    if layers.is_empty() {
        return Err(wrong("tensors", "expected factors, found none".to_owned()));
    }
    check_values(&path, &metadata, start)?;
    Ok(AdapterSummary {
        layers: layers.len(),
        parameters,
    })
}

fn adapter(path: &Path, field: &str, problem: String) -> ExternalError {
    ExternalError::Adapter {
        path: path.to_owned(),
        field: field.to_owned(),
        problem,
    }
}

fn check_config(path: &Path, run: &ExternalRun) -> Result<(), ExternalError> {
    let config = json(path)?;
    let wrong = |field: &str, expected: &str| {
        let got = &config[field];
        Err(adapter(
            path,
            field,
            format!("is {got}, expected {expected}"),
        ))
    };
    if config["peft_type"] != "LORA" {
        return wrong("peft_type", "\"LORA\"");
    }
    if config["r"].as_u64() != Some(run.rank as u64) {
        return wrong("r", &run.rank.to_string());
    }
    let alpha = config["lora_alpha"].as_f64();
    if alpha.is_none_or(|alpha| (alpha - run.alpha).abs() > 1e-6 * run.alpha.abs()) {
        return wrong("lora_alpha", &run.alpha.to_string());
    }
    for field in ["use_dora", "use_rslora", "fan_in_fan_out"] {
        if config[field] == true {
            return wrong(field, "false");
        }
    }
    if config["bias"].as_str().is_some_and(|bias| bias != "none") {
        return wrong("bias", "\"none\"");
    }
    for field in [
        "rank_pattern",
        "alpha_pattern",
        "modules_to_save",
        "layers_to_transform",
    ] {
        let empty = match &config[field] {
            Value::Null => true,
            Value::Array(list) => list.is_empty(),
            Value::Object(object) => object.is_empty(),
            _ => false,
        };
        if !empty {
            return wrong(
                field,
                "nothing: all layers have one rank, and nothing else is trained",
            );
        }
    }
    Ok(())
}

/// Layer and side of a factor's name.
fn factor(name: &str) -> Option<(&str, char)> {
    let rest = name.strip_prefix(PREFIX)?;
    let (layer, side) = match rest.strip_suffix(".lora_A.weight") {
        Some(layer) => (layer, 'A'),
        None => (rest.strip_suffix(".lora_B.weight")?, 'B'),
    };
    (!layer.is_empty()).then_some((layer, side))
}

/// Shapes of the model's weights, from one file or from the index of several.
fn base_shapes(folder: &Path) -> Result<Shapes, ExternalError> {
    let index = folder.join("model.safetensors.index.json");
    let mut files = BTreeSet::new();
    if index.exists() {
        let parsed = json(&index)?;
        let map = parsed["weight_map"].as_object();
        let names = map.into_iter().flatten().map(|(_, file)| file.as_str());
        for name in names {
            let plain = name.filter(|name| !name.contains('/') && !name.starts_with('.'));
            let problem = "expected names of files of this folder".to_owned();
            let name = plain.ok_or_else(|| adapter(&index, "weight_map", problem))?;
            files.insert(name.to_owned());
        }
    } else {
        files.insert("model.safetensors".to_owned());
    }
    let mut shapes = Shapes::new();
    for file in files {
        let (metadata, _) = header(&folder.join(file))?;
        shapes.extend(tensors(&metadata).map(|(name, info)| (name, info.shape.clone())));
    }
    Ok(shapes)
}

/// Tensors in the order of their values.
fn tensors(metadata: &Metadata) -> impl Iterator<Item = (String, &TensorInfo)> {
    let names = metadata.offset_keys().into_iter();
    names.filter_map(|name| metadata.info(&name).map(|info| (name, info)))
}

/// Header of a safetensors file, and where its values begin; the file must be as long as the header says.
fn header(path: &Path) -> Result<(Metadata, u64), ExternalError> {
    let cannot = |source| ExternalError::File {
        doing: "read",
        path: path.to_owned(),
        source,
    };
    let wrong = |problem: String| adapter(path, "header", problem);
    let mut file = File::open(path).map_err(cannot)?;
    let total = file.metadata().map_err(cannot)?.len();
    let mut length = [0; 8];
    file.read_exact(&mut length)
        .map_err(|_| wrong("the file is shorter than a header".to_owned()))?;
    let length = u64::from_le_bytes(length);
    if length > HEADER || length.saturating_add(8) > total {
        return Err(wrong(format!(
            "{length} bytes in a file of {total}: truncated, or no safetensors"
        )));
    }
    let mut bytes = Vec::new();
    file.take(length).read_to_end(&mut bytes).map_err(cannot)?;
    let metadata: Metadata =
        serde_json::from_slice(&bytes).map_err(|error| wrong(error.to_string()))?;
    let start = length + 8;
    let mut end = 0;
    for (name, info) in tensors(&metadata) {
        let (from, to) = info.data_offsets;
        let sizes = info.shape.iter().copied();
        let bits = sizes.fold(info.dtype.bitsize(), usize::saturating_mul);
        if from != end || to.checked_sub(from).and_then(|size| size.checked_mul(8)) != Some(bits) {
            let problem = format!("bytes {from}..{to} are not those of {:?}", info.shape);
            return Err(adapter(path, &name, problem));
        }
        end = to;
    }
    if start.checked_add(end as u64) != Some(total) {
        return Err(wrong(format!(
            "tells of {end} bytes of values, {} are there: truncated",
            total.saturating_sub(start)
        )));
    }
    Ok((metadata, start))
}

/// Every value must be finite.
fn check_values(path: &Path, metadata: &Metadata, start: u64) -> Result<(), ExternalError> {
    let cannot = |source| ExternalError::File {
        doing: "read",
        path: path.to_owned(),
        source,
    };
    let mut file = File::open(path).map_err(cannot)?;
    let mut piece = vec![0; PIECE];
    for (name, info) in tensors(metadata) {
        let (from, to) = info.data_offsets;
        file.seek(SeekFrom::Start(start + from as u64))
            .map_err(cannot)?;
        let mut left = to - from;
        while left > 0 {
            let bytes = &mut piece[..left.min(PIECE)];
            file.read_exact(bytes).map_err(cannot)?;
            left -= bytes.len();
            if !all_finite(info.dtype, bytes) {
                let problem = "has a value that is not finite; the training diverged".to_owned();
                return Err(adapter(path, &name, problem));
            }
        }
    }
    Ok(())
}

fn all_finite(dtype: Dtype, stored: &[u8]) -> bool {
    let dtype = match dtype {
        Dtype::F16 => consilium_kernels::Dtype::F16,
        Dtype::BF16 => consilium_kernels::Dtype::Bf16,
        _ => consilium_kernels::Dtype::F32,
    };
    bytes::hold_finite(dtype, stored)
}

fn json(path: &Path) -> Result<Value, ExternalError> {
    let cannot = |source| ExternalError::File {
        doing: "read",
        path: path.to_owned(),
        source,
    };
    let file = File::open(path).map_err(cannot)?;
    let mut bytes = Vec::new();
    file.take(JSON).read_to_end(&mut bytes).map_err(cannot)?;
    let parsed = serde_json::from_slice(&bytes);
    let value: Value = parsed.map_err(|error| adapter(path, "json", error.to_string()))?;
    if value.is_object() {
        Ok(value)
    } else {
        Err(adapter(path, "json", "expected an object".to_owned()))
    }
}
