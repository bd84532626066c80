//! Jobs, results and blobs over real files.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};

use consilium_protocol::RoundId;
use consilium_protocol::manifest::SymbolSpace;

use super::*;

fn spool() -> (tempfile::TempDir, Spool) {
    let folder = tempfile::tempdir().unwrap();
    let spool = Spool::open(folder.path()).unwrap();
    (folder, spool)
}

fn score(shard: u32) -> Job {
    Job::Score(ScoreJob {
        round: RoundId(1),
        shard,
        items: 0..64,
        reference: Digest::of(b"reference"),
        symbol_space: SymbolSpace::Bytes,
        symbols: 16,
        fill_permille: 995,
    })
}

fn done() -> Outcome {
    Outcome::Done {
        artefact: Digest::of(b"shard"),
        seconds: 1.5,
        notes: BTreeMap::from([("bits_per_byte".to_owned(), 1.25)]),
    }
}

fn names(folder: &Path) -> Vec<String> {
    let mut names: Vec<_> = fs::read_dir(folder)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    names
}

#[test]
fn jobs_come_in_order_and_submitting_again_changes_nothing() {
    let (_folder, spool) = spool();
    let second = spool.submit(&score(10)).unwrap();
    let first = spool.submit(&score(9)).unwrap();
    assert_eq!(spool.submit(&score(9)).unwrap(), first);
    assert_eq!(names(&spool.jobs()).len(), 2);
    assert!(first.as_str().starts_with("r1-score-0009-"), "{first}");

    assert_eq!(spool.next_job().unwrap(), Some((first.clone(), score(9))));
    spool.finish(&first, &done()).unwrap();
    assert_eq!(spool.outcome(&first).unwrap(), Some(done()));
    assert_eq!(spool.submit(&score(9)).unwrap(), first);
    assert_eq!(spool.next_job().unwrap().unwrap().0, second);
    spool.reset(&first).unwrap();
    assert_eq!(spool.next_job().unwrap().unwrap().0, first);
    spool.withdraw(&first).unwrap();
    assert!(!spool.is_wanted(&first));
    assert_eq!(spool.next_job().unwrap().unwrap().0, second);
}

#[test]
fn a_result_never_counts_for_a_job_with_other_content() {
    let (_folder, spool) = spool();
    let mut other = score(0);
    if let Job::Score(job) = &mut other {
        job.symbols = 8;
    }
    let old = spool.submit(&score(0)).unwrap();
    spool.finish(&old, &done()).unwrap();
    let new = spool.submit(&other).unwrap();
    assert_ne!(old, new);
    assert_eq!(spool.outcome(&new).unwrap(), None);
    assert_eq!(spool.next_job().unwrap(), Some((new, other)));
}

#[test]
fn malformed_files_are_set_aside_and_the_rest_goes_on() {
    let (_folder, spool) = spool();
    let good = spool.submit(&score(3)).unwrap();
    let valid = fs::read_to_string(spool.job_path(&good)).unwrap();
    let unknown = valid.replacen("\"round\"", "\"surprise\":1,\"round\"", 1);
    for (name, content) in [
        ("a.json", ""),
        ("b.json", "{\"score\":{}}"),
        ("c.json", unknown.as_str()),
        ("d.json", valid.as_str()),
        ("e.json", "[1]"),
    ] {
        fs::write(spool.jobs().join(name), content).unwrap();
    }
    let huge = File::create(spool.jobs().join("f.json")).unwrap();
    huge.set_len(JOB_LIMIT + 1).unwrap();
    assert_eq!(spool.next_job().unwrap().unwrap().0, good);
    let left = names(&spool.jobs());
    assert_eq!(
        left.iter().filter(|n| n.ends_with(".malformed")).count(),
        6,
        "{left:?}"
    );

    fs::write(spool.result_path(&good), "{\"done\":{}}").unwrap();
    assert_eq!(spool.outcome(&good).unwrap(), None);
    assert_eq!(spool.next_job().unwrap().unwrap().0, good);
}

#[test]
fn files_without_their_name_yet_are_no_jobs_and_nothing_is_left_behind() {
    let (folder, spool) = spool();
    fs::write(spool.jobs().join(".new-1-2-3"), "half a j").unwrap();
    assert_eq!(spool.next_job().unwrap(), None);
    Spool::open(folder.path()).unwrap();
    assert!(names(&spool.jobs()).is_empty(), "abandoned in 1970");

    let id = spool.submit(&score(0)).unwrap();
    spool.finish(&id, &done()).unwrap();
    let blob = spool.put_blob(b"blob").unwrap();
    fs::write(folder.path().join("file"), b"blob").unwrap();
    assert_eq!(
        spool.put_blob_file(&folder.path().join("file")).unwrap(),
        blob
    );
    for folder in [spool.jobs(), spool.results(), spool.blobs()] {
        assert_eq!(names(&folder).len(), 1, "{folder:?}");
    }
    let unmeasured = Outcome::Done {
        artefact: blob,
        seconds: f64::NAN,
        notes: BTreeMap::new(),
    };
    assert!(spool.finish(&id, &unmeasured).is_err());
    assert_eq!(spool.outcome(&id).unwrap(), Some(done()));
}

#[test]
fn a_damaged_blob_is_noticed() {
    let (_folder, spool) = spool();
    let digest = spool.put_blob(b"blob").unwrap();
    let other = spool.put_blob(b"other").unwrap();
    fs::write(spool.blobs().join(format!("{other}.part")), b"oth").unwrap();
    spool.keep_blobs(&BTreeSet::from([digest])).unwrap();
    assert_eq!(names(&spool.blobs()), [digest.to_string()]);
    assert_eq!(spool.read_blob(&digest, 4).unwrap(), b"blob");
    assert_eq!(spool.check_blob(&digest).unwrap(), 4);
    assert!(spool.read_blob(&digest, 3).is_err());
    fs::write(spool.blob_path(&digest), b"bl0b").unwrap();
    for refused in [
        spool.read_blob(&digest, 4).map(|_| ()),
        spool.check_blob(&digest).map(|_| ()),
    ] {
        assert!(matches!(refused, Err(SpoolError::Damaged { .. })));
    }
}

#[test]
fn waiting_ends_with_the_next_job() {
    let (_folder, spool) = spool();
    let writer = spool.clone();
    let waiter = std::thread::spawn(move || spool.wait_for_change(Duration::from_secs(60)));
    // Not before the waiter has looked once, or it would wait for the whole minute.
    let (_sender, pause) = mpsc::channel::<()>();
    let mut shard = 0;
    while !waiter.is_finished() {
        writer.submit(&score(shard)).unwrap();
        shard += 1;
        let _ = pause.recv_timeout(POLL);
    }
    waiter.join().unwrap().unwrap();
}
