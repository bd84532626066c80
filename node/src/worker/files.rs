//! Files that are either whole or absent.

use std::fs::{self, File};
use std::io::{self, Write};
use std::path::Path;

/// Writes `parts` one after another to a file beside `path`, flushes it to disk and renames it.
pub(crate) fn write_atomic<'a>(
    path: &Path,
    parts: impl IntoIterator<Item = &'a [u8]>,
) -> io::Result<()> {
    write_atomic_with(path, |file| {
        parts.into_iter().try_for_each(|part| file.write_all(part))
    })
}

/// As [`write_atomic`], with what `write` writes. Unless that succeeds, `path` stays as it was.
pub(crate) fn write_atomic_with(
    path: &Path,
    write: impl FnOnce(&mut File) -> io::Result<()>,
) -> io::Result<()> {
    let folder = path
        .parent()
        .filter(|folder| !folder.as_os_str().is_empty());
    let mut name = path.file_name().unwrap_or_default().to_os_string();
    name.push(".partial");
    let partial = path.with_file_name(name);
    let mut file = File::create(&partial)?;
    write(&mut file)?;
    file.sync_all()?;
    drop(file);
    fs::rename(&partial, path)?;
    File::open(folder.unwrap_or_else(|| Path::new(".")))?.sync_all()
}
