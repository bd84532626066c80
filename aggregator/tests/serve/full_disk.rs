//! A disk that is really full: the data folder is a file system of its own, of a few megabytes, that only this test sees.

use std::fs::{self, File};
use std::io::{self, Write as _};
use std::path::Path;
use std::process::Command;

use consilium_aggregator::store::{Index, IndexedSlot, Slot};
use consilium_protocol::artefact::Kind;
use consilium_protocol::message::Task;
use consilium_protocol::{Digest, InstitutionId, RejectCode, RoundId};

use crate::accepted;
use crate::consortium::Consortium;
use crate::node::Node;

const INSIDE: &str = "CONSILIUM_TEST_PRIVATE_MOUNTS";
const PAGE: u64 = 4096;

#[tokio::test]
async fn a_contribution_that_finds_the_disk_full_is_refused_and_taken_once_there_is_room() {
    if std::env::var_os(INSIDE).is_none() {
        return run_with_private_mounts(
            "full_disk::a_contribution_that_finds_the_disk_full_is_refused_and_taken_once_there_is_room",
        );
    }
    let mut consortium = Consortium::new(&["bank", "clinic"], &[], 2);
    let data = consortium.path("data");
    fs::create_dir(&data).unwrap();
    mount(&data);
    consortium.start().await;
    let mut bank = Node::join(&consortium, "bank", 10, None).await;
    let mut clinic = Node::join(&consortium, "clinic", 10, None).await;
    consortium.open_round(&[]);
    bank.until(|task| matches!(task, Task::Score { .. })).await;
    let first = bank.records(0);
    let receipt = bank.hand_over(Kind::Records, 0, &first).await.unwrap();

    // With each page more, the disk is full one step later: before the upload, at the log's entries, at its checkpoint.
    let ballast = data.join("ballast");
    let second = bank.records(1);
    let mut refused = 0;
    let taken = loop {
        leave_free(&ballast, refused * PAGE);
        match bank.hand_over(Kind::Records, 1, &second).await {
            Ok(taken) => break taken,
            Err(error) => assert_eq!(
                error.rejection(),
                Some(RejectCode::Storage),
                "{refused} pages free: {error:?}"
            ),
        }
        assert_eq!(accepted(&consortium).len(), 1, "{refused} pages free");
        refused += 1;
        assert!(refused < 2048, "never taken");
    };
    assert!(refused >= 3, "{refused} pages were enough");
    fs::remove_file(&ballast).unwrap();

    // Both receipts hold, also for a server that starts anew, and the round goes on.
    assert_eq!(accepted(&consortium).len(), 2);
    let again = bank.hand_over(Kind::Records, 1, &second).await.unwrap();
    assert_eq!(again.entry, taken.entry);
    consortium.kill();
    consortium.start().await;
    let (seen, clinic_seen) = (bank.seen, clinic.seen);
    bank = Node::join(&consortium, "bank", 10, seen).await;
    clinic = Node::join(&consortium, "clinic", 10, clinic_seen).await;
    bank.until(|task| *task != Task::Wait).await;
    for (shard, bytes, receipt) in [(0, &first, &receipt), (1, &second, &taken)] {
        let again = bank.hand_over(Kind::Records, shard, bytes).await.unwrap();
        assert_eq!(again.entry, receipt.entry, "shard {shard}");
    }
    let (a, b) = tokio::join!(bank.play(|_| false), clinic.play(|_| false));
    for task in [a, b] {
        assert!(matches!(task, Task::Finished { .. }), "{task:?}");
    }
}

#[test]
fn an_index_that_found_the_disk_full_goes_on_once_there_is_room() {
    if std::env::var_os(INSIDE).is_none() {
        return run_with_private_mounts(
            "full_disk::an_index_that_found_the_disk_full_goes_on_once_there_is_room",
        );
    }
    let folder = tempfile::tempdir().unwrap();
    mount(folder.path());
    let mut index = Index::open(&folder.path().join("index"), []).unwrap();
    let slot = |sequence| Slot {
        round: RoundId(1),
        institution: InstitutionId::new("bank").unwrap(),
        kind: Kind::Records,
        sequence,
    };
    let filled = |sequence: u32| IndexedSlot {
        digest: Digest::of(&sequence.to_le_bytes()),
        entry: u64::from(sequence),
        length: 1,
    };
    for sequence in 0..8 {
        index.insert(&slot(sequence), &filled(sequence)).unwrap();
    }
    // How many more fit depends on how far sled has filled the file that it grows ahead of time.
    let ballast = folder.path().join("ballast");
    leave_free(&ballast, 0);
    let (last, error) = (8..1 << 16)
        .find_map(|sequence| {
            let error = index.insert(&slot(sequence), &filled(sequence)).err()?;
            Some((sequence, error))
        })
        .expect("the disk was full");
    assert!(error.is_full(), "{last}: {error:?}");
    let again = index.insert(&slot(last), &filled(last)).unwrap_err();
    assert!(again.is_full(), "{again:?}");
    fs::remove_file(&ballast).unwrap();
    index.insert(&slot(last), &filled(last)).unwrap();
    for sequence in 0..=last {
        let found = index.slot(&slot(sequence)).unwrap();
        assert_eq!(found, Some(filled(sequence)), "{sequence} of {last}");
    }
}

fn mount(folder: &Path) {
    let mounted = Command::new("mount")
        .args(["-t", "tmpfs", "-o", "size=16m", "tmpfs"])
        .arg(folder)
        .status();
    assert!(mounted.unwrap().success(), "mount");
}

/// Fills the disk but for `free` bytes.
fn leave_free(ballast: &Path, free: u64) {
    let mut file = File::options()
        .create(true)
        .append(true)
        .open(ballast)
        .unwrap();
    let full = loop {
        if let Err(error) = file.write_all(&[1; 4096]) {
            break error;
        }
    };
    assert_eq!(full.kind(), io::ErrorKind::StorageFull, "{full}");
    let length = file.metadata().unwrap().len() / PAGE * PAGE;
    file.set_len(length - free).unwrap();
}

/// Runs the test `name` again where mounts are its own: as root, or else as the root of a user namespace.
fn run_with_private_mounts(name: &str) {
    let root = ["--mount"].as_slice();
    let user = ["--user", "--map-root-user", "--mount"].as_slice();
    let folder = tempfile::tempdir().unwrap();
    let can_mount = |flags: &&[&str]| {
        let probe = Command::new("unshare")
            .args(*flags)
            .args(["mount", "-t", "tmpfs", "tmpfs"])
            .arg(folder.path())
            .output();
        probe.is_ok_and(|probe| probe.status.success())
    };
    let Some(flags) = [root, user].into_iter().find(can_mount) else {
        // Past the capture of a passing test's output.
        let said = writeln!(
            io::stderr(),
            "\nNOT RUN: {name}: `unshare --mount` is not allowed here, neither as this user nor in a user namespace\n"
        );
        return said.unwrap();
    };
    let output = Command::new("unshare")
        .args(flags)
        .arg(std::env::current_exe().unwrap())
        .args(["--exact", name, "--nocapture"])
        .env(INSIDE, "1")
        .output()
        .unwrap();
    let [said, errors] =
        [&output.stdout, &output.stderr].map(|bytes| String::from_utf8_lossy(bytes));
    assert!(
        output.status.success() && said.contains("1 passed"),
        "{said}{errors}"
    );
}
