//! The node's own record of everything that left the site: JSON lines, each holding the SHA-256 of the line before.
//!
//! A line is on disk before anything acts on it. Beside the file lies `<file>.head` with the digest of the last line, so
//! that cutting lines off the end is noticed as well; the head also travels with every upload and stands in the log.
//! A last line without its newline was never acted on (the process died while it was written) and is cut off.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File, OpenOptions};
use std::io::{self, Read as _, Write as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use consilium_protocol::artefact::Kind;
use consilium_protocol::manifest::{Mode, canonical_json};
use consilium_protocol::{
    Clock, ConsortiumId, Digest, InstitutionId, RejectCode, RoundId, UnixMillis,
};
use serde::{Deserialize, Serialize};

/// Longest ledger that is read, in bytes.
const LIMIT: u64 = 4 << 30;

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

/// Whose ledger it is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Owner {
    /// The consortium.
    pub consortium: ConsortiumId,
    /// The institution.
    pub institution: InstitutionId,
}

impl std::fmt::Display for Owner {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} in {}", self.institution, self.consortium)
    }
}

/// One slot of one round: a site fills it once.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Slot {
    /// Number of the round.
    pub round: RoundId,
    /// Its manifest.
    pub manifest: Digest,
    /// What fills the slot.
    pub kind: Kind,
    /// Shard, inner round or 0, see [`Kind`].
    pub sequence: u32,
}

impl std::fmt::Display for Slot {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "{} {} of round {}",
            self.kind.name(),
            self.sequence,
            self.round
        )
    }
}

/// What is written down.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case", deny_unknown_fields)]
pub enum Event {
    /// The first line.
    Began {
        /// Whose ledger it is.
        owner: Owner,
    },
    /// These bytes may leave from now on.
    Released {
        /// What for.
        slot: Slot,
        /// Mode of the round.
        mode: Mode,
        /// SHA-256 of the bytes.
        artefact: Digest,
        /// How many they are.
        bytes: u64,
        /// Who receives them, as its certificate says.
        recipient: String,
    },
    /// The aggregator proved that it logged the contribution.
    Acknowledged {
        /// What for.
        slot: Slot,
        /// SHA-256 of the bytes.
        artefact: Digest,
        /// The log entry.
        entry: String,
        /// Its C2SP `tlog-proof@v1`.
        proof: String,
    },
    /// The aggregator refused the contribution.
    Refused {
        /// What for.
        slot: Slot,
        /// SHA-256 of the bytes.
        artefact: Digest,
        /// What it said.
        code: RejectCode,
    },
}

/// One line.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Line {
    /// Version of this format, 1.
    pub version: u32,
    /// SHA-256 of the line before, without its newline; of nothing in the first line.
    pub previous: Digest,
    /// When it was written.
    pub at: UnixMillis,
    /// What happened.
    pub event: Event,
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

/// The lines of a ledger whose chain holds.
#[derive(Debug)]
pub struct Chain {
    /// The lines in order.
    pub lines: Vec<Line>,
    /// Digest of the last one.
    pub head: Digest,
    /// Bytes before a last line that was not written whole, if there is one.
    torn: Option<u64>,
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

fn write_head(path: &Path, head: &Digest) -> Result<(), LedgerError> {
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

fn sync_folder(path: &Path) -> io::Result<()> {
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

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug)]
    struct Fixed;

    impl Clock for Fixed {
        fn now(&self) -> UnixMillis {
            UnixMillis(1_700_000_000_000)
        }
    }

    fn owner() -> Owner {
        Owner {
            consortium: ConsortiumId::new("demo").unwrap(),
            institution: InstitutionId::new("clinic").unwrap(),
        }
    }

    fn released(sequence: u32) -> Event {
        Event::Released {
            slot: Slot {
                round: RoundId(1),
                manifest: Digest::of(b"manifest"),
                kind: Kind::Records,
                sequence,
            },
            mode: Mode::Unified,
            artefact: Digest::of(&sequence.to_le_bytes()),
            bytes: 100,
            recipient: "consilium://demo/aggregator/hub".to_owned(),
        }
    }

    fn open(path: &Path) -> Result<Ledger, LedgerError> {
        Ledger::open(path, &owner(), Arc::new(Fixed))
    }

    fn example() -> (tempfile::TempDir, PathBuf) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("ledger.jsonl");
        let mut ledger = open(&path).unwrap();
        for sequence in 0..4 {
            ledger.append(released(sequence)).unwrap();
        }
        (folder, path)
    }

    #[test]
    fn a_ledger_continues_where_it_ended() {
        let (_folder, path) = example();
        let ledger = open(&path).unwrap();
        let head = ledger.head();
        assert_eq!(ledger.bytes_of_round(&Digest::of(b"manifest")), 400);
        assert_eq!(ledger.rounds_besides(&Digest::of(b"manifest")), 0);
        assert_eq!(ledger.rounds_besides(&Digest::of(b"other")), 1);
        drop(ledger);
        let mut ledger = open(&path).unwrap();
        assert_eq!(ledger.head(), head, "opening writes no line");
        assert_ne!(ledger.append(released(9)).unwrap(), head);
        assert_eq!(Chain::read(&path).unwrap().lines.len(), 6);
    }

    #[test]
    fn every_changed_removed_moved_or_inserted_line_is_noticed() {
        let (_folder, path) = example();
        let text = fs::read_to_string(&path).unwrap();
        let lines: Vec<&str> = text.lines().collect();
        let mut forged: Vec<(String, Vec<String>)> = Vec::new();
        for at in 0..lines.len() {
            let copy = || -> Vec<String> { lines.iter().map(ToString::to_string).collect() };
            let mut removed = copy();
            removed.remove(at);
            forged.push((format!("line {at} removed"), removed));
            let mut doubled = copy();
            doubled.insert(at, lines[at].to_owned());
            forged.push((format!("line {at} doubled"), doubled));
            if at > 0 {
                let mut swapped = copy();
                swapped.swap(at, at - 1);
                forged.push((format!("line {at} moved"), swapped));
            }
            for from in ["170000", "\"version\":1", "demo"] {
                let mut changed = copy();
                changed[at] = changed[at].replacen(from, "270000", 1);
                if changed[at] != lines[at] {
                    forged.push((format!("line {at}: {from} changed"), changed));
                }
            }
            let mut cut = copy();
            cut.truncate(at);
            forged.push((format!("cut to {at} lines"), cut));
        }
        for (what, lines) in forged {
            let text: String = lines.iter().map(|line| format!("{line}\n")).collect();
            fs::write(&path, text).unwrap();
            let refused = open(&path).expect_err(&what).to_string();
            assert!(
                refused.contains("ledger.jsonl") && refused.contains("backup"),
                "{refused}"
            );
        }
        for byte in 0..text.len() - 1 {
            let mut flipped = text.clone().into_bytes();
            flipped[byte] ^= 1;
            fs::write(&path, flipped).unwrap();
            assert!(open(&path).is_err(), "byte {byte}");
        }
        fs::write(&path, &text).unwrap();
        open(&path).unwrap();
        fs::remove_file(&path).unwrap();
        assert!(open(&path).is_err(), "the whole file is gone");
    }

    #[test]
    fn half_a_last_line_is_cut_off_and_a_head_one_line_behind_is_repaired() {
        let (_folder, path) = example();
        let before = fs::read(&path).unwrap();
        let head = open(&path).unwrap().head();
        let mut torn = before.clone();
        torn.extend_from_slice(b"{\"at\":17");
        fs::write(&path, torn).unwrap();
        assert_eq!(open(&path).unwrap().head(), head);
        assert_eq!(fs::read(&path).unwrap(), before);

        let stale = fs::read(head_path(&path)).unwrap();
        let newest = open(&path).unwrap().append(released(5)).unwrap();
        fs::write(head_path(&path), stale).unwrap();
        assert_eq!(open(&path).unwrap().head(), newest);
        assert_eq!(
            fs::read_to_string(head_path(&path)).unwrap(),
            format!("{newest}\n")
        );
    }

    #[test]
    fn the_ledger_of_another_institution_is_refused() {
        let (_folder, path) = example();
        let other = Owner {
            institution: InstitutionId::new("bank").unwrap(),
            ..owner()
        };
        let refused = Ledger::open(&path, &other, Arc::new(Fixed)).unwrap_err();
        assert!(refused.to_string().contains("clinic in demo"), "{refused}");
    }
}
