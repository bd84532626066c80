//! What does not belong gets a code, leaves no trace but a log entry, and does not stop the round.

use std::fs;

use consilium_protocol::artefact::Kind;
use consilium_protocol::contribution::Statement;
use consilium_protocol::event::Event;
use consilium_protocol::message::{Hello, Status, Task, Welcome};
use consilium_protocol::quic::{Connection, LinkError, Stream, Wait};
use consilium_protocol::{Digest, RejectCode, RoundId};

use crate::accepted;
use crate::consortium::Consortium;
use crate::node::{Node, dial, evaluation, hello, map_tensors, map_values, records};

const PAIR: [&str; 2] = ["bank", "clinic"];

/// A round that waits for records of two members.
async fn scoring() -> (Consortium, Node, Node) {
    let mut consortium = Consortium::new(&PAIR, &[], 2);
    consortium.start().await;
    consortium.open_round(&["training.inner_rounds=1"]);
    let mut bank = Node::join(&consortium, "bank", 10, None).await;
    let mut clinic = Node::join(&consortium, "clinic", 10, None).await;
    let score = |task: &Task| matches!(task, Task::Score { .. });
    bank.until(score).await;
    clinic.until(score).await;
    (consortium, bank, clinic)
}

async fn refuse(sender: &Node, statement: Statement, bytes: &[u8], expected: RejectCode) {
    let signed = sender.sign(statement);
    let refused = sender.send(signed, bytes).await.unwrap_err();
    assert_eq!(refused.rejection(), Some(expected), "{refused}");
}

fn logged_refusals(consortium: &Consortium) -> Vec<RejectCode> {
    let entries = consortium.entries().into_iter();
    entries
        .filter_map(|entry| match entry.event {
            Event::Refused { code, .. } => Some(code),
            _ => None,
        })
        .collect()
}

#[tokio::test]
async fn a_statement_counts_only_under_its_own_name_round_and_slot() {
    let (consortium, bank, clinic) = scoring().await;
    let good = bank.records(0);
    let truth = bank.statement(Kind::Records, 0, Digest::of(&good));

    let refused = bank
        .send(clinic.sign(truth.clone()), &good)
        .await
        .unwrap_err();
    assert_eq!(
        refused.rejection(),
        Some(RejectCode::Signature),
        "{refused}"
    );
    let wrong_round = Statement {
        round: RoundId(2),
        ..truth.clone()
    };
    refuse(&bank, wrong_round, &good, RejectCode::WrongRound).await;
    let wrong_manifest = Statement {
        manifest: Digest::of(b"another"),
        ..truth.clone()
    };
    refuse(&bank, wrong_manifest, &good, RejectCode::WrongRound).await;
    let of_another = clinic.statement(Kind::Records, 0, Digest::of(&good));
    refuse(&bank, of_another, &good, RejectCode::Identity).await;
    let early = bank.statement(Kind::Adapter, 0, Digest::of(&good));
    refuse(&bank, early, &good, RejectCode::WrongPhase).await;
    let no_such_shard = Statement {
        sequence: 3,
        ..truth.clone()
    };
    refuse(&bank, no_such_shard, &good, RejectCode::Content).await;
    refuse(&bank, truth.clone(), b"other bytes", RejectCode::Digest).await;
    assert!(accepted(&consortium).is_empty());

    // The beginning of an upload that broke off, once damaged on disk and once whole.
    let digest = Digest::of(&good);
    let partial = consortium.path(&format!("data/incoming/bank-{digest}.part"));
    let (first, rest) = good.split_at(good.len() / 2);
    fs::write(&partial, rest).unwrap();
    refuse(&bank, truth, &good, RejectCode::Digest).await;
    fs::write(&partial, first).unwrap();
    bank.hand_over(Kind::Records, 0, &good).await.unwrap();
    assert!(!partial.exists());

    let other = records(0..2, 0.9).to_bytes().unwrap();
    let second = bank.statement(Kind::Records, 0, Digest::of(&other));
    refuse(&bank, second, &other, RejectCode::Equivocation).await;
    assert_eq!(
        logged_refusals(&consortium).last(),
        Some(&RejectCode::Equivocation)
    );
    assert_eq!(accepted(&consortium).len(), 1);
    for (who, digest) in [(&bank, Digest::of(&other)), (&clinic, digest)] {
        let hidden = who.try_fetch(digest).await.unwrap_err();
        assert_eq!(hidden.rejection(), Some(RejectCode::NotFound), "{hidden}");
    }
}

#[tokio::test]
async fn content_that_breaks_a_rule_is_refused_and_the_round_goes_on() {
    let (consortium, mut bank, mut clinic) = scoring().await;
    let good = bank.records(0);
    // Unsorted symbols; the writer would refuse them, so the bytes of a good file are changed.
    let position = good.windows(2).position(|pair| pair == b"aa").unwrap();
    let mut unsorted = good.clone();
    unsorted[position..position + 2].copy_from_slice(b"ba");
    let mut heavy = records(0..2, 0.9);
    heavy.tail.fill(0);
    let heavy = heavy.to_bytes().unwrap();
    let next = records(2..4, 0.9).to_bytes().unwrap();
    let mut truncated = good.clone();
    truncated.truncate(good.len() - 1);
    let mut stranger = records(0..2, 0.9);
    stranger.header.reference = Digest::of(b"another set");
    let stranger = stranger.to_bytes().unwrap();
    let cases = [
        (&unsorted, RejectCode::Content),
        (&heavy, RejectCode::Content),
        (&next, RejectCode::Content),
        (&truncated, RejectCode::Content),
        (&stranger, RejectCode::WrongReference),
    ];
    for (bytes, code) in cases {
        let statement = bank.statement(Kind::Records, 0, Digest::of(bytes));
        refuse(&bank, statement, bytes, code).await;
    }

    let distil = |task: &Task| matches!(task, Task::Distil { .. });
    let (task, _) = tokio::join!(bank.play(distil), clinic.play(distil));
    let Task::Distil { start, .. } = task else {
        panic!("{task:?}")
    };
    let trained = bank.trained(&start).await;
    for bad in [f32::NAN, f32::NEG_INFINITY, 2e4] {
        let spoil = |value: f32, place: usize| if place == 3 { bad } else { value };
        let bytes = map_values(&trained, spoil);
        let statement = bank.statement(Kind::Adapter, 0, Digest::of(&bytes));
        refuse(&bank, statement, &bytes, RejectCode::Content).await;
    }
    let long = vec![0; trained.len() + (2 << 20)];
    let statement = bank.statement(Kind::Adapter, 0, Digest::of(&long));
    refuse(&bank, statement, &long, RejectCode::TooLarge).await;

    let evaluate = |task: &Task| matches!(task, Task::Evaluate { .. });
    tokio::join!(bank.play(evaluate), clinic.play(evaluate));
    let statement = bank.statement(Kind::Evaluation, 0, Digest::of(b"{}"));
    refuse(&bank, statement, b"{}", RejectCode::Content).await;
    bank.hand_over(Kind::Evaluation, 0, &evaluation(0.8))
        .await
        .unwrap();
    let (a, b) = tokio::join!(bank.play(|_| false), clinic.play(|_| false));
    for task in [a, b] {
        assert!(matches!(task, Task::Finished { .. }), "{task:?}");
    }
    assert_eq!(logged_refusals(&consortium).len(), 5 + 3 + 1);
    assert_eq!(accepted(&consortium).len(), 2 * 3 + 2 + 2);
}

/// In a round without records nothing but adapters and evaluations comes in, and an adapter only with the tensors of the
/// one that all start from.
#[tokio::test]
async fn an_adapter_of_other_layers_or_of_a_rank_that_the_rule_cannot_merge_is_refused_by_name() {
    let mut consortium = Consortium::new(&PAIR, &[], 2);
    consortium.start().await;
    // A mean of factors takes one rank.
    consortium.open_round(&[
        "training.inner_rounds=1",
        "mode=adapters",
        "training.merge.rule=factors",
    ]);
    let mut bank = Node::join(&consortium, "bank", 10, None).await;
    let mut clinic = Node::join(&consortium, "clinic", 10, None).await;
    let train = |task: &Task| matches!(task, Task::Train { .. });
    let (task, _) = tokio::join!(bank.play(train), clinic.play(train));
    let Task::Train { inner: 0, start } = task else {
        panic!("{task:?}")
    };
    let shard = bank.records(0);
    let statement = bank.statement(Kind::Records, 0, Digest::of(&shard));
    refuse(&bank, statement, &shard, RejectCode::Content).await;

    let trained = bank.trained(&start).await;
    // One row or column less in every factor, and a layer under another name.
    let narrower = map_tensors(&trained, |name, shape, values| {
        let (name, mut shape, mut values) = (name.to_owned(), shape.to_vec(), values.to_vec());
        let rank = usize::from(name.ends_with("lora_B.weight"));
        if name.contains("lora_") {
            shape[rank] -= 1;
            values.truncate(shape.iter().product());
        }
        (name, shape, values)
    });
    let elsewhere = map_tensors(&trained, |name, shape, values| {
        let name = name.replace("q_proj", "z_proj");
        (name, shape.to_vec(), values.to_vec())
    });
    for (bytes, named) in [(narrower, "has shape"), (elsewhere, "q_proj")] {
        assert_ne!(bytes, trained);
        let statement = bank.statement(Kind::Adapter, 0, Digest::of(&bytes));
        refuse(&bank, statement, &bytes, RejectCode::Content).await;
        let said = consortium.said();
        assert!(
            said.contains(named) && said.contains("contribution of bank"),
            "{said}"
        );
    }
    let (a, b) = tokio::join!(bank.play(|_| false), clinic.play(|_| false));
    for task in [a, b] {
        assert!(matches!(task, Task::Finished { .. }), "{task:?}");
    }
    assert_eq!(logged_refusals(&consortium).len(), 2);
    // No records: two adapters and two evaluations.
    assert_eq!(accepted(&consortium).len(), 2 + 2);
}

#[tokio::test]
async fn only_members_under_their_own_name_are_welcome() {
    let mut consortium = Consortium::new(&PAIR, &["stranger"], 2);
    consortium.start().await;

    let (_client, connection) = dial(&consortium, "stranger").await;
    let refused = greet(&connection, hello(&consortium, "stranger", 1, 0)).await;
    assert_eq!(refused.err(), Some(RejectCode::NotMember));

    let (_client, connection) = dial(&consortium, "bank").await;
    let refused = greet(&connection, hello(&consortium, "clinic", 1, 0)).await;
    assert_eq!(refused.err(), Some(RejectCode::Identity));

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
}

#[tokio::test]
async fn mistakes_of_the_operator_are_named() {
    let mut consortium = Consortium::new(&PAIR, &[], 2);
    consortium.start().await;
    let fails = |arguments: &[&str], code: i32, says: &str| {
        let output = consortium.run(arguments);
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(code), "{arguments:?}: {said}");
        assert!(said.contains(says), "{arguments:?}: {said}");
    };
    fails(&["serve"], 1, "another aggregator");
    fails(
        &["round", "open", "--set", "training.rang=4"],
        2,
        "training.rang",
    );
    fails(&["round", "open", "--set", "symbols=64"], 1, "symbols");
    let config = consortium.path("aggregator.toml");
    let text = fs::read_to_string(&config).unwrap();
    fs::write(&config, text.replace("listen", "lisen")).unwrap();
    fails(&["status"], 2, "lisen");
    fs::write(&config, text.replace("charter.signed", "reference.jsonl")).unwrap();
    fails(&["serve"], 1, "another aggregator");
    fs::write(
        &config,
        text.replace("\"data\"", "\"elsewhere\"")
            .replace("charter.signed", "reference.jsonl"),
    )
    .unwrap();
    fails(&["serve"], 2, "reference.jsonl");
    fs::write(
        &config,
        text.replace("\"data\"", "\"elsewhere\"")
            .replace("\"pivot\"", "\"bank\""),
    )
    .unwrap();
    fails(&["serve"], 1, "config.json");
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
    let greeted = conversation.await;
    greeted.map_err(|error| error.rejection().unwrap_or_else(|| panic!("{error}")))
}
