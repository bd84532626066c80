//! Scalars in TensorBoard's event files: `tensorboard --logdir runs` draws them.
//!
//! A file is a sequence of TFRecords: the length of the data, its masked CRC-32C, the data, its masked CRC-32C, all
//! little-endian (<https://www.tensorflow.org/tutorials/load_data/tfrecord>). The data is an `Event` of
//! `tensorflow/core/util/event.proto`, of which four fields are used: `wall_time` (1), `step` (2), `file_version` (3) and
//! `summary` (5), whose values (1) have a `tag` (1) and a `simple_value` (2).

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use consilium_protocol::time::UnixMillis;

use super::error::WorkError;

/// Added to a rotated checksum, so that data that holds its own checksum has another.
const MASK: u32 = 0xa282_ead8;

/// First event of every file.
const VERSION: &[u8] = b"brain.Event:2";

/// An event file that is written to.
#[derive(Debug)]
pub struct EventFile {
    path: PathBuf,
    file: File,
}

impl EventFile {
    /// Begins a file in a folder. A run that goes on after a kill begins another one beside the first, and TensorBoard
    /// shows both as one run.
    ///
    /// # Errors
    /// The file cannot be made.
    pub fn create(folder: &Path, now: UnixMillis) -> Result<Self, WorkError> {
        let seconds = now.0 / 1000;
        for number in 0_u32.. {
            let name = format!("events.out.tfevents.{seconds:010}.consilium.{number}");
            let path = folder.join(name);
            match OpenOptions::new().write(true).create_new(true).open(&path) {
                Ok(file) => {
                    let mut events = Self { path, file };
                    events.write(&first_event(now))?;
                    return Ok(events);
                }
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
                Err(source) => return Err(WorkError::Write { path, source }),
            }
        }
        Err(WorkError::Write {
            path: folder.into(),
            source: io::ErrorKind::AlreadyExists.into(),
        })
    }

    /// Where it lies.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Appends values of one step.
    ///
    /// # Errors
    /// The disk is full.
    pub fn scalars(
        &mut self,
        now: UnixMillis,
        step: u64,
        values: &[(&str, f32)],
    ) -> Result<(), WorkError> {
        self.write(&scalars(now, step, values))
    }

    fn write(&mut self, event: &[u8]) -> Result<(), WorkError> {
        // One call for one record: a reader never sees a part of it for long.
        self.file
            .write_all(&record(event))
            .map_err(|source| WorkError::Write {
                path: self.path.clone(),
                source,
            })
    }
}

/// One TFRecord.
fn record(data: &[u8]) -> Vec<u8> {
    let length = (data.len() as u64).to_le_bytes();
    let mut record = Vec::with_capacity(data.len() + 16);
    record.extend(length);
    record.extend(masked(&length).to_le_bytes());
    record.extend(data);
    record.extend(masked(data).to_le_bytes());
    record
}

fn masked(data: &[u8]) -> u32 {
    crc32c::crc32c(data).rotate_right(15).wrapping_add(MASK)
}

fn first_event(now: UnixMillis) -> Vec<u8> {
    let mut event = wall_time(now);
    bytes_field(&mut event, 3, VERSION);
    event
}

fn scalars(now: UnixMillis, step: u64, values: &[(&str, f32)]) -> Vec<u8> {
    let mut event = wall_time(now);
    tag(&mut event, 2, 0);
    varint(&mut event, step);
    let mut summary = Vec::new();
    for (name, value) in values {
        let mut of_value = Vec::new();
        bytes_field(&mut of_value, 1, name.as_bytes());
        tag(&mut of_value, 2, 5);
        of_value.extend(value.to_le_bytes());
        bytes_field(&mut summary, 1, &of_value);
    }
    bytes_field(&mut event, 5, &summary);
    event
}

fn wall_time(now: UnixMillis) -> Vec<u8> {
    let mut event = Vec::new();
    tag(&mut event, 1, 1);
    event.extend((now.0 as f64 / 1000.0).to_le_bytes());
    event
}

/// Number and wire type of a protobuf field: 0 varint, 1 eight bytes, 2 length and bytes, 5 four bytes.
fn tag(out: &mut Vec<u8>, field: u64, wire: u64) {
    varint(out, field << 3 | wire);
}

fn bytes_field(out: &mut Vec<u8>, field: u64, bytes: &[u8]) {
    tag(out, field, 2);
    varint(out, bytes.len() as u64);
    out.extend(bytes);
}

fn varint(out: &mut Vec<u8>, mut value: u64) {
    loop {
        let low = (value & 0x7f) as u8;
        value >>= 7;
        if value == 0 {
            out.push(low);
            return;
        }
        out.push(low | 0x80);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Two values of one step; `tests/interop/read_tensorboard.py --golden` has TensorBoard's own reader read them.
    const GOLDEN: &str = "1800000000000000a37f4b220900001040fc54d9411a0d627261696e2e4576656e743a32338d2fe93400000000000000\
        5e33175c0900001040fc54d94110ac022a260a110a0a747261696e2f6c6f737315000020400a110a0a747261696e2f72\
        617465156f12833a86f22a0b";

    #[test]
    fn the_bytes_are_those_that_tensorboard_reads() {
        let folder = tempfile::tempdir().unwrap();
        let now = UnixMillis(1_700_000_000_250);
        let mut events = EventFile::create(folder.path(), now).unwrap();
        let values = [("train/loss", 2.5), ("train/rate", 1e-3)];
        events.scalars(now, 300, &values).unwrap();
        let name = events.path().file_name().unwrap().to_str().unwrap();
        assert_eq!(name, "events.out.tfevents.1700000000.consilium.0");
        let bytes = std::fs::read(events.path()).unwrap();
        assert_eq!(hex::encode(bytes), GOLDEN);
        let second = EventFile::create(folder.path(), now).unwrap();
        assert_ne!(second.path(), events.path());
    }
}
