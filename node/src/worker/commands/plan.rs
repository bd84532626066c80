//! What `consilium-node plan` does, and the check that `train` makes before it starts.

use std::path::Path;

use super::train::{chat_format, new_tokenizer};
use super::train_file::TrainFile;
use crate::worker::data::{self, Counts, Encoder, Preparation, Source};
use crate::worker::error::{WorkError, size};
use crate::worker::model::{ModelConfig, ModelError};
use crate::worker::plan::{Budget, Memory, Shape, Time, Trained, speed};
use crate::worker::tokenizer::Tokenizer;
use crate::worker::train::run::{Event, Shell};

/// Text of a stage that is tokenised to count its tokens, in bytes.
const SAMPLE: u64 = 64 << 20;

/// What a run will need.
#[derive(Debug)]
pub struct Planned {
    /// The peak, in parts.
    pub memory: Memory,
    /// Memory that it may take, if anything says so.
    pub budget: Option<Budget>,
    /// Why it does not fit.
    pub refusal: Option<WorkError>,
    /// How long it takes.
    pub time: Time,
    /// What was found in the data of all stages.
    pub counts: Counts,
    /// Whether the data have more than what was counted.
    pub is_sample: bool,
}

/// Reads the data, estimates memory from the model's configuration, and time from a few steps of a small model
/// like it. No weights are read.
///
/// # Errors
/// The settings, the model's configuration or the data are bad.
pub fn plan(
    file: &TrainFile,
    memory: Option<u64>,
    shell: &mut Shell<'_>,
) -> Result<Planned, WorkError> {
    file.check()
        .map_err(|(field, problem)| WorkError::Setting { field, problem })?;
    let (config, shape) = sizes(file)?;
    let budget = Budget::find(memory);
    let refusal = budget
        .as_ref()
        .and_then(|budget| refusal(&config, &shape, budget, file.start.is_some()));
    let (counts, is_sample) = count(file, &config, shell)?;
    let steps = file.stages.iter().map(|stage| stage.steps).sum();
    let item_tokens = counts.tokens / counts.items.max(1);
    let item_tokens = usize::try_from(item_tokens).unwrap_or(shape.row_tokens);
    let rate = speed(&config, &shape, item_tokens, shell.clock)?;
    Ok(Planned {
        memory: Memory::of(&config, &shape),
        budget,
        refusal,
        time: Time::of(&config, &shape, item_tokens, steps, rate),
        counts,
        is_sample,
    })
}

/// Refuses a run that the machine has no memory for.
///
/// # Errors
/// [`WorkError::Memory`] with what would fit; or the model's configuration is bad.
pub(super) fn refuse_what_does_not_fit(
    file: &TrainFile,
    memory: Option<u64>,
) -> Result<(), WorkError> {
    let (config, shape) = sizes(file)?;
    let can_adapt = file.start.is_some();
    let budget = Budget::find(memory);
    let refused = budget.and_then(|budget| refusal(&config, &shape, &budget, can_adapt));
    refused.map_or(Ok(()), Err)
}

/// Shape of the model and of a step, from the model's files alone.
fn sizes(file: &TrainFile) -> Result<(ModelConfig, Shape), WorkError> {
    let tokenizer = file
        .start
        .as_deref()
        .or_else(|| file.new.as_ref()?.tokenizer.as_deref());
    let config = match (&file.start, &file.new) {
        (Some(folder), _) => ModelConfig::load(folder).map_err(ModelError::from)?,
        (None, Some(new)) => {
            let tokens = match tokenizer {
                Some(folder) => Tokenizer::load(folder)?.size(),
                None => new.vocabulary.unwrap_or(0),
            };
            new.config(tokens)
        }
        (None, None) => return Err(no_model()),
    };
    let trained = file.lora.map_or(Trained::All, |lora| Trained::Adapters {
        rank: lora.rank,
        embeddings_and_head: lora.embeddings_and_head,
    });
    let shape = Shape {
        rows: file.rows,
        row_tokens: file.row_tokens.min(config.max_positions),
        accumulate: file.accumulate,
        trained,
        file_bytes: file.start.as_deref().map_or(0, weight_bytes),
        tokenizer_bytes: tokenizer.map_or(0, |folder| bytes_of(&folder.join("tokenizer.json"))),
    };
    Ok((config, shape))
}

fn no_model() -> WorkError {
    WorkError::Setting {
        field: "start",
        problem: "name a folder to start from, or describe a model in [new]".to_owned(),
    }
}

fn bytes_of(path: &Path) -> usize {
    std::fs::metadata(path).map_or(0, |file| usize::try_from(file.len()).unwrap_or(usize::MAX))
}

fn weight_bytes(folder: &Path) -> usize {
    let Ok(entries) = std::fs::read_dir(folder) else {
        return 0;
    };
    entries
        .flatten()
        .map(|entry| entry.path())
        .filter(|path| path.extension().is_some_and(|end| end == "safetensors"))
        .map(|path| bytes_of(&path))
        .fold(0, usize::saturating_add)
}

/// Why a run does not fit, with the smallest change that would. `can_adapt` says whether there is a model for adapters.
fn refusal(
    config: &ModelConfig,
    shape: &Shape,
    budget: &Budget,
    can_adapt: bool,
) -> Option<WorkError> {
    let needs = |shape: &Shape| Memory::of(config, shape).total() as u64;
    let needed = needs(shape);
    if needed <= budget.bytes {
        return None;
    }
    let fits = |shape: &Shape| needs(shape) <= budget.bytes;
    let rows = (1..shape.rows)
        .rev()
        .find(|&rows| fits(&Shape { rows, ..*shape }));
    let shorter = Shape {
        rows: 1,
        row_tokens: shape.row_tokens.min(256),
        ..*shape
    };
    let adapters = Shape {
        trained: Trained::Adapters {
            rank: 8,
            embeddings_and_head: false,
        },
        ..shorter
    };
    let fix = match rows {
        Some(rows) => format!("rows = {rows} fits; raise accumulate to keep the batch"),
        None if fits(&shorter) => format!("rows = 1 and row_tokens = {} fit", shorter.row_tokens),
        None if can_adapt && shape.trained == Trained::All && fits(&adapters) => {
            "train adapters in place of all weights: --lora-rank 8 --rows 1 --row-tokens 256 fit"
                .to_owned()
        }
        None => format!(
            "this model needs at least {}; take a smaller one, or a larger machine",
            size(needs(if can_adapt { &adapters } else { &shorter }))
        ),
    };
    Some(WorkError::Memory {
        needed,
        available: budget.bytes,
        source_of: budget.source.clone(),
        fix,
    })
}

/// Counts records and tokens of all stages; true if there are more than those.
fn count(
    file: &TrainFile,
    config: &ModelConfig,
    shell: &mut Shell<'_>,
) -> Result<(Counts, bool), WorkError> {
    let sources = file
        .stages
        .iter()
        .map(|stage| Source::open(&stage.text))
        .collect::<Result<Vec<_>, _>>()?;
    let tokenizer = match (&file.start, &file.new, sources.first()) {
        (Some(folder), _, _) => Tokenizer::load(folder)?,
        (None, Some(new), Some(source)) => new_tokenizer(new, source, file)?,
        _ => return Err(no_model()),
    };
    let vocab = tokenizer.vocab(config.vocab_size.max(tokenizer.size()))?;
    let chat = chat_format(file.start.as_deref())?;
    let encoder = Encoder::new(&tokenizer, &vocab, &*chat, file.loss);
    let how = Preparation {
        length: file.row_tokens.min(config.max_positions),
        long: file.long_items,
        held_out: file.held_out,
        seed: file.seed,
        max_bad_rows: file.max_bad_rows,
        at_most: Some(SAMPLE),
    };
    let mut sum = Counts::default();
    let mut is_sample = false;
    for (stage, source) in (0_u64..).zip(&sources) {
        let counts = data::count(source, &encoder, &how, |counts| {
            let event = Event::Data {
                stage,
                counts,
                of_bytes: source.bytes(),
                done: false,
            };
            shell.watch.event(event)
        })?;
        is_sample |= counts.text_bytes >= SAMPLE;
        sum.add(&counts);
    }
    Ok((sum, is_sample))
}
