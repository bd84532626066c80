//! The real program takes scripted nodes through a round: to a signed release over kills and restarts, with members that
//! are late, missing or join in the middle, and with members that send what they must not.

#![cfg(test)]

mod consortium;
mod node;

use std::fs;

use consilium_aggregator::release::{PROOF, verify};
use consilium_protocol::artefact::Kind;
use consilium_protocol::contribution::Statement;
use consilium_protocol::event::{Event, Phase, Reason};
use consilium_protocol::message::{Hello, Status, Task, Welcome};
use consilium_protocol::quic::{Connection, LinkError, Stream, Wait};
use consilium_protocol::transcript::{LogProof, tree};
use consilium_protocol::{Digest, InstitutionId, RejectCode, RoundId};

use consortium::{Consortium, SHARDS};
use node::{Node, dial, evaluation, hello, map_values, records};

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

    // Fused; then an orderly restart: same targets, same parts.
    let distil = |inner: u32| move |task: &Task| matches!(task, Task::Distil { inner: now, .. } if *now == inner);
    let before = play_all(&mut nodes, distil(0)).await;
    let Task::Distil { targets, .. } = &before[0] else {
        panic!("{before:?}")
    };
    let index = nodes[0].fetch_targets(targets).await;
    assert_eq!(index.shards.len(), usize::try_from(SHARDS).unwrap());
    assert!(consortium.stop().await.success());
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
    assert!(
        matches!(refused, LinkError::Rejected(RejectCode::WrongPhase)),
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
            reason: Reason::Quorum
        }
    );
    consortium.open_round(&[]);
    bank.until(|task| matches!(task, Task::Score { .. })).await;
    let statement = bank.statement(Kind::Records, 0, Digest::of(b"any"));
    assert_eq!(statement.round, RoundId(2));
    let while_open = consortium.run(&["round", "open"]);
    assert_eq!(while_open.status.code(), Some(1), "one round at a time");
}

#[tokio::test]
async fn what_a_member_must_not_send_gets_a_code_and_changes_nothing() {
    let mut consortium = Consortium::new(&["bank", "clinic"], &["stranger"], 2);
    consortium.start().await;
    consortium.open_round(&["training.inner_rounds=1"]);
    let mut bank = Node::join(&consortium, "bank", 10, None).await;
    let mut clinic = Node::join(&consortium, "clinic", 10, None).await;
    bank.until(|task| matches!(task, Task::Score { .. })).await;
    clinic
        .until(|task| matches!(task, Task::Score { .. }))
        .await;
    let good = bank.records(0);
    let of_good = || bank.statement(Kind::Records, 0, Digest::of(&good));
    let refuse = async |statement: Statement, bytes: &[u8], expected: RejectCode| {
        let refused = bank.send(bank.sign(statement), bytes).await.unwrap_err();
        assert_eq!(refused.rejection(), Some(expected), "{refused}");
    };

    let signed = clinic.sign(of_good());
    let refused = bank.send(signed, &good).await.unwrap_err();
    assert_eq!(
        refused.rejection(),
        Some(RejectCode::Signature),
        "{refused}"
    );
    refuse(
        Statement {
            round: RoundId(2),
            ..of_good()
        },
        &good,
        RejectCode::WrongRound,
    )
    .await;
    let another = Statement {
        manifest: Digest::of(b"another"),
        ..of_good()
    };
    refuse(another, &good, RejectCode::WrongRound).await;
    refuse(
        clinic.statement(Kind::Records, 0, Digest::of(&good)),
        &good,
        RejectCode::Identity,
    )
    .await;
    refuse(
        bank.statement(Kind::Adapter, 0, Digest::of(b"x")),
        b"x",
        RejectCode::WrongPhase,
    )
    .await;
    refuse(of_good(), b"other bytes", RejectCode::Digest).await;

    let content = |bytes: &[u8]| bank.statement(Kind::Records, 0, Digest::of(bytes));
    // Unsorted symbols; the writer would refuse them, so the bytes of a good file are changed.
    let position = good.windows(2).position(|pair| pair == b"aa").unwrap();
    let mut bytes = good.clone();
    bytes[position..position + 2].copy_from_slice(b"ba");
    refuse(content(&bytes), &bytes, RejectCode::Content).await;
    let mut heavy = records(0..2, 0.9);
    heavy.tail.fill(0);
    let heavy = heavy.to_bytes().unwrap();
    refuse(content(&heavy), &heavy, RejectCode::Content).await;
    let mut other = records(0..2, 0.9);
    other.header.reference = Digest::of(b"another set");
    let other = other.to_bytes().unwrap();
    refuse(content(&other), &other, RejectCode::WrongReference).await;
    let next = records(2..4, 0.9).to_bytes().unwrap();
    refuse(content(&next), &next, RejectCode::Content).await;

    assert!(accepted(&consortium).is_empty());
    bank.hand_over(Kind::Records, 0, &good).await.unwrap();
    let changed = records(0..2, 0.9).to_bytes().unwrap();
    refuse(content(&changed), &changed, RejectCode::Equivocation).await;
    let missing = bank.try_fetch(Digest::of(&changed)).await.unwrap_err();
    assert_eq!(missing.rejection(), Some(RejectCode::NotFound), "{missing}");
    let private = clinic.try_fetch(Digest::of(&good)).await.unwrap_err();
    assert_eq!(
        private.rejection(),
        Some(RejectCode::NotFound),
        "contributions are nobody else's"
    );

    // Adapters and evaluations.
    let task = |task: &Task| matches!(task, Task::Distil { .. });
    let (distil, _) = tokio::join!(bank.play(task), clinic.play(task));
    let Task::Distil { start, .. } = distil else {
        panic!("{distil:?}")
    };
    let trained = bank.trained(&start).await;
    for bad in [f32::NAN, f32::INFINITY, 2e4] {
        let bytes = map_values(
            &trained,
            |value, place| if place == 3 { bad } else { value },
        );
        let refused = bank.hand_over(Kind::Adapter, 0, &bytes).await.unwrap_err();
        assert_eq!(refused.rejection(), Some(RejectCode::Content), "{bad}");
    }
    let evaluate = |task: &Task| matches!(task, Task::Evaluate { .. });
    tokio::join!(bank.play(evaluate), clinic.play(evaluate));
    let refused = bank
        .hand_over(Kind::Evaluation, 0, b"{}")
        .await
        .unwrap_err();
    assert_eq!(refused.rejection(), Some(RejectCode::Content));
    bank.hand_over(Kind::Evaluation, 0, &evaluation())
        .await
        .unwrap();
    let (a, b) = tokio::join!(bank.play(|_| false), clinic.play(|_| false));
    assert!(
        matches!((&a, &b), (Task::Finished { .. }, Task::Finished { .. })),
        "{a:?} {b:?}"
    );

    let codes: Vec<RejectCode> = consortium
        .entries()
        .into_iter()
        .filter_map(|entry| match entry.event {
            Event::Refused { code, .. } => Some(code),
            _ => None,
        })
        .collect();
    assert!(codes.contains(&RejectCode::Equivocation), "{codes:?}");
    assert!(
        codes
            .iter()
            .filter(|code| **code == RejectCode::Content)
            .count()
            >= 4,
        "{codes:?}"
    );
    assert_eq!(accepted(&consortium).len(), 2 * 3 + 2 + 2);
}

#[tokio::test]
async fn only_members_under_their_own_name_are_welcome() {
    let mut consortium = Consortium::new(&["bank", "clinic"], &["stranger"], 2);
    consortium.start().await;

    let (_client, connection) = dial(&consortium, "stranger").await;
    let refused = greet(&connection, hello(&consortium, "stranger", 1, 0)).await;
    assert_eq!(refused.err(), Some(RejectCode::NotMember));

    let (_client, connection) = dial(&consortium, "bank").await;
    let refused = greet(&connection, hello(&consortium, "clinic", 1, 0)).await;
    assert_eq!(refused.err(), Some(RejectCode::Identity));
    drop(connection);

    let mut clients = Vec::new();
    for _ in 0..3 {
        let (client, connection) = dial(&consortium, "clinic").await;
        let greeted = greet(&connection, hello(&consortium, "clinic", 1, 0)).await;
        clients.push((client, connection, greeted));
    }
    let codes: Vec<_> = clients
        .iter()
        .map(|(_, _, greeted)| greeted.as_ref().err())
        .collect();
    assert_eq!(
        codes,
        [None, None, Some(&RejectCode::Busy)],
        "connections of one member"
    );

    let said = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    let second = consortium.run(&["serve"]);
    assert_eq!(
        second.status.code(),
        Some(1),
        "one server for one data folder"
    );
    let config = consortium.path("aggregator.toml");
    let text = fs::read_to_string(&config).unwrap();
    fs::write(&config, text.replace("listen", "lisen")).unwrap();
    let typo = consortium.run(&["status"]);
    assert_eq!(typo.status.code(), Some(2));
    assert!(
        said(&typo.stderr).contains("lisen"),
        "{}",
        said(&typo.stderr)
    );
}

/// The open control stream, or the code that the greeting is refused with.
async fn greet(connection: &Connection, hello: Hello) -> Result<Stream, RejectCode> {
    let conversation = async {
        let mut control = connection.open().await?;
        control.send(&hello).await?;
        let _: Welcome = control.expect(Wait::Due).await?;
        let _: Status = control.expect(Wait::Due).await?;
        Ok::<_, LinkError>(control)
    };
    conversation
        .await
        .map_err(|error| error.rejection().unwrap_or_else(|| panic!("{error}")))
}
