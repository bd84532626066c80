//! Training data of any size and quality: memory does not grow with them, and private text stays out of everything that
//! people and programs see of a run.

#![cfg(test)]

use std::fs::{self, File};
use std::io::{BufWriter, Write as _};
use std::path::Path;
use std::process::{Command, Output};

use serde_json::Value;

/// Private text.
const MARKER: &str = "Xanthippe";

/// What the peak may grow by for a file longer by more than three times this: an allocator alone moves it by half.
const BOUND: u64 = 6 << 20;

fn node(folder: &Path, log: &str, arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_consilium-node"))
        .args(arguments)
        .args(["--threads", "1"])
        .env("CANDLE_NUM_THREADS", "1")
        .env("RUST_LOG", log)
        .current_dir(folder)
        .output()
        .unwrap()
}

fn write_start(folder: &Path) {
    let notes: String = (0..200)
        .map(|i| format!("{MARKER} has {} of kind {}\n", i % 7, i * 31 % 100))
        .collect();
    fs::write(folder.join("notes.txt"), notes).unwrap();
    let run = r#"
output = "model"
rows = 2
row_tokens = 64
held_out = 0.1
[new]
vocabulary = 300
hidden_size = 32
layers = 1
heads = 2
intermediate_size = 48
[[stages]]
text = ["notes.txt"]
steps = 3
learning_rate = 1e-3
"#;
    fs::write(folder.join("start.toml"), run).unwrap();
    let output = node(folder, "info", &["train", "start.toml"]);
    assert!(output.status.success(), "{output:?}");
}

#[test]
fn private_text_is_in_no_message_log_or_file_of_a_run() {
    let folder = tempfile::tempdir().unwrap();
    write_start(folder.path());
    let good = format!("{{\"prompt\":\"{MARKER}\",\"completion\":\" is here\"}}\n");
    let bad = [
        format!("{{\"prompt\":\"{MARKER}\",\"completion\":7}}\n"),
        format!("{{\"prompt\":\"{MARKER}\n"),
        format!("[\"{MARKER}\"]\n"),
        format!("{{\"{MARKER}\":1}}\n"),
    ];
    let mut data = good.repeat(30).into_bytes();
    data.extend(bad.concat().bytes());
    data.extend(
        format!("{MARKER}\u{e9}\n")
            .bytes()
            .filter(|&byte| byte != 0xa9),
    );
    fs::write(folder.path().join("pairs.jsonl"), data).unwrap();
    let options = [
        "--json",
        "train",
        "--start",
        "model",
        "--data",
        "pairs.jsonl",
        "--output",
        "out",
        "--steps",
        "2",
        "--row-tokens",
        "64",
        "--held-out",
        "0.2",
    ];
    let clean = |output: &Output| {
        for said in [&output.stdout, &output.stderr] {
            let said = String::from_utf8_lossy(said);
            assert!(!said.contains(MARKER), "{said}");
            // Its trace spells the text in single characters.
            assert!(!said.contains("tokenizers::"), "{said}");
        }
    };
    for allowed in ["0", "3", "5"] {
        let output = node(
            folder.path(),
            "trace",
            &[&options[..], &["--max-bad-rows", allowed]].concat(),
        );
        clean(&output);
        let said = String::from_utf8_lossy(&output.stdout).into_owned();
        let last: Value = serde_json::from_str(said.lines().last().unwrap()).unwrap();
        assert_eq!(output.status.success(), allowed == "5", "{last}");
        if allowed == "5" {
            assert_eq!(
                (
                    last["data"]["records"].as_u64(),
                    last["data"]["bad_records"].as_u64()
                ),
                (Some(30), Some(5))
            );
        } else {
            assert!(
                last["message"].as_str().unwrap().contains("pairs.jsonl:3"),
                "{last}"
            );
        }
    }
    let mut folders = vec![folder.path().join("runs")];
    let mut files = 0;
    while let Some(next) = folders.pop() {
        for entry in fs::read_dir(next).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                folders.push(path);
                continue;
            }
            files += 1;
            let bytes = fs::read(&path).unwrap();
            let found = bytes
                .windows(MARKER.len())
                .any(|window| window == MARKER.as_bytes());
            assert!(!found, "{}", path.display());
        }
    }
    assert!(files >= 3, "weights and events: {files}");
}

#[test]
fn memory_does_not_grow_with_the_data() {
    let folder = tempfile::tempdir().unwrap();
    write_start(folder.path());
    let peaks = [2000, 12_000].map(|records: u64| {
        let path = folder.path().join(format!("{records}.jsonl"));
        let mut file = BufWriter::new(File::create(&path).unwrap());
        for i in 0..records {
            let words: String = (0..60)
                .map(|at| format!("{} has {} ", MARKER, (i + at) % 7))
                .collect();
            // A field that nobody reads is long, because a short one makes the file as long only with more to encode.
            let filler = ".".repeat(1300);
            writeln!(file, "{{\"id\":\"{filler}\",\"text\":\"{words}\"}}").unwrap();
        }
        file.into_inner().unwrap().sync_all().unwrap();
        let (data, output) = (format!("{records}.jsonl"), format!("out-{records}"));
        let options = [
            "--json",
            "train",
            "--start",
            "model",
            "--data",
            &data,
            "--output",
            &output,
            "--steps",
            "2",
            "--row-tokens",
            "64",
        ];
        let output = node(folder.path(), "info", &options);
        assert!(output.status.success(), "{output:?}");
        let said = String::from_utf8(output.stdout).unwrap();
        let last: Value = serde_json::from_str(said.lines().last().unwrap()).unwrap();
        assert_eq!(last["data"]["records"], records);
        let peak = last["data"]["peak_memory_bytes"].as_u64().unwrap();
        let bytes = fs::metadata(&path).unwrap().len();
        println!("{bytes} bytes of data: peak {peak} bytes");
        (bytes, peak)
    });
    let [small, large] = peaks;
    assert!(large.0 - small.0 > 3 * BOUND, "{peaks:?}");
    assert!(large.1 < small.1 + BOUND, "{peaks:?}");
}
