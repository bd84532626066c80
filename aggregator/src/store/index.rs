//! What the log says about slots and artefacts, by key.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::Duration;

use consilium_protocol::artefact::Kind;
use consilium_protocol::contribution::Statement;
use consilium_protocol::event::{Entry, Event};
use consilium_protocol::{Digest, InstitutionId, RoundId};

use super::{Blobs, StoreError};

/// Memory for pages of the index in bytes.
const CACHE: u64 = 16 << 20;

/// Tries to open a database that failed, five seconds in all: sled's threads have to let go of it.
const UNLOCK_TRIES: u32 = 1000;
const UNLOCK_WAIT: Duration = Duration::from_millis(5);

/// Place of one contribution.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Slot {
    /// The round.
    pub round: RoundId,
    /// Whose contribution.
    pub institution: InstitutionId,
    /// What it is.
    pub kind: Kind,
    /// Which of that kind.
    pub sequence: u32,
}

impl Slot {
    /// Slot that a statement claims.
    #[must_use]
    pub fn of(statement: &Statement) -> Self {
        Self {
            round: statement.round,
            institution: statement.institution.clone(),
            kind: statement.kind,
            sequence: statement.sequence,
        }
    }

    /// Unique: identifiers and names hold no zero byte.
    fn key(&self) -> Vec<u8> {
        let mut key = self.round.0.to_be_bytes().to_vec();
        for text in [self.institution.as_str(), self.kind.name()] {
            key.extend_from_slice(text.as_bytes());
            key.push(0);
        }
        key.extend_from_slice(&self.sequence.to_be_bytes());
        key
    }
}

/// What fills a slot.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct IndexedSlot {
    /// The artefact.
    pub digest: Digest,
    /// Index of its `Accepted` entry in the log.
    pub entry: u64,
    /// Bytes of the artefact; 0 if its blob was gone when the index was made from the log.
    pub length: u64,
}

impl IndexedSlot {
    fn to_bytes(self) -> Vec<u8> {
        let mut bytes = self.digest.as_bytes().to_vec();
        bytes.extend_from_slice(&self.entry.to_be_bytes());
        bytes.extend_from_slice(&self.length.to_be_bytes());
        bytes
    }

    fn from_bytes(bytes: &[u8]) -> Option<Self> {
        let (digest, rest) = bytes.split_first_chunk::<32>()?;
        let (entry, rest) = rest.split_first_chunk::<8>()?;
        Some(Self {
            digest: Digest::from_bytes(*digest),
            entry: u64::from_be_bytes(*entry),
            length: u64::from_be_bytes(rest.try_into().ok()?),
        })
    }
}

/// What is known about an artefact.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct IndexedArtefact {
    /// What it is.
    pub kind: Kind,
    /// Its bytes.
    pub length: u64,
}

impl IndexedArtefact {
    fn to_bytes(self) -> Vec<u8> {
        let mut bytes = self.length.to_be_bytes().to_vec();
        bytes.extend_from_slice(self.kind.name().as_bytes());
        bytes
    }

    fn from_bytes(bytes: &[u8]) -> Option<Self> {
        let (length, kind) = bytes.split_first_chunk::<8>()?;
        Some(Self {
            kind: Kind::from_name(str::from_utf8(kind).ok()?)?,
            length: u64::from_be_bytes(*length),
        })
    }
}

/// Slots and artefacts of accepted contributions.
#[derive(Debug)]
pub struct Index {
    path: PathBuf,
    /// None after a failed write: sled then refuses everything until it is opened again.
    open: Option<Open>,
}

#[derive(Debug)]
struct Open {
    db: sled::Db,
    slots: sled::Tree,
    artefacts: sled::Tree,
}

type Rows = BTreeMap<Vec<u8>, Vec<u8>>;

impl Index {
    /// Opens the index `index/` of a data folder and holds it against the log's entries: one that
    /// is missing, corrupt or says something else is made again. Lengths come from the blobs in
    /// the same data folder.
    ///
    /// # Errors
    /// Another process holds the index, or the file system's reason.
    pub fn open(
        folder: &Path,
        entries: impl IntoIterator<Item = (u64, Entry)>,
    ) -> Result<Self, StoreError> {
        let blobs = Blobs::beside(folder.parent().unwrap_or_else(|| Path::new("")));
        let (slots, artefacts) = rows(entries, &blobs);
        let current = Open::load(folder).and_then(|open| {
            let same = contents(&open.slots)? == slots && contents(&open.artefacts)? == artefacts;
            Ok((open, same))
        });
        let failed = |source| index_error(folder, source);
        let open = match current {
            Ok((open, true)) => open,
            Ok((open, false)) => {
                tracing::warn!(index = %folder.display(), slots = slots.len(),
                    "the index differs from the log and is made again");
                open.replace(&slots, &artefacts).map_err(failed)?;
                open
            }
            Err(error) if is_corrupt(&error) => {
                tracing::warn!(index = %folder.display(), %error,
                    "the index is corrupt and is made again from the log");
                fs::remove_dir_all(folder)
                    .map_err(|error| StoreError::io(folder, "remove this folder", error))?;
                let open = Open::load(folder).map_err(failed)?;
                open.replace(&slots, &artefacts).map_err(failed)?;
                open
            }
            Err(error) => return Err(failed(error)),
        };
        Ok(Self {
            path: folder.to_owned(),
            open: Some(open),
        })
    }

    /// Notes what fills a slot; durable on return. The entry may be the one that is logged next.
    ///
    /// # Errors
    /// The index cannot be written; another try may succeed.
    pub fn insert(&mut self, slot: &Slot, filled: &IndexedSlot) -> Result<(), StoreError> {
        // One database at a time may hold the folder.
        let open = match self.open.take() {
            Some(open) => open,
            None => Open::load(&self.path).map_err(|error| index_error(&self.path, error))?,
        };
        open.insert(slot, filled)
            .map_err(|error| index_error(&self.path, error))?;
        self.open = Some(open);
        Ok(())
    }

    /// What fills a slot.
    ///
    /// # Errors
    /// The index cannot be read.
    pub fn slot(&self, slot: &Slot) -> Result<Option<IndexedSlot>, StoreError> {
        self.read(|open| decode(open.slots.get(slot.key())?, IndexedSlot::from_bytes))
    }

    /// What is known about an artefact.
    ///
    /// # Errors
    /// The index cannot be read.
    pub fn artefact(&self, digest: &Digest) -> Result<Option<IndexedArtefact>, StoreError> {
        let key = digest.as_bytes();
        self.read(|open| decode(open.artefacts.get(key)?, IndexedArtefact::from_bytes))
    }

    /// Number of slots that are filled.
    ///
    /// # Errors
    /// The index cannot be read.
    pub fn slots(&self) -> Result<u64, StoreError> {
        self.read(|open| Ok(contents(&open.slots)?.len() as u64))
    }

    fn read<T>(&self, f: impl FnOnce(&Open) -> sled::Result<T>) -> Result<T, StoreError> {
        let read = match &self.open {
            Some(open) => f(open),
            None => Open::load(&self.path).and_then(|open| f(&open)),
        };
        read.map_err(|error| index_error(&self.path, error))
    }
}

impl Open {
    fn load_once(folder: &Path) -> sled::Result<Self> {
        let db = sled::Config::new()
            .path(folder)
            .cache_capacity(CACHE)
            .open()?;
        Ok(Self {
            slots: db.open_tree("slots")?,
            artefacts: db.open_tree("artefacts")?,
            db,
        })
    }

    /// Opens the database. Where one was let go of just now, sled's own threads may hold its lock a little longer.
    #[expect(
        clippy::disallowed_methods,
        reason = "sled does not tell when its threads have let go of the lock"
    )]
    fn load(folder: &Path) -> sled::Result<Self> {
        let mut tries = 1..UNLOCK_TRIES;
        loop {
            match Self::load_once(folder) {
                Err(error) if is_locked(&error) && tries.next().is_some() => {
                    thread::sleep(UNLOCK_WAIT);
                }
                result => return result,
            }
        }
    }

    fn insert(&self, slot: &Slot, filled: &IndexedSlot) -> sled::Result<()> {
        let artefact = IndexedArtefact {
            kind: slot.kind,
            length: filled.length,
        };
        self.slots.insert(slot.key(), filled.to_bytes())?;
        let digest = filled.digest.as_bytes();
        self.artefacts.insert(digest, artefact.to_bytes())?;
        self.db.flush().map(drop)
    }

    fn replace(&self, slots: &Rows, artefacts: &Rows) -> sled::Result<()> {
        for (tree, rows) in [(&self.slots, slots), (&self.artefacts, artefacts)] {
            tree.clear()?;
            for (key, value) in rows {
                tree.insert(key, value.as_slice())?;
            }
        }
        self.db.flush().map(drop)
    }
}

fn decode<T>(
    found: Option<sled::IVec>,
    parse: impl Fn(&[u8]) -> Option<T>,
) -> sled::Result<Option<T>> {
    let malformed = || sled::Error::Corruption { at: None, bt: () };
    found
        .map(|bytes| parse(&bytes).ok_or_else(malformed))
        .transpose()
}

/// Rows that the log calls for. The first entry of a slot counts, as in the round.
fn rows(entries: impl IntoIterator<Item = (u64, Entry)>, blobs: &Blobs) -> (Rows, Rows) {
    let (mut slots, mut artefacts) = (Rows::new(), Rows::new());
    for (entry, logged) in entries {
        let Event::Accepted {
            institution,
            kind,
            sequence,
            artefact,
            ..
        } = logged.event
        else {
            continue;
        };
        let length = blobs.length(&artefact).unwrap_or_else(|| {
            tracing::warn!(%artefact, entry, "an accepted artefact is not in the store");
            0
        });
        let slot = Slot {
            round: logged.round,
            institution,
            kind,
            sequence,
        };
        let filled = IndexedSlot {
            digest: artefact,
            entry,
            length,
        };
        let known = IndexedArtefact { kind, length };
        slots.entry(slot.key()).or_insert_with(|| filled.to_bytes());
        artefacts
            .entry(artefact.as_bytes().to_vec())
            .or_insert_with(|| known.to_bytes());
    }
    (slots, artefacts)
}

fn contents(tree: &sled::Tree) -> sled::Result<Rows> {
    tree.iter()
        .map(|row| row.map(|(key, value)| (key.to_vec(), value.to_vec())))
        .collect()
}

fn is_corrupt(error: &sled::Error) -> bool {
    match error {
        sled::Error::Io(error) => matches!(
            error.kind(),
            io::ErrorKind::InvalidData | io::ErrorKind::UnexpectedEof
        ),
        sled::Error::Corruption { .. }
        | sled::Error::ReportableBug(_)
        | sled::Error::Unsupported(_) => true,
        sled::Error::CollectionNotFound(_) => false,
    }
}

/// Sled has no error of its own for this.
fn is_locked(error: &sled::Error) -> bool {
    matches!(error, sled::Error::Io(error) if error.to_string().contains("could not acquire lock"))
}

fn index_error(path: &Path, source: sled::Error) -> StoreError {
    match source {
        sled::Error::Io(error) if super::is_full(&error) => StoreError::Full {
            path: path.to_owned(),
        },
        source => StoreError::Index {
            path: path.to_owned(),
            source,
        },
    }
}

#[cfg(test)]
mod tests {
    use consilium_protocol::UnixMillis;

    use super::*;

    fn accepted(institution: &str, sequence: u32, artefact: Digest) -> Entry {
        Entry {
            version: 1,
            consortium: "fed".parse().unwrap(),
            round: RoundId(7),
            at: UnixMillis(1),
            event: Event::Accepted {
                institution: institution.parse().unwrap(),
                kind: Kind::Records,
                sequence,
                artefact,
                signature: String::new(),
                ledger: artefact,
            },
        }
    }

    fn slot(institution: &str, sequence: u32) -> Slot {
        Slot {
            round: RoundId(7),
            institution: institution.parse().unwrap(),
            kind: Kind::Records,
            sequence,
        }
    }

    /// A data folder with three contributions, the entries about them and an index made by inserts.
    fn filled(data: &Path) -> Vec<(u64, Entry)> {
        let blobs = Blobs::open(data).unwrap();
        let mut index = Index::open(&data.join("index"), Vec::new()).unwrap();
        let mut entries = Vec::new();
        for (entry, (who, sequence)) in (5..).zip([("north", 0), ("north", 1), ("south", 0)]) {
            let bytes = format!("{who} {sequence} {}", "x".repeat(sequence as usize));
            let digest = blobs.put_bytes(bytes.as_bytes()).unwrap();
            let length = bytes.len() as u64;
            let filled = IndexedSlot {
                digest,
                entry,
                length,
            };
            index.insert(&slot(who, sequence), &filled).unwrap();
            entries.push((entry, accepted(who, sequence, digest)));
        }
        entries
    }

    fn rows_of(index: &Index) -> (Rows, Rows) {
        let read = |tree| contents(tree).unwrap();
        let open = index.open.as_ref().unwrap();
        (read(&open.slots), read(&open.artefacts))
    }

    #[test]
    fn an_index_made_again_after_its_removal_equals_the_first() {
        let data = tempfile::tempdir().unwrap();
        let folder = data.path().join("index");
        let entries = filled(data.path());
        let before = rows_of(&Index::open(&folder, entries.clone()).unwrap());
        assert_eq!((before.0.len(), before.1.len()), (3, 3));
        fs::remove_dir_all(&folder).unwrap();

        let index = Index::open(&folder, entries).unwrap();
        assert_eq!(rows_of(&index), before);
        assert_eq!(index.slots().unwrap(), 3);
        let south = index.slot(&slot("south", 0)).unwrap().unwrap();
        assert_eq!((south.entry, south.length), (7, 8));
        let artefact = index.artefact(&south.digest).unwrap().unwrap();
        assert_eq!(
            artefact,
            IndexedArtefact {
                kind: Kind::Records,
                length: 8
            }
        );
        assert_eq!(index.slot(&slot("south", 1)).unwrap(), None);
    }

    #[test]
    fn what_the_log_does_not_say_is_gone_after_a_restart() {
        let data = tempfile::tempdir().unwrap();
        let folder = data.path().join("index");
        let mut entries = filled(data.path());
        entries.pop();
        let index = Index::open(&folder, entries).unwrap();
        assert_eq!(index.slots().unwrap(), 2);
        assert_eq!(index.slot(&slot("south", 0)).unwrap(), None);
        assert!(index.slot(&slot("north", 1)).unwrap().is_some());
    }

    #[test]
    fn a_corrupt_index_is_made_again() {
        for file in ["conf", "db"] {
            let data = tempfile::tempdir().unwrap();
            let folder = data.path().join("index");
            let entries = filled(data.path());
            let before = rows_of(&Index::open(&folder, entries.clone()).unwrap());
            let path = folder.join(file);
            let mut bytes = fs::read(&path).unwrap();
            for byte in &mut bytes {
                *byte ^= 0x5a;
            }
            fs::write(&path, bytes).unwrap();
            let index = Index::open(&folder, entries).unwrap();
            assert_eq!(rows_of(&index), before, "{file}");
        }
    }

    #[test]
    fn an_index_in_use_is_refused_and_left_alone() {
        let data = tempfile::tempdir().unwrap();
        let folder = data.path().join("index");
        let entries = filled(data.path());
        let index = Index::open(&folder, entries.clone()).unwrap();
        assert!(Index::open(&folder, entries).is_err());
        assert_eq!(index.slots().unwrap(), 3);
    }
}
