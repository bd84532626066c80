//! What `consilium-node plan` does, and the check that `train` makes before it starts.

use std::path::Path;

use super::train::{chat_format, new_tokenizer};
use super::train_file::{StageFile, TrainFile};
use crate::config::DeviceChoice;
use crate::worker::data::{self, Counts, Encoder, Preparation, Source};
use crate::worker::error::WorkError;
use crate::worker::model::{ModelConfig, ModelError};
use crate::worker::plan::fit::refusal;
use crate::worker::plan::{Budget, Memory, Shape, Time, Trained, speed};
use crate::worker::tokenizer::Tokenizer;
use crate::worker::train::run::{Event, Shell};

/// Text of a stage that is tokenised to count its tokens, in bytes.
const SAMPLE: u64 = 64 << 20;

/// What a run will need.
#[derive(Debug)]
pub struct Planned {
    /// Where it computes.
    pub device: DeviceChoice,
    /// The peak, in parts; none on a device, whose memory is not estimated.
    pub memory: Option<Memory>,
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
    let device = file.worker.device.found()?;
    let budget = budget(device, memory);
    let refusal = budget
        .as_ref()
        .and_then(|budget| refusal(&config, &shape, budget, file.start.is_some()));
    let stages = count(file, &config, shell)?;
    let of_stages = file.stages.iter().zip(&stages);
    let steps = of_stages
        .map(|(stage, counted)| counted.steps(stage, &shape))
        .sum();
    let is_sample = stages.iter().any(|counted| counted.is_sample);
    let mut counts = Counts::default();
    for counted in &stages {
        counts.add(&counted.counts);
    }
    let item_tokens = counts.tokens / counts.items.max(1);
    let item_tokens = usize::try_from(item_tokens).unwrap_or(shape.row_tokens);
    let rate = speed(&config, &shape, item_tokens, shell.clock)?;
    Ok(Planned {
        device,
        memory: (device == DeviceChoice::Cpu).then(|| Memory::of(&config, &shape)),
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
    let budget = budget(file.worker.device.found()?, memory);
    let refused = budget.and_then(|budget| refusal(&config, &shape, &budget, can_adapt));
    refused.map_or(Ok(()), Err)
}

/// Memory that a run may take on the processors; the estimate is of no other.
fn budget(device: DeviceChoice, memory: Option<u64>) -> Option<Budget> {
    match device {
        DeviceChoice::Cpu => Budget::find(memory),
        _ => None,
    }
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
        held: file.worker,
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

/// What was found in the data of a stage, or in their beginning.
struct Counted {
    counts: Counts,
    /// Bytes of all files.
    of_bytes: u64,
    /// Whether there is more than what was counted.
    is_sample: bool,
}

impl Counted {
    /// Steps that a stage says, or about as many as its epochs have: rows are taken to be full.
    fn steps(&self, stage: &StageFile, shape: &Shape) -> u64 {
        let (None, Some(epochs)) = (stage.steps, stage.epochs) else {
            return stage.steps.unwrap_or(1);
        };
        let share = match self.is_sample {
            true => self.of_bytes as f64 / self.counts.text_bytes.max(1) as f64,
            false => 1.0,
        };
        let tokens = epochs * self.counts.tokens as f64 * share.max(1.0);
        let steps = tokens / (shape.tokens() * shape.accumulate).max(1) as f64;
        #[expect(
            clippy::cast_possible_truncation,
            clippy::cast_sign_loss,
            reason = "positive; a cast saturates"
        )]
        let steps = steps.ceil() as u64;
        steps.max(1)
    }
}

/// Counts records and tokens of each stage.
fn count(
    file: &TrainFile,
    config: &ModelConfig,
    shell: &mut Shell<'_>,
) -> Result<Vec<Counted>, WorkError> {
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
    let chat = chat_format(file.start.as_deref(), shell.clock.now())?;
    let encoder = Encoder::new(&tokenizer, &vocab, &*chat, file.loss);
    let how = Preparation {
        length: file.row_tokens.min(config.max_positions),
        long: file.long_items,
        held_out: file.held_out,
        seed: file.seed,
        max_bad_rows: file.max_bad_rows,
        at_most: Some(SAMPLE),
    };
    let mut stages = Vec::with_capacity(sources.len());
    for (stage, source) in (0_u64..).zip(&sources) {
        let of_bytes = source.bytes();
        let counts = data::count(source, &encoder, &how, |counts| {
            shell.watch.event(Event::Data {
                stage,
                counts,
                of_bytes,
                done: false,
            })
        })?;
        stages.push(Counted {
            is_sample: counts.text_bytes >= SAMPLE,
            counts,
            of_bytes,
        });
    }
    Ok(stages)
}
