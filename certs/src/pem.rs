//! Key and certificate files: secrets of mode 0600, written whole or not at all.

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Read as _, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};

use zeroize::Zeroizing;

use crate::error::CertsError;

/// Longest file read here, in bytes.
const LIMIT: u64 = 256 * 1024;

/// What to do with a file that is there already.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Overwrite {
    /// Keep it and report an error.
    Refuse,
    /// Replace it.
    Replace,
}

/// Writes a private key, mode 0600.
///
/// # Errors
/// The file exists and must not be replaced, or cannot be written.
pub fn write_secret(path: &Path, content: &str, overwrite: Overwrite) -> Result<(), CertsError> {
    write(path, content, 0o600, overwrite)
}

/// Writes what everybody may read, mode 0644.
///
/// # Errors
/// The file exists and must not be replaced, or cannot be written.
pub fn write_public(path: &Path, content: &str, overwrite: Overwrite) -> Result<(), CertsError> {
    write(path, content, 0o644, overwrite)
}

/// Reads a private key; the text is wiped when dropped.
///
/// # Errors
/// Group or others may access the file, or it cannot be read.
pub fn read_secret(path: &Path) -> Result<Zeroizing<String>, CertsError> {
    read(path, true)
}

/// Reads a certificate or a public key.
///
/// # Errors
/// The file cannot be read.
pub fn read_public(path: &Path) -> Result<String, CertsError> {
    read(path, false).map(|mut text| std::mem::take(&mut *text))
}

/// Makes a folder, mode 0700, and the folders above it.
///
/// # Errors
/// It cannot be made.
pub fn create_folder(path: &Path) -> Result<(), CertsError> {
    DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(path)
        .map_err(failed_to_write(path))
}

/// Fails if one of the files exists and must not be replaced: asked before the first is written.
///
/// # Errors
/// The first file that exists.
pub fn check_absent(paths: &[PathBuf], overwrite: Overwrite) -> Result<(), CertsError> {
    match paths.iter().find(|path| path.symlink_metadata().is_ok()) {
        Some(path) if overwrite == Overwrite::Refuse => Err(CertsError::Exists(path.clone())),
        _ => Ok(()),
    }
}

fn write(path: &Path, content: &str, mode: u32, overwrite: Overwrite) -> Result<(), CertsError> {
    let folder = match path.parent() {
        Some(parent) if parent != Path::new("") => parent,
        _ => Path::new("."),
    };
    let mut suffix = [0_u8; 8];
    getrandom::fill(&mut suffix).map_err(|_| CertsError::Random)?;
    let temporary = folder.join(format!(".consilium-{}", hex::encode(suffix)));
    let written = write_temporary(&temporary, content, mode)
        .and_then(|()| publish(&temporary, path, overwrite))
        .and_then(|()| File::open(folder)?.sync_all());
    if written.is_err() {
        // Best effort: the first failure is the one to report.
        let _ = fs::remove_file(&temporary);
    }
    written.map_err(|error| match error.kind() {
        io::ErrorKind::AlreadyExists => CertsError::Exists(path.to_owned()),
        _ => failed_to_write(path)(error),
    })
}

fn write_temporary(path: &Path, content: &str, mode: u32) -> io::Result<()> {
    let mut file = OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(mode)
        .open(path)?;
    file.write_all(content.as_bytes())?;
    file.sync_all()
}

/// Gives the file its name. A hard link, unlike a rename, fails when the name is taken.
fn publish(temporary: &Path, path: &Path, overwrite: Overwrite) -> io::Result<()> {
    match overwrite {
        Overwrite::Replace => fs::rename(temporary, path),
        Overwrite::Refuse => {
            fs::hard_link(temporary, path)?;
            fs::remove_file(temporary)
        }
    }
}

fn read(path: &Path, secret: bool) -> Result<Zeroizing<String>, CertsError> {
    let failed = |source| CertsError::Read {
        path: path.to_owned(),
        source,
    };
    let not_a_file = || CertsError::NotAFile {
        path: path.to_owned(),
        limit: LIMIT,
    };
    if !fs::metadata(path).map_err(failed)?.is_file() {
        return Err(not_a_file());
    }
    let file = File::open(path).map_err(failed)?;
    // Asked of the open file: the path may name another one by now.
    let metadata = file.metadata().map_err(failed)?;
    let mode = metadata.mode() & 0o7777;
    if secret && mode & 0o077 != 0 {
        return Err(CertsError::LoosePermissions {
            path: path.to_owned(),
            mode,
        });
    }
    if metadata.len() > LIMIT {
        return Err(not_a_file());
    }
    // Room for all of it at once, because a growing string leaves copies of the secret behind.
    let mut text = Zeroizing::new(String::with_capacity(usize::try_from(LIMIT).unwrap_or(0)));
    match file.take(LIMIT).read_to_string(&mut text) {
        Ok(_) => Ok(text),
        Err(error) if error.kind() == io::ErrorKind::InvalidData => Err(not_a_file()),
        Err(error) => Err(failed(error)),
    }
}

fn failed_to_write(path: &Path) -> impl Fn(io::Error) -> CertsError + '_ {
    |source| CertsError::Write {
        path: path.to_owned(),
        source,
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

    #[test]
    fn secrets_are_private_and_not_replaced_by_accident() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("key.pem");
        write_secret(&path, "first", Overwrite::Refuse).unwrap();
        assert_eq!(path.metadata().unwrap().mode() & 0o7777, 0o600);
        let again = write_secret(&path, "second", Overwrite::Refuse);
        assert!(matches!(again, Err(CertsError::Exists(found)) if found == path));
        assert_eq!(*read_secret(&path).unwrap(), "first");
        write_secret(&path, "third", Overwrite::Replace).unwrap();
        assert_eq!(*read_secret(&path).unwrap(), "third");
        let files = fs::read_dir(folder.path()).unwrap().count();
        assert_eq!(files, 1, "temporary files are left behind");
    }

    #[test]
    fn a_key_open_to_others_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("key.pem");
        write_secret(&path, "secret", Overwrite::Refuse).unwrap();
        for mode in [0o644, 0o640, 0o604, 0o620, 0o601] {
            fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
            let refused = read_secret(&path).unwrap_err();
            assert!(matches!(refused, CertsError::LoosePermissions { mode: m, .. } if m == mode));
            assert!(refused.to_string().contains("chmod 600"), "{refused}");
        }
        fs::set_permissions(&path, fs::Permissions::from_mode(0o400)).unwrap();
        read_secret(&path).unwrap();
    }

    #[test]
    fn folders_and_huge_files_are_refused() {
        let folder = tempfile::tempdir().unwrap();
        assert!(matches!(
            read_public(folder.path()),
            Err(CertsError::NotAFile { .. })
        ));
        let path = folder.path().join("huge");
        File::create(&path).unwrap().set_len(LIMIT + 1).unwrap();
        assert!(matches!(
            read_public(&path),
            Err(CertsError::NotAFile { .. })
        ));
        let path = folder.path().join("binary");
        fs::write(&path, [0xff; 4]).unwrap();
        assert!(matches!(
            read_public(&path),
            Err(CertsError::NotAFile { .. })
        ));
    }
}
