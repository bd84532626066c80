//! What a forger could do to the file, and what a crash leaves of it.

use std::fs;

use consilium_protocol::artefact::Kind;
use consilium_protocol::manifest::Mode;
use consilium_protocol::{ConsortiumId, InstitutionId, RoundId, UnixMillis};

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
