//! What `consilium-node plan` does, and the check that `train` makes before it starts.

use std::path::Path;

use super::train::{chat_format, new_tokenizer};
use super::train_file::{StageFile, TrainFile};
use crate::config::DeviceChoice;
use crate::worker::data::{self, Counts, Encoder, Preparation, Source};
use crate::worker::device::ON_DEVICE;
use crate::worker::error::WorkError;
use crate::worker::model::{ModelConfig, ModelError};
use crate::worker::plan::fit::refusal;
use crate::worker::plan::{
    Budget, DeviceRoom, Estimate, Granted, Room, Shape, Time, Trained, speed,
};
use crate::worker::tokenizer::Tokenizer;
use crate::worker::train::run::{Event, Shell};

/// Text of a stage that is tokenised to count its tokens, in bytes.
const SAMPLE: u64 = 64 << 20;

/// What a run will need.
#[derive(Debug)]
pub struct Planned {
    /// Where it computes.
    pub device: DeviceChoice,
    /// The peak, in parts.
    pub estimate: Estimate,
    /// Memory that it may take.
    pub room: Room,
    /// Why it does not fit.
    pub refusal: Option<WorkError>,
    /// Steps of the optimiser.
    pub steps: u64,
    /// How long it takes; none of a device that is elsewhere.
    pub time: Option<Time>,
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
    granted: Granted,
    shell: &mut Shell<'_>,
) -> Result<Planned, WorkError> {
    file.check()
        .map_err(|(field, problem)| WorkError::Setting { field, problem })?;
    let (config, shape) = sizes(file)?;
    let found = match file.worker.device.found() {
        // A device elsewhere, whose memory is told.
        Err(_) if granted.device.is_some() => None,
        found => Some(found?),
    };
    let device = found.unwrap_or(DeviceChoice::Cuda);
    let room = room(device, granted)?;
    let refusal = refusal(&config, &shape, &room, file.start.is_some());
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
    let time = match found {
        None => None,
        Some(_) => {
            let rate = speed(&config, &shape, item_tokens, shell.clock)?;
            Some(Time::of(&config, &shape, item_tokens, steps, rate))
        }
    };
    Ok(Planned {
        device,
        estimate: Estimate::of(&config, &shape, &room),
        room,
        refusal,
        steps,
        time,
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
    granted: Granted,
) -> Result<(), WorkError> {
    let (config, shape) = sizes(file)?;
    let room = room(file.worker.device.found()?, granted)?;
    let refused = refusal(&config, &shape, &room, file.start.is_some());
    refused.map_or(Ok(()), Err)
}

/// Memory that a run may take, here and on a device.
fn room(device: DeviceChoice, granted: Granted) -> Result<Room, WorkError> {
    let device = match device {
        DeviceChoice::Cpu if granted.device.is_some() => {
            return Err(WorkError::Setting {
                field: "--device-memory",
                problem: "the run computes on the processors; add --device cuda, or leave it out"
                    .to_owned(),
            });
        }
        DeviceChoice::Cpu => None,
        _ => Some(DeviceRoom {
            value_bytes: ON_DEVICE.size_in_bytes(),
            budget: Budget::of_device(granted.device),
        }),
    };
    Ok(Room {
        host: Budget::find(granted.host),
        device,
    })
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
