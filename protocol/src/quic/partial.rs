//! A file that is being received: hashed as it grows, resumed after an interruption, published whole or not at all.
//!
//! Blocking: call from the blocking pool.

use std::fs::{File, OpenOptions, TryLockError};
use std::io::{self, Read as _, Seek as _, SeekFrom, Write};
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

use sha2::{Digest as _, Sha256};

use super::error::{LinkError, LocalError, PeerError};
use crate::ids::Digest;

const BUFFER: usize = 64 * 1024;

/// The first bytes of an artefact, locked against other transfers until dropped.
#[derive(Debug)]
pub struct Partial {
    path: PathBuf,
    file: File,
    hash: Sha256,
    length: u64,
}

impl Partial {
    /// Opens or makes the file, locks it, and hashes what it has. A file longer than `total` starts from scratch.
    ///
    /// # Errors
    /// [`LocalError::Locked`] while another transfer writes it; else the file system's reason.
    pub fn open(path: &Path, total: u64) -> Result<Self, LocalError> {
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .open(path)
            .map_err(LocalError::file(path))?;
        match file.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => return Err(LocalError::Locked(path.to_owned())),
            Err(TryLockError::Error(error)) => return Err(LocalError::file(path)(error)),
        }
        if !is_at(&file, path).map_err(LocalError::file(path))? {
            return Err(LocalError::Locked(path.to_owned()));
        }
        let mut partial = Self {
            path: path.to_owned(),
            file,
            hash: Sha256::new(),
            length: 0,
        };
        partial.read(total).map_err(LocalError::file(path))?;
        Ok(partial)
    }

    /// Bytes that are there.
    #[must_use]
    pub const fn length(&self) -> u64 {
        self.length
    }

    /// Forgets everything received.
    ///
    /// # Errors
    /// The file system's reason.
    pub fn restart(&mut self) -> Result<(), LocalError> {
        self.empty().map_err(LocalError::file(&self.path))
    }

    /// Makes the content durable and compares its digest. Content of another digest is removed: nobody can tell which of
    /// its bytes are wrong.
    ///
    /// # Errors
    /// [`PeerError::Digest`], or the file system's reason.
    pub fn complete(self, expected: Digest) -> Result<Complete, LinkError> {
        let got = Digest::from_bytes(self.hash.clone().finalize().into());
        if got != expected {
            self.discard()?;
            return Err(PeerError::Digest { got, expected }.into());
        }
        self.file.sync_all().map_err(LocalError::file(&self.path))?;
        Ok(Complete {
            partial: self,
            digest: got,
        })
    }

    /// Removes the file.
    ///
    /// # Errors
    /// The file system's reason.
    pub fn discard(self) -> Result<(), LocalError> {
        std::fs::remove_file(&self.path).map_err(LocalError::file(&self.path))
    }

    fn read(&mut self, total: u64) -> io::Result<()> {
        if self.file.metadata()?.len() > total {
            return self.empty();
        }
        let mut buffer = vec![0; BUFFER];
        loop {
            match self.file.read(&mut buffer) {
                Ok(0) => return Ok(()),
                Ok(read) => self.count(buffer.get(..read).unwrap_or_default()),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
    }

    fn empty(&mut self) -> io::Result<()> {
        self.file.set_len(0)?;
        self.file.seek(SeekFrom::Start(0))?;
        self.hash = Sha256::new();
        self.length = 0;
        Ok(())
    }

    fn count(&mut self, bytes: &[u8]) {
        self.hash.update(bytes);
        self.length = self
            .length
            .saturating_add(u64::try_from(bytes.len()).unwrap_or(u64::MAX));
    }
}

impl Write for Partial {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let written = self.file.write(bytes)?;
        self.count(bytes.get(..written).unwrap_or(bytes));
        Ok(written)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.file.flush()
    }
}

/// A received file whose digest was checked and whose bytes are durable, under its temporary name. Locked until dropped.
#[derive(Debug)]
pub struct Complete {
    partial: Partial,
    digest: Digest,
}

impl Complete {
    /// Where it is.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.partial.path
    }

    /// Its bytes.
    #[must_use]
    pub const fn length(&self) -> u64 {
        self.partial.length
    }

    /// Its digest.
    #[must_use]
    pub const fn digest(&self) -> Digest {
        self.digest
    }

    /// Gives it its final name on the same file system, durably and at once.
    ///
    /// # Errors
    /// The file system's reason.
    pub fn publish(self, path: &Path) -> Result<(), LocalError> {
        std::fs::rename(&self.partial.path, path).map_err(LocalError::file(path))?;
        let folder = match path.parent() {
            Some(folder) if folder != Path::new("") => folder,
            _ => Path::new("."),
        };
        File::open(folder)
            .and_then(|folder| folder.sync_all())
            .map_err(LocalError::file(folder))
    }

    /// Removes it: it is not wanted after all.
    ///
    /// # Errors
    /// The file system's reason.
    pub fn discard(self) -> Result<(), LocalError> {
        self.partial.discard()
    }
}

/// Whether the file was not renamed or removed between opening and locking it.
fn is_at(file: &File, path: &Path) -> io::Result<bool> {
    let ours = file.metadata()?;
    match std::fs::symlink_metadata(path) {
        Ok(there) => Ok((there.dev(), there.ino()) == (ours.dev(), ours.ino())),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(error) => Err(error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_written_before_counts_and_the_file_appears_whole() {
        let folder = tempfile::tempdir().unwrap();
        let (part, whole) = (folder.path().join("a.part"), folder.path().join("a"));
        let mut first = Partial::open(&part, 11).unwrap();
        first.write_all(b"hello ").unwrap();
        drop(first);

        let mut second = Partial::open(&part, 11).unwrap();
        assert_eq!(second.length(), 6);
        assert!(matches!(
            Partial::open(&part, 11),
            Err(LocalError::Locked(_))
        ));
        second.write_all(b"world").unwrap();
        let complete = second.complete(Digest::of(b"hello world")).unwrap();
        assert!(!whole.exists());
        complete.publish(&whole).unwrap();
        assert_eq!(std::fs::read(&whole).unwrap(), b"hello world");
        assert!(!part.exists());
    }

    #[test]
    fn wrong_content_is_removed_and_longer_content_starts_again() {
        let folder = tempfile::tempdir().unwrap();
        let part = folder.path().join("a.part");
        std::fs::write(&part, b"too long").unwrap();
        let mut partial = Partial::open(&part, 5).unwrap();
        assert_eq!(partial.length(), 0);
        partial.write_all(b"wrong").unwrap();
        let refused = partial.complete(Digest::of(b"right")).unwrap_err();
        assert!(matches!(refused, LinkError::Peer(PeerError::Digest { .. })));
        assert!(!part.exists());
    }
}
