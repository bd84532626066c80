//! A run whose chat template prints the date goes on, on another day, with the data that it began with.

#![cfg(test)]

use std::cell::Cell;
use std::fs;
use std::path::Path;
use std::sync::Arc;

use consilium_node::worker::commands::{LoraFile, StageFile, TrainFile, Trained, train};
use consilium_node::worker::model::ModelConfig;
use consilium_node::worker::plan::Granted;
use consilium_node::worker::tokenizer::train_bpe;
use consilium_node::worker::train::run::{Event, Shell, Watch};
use consilium_node::worker::{LoadedModel, WorkError};
use consilium_protocol::Clock;
use consilium_protocol::time::UnixMillis;

const DAY: u64 = 24 * 3600 * 1000;

/// Noon of a day since 1970.
#[derive(Debug)]
struct Day(u64);

impl Clock for Day {
    fn now(&self) -> UnixMillis {
        UnixMillis(self.0 * DAY + DAY / 2)
    }
}

/// Asks the run to end after a step.
struct EndAfter<'a> {
    step: u64,
    is_due: &'a Cell<bool>,
}

impl Watch for EndAfter<'_> {
    fn event(&mut self, event: Event<'_>) -> Result<(), WorkError> {
        if let Event::Step(report) = event {
            self.is_due.set(report.step == self.step);
        }
        Ok(())
    }
}

/// A chat model whose template begins with the date, and conversations.
fn site(folder: &Path) {
    let talks: Vec<String> = (0..30)
        .map(|i| format!("ref {i} -> use {}0mg", i * 7 % 5))
        .collect();
    let tokenizer = train_bpe(talks.iter().map(String::as_str), 290).unwrap();
    let config = ModelConfig::llama(tokenizer.size(), 16, 1, 2, 24);
    let model = LoadedModel::random(Arc::new(tokenizer), config, 1).unwrap();
    model.save(&folder.join("base")).unwrap();
    let template = "{{ strftime_now('%d %b %Y') }}{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}\
                    {% if add_generation_prompt %}<assistant>{% endif %}";
    fs::write(folder.join("base/chat_template.jinja"), template).unwrap();
    let lines: String = talks
        .iter()
        .map(|talk| {
            let (asked, answer) = talk.split_once(" -> ").unwrap();
            format!(
                "{{\"messages\":[{{\"role\":\"user\",\"content\":\"{asked}\"}},\
                 {{\"role\":\"assistant\",\"content\":\"{answer}\"}}]}}\n"
            )
        })
        .collect();
    fs::write(folder.join("chat.jsonl"), lines).unwrap();
}

fn run(folder: &Path, output: &str, day: u64, end_after: u64) -> Result<Trained, WorkError> {
    let stage = StageFile::new(vec![folder.join("chat.jsonl")], 6, 1e-2);
    let file = TrainFile {
        rows: 2,
        row_tokens: 64,
        lora: Some(LoraFile {
            rank: 2,
            alpha: None,
            embeddings_and_head: false,
        }),
        ..TrainFile::new(folder.join(output), folder.join("base"), stage)
    };
    let is_due = Cell::new(false);
    let mut watch = EndAfter {
        step: end_after,
        is_due: &is_due,
    };
    let mut shell = Shell {
        clock: &Day(day),
        stop: &|| is_due.get(),
        watch: &mut watch,
    };
    train(&file, Granted::default(), &mut shell)
}

#[test]
fn a_run_that_goes_on_tomorrow_sees_the_data_of_today() {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    site(folder);
    let weights =
        |name: &str| fs::read(folder.join(name).join("adapter_model.safetensors")).unwrap();
    run(folder, "whole", 20_000, 0).unwrap();
    let stopped = run(folder, "parts", 20_000, 3).unwrap_err();
    assert!(matches!(stopped, WorkError::Stopped), "{stopped}");
    let trained = run(folder, "parts", 20_001, 0).unwrap();
    assert_eq!(trained.resumed, Some(3));
    assert!(
        weights("whole") == weights("parts"),
        "the date changed the data"
    );
    run(folder, "other", 20_001, 0).unwrap();
    assert!(weights("whole") != weights("other"), "the date has no say");
}
