//! A member that gives what the text says a high probability fails the decoys, is kept out and named; the key is secret until then.

use std::fs;
use std::process::Command;

use consilium_protocol::Digest;
use consilium_protocol::decoys::{Decoy, DecoyKey};
use consilium_protocol::event::{Event, Reason};
use consilium_protocol::message::Task;
use consilium_protocol::reference::ReferenceSet;

use crate::consortium::{Consortium, REFERENCE};
use crate::{MEMBERS, join_all, play_all};

/// Item 4 is wrong as a whole; item 3 is held out.
fn write_key(consortium: &Consortium) -> Digest {
    let set = ReferenceSet::parse(REFERENCE.as_bytes()).unwrap();
    let decoy = Decoy {
        item: 4,
        from: 0,
        to: 3,
    };
    let key = DecoyKey::new(set.digest(), [9; 32], vec![decoy], vec![3]);
    let bytes = serde_json::to_vec(&key).unwrap();
    fs::write(consortium.path("key.json"), &bytes).unwrap();
    Digest::of(&bytes)
}

#[tokio::test]
async fn a_member_that_reads_the_text_is_kept_out_and_nobody_trains_on_decoys() {
    let mut consortium = Consortium::new(&MEMBERS, &[], 2);
    consortium.start().await;
    let key = write_key(&consortium);
    let mut nodes = join_all(&consortium, [None; 3]).await;
    let path = consortium.path("key.json").display().to_string();
    consortium.open_round_with(&["--decoys", &path], &["training.inner_rounds=1"]);
    nodes[0].until(|task| *task != Task::Wait).await;
    assert!(nodes[0].try_fetch(key).await.is_err(), "the key is secret");
    nodes[0].surprised = Some(4);
    nodes[1].surprised = Some(4);

    let distils = |task: &Task| matches!(task, Task::Distil { .. });
    let tasks = play_all(&mut nodes, distils).await;
    let Task::Distil { targets, .. } = &tasks[0] else {
        panic!("{tasks:?}")
    };
    let index = nodes[0].fetch_targets(targets).await;
    assert_eq!((index.withheld, index.key), (vec![3, 4], Some(key)));
    nodes[0].fetch(key).await;
    let Event::Fused {
        report: Some(report),
        ..
    } = targets.parse().unwrap().event
    else {
        panic!("{targets:?}")
    };
    let report: serde_json::Value = serde_json::from_slice(&nodes[0].fetch(report).await).unwrap();
    assert_eq!(
        report["screening"]["excluded"],
        serde_json::json!(["insurer"]),
        "{report}"
    );
    assert_eq!(
        report["screening"]["flags"][0]["institution"], "clinic",
        "the clinic repeats the bank"
    );
    assert_eq!(
        report["accounts"]["institutions"],
        serde_json::json!(["bank", "clinic"])
    );
    assert_eq!(report["accounts"]["items"], 1, "the holdout alone");

    for task in play_all(&mut nodes, |_| false).await {
        let Task::Finished { outcome } = task else {
            panic!("{task:?}")
        };
        let outcome = outcome.parse().unwrap().event;
        assert!(matches!(outcome, Event::Released { .. }), "{outcome:?}");
    }
    let folder = consortium.path("data/releases/round-1");
    let released = fs::read_to_string(folder.join("report.json")).unwrap();
    let released: serde_json::Value = serde_json::from_str(&released).unwrap();
    assert_eq!(released["records"], report);
    let card = fs::read_to_string(folder.join("README.md")).unwrap();
    assert!(
        card.contains("Flag: insurer (Decoy)") && card.contains("| all | bank |"),
        "{card}"
    );
}

#[tokio::test]
async fn where_too_few_remain_the_round_ends_and_names_them() {
    let mut consortium = Consortium::new(&MEMBERS, &[], 3);
    consortium.start().await;
    write_key(&consortium);
    let mut nodes = join_all(&consortium, [None; 3]).await;
    let path = consortium.path("key.json").display().to_string();
    consortium.open_round_with(&["--decoys", &path], &[]);
    nodes[0].surprised = Some(4);
    nodes[1].surprised = Some(4);
    for task in play_all(&mut nodes, |_| false).await {
        assert!(matches!(task, Task::Finished { .. }), "{task:?}");
    }
    let last = consortium.entries().pop().unwrap().event;
    let Event::Rejected {
        reason: Reason::Screening,
        blamed,
        report: Some(_),
    } = last
    else {
        panic!("{last:?}")
    };
    assert_eq!(
        blamed.iter().map(ToString::to_string).collect::<Vec<_>>(),
        ["insurer"]
    );
}

#[test]
fn the_command_writes_a_set_and_its_key_once() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    let words = ["kavo", "mira", "tolu"];
    let lines: String = (0..30)
        .map(|i| format!("{{\"target\":\"ref {} uses drug {i}\"}}\n", words[i % 3]))
        .collect();
    fs::write(at("set.jsonl"), lines).unwrap();
    let run = || {
        Command::new(env!("CARGO_BIN_EXE_consilium-aggregator"))
            .args([
                "decoys",
                "--decoys",
                "200",
                "--holdout",
                "100",
                "--reference",
            ])
            .arg(at("set.jsonl"))
            .arg("--out")
            .arg(at("planted.jsonl"))
            .arg("--key")
            .arg(at("key.json"))
            .output()
            .unwrap()
    };
    let output = run();
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success(), "{said}");
    let set = ReferenceSet::parse(&fs::read(at("planted.jsonl")).unwrap()).unwrap();
    let key = DecoyKey::parse(&fs::read(at("key.json")).unwrap(), &set).unwrap();
    assert_eq!((key.decoys.len(), key.holdout.len()), (6, 3));
    let again = run();
    assert!(
        !again.status.success(),
        "a key that a round may need is not overwritten"
    );
    assert_eq!(
        fs::read(at("planted.jsonl"))
            .map(|bytes| Digest::of(&bytes))
            .unwrap(),
        set.digest()
    );
}
