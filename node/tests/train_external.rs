//! `consilium-node train --external` hands the run to the site's own command and takes only what was asked for.

#![cfg(test)]

use std::fs;
use std::path::Path;
use std::process::{Command, Output};
use std::sync::Arc;

use consilium_node::worker::LoadedModel;
use consilium_node::worker::model::{LoraConfig, ModelConfig, save_adapter};
use consilium_node::worker::tokenizer::train_bpe;
use consilium_protocol::{ConsortiumId, InstitutionId};

/// A base model, the adapter that a command would train, and a node.toml whose command copies it.
fn site(folder: &Path) {
    let lines = ["the old mill stands on pale sand", "the pale river"];
    let tokenizer = train_bpe(lines.into_iter().cycle().take(40), 300).unwrap();
    let config = ModelConfig::llama(tokenizer.size(), 32, 1, 2, 48);
    let mut model = LoadedModel::random(Arc::new(tokenizer), config, 1).unwrap();
    model.save(&folder.join("base")).unwrap();
    let lora = LoraConfig {
        rank: 2,
        alpha: 4.0,
        embeddings_and_head: false,
    };
    model.model.attach_lora(lora, 5).unwrap();
    save_adapter(&model.model, &folder.join("made"), "base").unwrap();
    fs::write(folder.join("notes.txt"), lines.join("\n")).unwrap();
    let (demo, clinic) = (ConsortiumId::new("demo"), InstitutionId::new("clinic"));
    let text = consilium_node::config::template(&demo.unwrap(), &clinic.unwrap(), "127.0.0.1:1");
    let script = "test -r \"$CONSILIUM_DATA\" && cp \"$1\"/* \"$CONSILIUM_OUTPUT\"";
    let made = folder.join("made").display().to_string();
    let command = format!(
        "[train.external]\ncommand = {:?}\n",
        ["sh", "-c", script, "sh", &made]
    );
    fs::write(folder.join("node.toml"), text + &command).unwrap();
}

fn train(folder: &Path, more: &[&str]) -> Output {
    let command = [
        "--json",
        "train",
        "--external",
        "--config",
        "node.toml",
        "--start",
        "base",
    ];
    Command::new(env!("CARGO_BIN_EXE_consilium-node"))
        .current_dir(folder)
        .args(command)
        .args(["--data", "notes.txt", "--output", "adapter", "--steps", "9"])
        .args(more)
        .output()
        .unwrap()
}

#[test]
fn the_commands_adapter_is_taken_if_it_is_the_one_asked_for() {
    let folder = tempfile::tempdir().unwrap();
    site(folder.path());
    for (more, problem) in [
        (vec!["--lora-rank", "3"], "r: is 2, expected 3"),
        (vec![], "LoRA rank"),
        (vec!["--lora-rank", "2", "--held-out", "0.1"], "held_out"),
        (
            vec!["--lora-rank", "2", "--target-modules", "q_proj"],
            "expected q_proj",
        ),
    ] {
        let output = train(folder.path(), &more);
        let text = String::from_utf8(output.stdout).unwrap();
        assert_eq!(output.status.code(), Some(2), "{text}");
        assert!(text.contains(problem), "{problem} is not in: {text}");
        assert!(!folder.path().join("adapter").exists());
    }
    let output = train(folder.path(), &["--lora-rank", "2"]);
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(
        output.status.success() && text.contains("\"layers\":7"),
        "{text}"
    );
    let made = |name: &str| fs::read(folder.path().join(name).join("adapter_model.safetensors"));
    assert_eq!(made("adapter").unwrap(), made("made").unwrap());
}
