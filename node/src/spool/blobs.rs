//! Blobs: bytes stored under their digest.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};

use consilium_protocol::Digest;

use super::files::{
    copy_and_hash, exists, failed, hash_file, publish, read_limited, remove, temporary, write_whole,
};
use super::{Spool, SpoolError};

impl Spool {
    /// Stores bytes under their digest.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn put_blob(&self, bytes: &[u8]) -> Result<Digest, SpoolError> {
        let digest = Digest::of(bytes);
        let path = self.blob_path(&digest);
        if !exists(&path)? {
            write_whole(&path, bytes)?;
        }
        Ok(digest)
    }

    /// Stores a copy of a file under its digest; memory does not grow with the file.
    ///
    /// # Errors
    /// The file cannot be read, or its copy not written.
    pub fn put_blob_file(&self, from: &Path) -> Result<Digest, SpoolError> {
        let mut source = File::open(from).map_err(failed("open", from))?;
        let temporary = temporary(&self.blobs());
        let copied = copy_and_hash(&mut source, &temporary).and_then(|digest| {
            publish(&temporary, &self.blob_path(&digest))?;
            Ok(digest)
        });
        copied.map_err(|source| {
            let _ = fs::remove_file(&temporary);
            failed("copy", from)(source)
        })
    }

    /// Where a blob lies, or would lie.
    #[must_use]
    pub fn blob_path(&self, digest: &Digest) -> PathBuf {
        self.blobs().join(digest.to_string())
    }

    /// Whether a blob is there. Its bytes are not read.
    #[must_use]
    pub fn has_blob(&self, digest: &Digest) -> bool {
        self.blob_path(digest).is_file()
    }

    /// Reads a blob of at most `limit` bytes and checks its digest.
    ///
    /// # Errors
    /// Missing, longer, or damaged.
    pub fn read_blob(&self, digest: &Digest, limit: u64) -> Result<Vec<u8>, SpoolError> {
        let path = self.blob_path(digest);
        let bytes = read_limited(&path, limit)?
            .ok_or_else(|| failed("read", &path)(io::Error::from(io::ErrorKind::NotFound)))?;
        match Digest::of(&bytes) {
            got if got == *digest => Ok(bytes),
            got => Err(SpoolError::Damaged { path, got }),
        }
    }

    /// Reads a blob to its end without keeping it, checks its digest, and returns its length.
    ///
    /// # Errors
    /// Missing or damaged.
    pub fn check_blob(&self, digest: &Digest) -> Result<u64, SpoolError> {
        let path = self.blob_path(digest);
        let (got, length) = hash_file(&path).map_err(failed("read", &path))?;
        if got == *digest {
            Ok(length)
        } else {
            Err(SpoolError::Damaged { path, got })
        }
    }

    /// Removes a blob, if it is there.
    ///
    /// # Errors
    /// It cannot be removed.
    pub fn remove_blob(&self, digest: &Digest) -> Result<(), SpoolError> {
        remove(&self.blob_path(digest))
    }

    /// Removes every blob, and every part of one, whose digest is not in `keep`. For the agent, between rounds.
    ///
    /// # Errors
    /// The folder cannot be read, or a file not removed.
    pub fn keep_blobs(&self, keep: &BTreeSet<Digest>) -> Result<(), SpoolError> {
        let folder = self.blobs();
        for entry in fs::read_dir(&folder).map_err(failed("read", &folder))? {
            let path = entry.map_err(failed("read", &folder))?.path();
            let digest = path
                .file_stem()
                .and_then(|name| name.to_str()?.parse().ok());
            if digest.is_some_and(|digest| !keep.contains(&digest)) {
                remove(&path)?;
            }
        }
        Ok(())
    }
}
