//! Files as slices, mapped into memory: pages are read when they are first looked at and given back when memory is short.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::path::Path;

use memmap2::{Mmap, UncheckedAdvice};

/// A file mapped for reading.
///
/// The file must not be changed in place while it is mapped; replace it by a rename instead, as this project and the
/// Hugging Face cache do. A file that is cut short underneath ends the process (SIGBUS) at the next look at the lost part.
#[derive(Debug)]
pub struct MappedFile(Mmap);

impl MappedFile {
    /// Maps the whole of a file.
    ///
    /// # Errors
    /// The file cannot be opened or mapped; an empty one cannot either.
    pub fn open(path: &Path) -> io::Result<Self> {
        let file = File::open(path)?;
        let metadata = file.metadata()?;
        if !metadata.is_file() || metadata.len() == 0 {
            let what = if metadata.is_file() {
                "an empty file"
            } else {
                "not a file"
            };
            return Err(io::Error::new(io::ErrorKind::InvalidData, what));
        }
        #[expect(
            unsafe_code,
            reason = "the memmap2 crate leaves the file's constancy to the caller"
        )]
        // SAFETY: the map is private and read-only, so this process cannot write through it. Another process that writes
        // to the same file in place could change the bytes behind the slice; that is ruled out by the contract above, and
        // all that is ever made of the bytes is numbers: no reference, length or offset is read from them twice.
        let map = unsafe { Mmap::map(&file) }?;
        Ok(Self(map))
    }

    /// The bytes of the file.
    #[must_use]
    pub fn bytes(&self) -> &[u8] {
        &self.0
    }

    /// Gives the pages of a range back that were read and are not needed soon: they no longer count as this process's memory.
    /// A later look reads them again. What the system refuses stays as it is: this is a matter of memory alone.
    ///
    /// # Panics
    /// Where the range does not lie in the file.
    pub fn forget(&self, range: Range<usize>) {
        let bytes = &self.0[range.clone()];
        if bytes.is_empty() {
            return;
        }
        #[expect(
            unsafe_code,
            reason = "the memmap2 crate leaves to the caller what becomes of the pages' contents"
        )]
        // SAFETY: the map is read-only and of a file, so a page that is dropped has no contents of its own: the next access
        // reads the same bytes of the file again (madvise(2), MADV_DONTNEED). Slices into it stay valid.
        let advised = unsafe {
            self.0
                .unchecked_advise_range(UncheckedAdvice::DontNeed, range.start, bytes.len())
        };
        drop(advised);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mapped_file_is_its_bytes_and_an_empty_one_is_refused() {
        let path = std::env::temp_dir().join(format!("consilium-mapped-{}", std::process::id()));
        std::fs::write(&path, b"bytes").unwrap();
        let file = MappedFile::open(&path).unwrap();
        assert_eq!(file.bytes(), b"bytes");
        file.forget(1..4);
        file.forget(5..5);
        assert_eq!(file.bytes(), b"bytes", "read again");
        std::fs::write(&path, b"").unwrap();
        assert!(MappedFile::open(&path).is_err());
        std::fs::remove_file(&path).unwrap();
        assert!(MappedFile::open(&path).is_err());
        assert!(MappedFile::open(&std::env::temp_dir()).is_err());
    }
}
