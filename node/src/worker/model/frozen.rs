//! Frozen weights in fewer bits, in memory or in a file: matrices as [`Packed`], vectors as they are.

use std::fs::File;
use std::io::{Seek, SeekFrom, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use consilium_kernels::matmul::View;
use consilium_kernels::quant::{Format, Matrix, Packed};

use super::parameters::Slot;
use super::{ModelError, Placement};

/// How the weights that are not trained are held.
#[derive(Debug, Clone, Default)]
pub struct BaseStorage {
    /// Matrices of the layers.
    pub format: Format,
    /// Whether embedding and head are stored in fewer bits and placed too; set it where they are not trained. They
    /// take [`Format::Int8`] where the layers take [`Format::Nf4`].
    pub tables: bool,
    /// A file that holds the matrices of the layers, which are read when their layer is computed.
    pub offload: Option<Arc<OffloadFile>>,
    /// Where the model is to compute, if not with the host's own operations. The layers' weights are moved as they are read, so that
    /// the host's memory never holds all of them as f32; do not use it where they are to be trained.
    pub placement: Option<Placement>,
}

impl BaseStorage {
    /// The format of embedding and head.
    pub(crate) fn table_format(&self) -> Format {
        match self.format {
            _ if !self.tables => Format::F32,
            Format::Nf4 => Format::Int8,
            format => format,
        }
    }
}

/// A file of weights without a name, which ends with the process, and buffers to read them to.
#[derive(Debug)]
pub struct OffloadFile {
    folder: PathBuf,
    file: File,
    buffers: Mutex<Vec<Vec<u8>>>,
}

impl OffloadFile {
    /// Makes the file in a folder, which should be on a disk rather than in memory.
    ///
    /// # Errors
    /// The file cannot be made.
    pub fn create(folder: &Path) -> Result<Self, ModelError> {
        let file = tempfile::tempfile_in(folder).map_err(|source| ModelError::Write {
            path: folder.into(),
            source,
        })?;
        Ok(Self {
            folder: folder.into(),
            file,
            buffers: Mutex::default(),
        })
    }

    /// Appends bytes and returns their place.
    fn append(&self, bytes: &[u8]) -> candle_core::Result<u64> {
        let mut file = &self.file;
        let place = file.seek(SeekFrom::End(0));
        place
            .and_then(|place| file.write_all(bytes).map(|()| place))
            .map_err(|error| self.failed("written", &error))
    }

    /// Lends `len` bytes from a place on.
    fn read<R>(
        &self,
        place: u64,
        len: usize,
        f: impl FnOnce(&[u8]) -> R,
    ) -> candle_core::Result<R> {
        let buffers = || self.buffers.lock().unwrap_or_else(PoisonError::into_inner);
        let mut buffer = buffers().pop().unwrap_or_default();
        buffer.resize(len, 0);
        self.file
            .read_exact_at(&mut buffer, place)
            .map_err(|error| self.failed("read", &error))?;
        let result = f(&buffer);
        buffers().push(buffer);
        Ok(result)
    }

    fn failed(&self, what: &str, error: &std::io::Error) -> candle_core::Error {
        let folder = self.folder.display();
        candle_core::Error::msg(format!(
            "{folder}: the file of offloaded weights cannot be {what}: {error}"
        ))
    }
}

/// The weights of one bank.
#[derive(Debug)]
pub(crate) struct Frozen {
    len: usize,
    /// Vectors by their offset in the bank; neighbours are one.
    vectors: Vec<(usize, Vec<f32>)>,
    /// Matrices by their offset in the bank; neighbours of one width are one. Their codes lie one after
    /// another in `home`.
    matrices: Vec<(usize, Packed)>,
    home: Home,
}

#[derive(Debug)]
enum Home {
    Memory(Vec<u8>),
    File(Arc<OffloadFile>, u64),
}

impl Frozen {
    /// Stores the values of a bank.
    pub(crate) fn new(
        slots: &[Slot],
        values: &[f32],
        format: Format,
        file: Option<&Arc<OffloadFile>>,
    ) -> candle_core::Result<Self> {
        let is_one = |a: &Slot, b: &Slot| match (a.shape.as_slice(), b.shape.as_slice()) {
            ([_, a], [_, b]) => a == b,
            // Biases of several layers, and the norms of queries and keys, are read as one.
            ([_], [_]) => true,
            _ => false,
        };
        let (mut vectors, mut matrices, mut codes) = (Vec::new(), Vec::new(), Vec::new());
        for group in slots.chunk_by(is_one) {
            let (start, end) = (group[0].start, group[group.len() - 1].range().end);
            let values = &values[start..end];
            match group[0].shape.as_slice() {
                &[_, columns] => {
                    let mut packed = Packed::new(format, values, columns);
                    codes.append(&mut packed.take_codes());
                    matrices.push((start, packed));
                }
                _ => vectors.push((start, values.to_vec())),
            }
        }
        let home = match file {
            None => {
                codes.shrink_to_fit();
                Home::Memory(codes)
            }
            Some(file) => Home::File(Arc::clone(file), file.append(&codes)?),
        };
        Ok(Self {
            len: values.len(),
            vectors,
            matrices,
            home,
        })
    }

    /// Number of values.
    pub(crate) fn len(&self) -> usize {
        self.len
    }

    /// Bytes of codes, scales and vectors, wherever they are.
    pub(crate) fn bytes(&self) -> usize {
        let matrices = self.matrices.iter().map(|(_, packed)| packed.bytes());
        let vectors = self.vectors.iter();
        matrices.sum::<usize>()
            + vectors
                .map(|(_, v)| size_of_val(v.as_slice()))
                .sum::<usize>()
    }

    /// Lends the weights, which are read first where they are in a file.
    pub(crate) fn lend<R>(&self, f: impl FnOnce(Base<'_>) -> R) -> candle_core::Result<R> {
        let lend = |codes: &[u8]| {
            f(Base::Frozen {
                frozen: self,
                codes,
            })
        };
        match &self.home {
            Home::Memory(codes) => Ok(lend(codes)),
            Home::File(file, place) => {
                let len = self.matrices.iter().map(|(_, packed)| packed.codes_len());
                Ok(file.read(*place, len.sum(), lend)?)
            }
        }
    }

    /// All values of the bank, decoded.
    pub(crate) fn decode(&self) -> candle_core::Result<Vec<f32>> {
        let mut values = vec![0f32; self.len];
        for (start, vector) in &self.vectors {
            values[*start..][..vector.len()].copy_from_slice(vector);
        }
        self.lend(|base| {
            for (start, packed) in &self.matrices {
                let matrix = base.matrix(*start, packed.rows(), packed.columns());
                let len = packed.rows() * packed.columns();
                matrix.decode(&mut values[*start..][..len]);
            }
        })?;
        Ok(values)
    }
}

/// Weights of a bank, lent.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Base<'a> {
    Floats(&'a [f32]),
    Frozen { frozen: &'a Frozen, codes: &'a [u8] },
}

/// A matrix of a bank, lent.
#[derive(Debug, Clone, Copy)]
pub(crate) enum BaseMatrix<'a> {
    Floats(View<'a>, &'a [f32]),
    Packed(Matrix<'a>),
}

impl<'a> Base<'a> {
    /// The vector at an offset.
    pub(crate) fn vector(self, at: usize, len: usize) -> &'a [f32] {
        match self {
            Self::Floats(values) => &values[at..][..len],
            Self::Frozen { frozen, .. } => {
                let found = frozen.vectors.iter().rev().find(|(start, _)| *start <= at);
                let (start, values) = found.expect("every vector of the plan is stored");
                &values[at - start..][..len]
            }
        }
    }

    /// The matrix at an offset.
    pub(crate) fn matrix(self, at: usize, rows: usize, columns: usize) -> BaseMatrix<'a> {
        match self {
            Self::Floats(values) => {
                let values = &values[at..][..rows * columns];
                BaseMatrix::Floats(View::new(values, rows, columns), values)
            }
            Self::Frozen { frozen, codes } => {
                let mut codes = codes;
                for (start, packed) in &frozen.matrices {
                    let (own, rest) = codes.split_at(packed.codes_len());
                    if (*start..start + packed.rows() * packed.columns()).contains(&at) {
                        let first = (at - start) / columns;
                        return BaseMatrix::Packed(packed.with_codes(own).slice(first, rows));
                    }
                    codes = rest;
                }
                unreachable!("every matrix of the plan is stored")
            }
        }
    }
}

impl<'a> BaseMatrix<'a> {
    /// Rows of the matrix where they exist as they are.
    pub(crate) fn whole(&self) -> Option<View<'a>> {
        match self {
            Self::Floats(view, _) => Some(*view),
            Self::Packed(_) => None,
        }
    }

    /// Writes the values of rows `first ..`, as many as fill `out`.
    pub(crate) fn decode_rows(&self, first: usize, columns: usize, out: &mut [f32]) {
        match self {
            Self::Floats(_, values) => out.copy_from_slice(&values[first * columns..][..out.len()]),
            Self::Packed(matrix) => matrix.slice(first, out.len() / columns).decode(out),
        }
    }

    /// Writes all values.
    pub(crate) fn decode(&self, out: &mut [f32]) {
        match self {
            Self::Floats(_, values) => out.copy_from_slice(values),
            Self::Packed(matrix) => matrix.decode(out),
        }
    }
}
