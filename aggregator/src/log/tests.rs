//! The log survives restarts and crashes and refuses every change that its key did not sign.

use std::fs;

use consilium_protocol::event::Event;
use consilium_protocol::transcript::key::SignatureKind;
use consilium_protocol::transcript::tile::{self, TileKind};
use consilium_protocol::{RoundId, UnixMillis};
use ed25519_dalek::SigningKey;

use super::*;

fn signer(seed: u8) -> NoteSigner {
    let key = SigningKey::from_bytes(&[seed; 32]);
    NoteSigner::new("fed/log".parse().unwrap(), SignatureKind::Ed25519, &key).unwrap()
}

fn entry(number: u64) -> Entry {
    Entry {
        version: 1,
        consortium: "fed".parse().unwrap(),
        round: RoundId(1),
        at: UnixMillis(number),
        event: Event::Opened {
            manifest: Digest::of(&number.to_be_bytes()),
            start: Digest::of(b"start"),
        },
    }
}

fn open(folder: &Path) -> Result<Log, LogError> {
    Log::open(folder, signer(1))
}

/// A log with entries `0..size`.
fn filled(folder: &Path, size: u64) -> Log {
    let mut log = open(folder).unwrap();
    for number in log.size()..size {
        assert_eq!(log.append(&entry(number)).unwrap(), number);
    }
    log
}

fn verify(log: &Log, index: u64) {
    let logged = log.logged(index).unwrap();
    assert_eq!(logged.parse().unwrap(), entry(index));
    let proof = LogProof::parse(logged.proof.as_bytes()).unwrap();
    assert_eq!(proof.index, index);
    let leaf = tree::leaf_hash(&logged.entry);
    let checkpoint = proof.verify(&leaf, signer(1).verifier(), &[]).unwrap();
    assert_eq!(checkpoint.checkpoint().size, log.size());
}

fn paths(folder: &Path) -> Vec<PathBuf> {
    let mut found: Vec<PathBuf> = Vec::new();
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            found.extend(paths(&path));
        } else {
            found.push(path);
        }
    }
    found.sort();
    found
}

#[test]
fn a_restart_finds_the_same_log_and_goes_on() {
    let data = tempfile::tempdir().unwrap();
    let folder = data.path().join("log");
    let empty = open(&folder).unwrap();
    assert_eq!((empty.size(), empty.root()), (0, tree::empty_root()));
    drop(empty);

    let log = filled(&folder, 5);
    let (root, checkpoint) = (log.root(), log.checkpoint().to_owned());
    drop(log);
    let mut log = open(&folder).unwrap();
    assert_eq!((log.size(), log.root()), (5, root));
    assert_eq!(log.checkpoint(), checkpoint);
    assert_eq!(
        fs::read_to_string(folder.join("checkpoint")).unwrap(),
        checkpoint
    );
    let entries: Vec<(u64, Entry)> = log.entries().collect();
    let expected: Vec<(u64, Entry)> = (0..5).map(|index| (index, entry(index))).collect();
    assert_eq!(entries, expected);
    log.append(&entry(5)).unwrap();
    (0..6).for_each(|index| verify(&log, index));
    let path = log.consistency(5);
    tree::verify_consistency(5, 6, &path, &root, &log.root()).unwrap();
    assert!(log.consistency(7).is_empty());
    assert!(matches!(
        log.logged(6),
        Err(LogError::Unknown { index: 6, size: 6 })
    ));
}

#[test]
fn a_log_across_a_full_tile_has_the_files_of_the_specification() {
    let data = tempfile::tempdir().unwrap();
    let log = filled(data.path(), 300);
    (0..300).for_each(|index| verify(&log, index));
    let tree: Tree = (0..300)
        .map(|number| tree::leaf_hash(&entry(number).to_bytes().unwrap()))
        .collect();
    assert_eq!(log.root(), tree.root());
    for tile in tile::tiles_of(300) {
        let expected = match tile.kind() {
            TileKind::Hashes { .. } => tile::hash_tile(&tree, tile).unwrap(),
            TileKind::Entries => {
                let mut bytes = Vec::new();
                let first = tile.number() * 256;
                for number in first..first + u64::from(tile.width()) {
                    tile::push_entry(&mut bytes, &entry(number).to_bytes().unwrap()).unwrap();
                }
                bytes
            }
        };
        let read = fs::read(data.path().join(tile.to_string())).unwrap();
        assert_eq!(read, expected, "{tile}");
    }
    assert!(!data.path().join("tile/0/000.p").exists());
    drop(log);

    // A tree of hashes is made again where it is missing and refused where it differs.
    let missing = data.path().join("tile/0/000");
    let bytes = fs::read(&missing).unwrap();
    fs::remove_file(&missing).unwrap();
    drop(open(data.path()).unwrap());
    assert_eq!(fs::read(&missing).unwrap(), bytes);
    fs::write(&missing, &bytes[..8191]).unwrap();
    let refused = open(data.path()).unwrap_err();
    assert!(matches!(refused, LogError::HashTile { .. }), "{refused}");
}

#[test]
fn any_flipped_byte_is_refused() {
    let data = tempfile::tempdir().unwrap();
    drop(filled(data.path(), 3));
    let current = ["checkpoint", "tile/entries/000.p/3", "tile/0/000.p/3"];
    for file in current.map(|name| data.path().join(name)) {
        let bytes = fs::read(&file).unwrap();
        for at in 0..bytes.len() {
            let mut flipped = bytes.clone();
            flipped[at] ^= 1;
            fs::write(&file, flipped).unwrap();
            let refused = open(data.path()).err();
            assert!(refused.is_some(), "{} byte {at}", file.display());
        }
        fs::write(&file, bytes).unwrap();
    }
    assert_eq!(open(data.path()).unwrap().size(), 3);
    let refused = Log::open(data.path(), signer(2)).unwrap_err();
    assert!(matches!(refused, LogError::Checkpoint { .. }), "{refused}");
}

#[test]
fn an_entry_without_its_checkpoint_is_dropped_and_the_log_goes_on() {
    for size in [0, 1, 4, 255, 256] {
        let data = tempfile::tempdir().unwrap();
        let log = filled(data.path(), size);
        let (root, checkpoint) = (log.root(), log.checkpoint().to_owned());
        // Exactly what an append writes before its checkpoint.
        let lost = entry(999).to_bytes().unwrap();
        let mut grown = log.tree.clone();
        grown.push(tree::leaf_hash(&lost));
        let before = paths(data.path());
        let bytes = |index: usize| {
            let kept = log.kept.get(index).map(|kept| kept.bytes.as_slice());
            kept.or_else(|| (index as u64 == size).then_some(lost.as_slice()))
        };
        log.folder.write_growth(size, &grown, bytes).unwrap();
        assert!(paths(data.path()).len() > before.len());
        fs::write(data.path().join("7-7.tmp"), &checkpoint).unwrap();
        drop(log);

        let mut log = open(data.path()).unwrap();
        assert_eq!((log.size(), log.root()), (size, root), "size {size}");
        assert_eq!(paths(data.path()), before, "size {size}");
        log.append(&entry(size)).unwrap();
        verify(&log, size);
        drop(log);
        assert_eq!(open(data.path()).unwrap().size(), size + 1);
    }
}

#[test]
fn an_old_checkpoint_after_a_crash_reopens_one_entry_back_but_never_further() {
    let data = tempfile::tempdir().unwrap();
    let checkpoint = data.path().join("checkpoint");
    let mut log = filled(data.path(), 4);
    let four = log.checkpoint().to_owned();
    log.append(&entry(4)).unwrap();
    let five = log.checkpoint().to_owned();
    drop(log);
    fs::write(&checkpoint, &four).unwrap();
    let mut log = open(data.path()).unwrap();
    assert_eq!(log.size(), 4);
    log.append(&entry(4)).unwrap();
    assert_eq!(log.checkpoint(), five);
    log.append(&entry(5)).unwrap();
    drop(log);

    fs::write(&checkpoint, &four).unwrap();
    let refused = open(data.path()).unwrap_err();
    assert!(
        matches!(refused, LogError::RolledBack { checkpoint: 4, .. }),
        "{refused}"
    );
    fs::remove_file(&checkpoint).unwrap();
    let refused = open(data.path()).unwrap_err();
    assert!(
        matches!(refused, LogError::NoCheckpoint { .. }),
        "{refused}"
    );
}

#[test]
fn a_failed_append_leaves_the_log_as_it_was() {
    let data = tempfile::tempdir().unwrap();
    let mut log = filled(data.path(), 2);
    let (root, before) = (log.root(), log.checkpoint().to_owned());
    // A folder where the next bundle should go.
    let obstacle = data.path().join("tile/entries/000.p/3");
    fs::create_dir(&obstacle).unwrap();
    let refused = log.append(&entry(2)).unwrap_err();
    assert!(refused.to_string().contains("000.p/3"), "{refused}");
    assert_eq!((log.size(), log.root()), (2, root));
    assert_eq!(log.checkpoint(), before);
    verify(&log, 1);
    fs::remove_dir(&obstacle).unwrap();
    assert_eq!(log.append(&entry(2)).unwrap(), 2);
    verify(&log, 2);
}
