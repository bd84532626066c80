//! Checkpoints: everything that a run needs to continue bit for bit.
//!
//! One safetensors file with the trainable weights and both moments, written and read tensor by tensor: a checkpoint
//! costs no memory beside what training has already. Its metadata hold the place of the run.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, BufWriter, Read as _, Write};
use std::os::unix::fs::FileExt as _;
use std::path::Path;

use consilium_kernels::{Dtype, bytes};
use consilium_protocol::time::UnixMillis;
use serde::{Deserialize, Serialize};
use serde_json::json;

use super::TrainError;
use super::adamw::AdamW;
use crate::worker::data::Cursor;
use crate::worker::files::write_atomic_with;
use crate::worker::model::{Model, ModelError, Slot, edit, with_floats};

/// Version of the file's layout.
const VERSION: u32 = 1;

/// Metadata key of the run's place.
const KEY: &str = "consilium.checkpoint";

/// Longest header that is read, in bytes.
const HEADER: u64 = 64 << 20;

/// Values that are converted at once.
const CHUNK: usize = 1 << 16;

/// Place of a run.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Place {
    version: u32,
    /// Steps of the optimiser.
    pub step: u64,
    /// Place in the data.
    pub cursor: Cursor,
    /// Seed of the data's order.
    pub seed: u64,
    /// Of which run it is, if of a whole one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub run: Option<RunPlace>,
}

/// Place of a stage in a whole run.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct RunPlace {
    /// Digest of everything that the weights follow from, except the data.
    pub settings: String,
    /// Digest of the stage's items.
    pub data: String,
    /// When the run started: the day that a chat template prints, whenever the run goes on.
    pub started: UnixMillis,
    /// Stage, from 0.
    pub stage: u64,
    /// Steps of the run, those of earlier stages included.
    pub step: u64,
    /// Lowest loss on held-out items so far.
    pub best: Option<Best>,
}

/// A measurement on held-out items.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Best {
    /// Steps of the run.
    pub step: u64,
    /// Mean loss of a label, in nats.
    pub loss: f64,
}

/// Writes trainable weights, both moments and the place to one safetensors file, atomically.
///
/// # Errors
/// The file cannot be written.
pub fn save(
    path: &Path,
    model: &Model,
    optimiser: &AdamW,
    cursor: Cursor,
    seed: u64,
) -> Result<(), TrainError> {
    save_run(path, model, optimiser, (cursor, seed), None)
}

/// As [`save`], with the place in a whole run.
///
/// # Errors
/// The file cannot be written.
pub fn save_run(
    path: &Path,
    model: &Model,
    optimiser: &AdamW,
    (cursor, seed): (Cursor, u64),
    run: Option<RunPlace>,
) -> Result<(), TrainError> {
    let place = Place {
        version: VERSION,
        step: optimiser.steps,
        cursor,
        seed,
        run,
    };
    let refuse = |error: serde_json::Error| TrainError::Checkpoint {
        path: path.into(),
        reason: error.to_string(),
    };
    let header = header(model, &place).map_err(refuse)?;
    let mut failed = None;
    let written = write_atomic_with(path, |file| {
        let mut file = BufWriter::with_capacity(1 << 20, file);
        file.write_all(&(header.len() as u64).to_le_bytes())?;
        file.write_all(&header)?;
        for (bank, moments) in model.trainable().iter().zip(&optimiser.moments) {
            let mut write = |weights: &[f32], mean: &[f32], square: &[f32]| {
                for slot in bank.slots() {
                    for values in [weights, mean, square] {
                        let values = values.get(slot.range()).ok_or_else(other_model)?;
                        write_floats(&mut file, values)?;
                    }
                }
                Ok::<_, io::Error>(())
            };
            let result = bank.read(|weights| {
                with_floats(&moments.mean, |mean| {
                    with_floats(&moments.square, |square| write(weights, mean, square))
                })
            });
            match result.and_then(|inner| inner).and_then(|inner| inner) {
                Ok(written) => written?,
                Err(error) => failed = Some(error),
            }
        }
        file.flush()
    });
    if let Some(error) = failed {
        return Err(ModelError::from(error).into());
    }
    written.map_err(|source| write_error(path, source))
}

fn write_error(path: &Path, source: io::Error) -> TrainError {
    ModelError::Write {
        path: path.into(),
        source,
    }
    .into()
}

fn other_model() -> io::Error {
    io::Error::other(TrainError::OtherModel)
}

/// Names, shapes and places of all tensors, and the place of the run, filled up to a multiple of eight bytes.
fn header(model: &Model, place: &Place) -> serde_json::Result<Vec<u8>> {
    let mut entries = serde_json::Map::new();
    let place = serde_json::to_string(place)?;
    entries.insert("__metadata__".into(), json!({ "format": "pt", KEY: place }));
    let mut start = 0;
    for slot in model.trainable().iter().flat_map(|bank| bank.slots()) {
        for part in PARTS {
            let end = start + slot.range().len() * size_of::<f32>();
            let entry =
                json!({ "dtype": "F32", "shape": slot.shape, "data_offsets": [start, end] });
            entries.insert(format!("{part}/{}", slot.name), entry);
            start = end;
        }
    }
    let mut header = serde_json::to_vec(&entries)?;
    header.resize(header.len().next_multiple_of(8), b' ');
    Ok(header)
}

/// What is kept of each tensor, in this order.
const PARTS: [&str; 3] = ["weight", "mean", "square"];

fn write_floats(file: &mut impl Write, values: &[f32]) -> io::Result<()> {
    for chunk in values.chunks(CHUNK) {
        file.write_all(&bytes::encode(chunk))?;
    }
    Ok(())
}

/// Reads the place of a checkpoint and nothing else.
///
/// # Errors
/// The file is no checkpoint.
pub fn place(path: &Path) -> Result<Place, TrainError> {
    Ok(Opened::new(path)?.place)
}

/// Restores what [`save`] wrote into a model with the same trainable tensors. Unless the disk fails, nothing has changed
/// on error.
///
/// # Errors
/// The file is no checkpoint of such a model.
pub fn restore(path: &Path, model: &mut Model, optimiser: &mut AdamW) -> Result<Place, TrainError> {
    let opened = Opened::new(path)?;
    let banks = model.trainable();
    let slots = banks.iter().flat_map(|bank| bank.slots());
    let expected: Vec<_> = slots
        .flat_map(|slot| PARTS.map(|part| (format!("{part}/{}", slot.name), slot.shape.clone())))
        .collect();
    for (name, shape) in &expected {
        opened.check(path, name, shape)?;
    }
    if expected.len() != opened.tensors.len() || banks.len() != optimiser.moments.len() {
        return Err(TrainError::OtherModel);
    }
    for (bank, moments) in banks.iter().zip(&optimiser.moments) {
        let weights = bank.tensor().map_err(ModelError::from)?;
        for (part, tensor) in PARTS
            .into_iter()
            .zip([weights, &moments.mean, &moments.square])
        {
            let mut read = Ok(());
            edit(tensor, |values| {
                read = opened.read(part, bank.slots(), values);
            })
            .map_err(ModelError::from)?;
            read.map_err(|source| ModelError::Read {
                path: path.into(),
                source,
            })?;
        }
    }
    optimiser.steps = opened.place.step;
    Ok(opened.place)
}

/// A checkpoint whose header was read and fits the file.
struct Opened {
    file: File,
    /// Offset of the first value.
    data: u64,
    tensors: BTreeMap<String, Entry>,
    place: Place,
}

/// One tensor of the header.
#[derive(Debug, Deserialize)]
struct Entry {
    dtype: String,
    shape: Vec<usize>,
    data_offsets: (u64, u64),
}

#[derive(Debug, Deserialize)]
struct Header {
    #[serde(rename = "__metadata__", default)]
    metadata: BTreeMap<String, String>,
    #[serde(flatten)]
    tensors: BTreeMap<String, Entry>,
}

impl Opened {
    fn new(path: &Path) -> Result<Self, TrainError> {
        let refuse = |reason: &str| TrainError::Checkpoint {
            path: path.into(),
            reason: reason.to_owned(),
        };
        let failed = |source| ModelError::Read {
            path: path.into(),
            source,
        };
        let mut file = File::open(path).map_err(failed)?;
        let size = file.metadata().map_err(failed)?.len();
        let mut length = [0; 8];
        let broken = || refuse("not a whole safetensors file; delete it to start again");
        file.read_exact(&mut length).map_err(|_| broken())?;
        let length = u64::from_le_bytes(length);
        if length > HEADER || length + 8 > size {
            return Err(broken());
        }
        let mut header = Vec::new();
        (&file)
            .take(length)
            .read_to_end(&mut header)
            .map_err(failed)?;
        let header: Header = serde_json::from_slice(&header).map_err(|_| broken())?;
        let place = header.metadata.get(KEY);
        let place = place.ok_or_else(|| refuse("not a checkpoint"))?;
        let place: Place = serde_json::from_str(place)
            .map_err(|error| refuse(&format!("its place is unreadable: {error}")))?;
        if place.version != VERSION {
            let got = place.version;
            return Err(refuse(&format!("version {got}, expected {VERSION}")));
        }
        let data = length + 8;
        let end = (header.tensors.values())
            .map(|entry| entry.data_offsets.1)
            .max();
        if end.unwrap_or(0).checked_add(data) != Some(size) {
            return Err(broken());
        }
        Ok(Self {
            file,
            data,
            tensors: header.tensors,
            place,
        })
    }

    fn check(&self, path: &Path, name: &str, shape: &[usize]) -> Result<(), TrainError> {
        let (origin, name) = (path.display().to_string(), name.to_owned());
        let Some(entry) = self.tensors.get(&name) else {
            return Err(ModelError::MissingTensor { origin, name }.into());
        };
        let bytes = shape.iter().product::<usize>() as u64 * 4;
        let (start, end) = entry.data_offsets;
        if entry.shape != shape || entry.dtype != "F32" || end.checked_sub(start) != Some(bytes) {
            return Err(ModelError::WrongShape {
                origin,
                name,
                got: entry.shape.clone(),
                expected: shape.to_vec(),
            }
            .into());
        }
        Ok(())
    }

    /// Reads one part of a bank's tensors, whose shapes were checked, to their places.
    fn read(&self, part: &str, slots: &[Slot], values: &mut [f32]) -> io::Result<()> {
        let mut buffer = vec![0; CHUNK * size_of::<f32>()];
        for slot in slots {
            let entry = self.tensors.get(&format!("{part}/{}", slot.name));
            let mut at = self.data + entry.map_or(0, |entry| entry.data_offsets.0);
            let values = values.get_mut(slot.range()).ok_or_else(other_model)?;
            for chunk in values.chunks_mut(CHUNK) {
                let stored = &mut buffer[..size_of_val(chunk)];
                self.file.read_exact_at(stored, at)?;
                at += stored.len() as u64;
                bytes::decode(Dtype::F32, stored, chunk);
            }
        }
        Ok(())
    }
}
