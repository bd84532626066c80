//! The chain of lines and the file that names its head.

use std::fs::{self, File};
use std::io::{self, Read as _, Write as _};
use std::path::{Path, PathBuf};

use consilium_protocol::Digest;
use consilium_protocol::manifest::canonical_json;

use super::{LedgerError, Line, broken, failed};

/// Longest ledger that is read, in bytes.
const LIMIT: u64 = 4 << 30;

/// The lines of a ledger whose chain holds.
#[derive(Debug)]
pub struct Chain {
    /// The lines in order.
    pub lines: Vec<Line>,
    /// Digest of the last one.
    pub head: Digest,
    /// Bytes before a last line that was not written whole, if there is one.
    pub(super) torn: Option<u64>,
}

impl Chain {
    /// Reads a ledger and checks its chain. A missing file is an empty chain unless its head is there.
    ///
    /// # Errors
    /// The first line that does not hold.
    pub fn read(path: &Path) -> Result<Self, LedgerError> {
        let bytes = read_file(path, LIMIT)?.unwrap_or_default();
        let whole = bytes
            .iter()
            .rposition(|byte| *byte == b'\n')
            .map_or(0, |at| at.saturating_add(1));
        let torn = (whole < bytes.len()).then(|| u64::try_from(whole).unwrap_or(u64::MAX));
        let (mut lines, mut previous, mut before) = (Vec::new(), Digest::of(b""), None);
        let text = bytes.get(..whole).unwrap_or_default();
        for (number, line) in (1..).zip(text.split_inclusive(|byte| *byte == b'\n')) {
            let line = line.strip_suffix(b"\n").unwrap_or(line);
            lines.push(
                parse_line(line, &previous).map_err(|problem| broken(path, number, &problem))?,
            );
            before = Some(previous);
            previous = Digest::of(line);
        }
        let chain = Self {
            lines,
            head: previous,
            torn,
        };
        chain.check_head(path, before)?;
        Ok(chain)
    }

    /// The head file names the last line, or the one before it if the process died in between.
    fn check_head(&self, path: &Path, before: Option<Digest>) -> Result<(), LedgerError> {
        let count = u64::try_from(self.lines.len()).unwrap_or(u64::MAX);
        let stored = read_file(&head_path(path), 1024)?;
        let head: Option<Digest> = stored
            .as_deref()
            .and_then(|bytes| std::str::from_utf8(bytes).ok())
            .and_then(|text| text.trim_end().parse().ok());
        match (stored, head) {
            // The first line may be there before the first head.
            (None, _) if self.lines.len() <= 1 => Ok(()),
            (Some(_), Some(head)) if head == self.head || Some(head) == before => Ok(()),
            (None, _) => Err(broken(path, count, "its head file is missing")),
            (Some(_), None) => Err(broken(path, count, "its head file holds no digest")),
            (Some(_), Some(head)) => {
                let problem = format!("the last line is not the one its head file names, {head}");
                Err(broken(path, count, &problem))
            }
        }
    }
}

/// Where the digest of the last line is kept.
#[must_use]
pub fn head_path(ledger: &Path) -> PathBuf {
    let mut name = ledger.to_owned().into_os_string();
    name.push(".head");
    name.into()
}

fn parse_line(bytes: &[u8], previous: &Digest) -> Result<Line, String> {
    let line: Line = serde_json::from_slice(bytes).map_err(|error| error.to_string())?;
    if line.version != 1 {
        return Err(format!("version {} is not supported", line.version));
    }
    if line.previous != *previous {
        return Err("the line before it was changed, removed or moved".to_owned());
    }
    let canonical = canonical_json(&line).map_err(|error| error.to_string())?;
    if canonical.as_bytes() == bytes {
        Ok(line)
    } else {
        Err("not in canonical form".to_owned())
    }
}

pub(super) fn write_head(path: &Path, head: &Digest) -> Result<(), LedgerError> {
    let to = head_path(path);
    let mut name = to.clone().into_os_string();
    name.push(".new");
    let temporary = PathBuf::from(name);
    let write = || {
        let mut file = File::create(&temporary)?;
        file.write_all(format!("{head}\n").as_bytes())?;
        file.sync_all()?;
        fs::rename(&temporary, &to)?;
        sync_folder(&to)
    };
    write().map_err(failed("write the head of", path))
}

pub(super) fn sync_folder(path: &Path) -> io::Result<()> {
    match path.parent() {
        Some(folder) if !folder.as_os_str().is_empty() => File::open(folder)?.sync_all(),
        _ => Ok(()),
    }
}

fn read_file(path: &Path, limit: u64) -> Result<Option<Vec<u8>>, LedgerError> {
    let file = match File::open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(failed("open", path)(error)),
    };
    let mut bytes = Vec::new();
    file.take(limit)
        .read_to_end(&mut bytes)
        .map_err(failed("read", path))?;
    Ok(Some(bytes))
}
