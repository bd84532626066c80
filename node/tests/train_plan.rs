//! What `plan` says a run will need is what the run takes, and a run that does not fit never starts.

#![cfg(test)]

use std::fs;
use std::path::Path;
use std::process::{Command, Output};
use std::sync::Arc;

use consilium_node::worker::LoadedModel;
use consilium_node::worker::model::ModelConfig;
use consilium_node::worker::tokenizer::Tokenizer;
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

/// A model whose weights and optimiser are most of the memory, saved by a run of two steps.
const START: &str = r#"
output = "model"
rows = 2
row_tokens = 64
[new]
vocabulary = 2500
hidden_size = 384
layers = 3
heads = 6
intermediate_size = 1024
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

/// A larger model than the first run's, with its tokenizer and random weights: they are most of the memory of an adapter's
/// training on short rows.
fn write_large(folder: &Path) {
    let tokenizer = Tokenizer::load(&folder.join("model")).unwrap();
    let config = ModelConfig::llama(tokenizer.size(), 512, 8, 8, 1536);
    let large = LoadedModel::random(Arc::new(tokenizer), config, 1).unwrap();
    large.save(&folder.join("large")).unwrap();
}

fn adapter<'a>(start: &'a str, output: &'a str, more: &[&'a str]) -> Vec<&'a str> {
    let options = [
        "--start",
        start,
        "--data",
        "notes.txt",
        "--steps",
        "2",
        "--output",
        output,
        "--lora-rank",
        "8",
    ];
    [&options[..], more].concat()
}

/// Plans a run and trains; returns the peak, which must be what the plan says, and the loss of the last steps.
fn peak_as_planned(folder: &Path, arguments: &[&str]) -> (f64, f64) {
    let (planned, plan) = node(folder, &[&["plan"], arguments].concat());
    assert!(planned.status.success(), "{plan}");
    let (trained, reply) = node(folder, &[&["train"], arguments].concat());
    assert!(trained.status.success(), "{reply}");
    let estimate = plan["data"]["memory_bytes"].as_f64().unwrap();
    let peak = reply["data"]["peak_memory_bytes"].as_f64().unwrap();
    println!(
        "{arguments:?}: estimate {estimate}, peak {peak}, {:.3}",
        estimate / peak
    );
    assert!(
        (estimate / peak - 1.0).abs() < TOLERANCE,
        "{arguments:?}: {estimate} for {peak}: {plan}"
    );
    // Time depends on who else uses the machine.
    println!("{} seconds a step", plan["data"]["seconds_per_step"]);
    assert!(plan["data"]["seconds_per_step"].as_f64().unwrap() > 0.0);
    (peak, reply["data"]["loss_nats"].as_f64().unwrap())
}

#[test]
fn the_estimate_of_memory_is_the_peak_of_the_run_however_the_model_is_held() {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    write_site(folder);
    peak_as_planned(folder, &["start.toml"]);
    write_large(folder);

    // Activations are most of the memory of the long rows, the weights are of the short ones.
    let long = ["--rows", "8", "--row-tokens", "256"];
    let short = ["--rows", "2", "--row-tokens", "32"];
    let runs: [(&str, &str, &[&str], &[&str]); 7] = [
        ("model", "kept", &long, &[]),
        ("model", "again", &long, &["--checkpoint-activations"]),
        ("large", "f32", &short, &[]),
        ("large", "bf16", &short, &["--base", "bf16"]),
        ("large", "int8", &short, &["--base", "int8"]),
        ("large", "nf4", &short, &["--base", "nf4"]),
        ("large", "file", &short, &["--offload"]),
    ];
    let run = |(start, output, rows, held): (&str, &str, &[&str], &[&str])| {
        let more = [rows, held].concat();
        peak_as_planned(folder, &adapter(start, output, &more))
    };
    let [kept, again, plain, held @ ..] = at_once(runs, run);
    let (kept, again) = (kept.0, again.0);
    assert!(again < 0.72 * kept, "{again} for {kept}");
    // A file changes the order of sums alone.
    let bounds = [(0.8, 0.01), (0.7, 0.01), (0.65, 0.03), (0.75, 1e-5)];
    for ((run, (share, tolerance)), (peak, loss)) in runs[3..].iter().zip(bounds).zip(held) {
        let (output, off) = (run.1, (loss / plain.1 - 1.0).abs());
        println!("{output}: loss off by {off:.2e}");
        assert!(peak < share * plain.0, "{output}: {peak} for {}", plain.0);
        assert!(off < tolerance, "{output}: {loss} for {}", plain.1);
    }
    let bytes = |output: &str| {
        let path = folder.join(output).join("adapter_model.safetensors");
        fs::read(path).unwrap()
    };
    assert!(
        bytes("kept") == bytes("again"),
        "computing again changes no number"
    );
    assert!(bytes("f32") != bytes("nf4"), "four bits do");
    let cases = [
        ("290MiB", "--rows"),
        ("220MiB", "--checkpoint-activations"),
        ("185MiB", "--base"),
        ("108MiB", "--offload"),
    ];
    at_once(cases, |(memory, named)| a_fix_fits(folder, memory, named));
}

/// Processes of one thread each, all started together: what each needs and says does not depend on the others.
fn at_once<T: Copy + Send, R: Send, const N: usize>(
    cases: [T; N],
    run: impl Fn(T) -> R + Sync,
) -> [R; N] {
    std::thread::scope(|scope| {
        let run = &run;
        let threads = cases.map(|case| scope.spawn(move || run(case)));
        threads.map(|thread| thread.join().unwrap())
    })
}

/// What a refusal proposes is taken, and then fits.
fn a_fix_fits(folder: &Path, memory: &str, named: &str) {
    let plan = |rows: &[&str], fix: &[&str]| {
        let options = [rows, &["--memory", memory], fix].concat();
        let options = adapter("large", "never", &options);
        node(folder, &[&["plan"], options.as_slice()].concat())
    };
    let rows = ["--rows", "4", "--row-tokens", "256"];
    let (output, refusal) = plan(&rows, &[]);
    assert_eq!(output.status.code(), Some(1), "{memory}: {refusal}");
    let message = refusal["message"].as_str().unwrap().to_owned();
    println!("{memory}: {message}");
    let fix = message.split("it fits with ").nth(1).expect(&message);
    assert!(fix.contains(named), "{memory}: {message}");
    let fix = fix.split(';').next().unwrap();
    let fix: Vec<&str> = fix.split(' ').collect();
    let kept: Vec<&str> = rows
        .chunks(2)
        .filter(|option| !fix.contains(&option[0]))
        .flatten()
        .copied()
        .collect();
    let (output, fits) = plan(&kept, &fix);
    assert!(output.status.success(), "{fix:?}: {fits}");
}

#[test]
fn a_run_that_does_not_fit_is_refused_with_what_would() {
    let folder = tempfile::tempdir().unwrap();
    write_site(folder.path());
    let large = [
        "start.toml",
        "--rows",
        "64",
        "--row-tokens",
        "256",
        "--memory",
        "400MiB",
    ];
    let (output, plan) = node(folder.path(), &[&["plan"], &large[..]].concat());
    assert_eq!(output.status.code(), Some(1), "{plan}");
    let message = plan["message"].as_str().unwrap();
    assert!(
        message.contains("400.0 MiB") && message.contains("--rows "),
        "{message}"
    );
    assert!(plan["data"]["memory_bytes"].as_u64().unwrap() > 400 << 20);
    let (output, reply) = node(folder.path(), &[&["train"], &large[..]].concat());
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

#[test]
fn a_device_that_is_elsewhere_is_planned_for_with_the_memory_it_has() {
    let folder = tempfile::tempdir().unwrap();
    write_site(folder.path());
    let plan = |more: &[&str]| node(folder.path(), &[&["plan", "start.toml"], more].concat());
    let cuda = ["--device", "cuda", "--device-memory"];
    let (output, said) = plan(&[&cuda[..], &["2GiB"]].concat());
    assert!(output.status.success(), "{said}");
    let bytes = |name: &str| said["data"][name].as_u64().expect(name);
    let parts = [
        "weights",
        "gradients",
        "optimiser",
        "activations",
        "head",
        "process",
    ];
    for part in parts {
        assert!(bytes(&format!("device_{part}_bytes")) > 0, "{part}: {said}");
    }
    assert_eq!(bytes("device_available_bytes"), 2 << 30);
    assert!(bytes("memory_bytes") > 0 && bytes("loading_bytes") > 0);

    // The refusal says where, and its fix fits.
    let rows = ["--rows", "64", "--row-tokens", "256"];
    let (output, said) = plan(&[&cuda[..], &["600MiB"], &rows].concat());
    assert_eq!(output.status.code(), Some(1), "{said}");
    let message = said["message"].as_str().unwrap();
    assert!(
        message.contains("of memory on the device and 600.0 MiB are free (--device-memory)"),
        "{message}"
    );
    let fix = message.split("it fits with ").nth(1).expect(message);
    let fix: Vec<&str> = fix.split(';').next().unwrap().split(' ').collect();
    let kept = rows.chunks(2).filter(|option| !fix.contains(&option[0]));
    let kept: Vec<&str> = kept.flatten().copied().collect();
    let (output, said) = plan(&[&cuda[..], &["600MiB"], &kept, &fix].concat());
    assert!(output.status.success(), "{fix:?}: {said}");

    let (output, said) = plan(&["--device", "cpu", "--device-memory", "1GiB"]);
    assert_eq!(output.status.code(), Some(2), "{said}");
    let message = said["message"].as_str().unwrap();
    assert!(message.contains("--device-memory") && message.contains("--device cuda"));
}
