//! Files that are either whole or absent, read with limits and hashed as streams.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read as _, Write as _};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use consilium_protocol::time::SystemClock;
use consilium_protocol::{Clock as _, Digest, UnixMillis};
use serde::Serialize;
use serde::de::DeserializeOwned;
use sha2::{Digest as _, Sha256};

use super::SpoolError;

/// A temporary file this old was left by a process that is gone.
const ABANDONED: Duration = Duration::from_secs(24 * 60 * 60);

/// SHA-256 and length of a file; memory does not grow with it.
///
/// # Errors
/// It cannot be read.
pub fn hash_file(path: &Path) -> io::Result<(Digest, u64)> {
    let mut file = File::open(path)?;
    hash_stream(&mut file, |_| Ok(()))
}

pub(super) fn copy_and_hash(source: &mut File, to: &Path) -> io::Result<Digest> {
    let mut target = OpenOptions::new().write(true).create_new(true).open(to)?;
    let (digest, _) = hash_stream(source, |bytes| target.write_all(bytes))?;
    target.sync_all()?;
    Ok(digest)
}

fn hash_stream(
    source: &mut File,
    mut each: impl FnMut(&[u8]) -> io::Result<()>,
) -> io::Result<(Digest, u64)> {
    let mut hasher = Sha256::new();
    let mut buffer = vec![0; 256 * 1024];
    let mut length = 0_u64;
    loop {
        let count = source.read(&mut buffer)?;
        let Some(bytes) = buffer.get(..count).filter(|bytes| !bytes.is_empty()) else {
            return Ok((Digest::from_bytes(hasher.finalize().into()), length));
        };
        hasher.update(bytes);
        each(bytes)?;
        length = length.saturating_add(u64::try_from(count).unwrap_or(u64::MAX));
    }
}

pub(super) fn write_json<T: Serialize>(path: &Path, value: &T) -> Result<(), SpoolError> {
    let bytes = serde_json::to_vec(value).map_err(|error| SpoolError::Malformed {
        path: path.to_owned(),
        problem: error.to_string(),
    })?;
    write_whole(path, &bytes)
}

pub(super) fn read_json<T: DeserializeOwned>(
    path: &Path,
    limit: u64,
) -> Result<Option<T>, SpoolError> {
    let Some(bytes) = read_limited(path, limit)? else {
        return Ok(None);
    };
    let parsed = serde_json::from_slice(&bytes).map_err(|error| SpoolError::Malformed {
        path: path.to_owned(),
        problem: error.to_string(),
    })?;
    Ok(Some(parsed))
}

pub(super) fn read_limited(path: &Path, limit: u64) -> Result<Option<Vec<u8>>, SpoolError> {
    let file = match File::open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(failed("open", path)(error)),
    };
    let mut bytes = Vec::new();
    file.take(limit.saturating_add(1))
        .read_to_end(&mut bytes)
        .map_err(failed("read", path))?;
    if u64::try_from(bytes.len()).unwrap_or(u64::MAX) > limit {
        return Err(SpoolError::Malformed {
            path: path.to_owned(),
            problem: format!("longer than {limit} bytes"),
        });
    }
    Ok(Some(bytes))
}

/// Writes a file that has its name only once it is complete and on disk.
pub(super) fn write_whole(path: &Path, bytes: &[u8]) -> Result<(), SpoolError> {
    let temporary = temporary(path.parent().unwrap_or_else(|| Path::new(".")));
    let write = || {
        let mut file = OpenOptions::new()
            .write(true)
            .create_new(true)
            .open(&temporary)?;
        file.write_all(bytes)?;
        file.sync_all()?;
        publish(&temporary, path)
    };
    write().map_err(|source| {
        // Best effort: the first failure is the one to report.
        let _ = fs::remove_file(&temporary);
        failed("write", path)(source)
    })
}

pub(super) fn publish(temporary: &Path, path: &Path) -> io::Result<()> {
    fs::rename(temporary, path)?;
    match path.parent() {
        Some(folder) => File::open(folder)?.sync_all(),
        None => Ok(()),
    }
}

pub(super) fn temporary(folder: &Path) -> PathBuf {
    static NEXT: AtomicU64 = AtomicU64::new(0);
    let number = NEXT.fetch_add(1, Ordering::Relaxed);
    // The time tells apart processes of the same number on two machines that share the folder.
    let now = SystemClock.now().0;
    folder.join(format!(".new-{now}-{}-{number}", std::process::id()))
}

/// Best effort: what cannot be removed is no harm.
pub(super) fn remove_abandoned(folder: &Path) {
    let Ok(entries) = fs::read_dir(folder) else {
        return;
    };
    for entry in entries.flatten() {
        let name = entry.file_name();
        let made = name
            .to_str()
            .and_then(|name| name.strip_prefix(".new-"))
            .and_then(|name| name.split('-').next())
            .and_then(|made| made.parse().ok());
        if made.is_some_and(|made| SystemClock.now().since(UnixMillis(made)) > ABANDONED) {
            let _ = fs::remove_file(entry.path());
        }
    }
}

pub(super) fn json_files(folder: &Path) -> Result<Vec<PathBuf>, SpoolError> {
    let mut files = Vec::new();
    for entry in fs::read_dir(folder).map_err(failed("read", folder))? {
        let path = entry.map_err(failed("read", folder))?.path();
        if path
            .extension()
            .is_some_and(|extension| extension == "json")
        {
            files.push(path);
        }
    }
    files.sort();
    Ok(files)
}

pub(super) fn names(folder: &Path, prefix: &str) -> Result<Vec<String>, SpoolError> {
    let mut found = Vec::new();
    for entry in fs::read_dir(folder).map_err(failed("read", folder))? {
        let name = entry.map_err(failed("read", folder))?.file_name();
        let name = name.into_string().ok();
        found.extend(name.filter(|name| name.starts_with(prefix)));
    }
    found.sort();
    Ok(found)
}

pub(super) fn set_aside(error: &SpoolError) {
    tracing::warn!(%error, "set aside");
    if let SpoolError::Malformed { path, .. } = error {
        let mut name = path.clone().into_os_string();
        name.push(".malformed");
        let _ = fs::rename(path, name);
    }
}

pub(super) fn exists(path: &Path) -> Result<bool, SpoolError> {
    path.try_exists().map_err(failed("look for", path))
}

pub(super) fn remove(path: &Path) -> Result<(), SpoolError> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(failed("remove", path)(error)),
        _ => Ok(()),
    }
}

pub(super) fn failed<'a>(
    doing: &'static str,
    path: &'a Path,
) -> impl Fn(io::Error) -> SpoolError + 'a {
    move |source| SpoolError::Io {
        doing,
        path: path.to_owned(),
        source,
    }
}
