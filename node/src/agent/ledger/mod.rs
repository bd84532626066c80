//! The node's own record of everything that left the site: JSON lines, each holding the SHA-256 of the line before.
//!
//! A line is on disk before anything acts on it. Beside the file lies `<file>.head` with the digest of the last line, so
//! that cutting lines off the end is noticed as well; the head also travels with every upload and stands in the log.
//! A last line without its newline was never acted on (the process died while it was written) and is cut off.

mod chain;
mod line;
#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{File, OpenOptions};
use std::io::{self, Write as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use consilium_protocol::manifest::canonical_json;
use consilium_protocol::{Clock, Digest};

use chain::{sync_folder, write_head};

pub use chain::{Chain, head_path};
pub use line::{Event, Line, Owner, Slot};

/// Why a ledger cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum LedgerError {
    /// The file cannot be read or written.
    #[error("ledger {}: cannot {doing}", path.display())]
    Io {
        /// What was tried.
        doing: &'static str,
        /// The file.
        path: PathBuf,
        /// Why it failed.
        source: io::Error,
    },
    /// The chain does not hold. Nothing may leave on such a ledger.
    #[error(
        "ledger {}, line {line}: {problem}; nothing leaves this site on a broken ledger: restore it from a backup, or show both to your auditor before beginning a new one",
        path.display()
    )]
    Broken {
        /// The file.
        path: PathBuf,
        /// Line number from 1.
        line: u64,
        /// What is wrong there.
        problem: String,
    },
    /// The ledger of someone else.
    #[error("ledger {} belongs to {found}, the configuration says {expected}; give each node a spool of its own", path.display())]
    Owner {
        /// The file.
        path: PathBuf,
        /// Who began it.
        found: Owner,
        /// Who the configuration names.
        expected: Owner,
    },
}

/// A verified ledger that can be continued. One process writes; the agent holds a lock for that.
pub struct Ledger {
    path: PathBuf,
    clock: Arc<dyn Clock>,
    head: Digest,
    lines: u64,
    released: BTreeMap<Slot, (Digest, u64)>,
    acknowledged: BTreeMap<Slot, Digest>,
    refused: BTreeSet<Slot>,
}

impl std::fmt::Debug for Ledger {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Ledger({}, head {})", self.path.display(), self.head)
    }
}

impl Ledger {
    /// Verifies a ledger to continue it, or begins one where there is none.
    ///
    /// # Errors
    /// The chain does not hold, it is someone else's, or it cannot be read or written.
    pub fn open(path: &Path, owner: &Owner, clock: Arc<dyn Clock>) -> Result<Self, LedgerError> {
        let read = Chain::read(path)?;
        let mut ledger = Self {
            path: path.to_owned(),
            clock,
            head: read.head,
            lines: 0,
            released: BTreeMap::new(),
            acknowledged: BTreeMap::new(),
            refused: BTreeSet::new(),
        };
        if let Some(keep) = read.torn {
            tracing::warn!(ledger = %path.display(), "the last line was not written whole: cut off");
            let file = ledger.append_to()?;
            file.set_len(keep)
                .and_then(|()| file.sync_all())
                .map_err(failed("write", path))?;
        }
        for line in &read.lines {
            ledger.note(&line.event);
        }
        ledger.lines = u64::try_from(read.lines.len()).unwrap_or(u64::MAX);
        match read.lines.first().map(|line| &line.event) {
            None => {
                let owner = owner.clone();
                ledger.append(Event::Began { owner })?;
            }
            Some(Event::Began { owner: found }) if found == owner => {
                // The process may have died between a line and its head.
                write_head(&ledger.path, &ledger.head)?;
            }
            Some(Event::Began { owner: found }) => {
                return Err(LedgerError::Owner {
                    path: path.to_owned(),
                    found: found.clone(),
                    expected: owner.clone(),
                });
            }
            Some(_) => return Err(broken(path, 1, "the first line does not say whose it is")),
        }
        Ok(ledger)
    }

    /// Writes a line and returns once it is on disk.
    ///
    /// # Errors
    /// It cannot be written; the ledger is then as it was.
    pub fn append(&mut self, event: Event) -> Result<Digest, LedgerError> {
        let line = Line {
            version: 1,
            previous: self.head,
            at: self.clock.now(),
            event,
        };
        let text = canonical_json(&line).map_err(|error| {
            let next = self.lines.saturating_add(1);
            broken(&self.path, next, &error.to_string())
        })?;
        let mut file = self.append_to()?;
        let before = file.metadata().map_err(failed("read", &self.path))?.len();
        let written = file
            .write_all(format!("{text}\n").as_bytes())
            .and_then(|()| file.sync_all())
            .and_then(|()| sync_folder(&self.path));
        if let Err(error) = written {
            // A full disk must not leave half a line before the next one.
            let _ = file.set_len(before);
            return Err(failed("write", &self.path)(error));
        }
        self.head = Digest::of(text.as_bytes());
        self.lines = self.lines.saturating_add(1);
        self.note(&line.event);
        write_head(&self.path, &self.head)?;
        Ok(self.head)
    }

    /// Digest of the last line.
    #[must_use]
    pub const fn head(&self) -> Digest {
        self.head
    }

    /// What was released for a slot, and its bytes.
    #[must_use]
    pub fn released(&self, slot: &Slot) -> Option<(Digest, u64)> {
        self.released.get(slot).copied()
    }

    /// What the aggregator acknowledged for a slot.
    #[must_use]
    pub fn acknowledged(&self, slot: &Slot) -> Option<Digest> {
        self.acknowledged.get(slot).copied()
    }

    /// Slots of a round whose artefact was released and neither acknowledged nor refused.
    #[must_use]
    pub fn unacknowledged(&self, manifest: &Digest) -> Vec<Slot> {
        self.released
            .keys()
            .filter(|slot| slot.manifest == *manifest)
            .filter(|slot| !self.acknowledged.contains_key(slot) && !self.refused.contains(slot))
            .copied()
            .collect()
    }

    /// Bytes released in a round.
    #[must_use]
    pub fn bytes_of_round(&self, manifest: &Digest) -> u64 {
        self.released
            .iter()
            .filter(|(slot, _)| slot.manifest == *manifest)
            .fold(0, |sum, (_, (_, bytes))| sum.saturating_add(*bytes))
    }

    /// Rounds that received anything, one of them left out.
    #[must_use]
    pub fn rounds_besides(&self, manifest: &Digest) -> u64 {
        let rounds: BTreeSet<Digest> = self
            .released
            .keys()
            .map(|slot| slot.manifest)
            .filter(|other| other != manifest)
            .collect();
        u64::try_from(rounds.len()).unwrap_or(u64::MAX)
    }

    fn note(&mut self, event: &Event) {
        match event {
            Event::Released {
                slot,
                artefact,
                bytes,
                ..
            } => {
                self.released.insert(*slot, (*artefact, *bytes));
            }
            Event::Acknowledged { slot, artefact, .. } => {
                self.acknowledged.insert(*slot, *artefact);
            }
            Event::Refused { slot, .. } => {
                self.refused.insert(*slot);
            }
            Event::Began { .. } => {}
        }
    }

    fn append_to(&self) -> Result<File, LedgerError> {
        OpenOptions::new()
            .append(true)
            .create(true)
            .open(&self.path)
            .map_err(failed("open", &self.path))
    }
}

fn broken(path: &Path, line: u64, problem: &str) -> LedgerError {
    LedgerError::Broken {
        path: path.to_owned(),
        line,
        problem: problem.to_owned(),
    }
}

fn failed<'a>(doing: &'static str, path: &'a Path) -> impl FnOnce(io::Error) -> LedgerError + 'a {
    move |source| LedgerError::Io {
        doing,
        path: path.to_owned(),
        source,
    }
}
