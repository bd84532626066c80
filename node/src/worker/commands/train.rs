//! What `consilium-node train` does.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use consilium_protocol::Digest;
use consilium_protocol::time::UnixMillis;
use serde_json::json;

use super::plan::refuse_what_does_not_fit;
use super::train_file::{NewModel, StageFile, TrainFile};
use crate::worker::data::{
    BadRows, Batches, ChatFormat, Counts, DataError, Dataset, Encoder, Items, PlainChat,
    Preparation, Row, Source, prepare,
};
use crate::worker::error::WorkError;
use crate::worker::model::{BaseStorage, LoraConfig, ModelConfig, save_adapter};
use crate::worker::plan::Granted;
use crate::worker::source::LoadedModel;
use crate::worker::tokenizer::chat::ChatError;
use crate::worker::tokenizer::{ChatTemplate, Tokenizer, train_bpe};
use crate::worker::train::checkpoint::{Best, RunPlace};
use crate::worker::train::run::{Event, RunFolder, Shell, StagePlan};
use crate::worker::train::{TrainConfig, TrainError, Trainer};

/// Text that a new vocabulary is made from, in bytes; what follows it in the files has no say.
const VOCABULARY_TEXT: u64 = 64 << 20;

/// What a run did.
#[derive(Debug, Clone, PartialEq)]
pub struct Trained {
    /// Folder that was written.
    pub output: PathBuf,
    /// Mean loss of the last step, in nats; none if an earlier process took it.
    pub loss: Option<f64>,
    /// Lowest loss on what the last stage held out.
    pub best: Option<Best>,
    /// What was found in the data of each stage that this process read.
    pub counts: Vec<Counts>,
    /// Where the run went on, if it did.
    pub resumed: Option<u64>,
}

/// Trains a model or an adapter as a file says, or goes on where an earlier process of the same run was when it ended,
/// and writes its folder. `granted` is memory that the run may take in place of what the machine has free.
///
/// # Errors
/// A file cannot be read or written, training fails, or [`WorkError::Stopped`]: the same call then goes on.
pub fn train(
    file: &TrainFile,
    granted: Granted,
    shell: &mut Shell<'_>,
) -> Result<Trained, WorkError> {
    file.check()
        .map_err(|(field, problem)| WorkError::Setting { field, problem })?;
    refuse_what_does_not_fit(file, granted)?;
    // Every path is looked at before the first step.
    let sources = file
        .stages
        .iter()
        .map(|stage| Source::open(&stage.text))
        .collect::<Result<Vec<_>, _>>()
        .map_err(TrainError::from)?;
    let folder = RunFolder::create(file.run_folder())?;
    let settings = settings_digest(file)?;
    let place = folder.place(&settings)?;
    let before = (place.as_ref()).map_or(0, |(own, run)| run.step.saturating_sub(own.step));
    let place = place.map(|(_, run)| run);
    let started = (place.as_ref()).map_or_else(|| shell.clock.now(), |place| place.started);
    let mut run = Run {
        file,
        sources: &sources,
        folder: &folder,
        settings: &settings,
        place: place.as_ref(),
        before,
        started,
        trained: Trained {
            output: file.output.clone(),
            loss: None,
            best: None,
            counts: Vec::new(),
            resumed: place.as_ref().map(|place| place.step),
        },
    };
    let mut loaded = run.start()?;
    let first = place.as_ref().map_or(0, |place| place.stage);
    for stage in (0_u64..).zip(&file.stages).map(|(stage, _)| stage) {
        if stage >= first {
            loaded = run.stage(loaded, stage, shell)?;
        }
    }
    save(file, &loaded)?;
    folder.finish()?;
    Ok(run.trained)
}

struct Run<'a> {
    file: &'a TrainFile,
    sources: &'a [Source],
    folder: &'a RunFolder,
    settings: &'a str,
    place: Option<&'a RunPlace>,
    /// Steps of the stages before the one in hand.
    before: u64,
    started: UnixMillis,
    trained: Trained,
}

impl Run<'_> {
    /// The model before the first step, ready to be trained.
    fn start(&self) -> Result<LoadedModel, WorkError> {
        let file = self.file;
        let held = file.worker;
        let storage = match file.lora {
            None => BaseStorage::default(),
            Some(lora) => held.storage(lora.embeddings_and_head, self.folder.path())?,
        };
        let mut loaded = match (&file.start, &file.new, self.sources.first()) {
            (Some(folder), _, _) => LoadedModel::load_as(folder, &storage)?,
            (None, Some(new), Some(source)) => new_model(new, source, file)?,
            _ => {
                return Err(WorkError::Setting {
                    field: "start",
                    problem: "name a folder to start from, or describe a model in [new]".to_owned(),
                });
            }
        };
        match file.lora {
            None => {
                loaded.model.train_all()?;
                if let Some(placement) = held.placement()? {
                    loaded.model.place(placement)?;
                }
            }
            Some(lora) => {
                let config = LoraConfig {
                    rank: lora.rank,
                    alpha: lora.alpha(),
                    embeddings_and_head: lora.embeddings_and_head,
                };
                loaded.model.attach_lora(config, file.seed)?;
            }
        }
        let again = held.checkpoint_activations;
        loaded.model.checkpoint_activations(again);
        Ok(loaded)
    }

    /// Steps of a stage with these batches: what the stage says, or what its epochs have.
    fn steps(&self, stage: &StageFile, batches: Batches) -> Result<u64, WorkError> {
        match (stage.steps, stage.epochs) {
            (None, Some(epochs)) => Ok(batches.steps(epochs, self.file.accumulate)?),
            (steps, _) => Ok(steps.unwrap_or(1)),
        }
    }

    /// Trains one stage, or what is left of it.
    fn stage(
        &mut self,
        loaded: LoadedModel,
        stage: u64,
        shell: &mut Shell<'_>,
    ) -> Result<LoadedModel, WorkError> {
        let file = self.file;
        let index = usize::try_from(stage).unwrap_or(usize::MAX);
        let (Some(settings), Some(source)) = (file.stages.get(index), self.sources.get(index))
        else {
            return Ok(loaded);
        };
        let row_tokens = file.row_tokens.min(loaded.model.config().max_positions);
        let data = self.data(&loaded, source, stage, row_tokens, shell)?;
        let start = loaded.tokenizer.start_of_record();
        let seed = file.seed.wrapping_add(stage);
        let items = Items::from(Arc::clone(&data.train));
        let batches = Batches::new(items, start, file.rows, row_tokens, seed)?;
        let steps = self.steps(settings, batches)?;
        let config = TrainConfig {
            rows: file.rows,
            length: row_tokens,
            accumulate: file.accumulate,
            schedule: settings.schedule(steps),
            optimiser: file.optimiser,
            seed,
        };
        let later = file.stages.iter().skip(index + 1);
        let plan = StagePlan {
            folder: self.folder,
            settings: self.settings,
            data: data.digest().to_string(),
            started: self.started,
            stage,
            before: self.before,
            steps: self.before + steps + later.filter_map(|stage| stage.steps).sum::<u64>(),
            held_out: Items::from(Arc::clone(&data.held_out)),
            start,
            evaluate_every: file.evaluate_every,
            checkpoint_every: file.checkpoint_every,
        };
        let vocab = Arc::clone(&loaded.vocab);
        let mut trainer = Trainer::new(loaded.model, &vocab, data.train, start, config)?;
        let place = self.place.filter(|place| place.stage == stage);
        let end = plan.run(&mut trainer, place, shell)?;
        self.before += steps;
        self.trained.loss = end.loss.or(self.trained.loss);
        self.trained.best = end.best;
        Ok(LoadedModel {
            model: trainer.into_model(),
            ..loaded
        })
    }

    fn data(
        &mut self,
        loaded: &LoadedModel,
        source: &Source,
        stage: u64,
        row_tokens: usize,
        shell: &mut Shell<'_>,
    ) -> Result<Dataset, WorkError> {
        let file = self.file;
        let chat = chat_format(file.start.as_deref(), self.started)?;
        let encoder = Encoder::new(&loaded.tokenizer, &loaded.vocab, &*chat, file.loss);
        let how = Preparation {
            length: row_tokens,
            long: file.long_items,
            held_out: file.held_out,
            seed: file.seed.wrapping_add(stage),
            max_bad_rows: file.max_bad_rows,
            at_most: None,
        };
        let of_bytes = source.bytes();
        let stop = shell.stop;
        let mut tell = |counts: &Counts, done: bool| {
            if stop() {
                return Err(WorkError::Stopped);
            }
            shell.watch.event(Event::Data {
                stage,
                counts,
                of_bytes,
                done,
            })
        };
        let folder = self.folder.path();
        let data = prepare(source, &encoder, &how, folder, |counts| tell(counts, false))?;
        tell(&data.counts, true)?;
        if file.held_out > 0.0 && data.counts.held_out == 0 {
            return Err(WorkError::Setting {
                field: "held_out",
                problem: format!(
                    "of {} records none was chosen; raise it, or set it to 0",
                    data.counts.records
                ),
            });
        }
        self.trained.counts.push(data.counts);
        Ok(data)
    }
}

/// The form of conversations of a model: its chat template, or the plain one where it has none. `now` is the day that a
/// template prints.
///
/// # Errors
/// The model's own template is unusable.
pub(crate) fn chat_format(
    model: Option<&Path>,
    now: UnixMillis,
) -> Result<Box<dyn ChatFormat>, WorkError> {
    let template = model.map(|folder| ChatTemplate::load(folder, now));
    match template {
        None | Some(Err(ChatError::NoTemplate { .. })) => Ok(Box::new(PlainChat)),
        Some(template) => Ok(Box::new(template?)),
    }
}

/// Writes what was trained: a model folder, or a PEFT folder.
fn save(file: &TrainFile, loaded: &LoadedModel) -> Result<(), WorkError> {
    if file.lora.is_none() {
        return loaded.save(&file.output);
    }
    let base = file.start.clone().unwrap_or_default();
    let base = std::path::absolute(&base).unwrap_or(base);
    Ok(save_adapter(
        &loaded.model,
        &file.output,
        &base.display().to_string(),
    )?)
}

/// Digest of what the weights follow from, besides the data: a checkpoint is continued only under the same. Where files
/// and weights lie, what is computed again, and how often something is measured or written, makes no difference; on a device
/// weights are rounded.
fn settings_digest(file: &TrainFile) -> Result<String, WorkError> {
    let mut same = file.clone();
    let start = file.start.as_deref().map(model_files).transpose()?;
    same.output = PathBuf::new();
    (same.run, same.start) = (None, None);
    (same.max_bad_rows, same.checkpoint_every) = (0, 1);
    let held = &mut same.worker;
    held.device = held.device.found()?;
    (held.checkpoint_activations, held.offload) = (false, false);
    for stage in &mut same.stages {
        stage.text.clear();
    }
    let text = json!({ "settings": same, "start": start }).to_string();
    Ok(Digest::of(text.as_bytes()).to_string())
}

/// What tells one model folder from another without reading its weights: its configuration, and the weights' sizes.
fn model_files(folder: &Path) -> Result<serde_json::Value, WorkError> {
    let failed = |path: &Path| {
        let path = path.to_owned();
        move |source| WorkError::Read { path, source }
    };
    let path = folder.join("config.json");
    let config = Digest::of(&std::fs::read(&path).map_err(failed(&path))?).to_string();
    let mut weights = Vec::new();
    for entry in std::fs::read_dir(folder).map_err(failed(folder))? {
        let entry = entry.map_err(failed(folder))?;
        let name = entry.file_name().to_string_lossy().into_owned();
        if name.ends_with(".safetensors") {
            let size = std::fs::metadata(entry.path())
                .map_err(failed(folder))?
                .len();
            weights.push((name, size));
        }
    }
    weights.sort();
    Ok(json!({ "config": config, "weights": weights }))
}

fn new_model(new: &NewModel, source: &Source, file: &TrainFile) -> Result<LoadedModel, WorkError> {
    let tokenizer = new_tokenizer(new, source, file)?;
    let mut config = new.config(tokenizer.size());
    config.eos = vec![tokenizer.end_of_record()];
    LoadedModel::random(Arc::new(tokenizer), config, file.seed)
}

/// The tokenizer of a new model: one of a folder, or one made from the beginning of its text.
pub(super) fn new_tokenizer(
    new: &NewModel,
    source: &Source,
    file: &TrainFile,
) -> Result<Tokenizer, WorkError> {
    match (&new.tokenizer, new.vocabulary) {
        (Some(folder), _) => Ok(Tokenizer::load(folder)?),
        (None, Some(size)) => {
            let texts = texts(source, file.max_bad_rows)?;
            Ok(train_bpe(texts.iter().map(String::as_str), size)?)
        }
        (None, None) => Err(WorkError::Setting {
            field: "new.tokenizer",
            problem: "name its folder, or give the size of a new vocabulary".to_owned(),
        }),
    }
}

impl NewModel {
    /// Its shape with a vocabulary of `tokens`.
    pub(super) fn config(&self, tokens: usize) -> ModelConfig {
        ModelConfig::llama(
            tokens,
            self.hidden_size,
            self.layers,
            self.heads,
            self.intermediate_size,
        )
    }
}

/// The beginning of a source's text.
fn texts(source: &Source, max_bad_rows: u64) -> Result<Vec<String>, WorkError> {
    let mut texts = Vec::new();
    let mut bytes = 0;
    source
        .read(&mut BadRows::up_to(max_bad_rows), |_, placed| {
            bytes += placed.row.bytes() as u64;
            match placed.row {
                Row::Text(text) => texts.push(text),
                Row::Pair { prompt, completion } => texts.extend([prompt, completion]),
                Row::Chat { prompt, completion } => {
                    let turns = prompt.into_iter().chain(completion);
                    texts.extend(turns.map(|turn| turn.content));
                }
            }
            Ok::<bool, DataError>(bytes < VOCABULARY_TEXT)
        })
        .map_err(TrainError::from)?;
    Ok(texts)
}
