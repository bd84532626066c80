//! The log of the consortium on disk, in the C2SP formats that anyone can serve and check.
//!
//! Order of durability: entry, hash tiles, signed checkpoint, answer. So every signed checkpoint
//! can be rebuilt from the entries, and [`Log::open`] does so before anything is appended.

mod files;
#[cfg(test)]
mod tests;

use std::io;
use std::path::{Path, PathBuf};

use consilium_protocol::Digest;
use consilium_protocol::event::{Entry, EntryError};
use consilium_protocol::message::Logged;
use consilium_protocol::transcript::checkpoint::{Checkpoint, CheckpointError, VerifiedCheckpoint};
use consilium_protocol::transcript::key::NoteSigner;
use consilium_protocol::transcript::proof::{LogProof, ProofError};
use consilium_protocol::transcript::tile::TileError;
use consilium_protocol::transcript::tree::{self, Tree};

use crate::store::is_full;
use files::Folder;

/// Why the log refused.
#[derive(Debug, thiserror::Error)]
pub enum LogError {
    /// No room is left, or a quota is used up. Nothing was logged; worth another try later.
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
    /// There are tiles without a checkpoint.
    #[error("{}: is missing although there are tiles; restore the whole log from a copy", path.display())]
    NoCheckpoint {
        /// Where it should be.
        path: PathBuf,
    },
    /// The checkpoint is not one of this log's key.
    #[error("{}: is not signed by this log's key; restore the whole log from a copy, or use the key of this log", path.display())]
    Checkpoint {
        /// The checkpoint.
        path: PathBuf,
        /// What is wrong.
        source: CheckpointError,
    },
    /// The entries are not those that were signed.
    #[error("{}: signs root {signed} of {size} entries, those on disk have root {got}; restore the whole log from a copy", path.display())]
    WrongRoot {
        /// The checkpoint.
        path: PathBuf,
        /// Entries it signs for.
        size: u64,
        /// Root it signs.
        signed: Digest,
        /// Root of the entries on disk.
        got: Digest,
    },
    /// The tiles hold more than an interrupted append can have left.
    #[error("{}: reaches to {end} but the checkpoint signs {checkpoint} entries, so an older checkpoint has replaced a newer one; restore the whole log from a copy", path.display())]
    RolledBack {
        /// A tile beyond the checkpoint.
        path: PathBuf,
        /// Entries that the checkpoint signs for.
        checkpoint: u64,
        /// Entries or hashes up to the end of the tile.
        end: u64,
    },
    /// A tile is malformed.
    #[error("{}: is no tile of this log; restore the whole log from a copy", path.display())]
    Bundle {
        /// The tile.
        path: PathBuf,
        /// What is wrong.
        source: TileError,
    },
    /// A hash tile differs from what the signed entries give.
    #[error("{}: differs from the hashes of the signed entries; remove it and it is made again", path.display())]
    HashTile {
        /// The tile.
        path: PathBuf,
    },
    /// An entry is signed but not one of this program's.
    #[error("log entry {index} cannot be read; use the version of this program that wrote it")]
    Entry {
        /// Its index.
        index: u64,
        /// What is wrong.
        source: EntryError,
    },
    /// The entry to append does not fit a log.
    #[error(transparent)]
    Unfit(#[from] EntryError),
    /// The new checkpoint cannot be signed.
    #[error(
        "the new checkpoint cannot be signed; the log's key must be an Ed25519 key of its name"
    )]
    Sign(#[source] CheckpointError),
    /// An earlier checkpoint may or may not have reached the disk, so another one must not be signed.
    #[error("the log stopped after a failed write of its checkpoint; restart this program")]
    Stopped,
    /// There is no such entry.
    #[error("there is no entry {index} in a log of {size}")]
    Unknown {
        /// Index asked for.
        index: u64,
        /// Entries there are.
        size: u64,
    },
    /// A proof cannot be made.
    #[error("entry {index} cannot be proved")]
    Proof {
        /// Index asked for.
        index: u64,
        /// What is wrong.
        source: ProofError,
    },
}

impl LogError {
    fn io(path: &Path, action: &'static str, source: io::Error) -> Self {
        let path = path.to_owned();
        if is_full(&source) {
            return Self::Full { path };
        }
        Self::Io {
            path,
            action,
            source,
        }
    }
}

/// An entry and its canonical bytes.
#[derive(Debug)]
struct Kept {
    bytes: Vec<u8>,
    entry: Entry,
}

/// A log that one process appends to. Entries and hashes are held in memory: an entry's bytes
/// twice over and 64 bytes of hashes.
#[derive(Debug)]
pub struct Log {
    folder: Folder,
    signer: NoteSigner,
    kept: Vec<Kept>,
    tree: Tree,
    checkpoint: VerifiedCheckpoint,
    note: String,
    stopped: bool,
}

impl Log {
    /// Opens the log in `folder`, or starts one there if it is empty. Its origin is the name of
    /// the signer's key.
    ///
    /// All entries are read, and the root over them must be the signed one. An entry beyond the
    /// checkpoint, left by a crash and never acknowledged, is dropped.
    ///
    /// # Errors
    /// The files are not what the key signed, or the file system's reason.
    pub fn open(folder: &Path, signer: NoteSigner) -> Result<Self, LogError> {
        let folder = Folder::open(folder)?;
        let checkpoint = match folder.read_checkpoint()? {
            Some(bytes) => {
                VerifiedCheckpoint::open(&bytes, signer.verifier(), &[]).map_err(|source| {
                    LogError::Checkpoint {
                        path: folder.checkpoint_path(),
                        source,
                    }
                })?
            }
            None => {
                let first = sign(&Tree::new(), &signer)?;
                folder.write_checkpoint(&first.note().to_string())?;
                first
            }
        };
        let signed = checkpoint.checkpoint();
        let entries = folder.read_entries(signed.size)?;
        let tree: Tree = entries.iter().map(|bytes| tree::leaf_hash(bytes)).collect();
        if tree.root() != signed.root {
            return Err(LogError::WrongRoot {
                path: folder.checkpoint_path(),
                size: signed.size,
                signed: signed.root,
                got: tree.root(),
            });
        }
        let kept = (0..)
            .zip(entries)
            .map(|(index, bytes)| match Entry::parse(&bytes) {
                Ok(entry) => Ok(Kept { bytes, entry }),
                Err(source) => Err(LogError::Entry { index, source }),
            })
            .collect::<Result<Vec<Kept>, LogError>>()?;
        folder.settle(&tree)?;
        Ok(Self {
            note: checkpoint.note().to_string(),
            folder,
            signer,
            kept,
            tree,
            checkpoint,
            stopped: false,
        })
    }

    /// Appends an entry and returns its index once it and the checkpoint over it are durable.
    ///
    /// # Errors
    /// Nothing is logged. After a failed write of the checkpoint every later append fails too,
    /// until the log is opened again: two checkpoints of one size must never be signed.
    pub fn append(&mut self, entry: &Entry) -> Result<u64, LogError> {
        if self.stopped {
            return Err(LogError::Stopped);
        }
        let bytes = entry.to_bytes()?;
        let index = self.size();
        self.tree.push(tree::leaf_hash(&bytes));
        self.kept.push(Kept {
            bytes,
            entry: entry.clone(),
        });
        if let Err(error) = self.publish(index) {
            self.kept.pop();
            let leaves = self.kept.iter().map(|kept| tree::leaf_hash(&kept.bytes));
            self.tree = leaves.collect();
            return Err(error);
        }
        if let Err(error) = self.folder.remove_partials(index, self.size()) {
            tracing::warn!(%error, "tiles that are no longer needed stay");
        }
        Ok(index)
    }

    /// Entry `index` with the proof that the log of the current checkpoint holds it.
    ///
    /// # Errors
    /// There is no such entry.
    pub fn logged(&self, index: u64) -> Result<Logged, LogError> {
        let kept = usize::try_from(index)
            .ok()
            .and_then(|index| self.kept.get(index))
            .ok_or_else(|| LogError::Unknown {
                index,
                size: self.size(),
            })?;
        let proof = LogProof::new(&self.tree, index, &self.checkpoint)
            .map_err(|source| LogError::Proof { index, source })?;
        Ok(Logged {
            entry: kept.bytes.clone(),
            proof: proof.to_string(),
        })
    }

    /// The current signed checkpoint.
    #[must_use]
    pub fn checkpoint(&self) -> &str {
        &self.note
    }

    /// Number of entries.
    #[must_use]
    pub fn size(&self) -> u64 {
        self.tree.size()
    }

    /// Root over all entries.
    #[must_use]
    pub fn root(&self) -> Digest {
        self.checkpoint.checkpoint().root
    }

    /// Proof that the log of `from` entries is the beginning of this one; empty if there is none
    /// because this one is shorter.
    #[must_use]
    pub fn consistency(&self, from: u64) -> Vec<Digest> {
        self.tree.consistency(from, self.size()).unwrap_or_default()
    }

    /// All entries with their indices, oldest first.
    pub fn entries(&self) -> impl Iterator<Item = (u64, Entry)> + '_ {
        (0..).zip(self.kept.iter().map(|kept| kept.entry.clone()))
    }

    /// Makes the tree durable that has grown from `old` entries.
    fn publish(&mut self, old: u64) -> Result<(), LogError> {
        let checkpoint = sign(&self.tree, &self.signer)?;
        let kept = &self.kept;
        let entries = |index: usize| kept.get(index).map(|kept| kept.bytes.as_slice());
        self.folder.write_growth(old, &self.tree, entries)?;
        let note = checkpoint.note().to_string();
        if let Err(error) = self.folder.write_checkpoint(&note) {
            // The file may have got its name before the failure.
            self.stopped = true;
            return Err(error);
        }
        (self.checkpoint, self.note) = (checkpoint, note);
        Ok(())
    }
}

fn sign(tree: &Tree, signer: &NoteSigner) -> Result<VerifiedCheckpoint, LogError> {
    let checkpoint = Checkpoint {
        origin: signer.verifier().name().clone(),
        size: tree.size(),
        root: tree.root(),
    };
    let note = checkpoint.sign(signer).map_err(LogError::Sign)?;
    VerifiedCheckpoint::verify(note, signer.verifier(), &[]).map_err(LogError::Sign)
}
