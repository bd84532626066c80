//! A safetensors file of `f32` tensors, written tensor by tensor: a file is never in memory as a whole.

use std::collections::HashMap;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::{Mutex, PoisonError};

use faer::Mat;
use safetensors::tensor::{Dtype, Metadata, TensorInfo};

use super::tensors::as_u64;
use crate::fusion::error::FusionError;

/// Where merged adapters go: bytes at offsets, in any order and from several threads.
pub trait Sink: Sync {
    /// Writes bytes at an offset; what lies before and was not written is zero.
    ///
    /// # Errors
    /// The disk's reason.
    fn write_at(&self, bytes: &[u8], at: u64) -> io::Result<()>;

    /// Ends it at this length.
    ///
    /// # Errors
    /// The disk's reason.
    fn end_at(&self, length: u64) -> io::Result<()>;
}

impl Sink for File {
    fn write_at(&self, bytes: &[u8], at: u64) -> io::Result<()> {
        self.write_all_at(bytes, at)
    }

    fn end_at(&self, length: u64) -> io::Result<()> {
        self.set_len(length)
    }
}

/// A file in memory.
#[derive(Debug, Default)]
pub struct MemoryFile(Mutex<Vec<u8>>);

impl MemoryFile {
    /// What was written.
    #[must_use]
    pub fn into_bytes(self) -> Vec<u8> {
        self.0.into_inner().unwrap_or_else(PoisonError::into_inner)
    }

    fn resized(&self, length: u64, change: impl FnOnce(&mut Vec<u8>, usize)) -> io::Result<()> {
        let length = usize::try_from(length).map_err(|_| io::ErrorKind::OutOfMemory)?;
        let mut bytes = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        change(&mut bytes, length);
        Ok(())
    }
}

impl Sink for MemoryFile {
    fn write_at(&self, bytes: &[u8], at: u64) -> io::Result<()> {
        self.resized(at, |file, at| {
            let end = at + bytes.len();
            if file.len() < end {
                file.resize(end, 0);
            }
            if let Some(place) = file.get_mut(at..end) {
                place.copy_from_slice(bytes);
            }
        })
    }

    fn end_at(&self, length: u64) -> io::Result<()> {
        self.resized(length, |file, length| file.resize(length, 0))
    }
}

/// A file that is being written. Tensors lie in it in the order in which they are added; equal ones give equal bytes.
pub(super) struct Output<'a> {
    file: &'a dyn Sink,
    /// Bytes kept free for the header, beside its length.
    header: usize,
    /// Bytes of the tensors so far.
    next: usize,
    tensors: Vec<(String, TensorInfo)>,
}

impl<'a> Output<'a> {
    /// Begins an empty `file`. `most` are all tensors that it gets, in their order, each with the largest shape that it can
    /// have: the header stands before tensors whose ranks are not known yet.
    pub(super) fn begin(
        file: &'a dyn Sink,
        most: impl IntoIterator<Item = (String, Vec<usize>)>,
    ) -> Result<Self, FusionError> {
        let mut output = Self {
            file,
            header: 0,
            next: 0,
            tensors: Vec::new(),
        };
        for (name, shape) in most {
            output.place(&name, &shape);
        }
        output.header = output.json()?.len().next_multiple_of(8);
        output.next = 0;
        output.tensors.clear();
        Ok(output)
    }

    /// Adds a tensor and says where its values go.
    pub(super) fn place(&mut self, name: &str, shape: &[usize]) -> u64 {
        let from = self.next;
        self.next += 4 * shape.iter().product::<usize>();
        let info = TensorInfo {
            dtype: Dtype::F32,
            shape: shape.to_vec(),
            data_offsets: (from, self.next),
        };
        self.tensors.push((name.to_owned(), info));
        as_u64(8 + self.header + from)
    }

    /// Writes values at a place, `from` elements into the tensor.
    pub(super) fn write(&self, place: u64, from: usize, values: &[f32]) -> Result<(), FusionError> {
        let bytes: Vec<u8> = values.iter().flat_map(|v| v.to_le_bytes()).collect();
        let at = place.saturating_add(as_u64(4 * from));
        self.file.write_at(&bytes, at).map_err(FusionError::Write)
    }

    /// Adds a matrix in `f32`; with `transposed` the file holds the transpose of `values`.
    #[expect(
        clippy::cast_possible_truncation,
        reason = "adapters are stored in f32; overflow is refused"
    )]
    pub(super) fn matrix(
        &mut self,
        name: &str,
        values: &Mat<f64>,
        transposed: bool,
    ) -> Result<(), FusionError> {
        let values = if transposed {
            values.transpose()
        } else {
            values.as_ref()
        };
        let (rows, columns) = values.shape();
        let mut stored = Vec::with_capacity(rows * columns);
        for i in 0..rows {
            stored.extend((0..columns).map(|j| values[(i, j)] as f32));
        }
        if stored.iter().any(|value| !value.is_finite()) {
            return Err(FusionError::Overflow(name.to_owned()));
        }
        let place = self.place(name, &[rows, columns]);
        self.write(place, 0, &stored)
    }

    /// Writes the header; spaces fill what was kept free for it, as the format allows.
    pub(super) fn finish(self) -> Result<(), FusionError> {
        let mut header = self.json()?;
        header.resize(self.header, b' ');
        let length = as_u64(header.len()).to_le_bytes();
        let end = as_u64(8 + self.header + self.next);
        let write = || -> io::Result<()> {
            self.file.write_at(&length, 0)?;
            self.file.write_at(&header, 8)?;
            self.file.end_at(end)
        };
        write().map_err(FusionError::Write)
    }

    fn json(&self) -> Result<Vec<u8>, FusionError> {
        // One key only: the order of a map's keys would reach the bytes.
        let format = HashMap::from([("format".to_owned(), "pt".to_owned())]);
        let encode = |problem: String| FusionError::Encode(problem);
        let metadata = Metadata::new(Some(format), self.tensors.clone())
            .map_err(|error| encode(error.to_string()))?;
        serde_json::to_vec(&metadata).map_err(|error| encode(error.to_string()))
    }
}
