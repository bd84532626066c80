//! The real program takes scripted nodes through a round: to a signed release over kills and restarts, with members that
//! are late, missing or join in the middle, and with members that send what they must not.

#![cfg(test)]

mod consortium;
mod decoys;
mod full_disk;
mod node;
mod refusals;

use std::collections::BTreeSet;
use std::fs;
use std::time::Duration;

use consilium_aggregator::release::{PROOF, verify};
use consilium_protocol::artefact::Kind;
use consilium_protocol::event::{Event, Phase, Reason};
use consilium_protocol::message::Task;
use consilium_protocol::transcript::{LogProof, tree};
use consilium_protocol::{Digest, InstitutionId, RejectCode, RoundId};

use consortium::{Consortium, SHARDS};
use node::Node;

const MEMBERS: [&str; 3] = ["bank", "clinic", "insurer"];

async fn join_all(consortium: &Consortium, seen: [node::Seen; 3]) -> [Node; 3] {
    let [bank, clinic, insurer] = seen;
    [
        Node::join(consortium, "bank", 10, bank).await,
        Node::join(consortium, "clinic", 10, clinic).await,
        Node::join(consortium, "insurer", 20, insurer).await,
    ]
}

async fn play_all(nodes: &mut [Node; 3], stop: impl Fn(&Task) -> bool) -> [Task; 3] {
    let [bank, clinic, insurer] = nodes;
    let (a, b, c) = tokio::join!(bank.play(&stop), clinic.play(&stop), insurer.play(&stop));
    [a, b, c]
}

fn accepted(consortium: &Consortium) -> Vec<(InstitutionId, Kind, u32)> {
    let events = consortium.entries().into_iter().map(|entry| entry.event);
    events
        .filter_map(|event| match event {
            Event::Accepted {
                institution,
                kind,
                sequence,
                ..
            } => Some((institution, kind, sequence)),
            _ => None,
        })
        .collect()
}

#[tokio::test]
async fn a_round_reaches_a_signed_release_over_kills_and_restarts() {
    let mut consortium = Consortium::new(&MEMBERS, &[], 3);
    consortium.start().await;
    let mut nodes = join_all(&consortium, [None; 3]).await;
    consortium.open_round(&[]);

    // One shard is in, then the power fails.
    let task = nodes[1].until(|task| *task != Task::Wait).await;
    assert_eq!(
        task,
        Task::Score {
            shards: (0..SHARDS).collect()
        }
    );
    let first = nodes[1].records(0);
    let receipt = nodes[1].hand_over(Kind::Records, 0, &first).await.unwrap();
    consortium.kill();
    consortium.start().await;
    let seen = nodes.map(|node| node.seen);
    let mut nodes = join_all(&consortium, seen).await;
    let task = nodes[1].until(|task| *task != Task::Wait).await;
    assert_eq!(
        task,
        Task::Score {
            shards: (1..SHARDS).collect()
        }
    );
    let again = nodes[1].hand_over(Kind::Records, 0, &first).await.unwrap();
    assert_eq!(
        again.entry, receipt.entry,
        "a repeat has the receipt of the first time"
    );

    // Fused; then an orderly restart with a damaged index: same targets, same parts.
    let distil = |inner: u32| move |task: &Task| matches!(task, Task::Distil { inner: now, .. } if *now == inner);
    let before = play_all(&mut nodes, distil(0)).await;
    let Task::Distil { targets, .. } = &before[0] else {
        panic!("{before:?}")
    };
    let index = nodes[0].fetch_targets(targets).await;
    assert_eq!(index.shards.len(), usize::try_from(SHARDS).unwrap());
    assert!(consortium.stop().await.success());
    fs::write(consortium.path("data/index/db"), b"not what was there").unwrap();
    consortium.start().await;
    let seen = nodes.map(|node| node.seen);
    let mut nodes = join_all(&consortium, seen).await;
    for (node, before) in nodes.iter_mut().zip(&before) {
        let (Task::Distil { part, start, .. }, now) = (before, node.until(distil(0)).await) else {
            panic!("{before:?}")
        };
        let Task::Distil {
            part: part_now,
            start: start_now,
            ..
        } = now
        else {
            panic!("{now:?}")
        };
        assert_eq!((part_now, &start_now.entry), (*part, &start.entry));
    }

    // Merged once; then the index is lost and rebuilt.
    play_all(&mut nodes, distil(1)).await;
    assert!(consortium.stop().await.success());
    fs::remove_dir_all(consortium.path("data/index")).unwrap();
    let rebuilt = consortium.run(&["reindex"]);
    assert!(
        rebuilt.status.success(),
        "{}",
        String::from_utf8_lossy(&rebuilt.stderr)
    );
    consortium.start().await;
    let seen = nodes.map(|node| node.seen);
    let mut nodes = join_all(&consortium, seen).await;
    nodes[1].until(|task| *task != Task::Wait).await;
    let again = nodes[1].hand_over(Kind::Records, 0, &first).await.unwrap();
    assert_eq!(
        again.entry, receipt.entry,
        "the rebuilt index knows the receipt"
    );

    for task in play_all(&mut nodes, |_| false).await {
        let Task::Finished { outcome } = task else {
            panic!("{task:?}")
        };
        let outcome = outcome.parse().unwrap().event;
        assert!(matches!(outcome, Event::Released { .. }), "{outcome:?}");
    }

    let release = consortium.path("data/releases/round-1");
    let key = fs::read_to_string(consortium.path("data/releases/release.pub")).unwrap();
    verify(&release, &key).unwrap();
    let proof = LogProof::parse(&fs::read(release.join(PROOF)).unwrap()).unwrap();
    let entries = consortium.entries();
    let last = entries.last().unwrap();
    assert!(matches!(last.event, Event::Released { .. }));
    let leaf = tree::leaf_hash(&last.to_bytes().unwrap());
    proof.verify(&leaf, &consortium.log, &[]).unwrap();

    let mut counted = accepted(&consortium);
    assert_eq!(counted.len(), 3 * 3 + 2 * 3 + 3);
    counted.sort();
    counted.dedup();
    assert_eq!(counted.len(), 18, "no slot counts twice");
    assert!(consortium.stop().await.success());
    let status = consortium.run(&["status", "--json"]);
    let status: serde_json::Value = serde_json::from_slice(&status.stdout).unwrap();
    assert_eq!(status["round"]["merged"], 2, "{status}");
}

#[tokio::test]
async fn the_next_round_starts_from_the_last_release_and_has_to_beat_it() {
    let mut consortium = Consortium::new(&MEMBERS, &[], 3);
    consortium.start().await;
    let mut nodes = join_all(&consortium, [None; 3]).await;
    let mut outcomes = Vec::new();
    for measures in [0.8, 0.8, 0.7] {
        consortium.open_round(&[]);
        for node in &mut nodes {
            node.measures = measures;
            node.until(|task| matches!(task, Task::Score { .. })).await;
        }
        for task in play_all(&mut nodes, |_| false).await {
            assert!(matches!(task, Task::Finished { .. }), "{task:?}");
        }
        outcomes.push(consortium.entries().pop().unwrap().event);
        // What the next round builds on is in the log.
        consortium.kill();
        consortium.start().await;
        nodes = join_all(&consortium, nodes.map(|node| node.seen)).await;
    }
    let [
        Event::Released { release, .. },
        Event::Rejected {
            reason: Reason::NoGain,
            ..
        },
        Event::Released { .. },
    ] = outcomes.as_slice()
    else {
        panic!("{outcomes:?}")
    };
    let events: Vec<Event> = consortium.entries().into_iter().map(|e| e.event).collect();
    let candidates = events.iter().filter_map(|event| match event {
        Event::Merged {
            inner: 1, adapter, ..
        } => Some(*adapter),
        _ => None,
    });
    let candidates: Vec<Digest> = candidates.collect();
    let opened = |events: &[Event]| -> Vec<(Digest, Digest)> {
        let opened = events.iter().filter_map(|event| match event {
            Event::Opened { manifest, start } => Some((*manifest, *start)),
            _ => None,
        });
        opened.collect()
    };
    let rounds = opened(&events);
    assert_eq!(rounds.len(), 3);
    for (manifest, start) in &rounds[1..] {
        assert_eq!(*start, candidates[0], "the rejected one is nobody's start");
        let text = nodes[0].fetch(*manifest).await;
        assert!(String::from_utf8_lossy(&text).contains(&release.to_string()));
    }
    // An adapter of another rank cannot be the start, but remains what is to be beaten.
    consortium.open_round(&["training.rank=1"]);
    let events: Vec<Event> = consortium.entries().into_iter().map(|e| e.event).collect();
    let (_, start) = *opened(&events).last().unwrap();
    assert!(!candidates.contains(&start) && start != rounds[0].1);
}

#[tokio::test]
async fn killed_again_and_again_it_loses_no_receipt_and_counts_none_twice() {
    let mut consortium = Consortium::new(&MEMBERS, &[], 3);
    consortium.start().await;
    consortium.open_round(&[]);
    let mut seen = [None; 3];
    let mut receipts = BTreeSet::new();
    let mut kills: u64 = 0;
    loop {
        let mut nodes = join_all(&consortium, seen).await;
        // Another stretch each time, so that the kill falls into another step: short ones first, so that a fast machine is
        // killed before it is through, and longer ones, so that a slow or busy one gets on too.
        let stretch = Duration::from_millis(5 + kills * 37 % 30 + kills * 10);
        let finished = tokio::select! {
            _ = play_all(&mut nodes, |_| false) => true,
            () = tokio::time::sleep(stretch) => false,
        };
        receipts.extend(nodes.iter().flat_map(Node::receipts));
        if finished {
            break;
        }
        consortium.kill();
        kills += 1;
        assert!(kills < 60, "no progress");
        seen = nodes.map(|node| node.seen);
        consortium.start().await;
    }
    assert!(kills >= 3, "killed {kills} times");
    let entries = consortium.entries();
    let logged: BTreeSet<Vec<u8>> = entries
        .iter()
        .map(|entry| entry.to_bytes().unwrap())
        .collect();
    assert!(receipts.is_subset(&logged), "a receipt is not in the log");
    let mut counted = accepted(&consortium);
    assert_eq!(counted.len(), 18);
    counted.sort();
    counted.dedup();
    assert_eq!(counted.len(), 18, "a slot counts twice");
    assert!(matches!(
        entries.last().unwrap().event,
        Event::Released { .. }
    ));
}

#[tokio::test]
async fn the_round_goes_on_without_the_late_and_takes_them_back() {
    let mut consortium = Consortium::new(&MEMBERS, &[], 1);
    consortium.start().await;
    consortium.open_round(&[
        "training.inner_rounds=3",
        "deadlines.contribute_seconds=2",
        "deadlines.distil_seconds=2",
    ]);
    let mut bank = Node::join(&consortium, "bank", 10, None).await;
    let mut clinic = Node::join(&consortium, "clinic", 10, None).await;
    let distil = |inner: u32| move |task: &Task| matches!(task, Task::Distil { inner: now, .. } if *now == inner);

    // The insurer never comes; the deadline closes the records without it.
    let (missed, _) = tokio::join!(bank.play(distil(0)), clinic.play(distil(1)));
    // The bank was asked for the first inner round and let it pass: it is left out of the second one.
    let Task::Distil { start, .. } = missed else {
        panic!("{missed:?}")
    };
    let late = bank.trained(&start).await;
    let refused = bank.hand_over(Kind::Adapter, 0, &late).await.unwrap_err();
    assert_eq!(
        refused.rejection(),
        Some(RejectCode::WrongPhase),
        "{refused}"
    );

    bank.until(|task| *task == Task::Wait).await;

    // Late but alive, and one that comes in the middle: both take part in the third.
    let mut insurer = Node::join(&consortium, "insurer", 20, None).await;
    let (a, b, c) = tokio::join!(
        bank.play(|_| false),
        clinic.play(|_| false),
        insurer.play(|_| false)
    );
    for task in [a, b, c] {
        assert!(matches!(task, Task::Finished { .. }), "{task:?}");
    }
    let closed: Vec<(Phase, Vec<String>)> = consortium
        .entries()
        .into_iter()
        .filter_map(|entry| match entry.event {
            Event::Closed { phase, members } => {
                Some((phase, members.iter().map(ToString::to_string).collect()))
            }
            _ => None,
        })
        .collect();
    let expected: [(Phase, &[&str]); 5] = [
        (Phase::Contribute, &["bank", "clinic"]),
        (Phase::Distil { inner: 0 }, &["clinic"]),
        (Phase::Distil { inner: 1 }, &["clinic"]),
        (Phase::Distil { inner: 2 }, &MEMBERS),
        (Phase::Evaluate, &MEMBERS),
    ];
    assert_eq!(closed.len(), expected.len(), "{closed:?}");
    for ((phase, members), (expected_phase, expected_members)) in closed.iter().zip(expected) {
        assert_eq!(*phase, expected_phase);
        assert_eq!(members, expected_members, "{phase:?}");
    }
}

#[tokio::test]
async fn too_few_before_the_deadline_end_the_round_and_the_next_one_opens() {
    let mut consortium = Consortium::new(&MEMBERS, &[], 2);
    consortium.start().await;
    consortium.open_round(&["deadlines.contribute_seconds=1"]);
    let mut bank = Node::join(&consortium, "bank", 10, None).await;
    let Task::Finished { outcome } = bank.play(|_| false).await else {
        panic!()
    };
    let event = outcome.parse().unwrap().event;
    assert_eq!(
        event,
        Event::Rejected {
            reason: Reason::Quorum,
            blamed: Vec::new(),
            report: None,
        }
    );
    consortium.open_round(&[]);
    bank.until(|task| matches!(task, Task::Score { .. })).await;
    let statement = bank.statement(Kind::Records, 0, Digest::of(b"any"));
    assert_eq!(statement.round, RoundId(2));
    let while_open = consortium.run(&["round", "open"]);
    assert_eq!(while_open.status.code(), Some(1), "one round at a time");
}
