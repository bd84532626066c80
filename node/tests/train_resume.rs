//! A training process that is killed goes on from its last checkpoint, and the weights are those of a run that was never
//! interrupted, byte for byte.

#![cfg(test)]

use std::fs;
use std::io::{BufRead as _, BufReader};
use std::path::Path;
use std::process::{Command, Stdio};

use serde_json::Value;

const WORDS: [&str; 5] = ["dolin", "merak", "tamu", "sirel", "kavo"];

fn write_site(folder: &Path) {
    let turn =
        |role: &str, content: String| format!("{{\"role\":\"{role}\",\"content\":\"{content}\"}}");
    let lines: String = (0..160)
        .map(|i| {
            let (asked, answer) = (WORDS[i % 5], WORDS[i * 3 / 5 % 5]);
            let user = turn("user", format!("{asked} {i}"));
            let assistant = turn("assistant", format!("use {answer} {}0mg", i % 4));
            format!("{{\"messages\":[{user},{assistant}]}}\n")
        })
        .collect();
    fs::write(folder.join("chat.jsonl"), lines).unwrap();
    let notes: Vec<String> = (0..120)
        .map(|i| format!("{} takes {}", WORDS[i % 5], i * 7 % 50))
        .collect();
    fs::write(folder.join("notes.txt"), notes.join("\n")).unwrap();
}

const FULL: &str = r#"
output = "OUTPUT"
rows = 4
row_tokens = 48
accumulate = 2
seed = 3
held_out = 0.1
evaluate_every = 4
checkpoint_every = 5
[new]
vocabulary = 300
hidden_size = 32
layers = 2
heads = 2
intermediate_size = 48
[[stages]]
text = ["notes.txt"]
steps = 12
learning_rate = 5e-3
[[stages]]
text = ["chat.jsonl", "notes.txt"]
epochs = 2.5
learning_rate = 3e-3
decay = "cosine"
"#;

const ADAPTER: &str = r#"
output = "OUTPUT"
start = "whole"
rows = 4
row_tokens = 48
seed = 3
checkpoint_every = 3
[lora]
rank = 4
embeddings_and_head = true
[[stages]]
text = ["chat.jsonl"]
steps = 14
learning_rate = 5e-3
"#;

/// How a process ends before its time.
#[derive(Clone, Copy, PartialEq)]
enum Interrupt {
    /// SIGKILL once this checkpoint is on disk.
    Kill(u64),
    /// SIGTERM once this step was taken.
    Terminate(u64),
}

/// Runs the program until its end, or until it is interrupted. Returns what it said.
fn run(file: &Path, interrupt: Option<Interrupt>) -> Vec<Value> {
    let mut child = Command::new(env!("CARGO_BIN_EXE_consilium-node"))
        .args(["--json", "train", "--threads", "1"])
        .arg(file)
        .env("CANDLE_NUM_THREADS", "1")
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut said = Vec::new();
    for line in BufReader::new(child.stdout.take().unwrap()).lines() {
        let value: Value = serde_json::from_str(&line.unwrap()).unwrap();
        let at = value["step"].as_u64();
        let kind = value["event"].as_str().unwrap_or_default().to_owned();
        said.push(value);
        match (interrupt, kind.as_str()) {
            (Some(Interrupt::Kill(step)), "checkpoint") if at == Some(step) => {
                child.kill().unwrap();
                break;
            }
            (Some(Interrupt::Terminate(step)), "step") if at == Some(step) => {
                let id = child.id().to_string();
                let sent = Command::new("kill").args(["-TERM", &id]).status().unwrap();
                assert!(sent.success());
            }
            _ => {}
        }
    }
    let status = child.wait().unwrap();
    assert_eq!(status.success(), interrupt.is_none(), "{said:?}");
    said
}

/// The last checkpoint of a process.
fn checkpoint(said: &[Value]) -> Option<u64> {
    let event = said.iter().rfind(|value| value["event"] == "checkpoint")?;
    event["step"].as_u64()
}

fn weights(folder: &Path, name: &str) -> Vec<u8> {
    fs::read(folder.join(name)).unwrap()
}

fn resumed(said: &[Value]) -> Option<u64> {
    let event = said.iter().find(|value| value["event"] == "resumed")?;
    event["step"].as_u64()
}

#[test]
fn a_killed_run_ends_with_the_weights_of_an_uninterrupted_one() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    write_site(folder.path());
    let write = |name: &str, text: &str, output: &str| {
        fs::write(at(name), text.replace("OUTPUT", output)).unwrap();
        at(name)
    };

    let whole = run(&write("whole.toml", FULL, "whole"), None);
    let last = whole.last().unwrap();
    assert_eq!(last["data"]["records"], 160 + 120 + 120, "{last}");
    assert!(last["data"]["best_step"].as_u64().is_some(), "{last}");
    let file = write("killed.toml", FULL, "killed");
    // In the first stage, at its end, and in the second: each process goes on where the one before was seen to be.
    let mut before = None;
    for step in [5, 10, 12] {
        assert_eq!(resumed(&run(&file, Some(Interrupt::Kill(step)))), before);
        before = Some(step);
    }
    // Asked to end, it writes a checkpoint first, wherever it is.
    let said = run(&file, Some(Interrupt::Terminate(14)));
    assert_eq!(resumed(&said), before);
    let last = said.last().unwrap();
    assert!(
        last["message"].as_str().unwrap().contains("stopped"),
        "{last}"
    );
    let stopped = checkpoint(&said);
    assert!(stopped >= Some(14), "{said:?}");
    if stopped < Some(22) {
        assert_eq!(resumed(&run(&file, Some(Interrupt::Kill(22)))), stopped);
    }
    let rest = run(&file, None);
    assert_eq!(resumed(&rest), stopped.max(Some(22)));
    let name = "model.safetensors";
    assert!(
        weights(&at("whole"), name) == weights(&at("killed"), name),
        "the weights differ"
    );
    let steps = |said: &[Value]| -> Vec<Value> {
        let is_step = |value: &&Value| {
            value["event"] == "step" && value["step"].as_u64() > stopped.max(Some(22))
        };
        let loss = |value: &Value| value["loss_nats"].clone();
        said.iter().filter(is_step).map(loss).collect()
    };
    assert_eq!(steps(&rest), steps(&whole));
    assert!(!at("runs/killed/checkpoint.safetensors").exists());
    assert!(at("runs/killed/best-stage-2.safetensors").exists());

    run(&write("adapter.toml", ADAPTER, "adapter"), None);
    let file = write("killed-adapter.toml", ADAPTER, "killed-adapter");
    run(&file, Some(Interrupt::Kill(6)));
    run(&file, None);
    let name = "adapter_model.safetensors";
    assert!(weights(&at("adapter"), name) == weights(&at("killed-adapter"), name));
}

#[test]
fn a_checkpoint_of_other_settings_or_data_is_refused_and_stays() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    write_site(folder.path());
    let text = FULL.replace("OUTPUT", "model");
    fs::write(at("train.toml"), &text).unwrap();
    run(&at("train.toml"), Some(Interrupt::Kill(5)));
    let refused = |what: &str| {
        let output = Command::new(env!("CARGO_BIN_EXE_consilium-node"))
            .arg("train")
            .arg(at("train.toml"))
            .output()
            .unwrap();
        let said = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(2), "{said}");
        assert!(
            said.contains(what) && said.contains("checkpoint.safetensors"),
            "{said}"
        );
        assert!(at("runs/model/checkpoint.safetensors").exists());
    };
    fs::write(at("train.toml"), text.replace("5e-3", "4e-3")).unwrap();
    refused("other settings");
    fs::write(at("train.toml"), &text).unwrap();
    let notes = fs::read_to_string(at("notes.txt")).unwrap();
    fs::write(at("notes.txt"), notes.replacen("takes 7", "takes 8", 1)).unwrap();
    refused("other data");
}
