//! Artefacts on disk and what is known about them.
//!
//! [`Blobs`] and the log are the truth, written so that they survive a power cut. [`Index`] only
//! answers faster what the log says, and is made again from it whenever it is missing or differs.

mod blobs;
pub(crate) mod durable;
mod index;

use std::io;
use std::path::{Path, PathBuf};

use consilium_protocol::Digest;

pub use blobs::{Blobs, Draft};
pub use index::{Index, IndexedArtefact, IndexedSlot, Slot};

/// Why the store refused.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// No room is left, or a quota is used up. Nothing was changed; worth another try later.
    #[error("{}: the disk is full; free some space and try again", path.display())]
    Full {
        /// File that did not fit.
        path: PathBuf,
    },
    /// The file system failed.
    #[error("{}: cannot {action}; see that the disk works and its owner runs this program", path.display())]
    Io {
        /// File or folder.
        path: PathBuf,
        /// What was tried.
        action: &'static str,
        /// Why it failed.
        source: io::Error,
    },
    /// The file system failed on a file that the caller knows.
    #[error("a file cannot be read or written")]
    File(#[from] io::Error),
    /// A received file is another one than announced. It was removed.
    #[error("{}: has digest {got}, announced was {expected}; send it again", path.display())]
    WrongDigest {
        /// Where it was.
        path: PathBuf,
        /// Digest of the bytes.
        got: Digest,
        /// Digest announced.
        expected: Digest,
    },
    /// There is no such artefact.
    #[error("{}: is missing; restore it from a copy of the data folder", path.display())]
    Missing {
        /// Where it should be.
        path: PathBuf,
    },
    /// The bytes of an artefact have changed since they were stored.
    #[error("{}: has digest {got} instead of its name; restore it from a copy", path.display())]
    Damaged {
        /// Where it is.
        path: PathBuf,
        /// Digest of its bytes now.
        got: Digest,
    },
    /// An artefact is longer than its reader allows.
    #[error("{}: has {length} bytes, at most {limit} are read here", path.display())]
    TooLong {
        /// Where it is.
        path: PathBuf,
        /// Its bytes.
        length: u64,
        /// Most bytes allowed.
        limit: u64,
    },
    /// The index fails; it holds nothing that the log does not.
    #[error("{}: the index fails; run `consilium-aggregator reindex`", path.display())]
    Index {
        /// Its folder.
        path: PathBuf,
        /// What it says.
        source: sled::Error,
    },
}

impl StoreError {
    fn io(path: &Path, action: &'static str, source: io::Error) -> Self {
        if is_full(&source) {
            return Self::Full {
                path: path.to_owned(),
            };
        }
        Self::Io {
            path: path.to_owned(),
            action,
            source,
        }
    }

    /// Whether room on the disk is all that is missing.
    #[must_use]
    pub fn is_full(&self) -> bool {
        match self {
            Self::Full { .. } => true,
            Self::File(error)
            | Self::Index {
                source: sled::Error::Io(error),
                ..
            } => is_full(error),
            _ => false,
        }
    }
}

/// Whether an operation failed for want of room.
pub(crate) fn is_full(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded
    )
}
