//! Files that are either there in full or not at all, also after a power cut.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write as _};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

/// Ending of files that a crash may leave behind; nothing ever refers to them.
pub(crate) const TEMPORARY: &str = "tmp";

/// A new file in `folder`, its path removed again if it is dropped before [`Temporary::publish`].
#[derive(Debug)]
pub(crate) struct Temporary {
    path: PathBuf,
    file: File,
    published: bool,
}

impl Temporary {
    /// Creates the file under a name of its own.
    pub(crate) fn new(folder: &Path) -> io::Result<Self> {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let path = folder.join(format!("{}-{number}.{TEMPORARY}", std::process::id()));
        let file = OpenOptions::new()
            .write(true)
            .create_new(true)
            .open(&path)?;
        Ok(Self {
            path,
            file,
            published: false,
        })
    }

    /// Where it is.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// The open file.
    pub(crate) const fn file(&self) -> &File {
        &self.file
    }

    /// Adds bytes and waits until the disk has them.
    pub(crate) fn write(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.file.write_all(bytes)?;
        self.file.sync_all()
    }

    /// Waits until the disk has the bytes and gives the file its name, replacing what had it.
    pub(crate) fn publish(mut self, path: &Path) -> io::Result<()> {
        self.file.sync_all()?;
        move_file(&self.path, path)?;
        self.published = true;
        Ok(())
    }
}

impl Drop for Temporary {
    fn drop(&mut self) {
        if !self.published {
            // Whoever opens the folder next removes what cannot be removed now.
            let _ = fs::remove_file(&self.path);
        }
    }
}

/// Writes a whole file: temporary file, fsync, rename, fsync of the folder, which is made if needed.
pub(crate) fn write_file(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let folder = parent(path)?;
    create_folder(folder)?;
    let mut temporary = Temporary::new(folder)?;
    temporary.write(bytes)?;
    temporary.publish(path)
}

/// Renames a file within its file system and waits until the disk knows both names' folders.
pub(crate) fn move_file(from: &Path, to: &Path) -> io::Result<()> {
    fs::rename(from, to)?;
    let (source, target) = (parent(from)?, parent(to)?);
    sync_folder(target)?;
    if source != target {
        sync_folder(source)?;
    }
    Ok(())
}

/// Makes a folder and those above it, each durable before the next.
pub(crate) fn create_folder(folder: &Path) -> io::Result<()> {
    if folder.as_os_str().is_empty() || folder.is_dir() {
        return Ok(());
    }
    let above = parent(folder)?;
    create_folder(above)?;
    match fs::create_dir(folder) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => Err(error),
        _ => sync_folder(above),
    }
}

/// Waits until the disk has the names in a folder.
pub(crate) fn sync_folder(folder: &Path) -> io::Result<()> {
    let folder = if folder.as_os_str().is_empty() {
        Path::new(".")
    } else {
        folder
    };
    File::open(folder)?.sync_all()
}

fn parent(path: &Path) -> io::Result<&Path> {
    path.parent()
        .ok_or_else(|| io::Error::new(io::ErrorKind::InvalidInput, "path has no folder"))
}
