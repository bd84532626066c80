//! Files and folders of records, read as a stream: memory does not grow with their size.

use std::fmt;
use std::fs::File;
use std::io::{self, Read as _, Seek as _, SeekFrom};
use std::path::{Path, PathBuf};

use super::DataError;
use super::jsonl::Lines;
use super::parquet::Table;
use super::shape::Row;

/// Bad rows that are named in the log; further ones are only counted.
const NAMED: u64 = 20;

/// First bytes of a Parquet file.
const MAGIC: &[u8] = b"PAR1";

/// What a file's name says about its content.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Format {
    Json,
    Parquet,
    Text,
}

impl Format {
    /// By the end of the name: `.jsonl`, `.ndjson` and `.json`; `.parquet`; `.txt`.
    fn of(path: &Path) -> Option<Self> {
        match path.extension()?.to_str()? {
            "jsonl" | "ndjson" | "json" => Some(Self::Json),
            "parquet" => Some(Self::Parquet),
            "txt" => Some(Self::Text),
            _ => None,
        }
    }
}

/// Where a record stands in its file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Place {
    /// A line and a byte of it, both from 1.
    Line {
        /// Line.
        line: u64,
        /// Byte.
        column: usize,
    },
    /// A row of a table, from 1.
    Row(u64),
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Line { line, column } => write!(f, "{line}:{column}"),
            Self::Row(row) => write!(f, "row {row}"),
        }
    }
}

/// Why a reader has no record to give.
#[derive(Debug)]
pub(super) enum Refused {
    /// One record is bad; the next may be good.
    Row(Place, String),
    /// The file as a table is bad.
    Table(String),
    /// The file cannot be read.
    File(io::Error),
}

/// A record with the place it came from.
#[derive(Debug)]
pub struct Placed {
    /// Index of the file among those of the [`Source`].
    pub file: usize,
    /// Place in it.
    pub place: Place,
    /// The record.
    pub row: Row,
}

/// Bad rows so far, and how many are allowed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BadRows {
    limit: u64,
    count: u64,
}

impl BadRows {
    /// At most `limit` may be skipped; with 0 the first one is fatal.
    #[must_use]
    pub const fn up_to(limit: u64) -> Self {
        Self { limit, count: 0 }
    }

    /// How many there were.
    #[must_use]
    pub const fn count(&self) -> u64 {
        self.count
    }

    /// Skips one more.
    ///
    /// # Errors
    /// There are too many.
    pub fn skip(&mut self, path: &Path, place: Place, reason: String) -> Result<(), DataError> {
        self.count += 1;
        if self.count > self.limit {
            return Err(DataError::Row {
                path: path.into(),
                place,
                reason,
                before: self.count - 1,
            });
        }
        if self.count <= NAMED {
            tracing::warn!(file = %path.display(), place = %place, reason, "a bad record is skipped");
        }
        Ok(())
    }
}

/// Files to read, in a fixed order.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Source {
    files: Vec<PathBuf>,
    bytes: u64,
}

impl Source {
    /// Takes files as they are named, and from folders, at any depth and in the order of their names, all files that end
    /// in `.jsonl`, `.ndjson`, `.json`, `.parquet` or `.txt`. Names that begin with a dot are passed over.
    ///
    /// # Errors
    /// A path that is not there, a folder without such files, or no path at all.
    pub fn open(paths: &[PathBuf]) -> Result<Self, DataError> {
        let mut files = Vec::new();
        for path in paths {
            let metadata = std::fs::metadata(path).map_err(|source| read_error(path, source))?;
            if metadata.is_dir() {
                let before = files.len();
                collect(path, &mut files)?;
                if files.len() == before {
                    return Err(DataError::NoFiles { path: path.clone() });
                }
            } else {
                files.push(path.clone());
            }
        }
        if files.is_empty() {
            return Err(DataError::Empty);
        }
        let size = |path: &PathBuf| {
            let metadata = std::fs::metadata(path).map_err(|source| read_error(path, source))?;
            Ok(metadata.len())
        };
        let bytes = files.iter().map(size).sum::<Result<u64, DataError>>()?;
        Ok(Self { files, bytes })
    }

    /// The files.
    #[must_use]
    pub fn files(&self) -> &[PathBuf] {
        &self.files
    }

    /// Their bytes on disk.
    #[must_use]
    pub const fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Name of a file, for messages.
    #[must_use]
    pub fn path(&self, file: usize) -> &Path {
        self.files
            .get(file)
            .map_or_else(|| Path::new("?"), PathBuf::as_path)
    }

    /// Reads all records in order, giving each to `take`, until that says stop (false).
    ///
    /// # Errors
    /// A file that cannot be read, is no table, or holds no record at all; more bad rows than allowed; what `take` gives.
    pub fn read<E: From<DataError>>(
        &self,
        bad: &mut BadRows,
        mut take: impl FnMut(&mut BadRows, Placed) -> Result<bool, E>,
    ) -> Result<(), E> {
        for (file, path) in self.files.iter().enumerate() {
            let mut reader = Reader::open(path)?;
            let mut records = 0_u64;
            while let Some(next) = reader.next_row() {
                records += 1;
                match next {
                    Ok((place, row)) => {
                        if !take(bad, Placed { file, place, row })? {
                            return Ok(());
                        }
                    }
                    Err(Refused::Row(place, reason)) => bad.skip(path, place, reason)?,
                    Err(other) => return Err(in_file(path, other).into()),
                }
            }
            if records == 0 {
                return Err(DataError::NoRecords { path: path.clone() }.into());
            }
        }
        Ok(())
    }
}

/// One open file.
enum Reader {
    Lines(Lines),
    Table(Box<Table>),
}

impl Reader {
    fn open(path: &Path) -> Result<Self, DataError> {
        let mut file = File::open(path).map_err(|source| read_error(path, source))?;
        let is_table = starts_with_magic(&mut file).map_err(|source| read_error(path, source))?;
        match (Format::of(path), is_table) {
            (Some(Format::Parquet), false) => Err(DataError::Table {
                path: path.into(),
                reason: "not a Parquet file; name it .jsonl if it holds JSON lines".into(),
            }),
            (_, true) => Table::open(file)
                .map(|table| Self::Table(Box::new(table)))
                .map_err(|error| in_file(path, error)),
            (format, false) => Ok(Self::Lines(Lines::new(file, format == Some(Format::Json)))),
        }
    }

    fn next_row(&mut self) -> Option<Result<(Place, Row), Refused>> {
        match self {
            Self::Lines(lines) => lines.next_row(),
            Self::Table(table) => table.next_row(),
        }
    }
}

fn starts_with_magic(file: &mut File) -> io::Result<bool> {
    let mut first = Vec::new();
    (&*file).take(MAGIC.len() as u64).read_to_end(&mut first)?;
    file.seek(SeekFrom::Start(0))?;
    Ok(first == MAGIC)
}

fn collect(folder: &Path, files: &mut Vec<PathBuf>) -> Result<(), DataError> {
    let failed = |source| read_error(folder, source);
    let mut entries = std::fs::read_dir(folder)
        .and_then(|entries| {
            entries
                .map(|entry| Ok(entry?.path()))
                .collect::<io::Result<Vec<_>>>()
        })
        .map_err(failed)?;
    entries.sort();
    for path in entries {
        let name = path.file_name().unwrap_or_default();
        if name.as_encoded_bytes().first() == Some(&b'.') {
            continue;
        }
        let kind = std::fs::metadata(&path).map_err(|source| read_error(&path, source))?;
        // A link to a folder could lead round in circles.
        let is_link = path.is_symlink();
        if kind.is_dir() && !is_link {
            collect(&path, files)?;
        } else if kind.is_file() && Format::of(&path).is_some() {
            files.push(path);
        }
    }
    Ok(())
}

fn in_file(path: &Path, error: Refused) -> DataError {
    match error {
        Refused::Row(place, reason) => DataError::Row {
            path: path.into(),
            place,
            reason,
            before: 0,
        },
        Refused::Table(reason) => DataError::Table {
            path: path.into(),
            reason,
        },
        Refused::File(source) => read_error(path, source),
    }
}

fn read_error(path: &Path, source: io::Error) -> DataError {
    DataError::Read {
        path: path.into(),
        source,
    }
}
