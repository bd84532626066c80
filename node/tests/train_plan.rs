//! What `plan` says a run will need is what the run takes, and a run that does not fit never starts.

#![cfg(test)]

use std::fs;
use std::path::Path;
use std::process::{Command, Output};

use serde_json::Value;

/// How far the estimate may be from the measured peak, as a share of it.
const TOLERANCE: f64 = 0.25;

fn node(folder: &Path, arguments: &[&str]) -> (Output, Value) {
    let output = Command::new(env!("CARGO_BIN_EXE_consilium-node"))
        .arg("--json")
        .args(arguments)
        .args(["--threads", "1"])
        .env("CANDLE_NUM_THREADS", "1")
        .current_dir(folder)
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    let last = said.lines().last().unwrap_or_default();
    let value = serde_json::from_str(last).unwrap_or_else(|_| panic!("{output:?}"));
    (output, value)
}

/// A model with layers and a vocabulary that both matter, saved by a run of two steps.
const START: &str = r#"
output = "model"
rows = 8
row_tokens = 512
[new]
vocabulary = 4000
hidden_size = 256
layers = 6
heads = 4
intermediate_size = 704
[[stages]]
text = ["notes.txt"]
steps = 2
learning_rate = 1e-3
"#;

fn write_site(folder: &Path) {
    // Many different words, so that the vocabulary is as large as it is asked to be.
    let words =
        |i: u64| (0..8).map(move |at| i.wrapping_mul(2_654_435_761).rotate_left(7 * at) % 100_000);
    let lines: Vec<String> = (0..3000)
        .map(|i| {
            words(i)
                .map(|word| format!("w{word:x}"))
                .collect::<Vec<_>>()
                .join(" ")
        })
        .collect();
    fs::write(folder.join("notes.txt"), lines.join("\n")).unwrap();
    fs::write(folder.join("start.toml"), START).unwrap();
}

#[test]
fn the_estimate_of_memory_is_the_peak_of_the_run() {
    let folder = tempfile::tempdir().unwrap();
    write_site(folder.path());
    let common = [
        "--start",
        "model",
        "--data",
        "notes.txt",
        "--steps",
        "2",
        "--rows",
        "8",
    ];
    let full = [&common[..], &["--row-tokens", "512", "--output", "full"]].concat();
    let adapter = [&full[..], &["--lora-rank", "8", "--output", "adapter"]].concat();
    let adapter: Vec<&str> = adapter.into_iter().collect();
    let adapter: Vec<&str> = {
        // The option for the output may stand only once.
        let mut arguments = adapter;
        let first = arguments
            .iter()
            .position(|argument| *argument == "--output")
            .unwrap();
        arguments.drain(first..first + 2);
        arguments
    };
    for arguments in [vec!["start.toml"], full, adapter] {
        let (planned, plan) = node(folder.path(), &[&["plan"], arguments.as_slice()].concat());
        assert!(planned.status.success(), "{plan}");
        let (trained, reply) = node(folder.path(), &[&["train"], arguments.as_slice()].concat());
        assert!(trained.status.success(), "{reply}");
        let estimate = plan["data"]["memory_bytes"].as_f64().unwrap();
        let peak = reply["data"]["peak_memory_bytes"].as_f64().unwrap();
        println!(
            "{arguments:?}: estimate {estimate}, peak {peak}, {:.3}",
            estimate / peak
        );
        println!("{}", plan["data"]);
        assert!(
            (estimate / peak - 1.0).abs() < TOLERANCE,
            "{estimate} for {peak}: {plan}"
        );
    }
}

#[test]
fn a_run_that_does_not_fit_is_refused_with_what_would() {
    let folder = tempfile::tempdir().unwrap();
    write_site(folder.path());
    let (output, plan) = node(folder.path(), &["plan", "start.toml", "--memory", "300MiB"]);
    assert_eq!(output.status.code(), Some(1), "{plan}");
    let message = plan["message"].as_str().unwrap();
    assert!(
        message.contains("300.0 MiB") && message.contains("rows = "),
        "{message}"
    );
    assert!(plan["data"]["memory_bytes"].as_u64().unwrap() > 300 << 20);
    let (output, reply) = node(
        folder.path(),
        &["train", "start.toml", "--memory", "300MiB"],
    );
    assert_eq!(output.status.code(), Some(2), "{reply}");
    assert_eq!(reply["message"], message);
    assert!(!folder.path().join("model").exists());
    let (_, plan) = node(folder.path(), &["plan", "start.toml", "--memory", "20MiB"]);
    assert!(
        plan["message"]
            .as_str()
            .unwrap()
            .contains("a larger machine"),
        "{plan}"
    );
}
