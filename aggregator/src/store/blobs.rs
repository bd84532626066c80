//! Artefacts as files named by the SHA-256 of their bytes.

use std::fs::{self, File};
use std::io::{self, Read as _};
use std::path::{Path, PathBuf};

use consilium_protocol::{Digest, InstitutionId};

use super::StoreError;
use super::durable::{self, TEMPORARY, Temporary};

/// `blobs/<first 2 hex digits>/<digest>` in a data folder, and `incoming/` for what is on its way.
///
/// A blob under its name is complete and durable. One process at a time may hold a data folder.
#[derive(Debug, Clone)]
pub struct Blobs {
    blobs: PathBuf,
    incoming: PathBuf,
}

/// A file that is being written and becomes a blob by [`Blobs::keep`].
#[derive(Debug)]
pub struct Draft(Temporary);

impl Draft {
    /// The open file, empty at first.
    #[must_use]
    pub const fn file(&self) -> &File {
        self.0.file()
    }
}

impl Blobs {
    /// Opens the blobs of a data folder, makes the folders if needed, and removes what an
    /// interrupted write left. Uploads that can be resumed stay.
    ///
    /// # Errors
    /// The file system's reason.
    pub fn open(data_dir: &Path) -> Result<Self, StoreError> {
        let blobs = Self::beside(data_dir);
        for folder in [&blobs.blobs, &blobs.incoming] {
            durable::create_folder(folder)
                .map_err(|error| StoreError::io(folder, "make this folder", error))?;
        }
        let list = |error| StoreError::io(&blobs.incoming, "list this folder", error);
        for file in fs::read_dir(&blobs.incoming).map_err(list)? {
            let path = file.map_err(list)?.path();
            if path.extension().is_some_and(|ending| ending == TEMPORARY) {
                fs::remove_file(&path)
                    .map_err(|error| StoreError::io(&path, "remove this file", error))?;
            }
        }
        Ok(blobs)
    }

    /// The blobs of a data folder as they are; touches nothing.
    pub(super) fn beside(data_dir: &Path) -> Self {
        Self {
            blobs: data_dir.join("blobs"),
            incoming: data_dir.join("incoming"),
        }
    }

    /// Stores bytes. Bytes that are there already are not written again; a damaged file is replaced.
    ///
    /// # Errors
    /// The disk is full, or the file system's reason; no file is left then.
    pub fn put_bytes(&self, bytes: &[u8]) -> Result<Digest, StoreError> {
        let digest = Digest::of(bytes);
        let path = self.path(&digest);
        if path.is_file() && hash_file(&path)? == digest {
            return Ok(digest);
        }
        self.prepare(&digest)?;
        let written = Temporary::new(&self.incoming).and_then(|mut temporary| {
            temporary.write(bytes)?;
            temporary.publish(&path)
        });
        written.map_err(|error| StoreError::io(&path, "write this file", error))?;
        Ok(digest)
    }

    /// A new file for bytes that are made piece by piece; dropped, it is gone.
    ///
    /// # Errors
    /// The file system's reason.
    pub fn draft(&self) -> Result<Draft, StoreError> {
        Temporary::new(&self.incoming)
            .map(Draft)
            .map_err(|error| StoreError::io(&self.incoming, "write into this folder", error))
    }

    /// Stores what was written to a draft.
    ///
    /// # Errors
    /// The disk is full, or the file system's reason; no file is left then.
    pub fn keep(&self, draft: Draft) -> Result<Digest, StoreError> {
        let digest = hash_file(draft.0.path())?;
        let path = self.prepare(&digest)?;
        draft
            .0
            .publish(&path)
            .map_err(|error| StoreError::io(&path, "write this file", error))?;
        Ok(digest)
    }

    /// Takes over a complete file on the same file system. The file is gone afterwards, also when
    /// it is refused for its digest.
    ///
    /// # Errors
    /// The bytes have another digest, or the file system's reason.
    pub fn adopt(&self, file: &Path, expected: Digest) -> Result<(), StoreError> {
        let remove = || {
            fs::remove_file(file).map_err(|error| StoreError::io(file, "remove this file", error))
        };
        let got = hash_file(file)?;
        if got != expected {
            remove()?;
            return Err(StoreError::WrongDigest {
                path: file.to_owned(),
                got,
                expected,
            });
        }
        let path = self.prepare(&expected)?;
        File::open(file)
            .and_then(|file| file.sync_all())
            .and_then(|()| durable::move_file(file, &path))
            .map_err(|error| StoreError::io(&path, "write this file", error))
    }

    /// Where the blob is or will be.
    #[must_use]
    pub fn path(&self, digest: &Digest) -> PathBuf {
        let name = digest.to_string();
        let folder: String = name.chars().take(2).collect();
        self.blobs.join(folder).join(name)
    }

    /// As [`Self::path`], for a caller that moves a verified file there: its folder exists and is
    /// durable.
    ///
    /// # Errors
    /// The file system's reason.
    pub fn prepare(&self, digest: &Digest) -> Result<PathBuf, StoreError> {
        let path = self.path(digest);
        let folder = path.parent().unwrap_or(&self.blobs);
        durable::create_folder(folder)
            .map_err(|error| StoreError::io(folder, "make this folder", error))?;
        Ok(path)
    }

    /// Whether the blob is here.
    #[must_use]
    pub fn has(&self, digest: &Digest) -> bool {
        self.path(digest).is_file()
    }

    /// Bytes of the blob; none if it is not here.
    #[must_use]
    pub fn length(&self, digest: &Digest) -> Option<u64> {
        let metadata = fs::metadata(self.path(digest)).ok()?;
        metadata.is_file().then_some(metadata.len())
    }

    /// The whole blob, at most `limit` bytes, its digest checked.
    ///
    /// # Errors
    /// Missing, longer, or damaged.
    pub fn read(&self, digest: &Digest, limit: u64) -> Result<Vec<u8>, StoreError> {
        let path = self.path(digest);
        let file = open(&path)?;
        let failed = |error| StoreError::io(&path, "read this file", error);
        let length = file.metadata().map_err(failed)?.len();
        if length > limit {
            return Err(StoreError::TooLong {
                path,
                length,
                limit,
            });
        }
        let mut bytes = Vec::new();
        file.take(limit).read_to_end(&mut bytes).map_err(failed)?;
        let got = Digest::of(&bytes);
        if got == *digest {
            Ok(bytes)
        } else {
            Err(StoreError::Damaged { path, got })
        }
    }

    /// Path of a blob whose bytes were just read through and have its digest; for what is too long to be held in memory.
    ///
    /// # Errors
    /// Missing, or damaged.
    pub fn verified(&self, digest: &Digest) -> Result<PathBuf, StoreError> {
        let path = self.path(digest);
        let got = hash_file(&path)?;
        if got == *digest {
            Ok(path)
        } else {
            Err(StoreError::Damaged { path, got })
        }
    }

    /// Where an upload of `sender` is put together, and how many of its bytes are there from an earlier try. Each sender
    /// has a file of its own: nobody's bytes get into, or lock, what another one sends.
    ///
    /// # Errors
    /// The file system's reason.
    pub fn partial(
        &self,
        sender: &InstitutionId,
        digest: &Digest,
    ) -> Result<(PathBuf, u64), StoreError> {
        let path = self.incoming.join(format!("{sender}-{digest}.part"));
        match fs::metadata(&path) {
            Ok(metadata) => Ok((path, metadata.len())),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok((path, 0)),
            Err(error) => Err(StoreError::io(&path, "read this file", error)),
        }
    }

    /// Bytes that this program may still write.
    ///
    /// # Errors
    /// The file system's reason.
    pub fn free_space(&self) -> Result<u64, StoreError> {
        let space = rustix::fs::statvfs(&self.blobs)
            .map_err(|error| StoreError::io(&self.blobs, "ask for free space", error.into()))?;
        Ok(space.f_bavail.saturating_mul(space.f_frsize))
    }
}

fn open(path: &Path) -> Result<File, StoreError> {
    File::open(path).map_err(|error| {
        if error.kind() == io::ErrorKind::NotFound {
            return StoreError::Missing {
                path: path.to_owned(),
            };
        }
        StoreError::io(path, "read this file", error)
    })
}

fn hash_file(path: &Path) -> Result<Digest, StoreError> {
    Digest::of_reader(open(path)?).map_err(|error| StoreError::io(path, "read this file", error))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sender() -> InstitutionId {
        InstitutionId::new("clinic").unwrap()
    }

    fn files(folder: &Path) -> Vec<PathBuf> {
        let mut found = Vec::new();
        for entry in fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                found.extend(files(&path));
            } else {
                found.push(path);
            }
        }
        found
    }

    #[test]
    fn the_same_bytes_are_stored_once_and_damage_is_found_and_mended() {
        let data = tempfile::tempdir().unwrap();
        let blobs = Blobs::open(data.path()).unwrap();
        let digest = blobs.put_bytes(b"three words here").unwrap();
        let written = fs::metadata(blobs.path(&digest)).unwrap();
        assert_eq!(blobs.put_bytes(b"three words here").unwrap(), digest);
        assert_eq!(files(data.path()), [blobs.path(&digest)]);
        let again = fs::metadata(blobs.path(&digest)).unwrap();
        assert_eq!(again.modified().unwrap(), written.modified().unwrap());
        assert_eq!(blobs.read(&digest, 16).unwrap(), b"three words here");
        assert!(matches!(
            blobs.read(&digest, 15),
            Err(StoreError::TooLong { length: 16, .. })
        ));

        fs::write(blobs.path(&digest), b"three words hers").unwrap();
        assert!(matches!(
            blobs.read(&digest, 16),
            Err(StoreError::Damaged { .. })
        ));
        blobs.put_bytes(b"three words here").unwrap();
        assert_eq!(blobs.read(&digest, 16).unwrap(), b"three words here");
        assert!(matches!(
            blobs.read(&Digest::of(b"absent"), 1),
            Err(StoreError::Missing { .. })
        ));
    }

    #[test]
    fn a_received_file_is_taken_only_under_its_digest_and_nothing_is_left_otherwise() {
        let data = tempfile::tempdir().unwrap();
        let blobs = Blobs::open(data.path()).unwrap();
        let digest = Digest::of(b"received");
        let (partial, length) = blobs.partial(&sender(), &digest).unwrap();
        assert_eq!(length, 0);

        fs::write(&partial, b"deceived").unwrap();
        assert_eq!(blobs.partial(&sender(), &digest).unwrap().1, 8);
        let refused = blobs.adopt(&partial, digest).unwrap_err();
        assert!(
            matches!(refused, StoreError::WrongDigest { expected, .. } if expected == digest),
            "{refused}"
        );
        assert!(files(data.path()).is_empty(), "{:?}", files(data.path()));

        fs::write(&partial, b"received").unwrap();
        blobs.adopt(&partial, digest).unwrap();
        assert_eq!(files(data.path()), [blobs.path(&digest)]);
        assert_eq!(blobs.length(&digest), Some(8));
    }

    #[test]
    fn opening_removes_interrupted_writes_and_keeps_uploads_to_resume() {
        let data = tempfile::tempdir().unwrap();
        let blobs = Blobs::open(data.path()).unwrap();
        let (partial, _) = blobs.partial(&sender(), &Digest::of(b"upload")).unwrap();
        fs::write(&partial, b"upl").unwrap();
        fs::write(data.path().join("incoming/1-2.tmp"), b"half").unwrap();
        Blobs::open(data.path()).unwrap();
        assert_eq!(files(data.path()), [partial]);
        assert!(blobs.free_space().unwrap() > 0);
    }

    #[test]
    fn a_full_disk_is_told_from_other_failures() {
        let path = Path::new("file");
        // Every write to this device finds no space.
        let mut device = File::options().write(true).open("/dev/full").unwrap();
        let error = io::Write::write_all(&mut device, b"a byte").unwrap_err();
        let full = StoreError::io(path, "write", error);
        assert!(
            full.is_full() && full.to_string().contains("file"),
            "{full}"
        );
        let other = StoreError::io(path, "write", io::ErrorKind::PermissionDenied.into());
        assert!(!other.is_full());
    }
}
