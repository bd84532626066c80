//! A training run as a file or as options of the command line.

use std::path::{Path, PathBuf};

use consilium_kernels::quant::Format;
use serde::{Deserialize, Serialize};

use crate::config::Memory;
use crate::hub::ModelPlace;
use crate::worker::data::{LongItems, Loss};
use crate::worker::error::WorkError;
use crate::worker::train::{AdamWConfig, Decay, Schedule};

/// Most epochs of a stage.
const EPOCHS: f64 = 1000.0;

/// A training run as a TOML file. Unknown keys are refused; relative paths start at the file's folder.
///
/// ```toml
/// output = "source"        # folder to write
/// start = "pivot"          # folder to start from, or [new]
/// seed = 1
///
/// [[stages]]
/// text = ["notes.jsonl", "letters/"]
/// steps = 250
/// learning_rate = 3e-3
/// ```
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TrainFile {
    /// Folder of the trained model; of the adapter, as PEFT writes it, where there is `[lora]`.
    pub output: PathBuf,
    /// Folder of checkpoints and of TensorBoard's events; `runs/` and the output's name, beside the output, by default.
    pub run: Option<PathBuf>,
    /// The model to start from: a folder, or its name in the local Hugging Face cache.
    pub start: Option<PathBuf>,
    /// A model of random weights to start from.
    pub new: Option<NewModel>,
    /// Adapters to train in place of all weights.
    pub lora: Option<LoraFile>,
    /// Where the model computes and how it is held in memory, in the words of `[worker]` of node.toml; fewer bits and offload are for
    /// adapters.
    #[serde(default)]
    pub worker: Memory,
    /// Rows of a batch.
    #[serde(default = "rows")]
    pub rows: usize,
    /// Tokens of a row.
    #[serde(default = "row_tokens")]
    pub row_tokens: usize,
    /// Batches whose gradients are added up for one step.
    #[serde(default = "one")]
    pub accumulate: usize,
    /// What becomes of records longer than a row.
    #[serde(default)]
    pub long_items: LongItems,
    /// What is learned of a pair or a conversation.
    #[serde(default)]
    pub loss: Loss,
    /// Seed of random weights, of the data's order and of the choice of held-out records.
    #[serde(default)]
    pub seed: u64,
    /// Bad records of a stage that may be skipped; the next one ends the run.
    #[serde(default)]
    pub max_bad_rows: u64,
    /// Share of the records that is held out, 0 to 0.5: the loss on them is measured, and the best weights are kept.
    #[serde(default)]
    pub held_out: f64,
    /// Steps between measurements on what is held out.
    #[serde(default = "interval")]
    pub evaluate_every: u64,
    /// Steps between checkpoints.
    #[serde(default = "interval")]
    pub checkpoint_every: u64,
    /// Constants of the optimiser.
    #[serde(default)]
    pub optimiser: AdamWConfig,
    /// Trained one after the other, each with a learning rate that rises and falls.
    pub stages: Vec<StageFile>,
}

/// A model of random weights.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NewModel {
    /// Folder with a `tokenizer.json`.
    pub tokenizer: Option<PathBuf>,
    /// Tokens of a vocabulary to be made from the text of the first stage.
    pub vocabulary: Option<usize>,
    /// Width of the residual stream.
    pub hidden_size: usize,
    /// Layers.
    pub layers: usize,
    /// Attention heads.
    pub heads: usize,
    /// Width of the feed-forward layers.
    pub intermediate_size: usize,
}

/// Low-rank adapters on all linear layers.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LoraFile {
    /// Rank of the factors.
    pub rank: usize,
    /// The product is scaled by `alpha / rank`; twice the rank by default.
    pub alpha: Option<f64>,
    /// Train the embedding and the head as well.
    #[serde(default)]
    pub embeddings_and_head: bool,
}

/// One stage.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct StageFile {
    /// Files and folders of records: JSON lines, Parquet, or plain text with one record a line.
    pub text: Vec<PathBuf>,
    /// Steps of the optimiser; a stage has either these or epochs.
    pub steps: Option<u64>,
    /// How often every record is learned; the last step may begin a record anew.
    pub epochs: Option<f64>,
    /// Highest learning rate.
    pub learning_rate: f64,
    /// How it falls.
    #[serde(default = "linear")]
    pub decay: Decay,
    /// Share of the steps on which it rises, 0 to 1.
    #[serde(default = "warmup")]
    pub warmup: f64,
    /// Learning rate at the end, as a share of the highest.
    #[serde(default = "floor")]
    pub floor: f64,
}

const fn rows() -> usize {
    12
}

const fn row_tokens() -> usize {
    96
}

const fn one() -> usize {
    1
}

const fn interval() -> u64 {
    100
}

const fn linear() -> Decay {
    Decay::Linear
}

const fn warmup() -> f64 {
    0.05
}

const fn floor() -> f64 {
    0.02
}

impl StageFile {
    /// A stage with the usual schedule.
    #[must_use]
    pub const fn new(text: Vec<PathBuf>, steps: u64, learning_rate: f64) -> Self {
        Self {
            text,
            steps: Some(steps),
            epochs: None,
            learning_rate,
            decay: linear(),
            warmup: warmup(),
            floor: floor(),
        }
    }

    /// Learning rate over its steps, of which there are as many as it says, or as its epochs have.
    #[must_use]
    pub const fn schedule(&self, steps: u64) -> Schedule {
        Schedule {
            rate: self.learning_rate,
            warmup: self.warmup,
            decay: self.decay,
            floor: self.floor,
            steps,
        }
    }
}

impl LoraFile {
    /// Scale of the product, times the rank.
    #[must_use]
    pub fn alpha(&self) -> f64 {
        self.alpha.unwrap_or(2.0 * self.rank as f64)
    }
}

impl TrainFile {
    /// A run of one stage with the usual settings.
    #[must_use]
    pub fn new(output: PathBuf, start: PathBuf, stage: StageFile) -> Self {
        Self {
            output,
            run: None,
            start: Some(start),
            new: None,
            lora: None,
            worker: Memory::default(),
            rows: rows(),
            row_tokens: row_tokens(),
            accumulate: one(),
            long_items: LongItems::default(),
            loss: Loss::default(),
            seed: 0,
            max_bad_rows: 0,
            held_out: 0.0,
            evaluate_every: interval(),
            checkpoint_every: interval(),
            optimiser: AdamWConfig::default(),
            stages: vec![stage],
        }
    }

    /// Reads a file.
    ///
    /// # Errors
    /// The first thing that is wrong with it.
    pub fn load(path: &Path) -> Result<Self, WorkError> {
        let text = std::fs::read_to_string(path).map_err(|source| WorkError::Read {
            path: path.to_owned(),
            source,
        })?;
        let refuse = |problem: String| WorkError::File {
            path: path.to_owned(),
            problem,
        };
        let mut file: Self = toml::from_str(&text)
            .map_err(|error| refuse(error.to_string().trim_end().to_owned()))?;
        file.check()
            .map_err(|(field, problem)| refuse(format!("{field}: {problem}")))?;
        let folder = path.parent().unwrap_or_else(|| Path::new("."));
        let mut paths = vec![&mut file.output];
        paths.extend(&mut file.run);
        paths.extend(file.new.iter_mut().filter_map(|new| new.tokenizer.as_mut()));
        paths.extend(file.stages.iter_mut().flat_map(|stage| &mut stage.text));
        for path in paths {
            *path = folder.join(&path);
        }
        if let Some(start) = &mut file.start {
            *start = ModelPlace::new(folder, start).resolve()?;
        }
        Ok(file)
    }

    /// Checks every value; gives the field that is wrong and what would be right.
    ///
    /// # Errors
    /// The first bad field.
    pub fn check(&self) -> Result<(), (&'static str, String)> {
        let either = |field, problem: &str| Err((field, problem.to_owned()));
        if self.start.is_some() == self.new.is_some() {
            return either(
                "start",
                "name a folder to start from, or describe a model in [new], not both",
            );
        }
        if let Some(new) = &self.new
            && new.tokenizer.is_some() == new.vocabulary.is_some()
        {
            return either(
                "new.tokenizer",
                "name its folder, or give new.vocabulary the size of one to make, not both",
            );
        }
        if self.new.is_some() && self.lora.is_some() {
            return either(
                "lora",
                "adapters need a trained model: name its folder as `start`",
            );
        }
        if self.lora.is_none() && self.worker.base != Format::F32 {
            return either(
                "worker.base",
                "weights of fewer bits cannot be trained: train adapters (lora.rank, --lora-rank), or leave it out",
            );
        }
        if self.lora.is_none() && self.worker.offload {
            return either(
                "worker.offload",
                "weights that stay behind cannot be trained: train adapters (lora.rank, --lora-rank), or leave it out",
            );
        }
        if self.stages.is_empty() {
            return either("stages", "at least one [[stages]] is needed");
        }
        whole("rows", self.rows as u64, 1..=4096)?;
        whole("row_tokens", self.row_tokens as u64, 2..=1 << 20)?;
        whole("accumulate", self.accumulate as u64, 1..=4096)?;
        whole("evaluate_every", self.evaluate_every, 1..=u64::MAX)?;
        whole("checkpoint_every", self.checkpoint_every, 1..=u64::MAX)?;
        real("held_out", self.held_out, 0.0, 0.5)?;
        if let Some(lora) = &self.lora {
            whole("lora.rank", lora.rank as u64, 1..=1 << 16)?;
            above_zero("lora.alpha", lora.alpha(), 1e6)?;
        }
        let AdamWConfig {
            beta1,
            beta2,
            eps,
            weight_decay,
            clip,
        } = self.optimiser;
        real("optimiser.beta1", beta1, 0.0, 1.0 - f64::EPSILON)?;
        real("optimiser.beta2", beta2, 0.0, 1.0 - f64::EPSILON)?;
        above_zero("optimiser.eps", eps, 1.0)?;
        real("optimiser.weight_decay", weight_decay, 0.0, 1e3)?;
        above_zero("optimiser.clip", clip, f64::MAX)?;
        self.stages.iter().try_for_each(StageFile::check)
    }

    /// Folder of checkpoints and events.
    #[must_use]
    pub fn run_folder(&self) -> PathBuf {
        self.run.clone().unwrap_or_else(|| {
            let name = self.output.file_name().unwrap_or_default();
            self.output.with_file_name("runs").join(name)
        })
    }
}

impl StageFile {
    fn check(&self) -> Result<(), (&'static str, String)> {
        if self.text.is_empty() {
            return Err(("stages.text", "name at least one file or folder".into()));
        }
        match (self.steps, self.epochs) {
            (Some(steps), None) => whole("stages.steps", steps, 1..=1 << 40)?,
            (None, Some(epochs)) => above_zero("stages.epochs", epochs, EPOCHS)?,
            (Some(_), Some(_)) => {
                return Err(("stages.steps", "given beside epochs; leave one out".into()));
            }
            (None, None) => {
                return Err((
                    "stages.steps",
                    "give steps, or epochs in their place".into(),
                ));
            }
        }
        above_zero("stages.learning_rate", self.learning_rate, 1e3)?;
        real("stages.warmup", self.warmup, 0.0, 1.0)?;
        real("stages.floor", self.floor, 0.0, 1.0)
    }
}

fn whole(
    field: &'static str,
    value: u64,
    range: std::ops::RangeInclusive<u64>,
) -> Result<(), (&'static str, String)> {
    if range.contains(&value) {
        return Ok(());
    }
    let problem = match *range.end() {
        u64::MAX => format!("{value}, expected at least {}", range.start()),
        end => format!("{value}, expected {} to {end}", range.start()),
    };
    Err((field, problem))
}

fn real(
    field: &'static str,
    value: f64,
    least: f64,
    most: f64,
) -> Result<(), (&'static str, String)> {
    if (least..=most).contains(&value) {
        return Ok(());
    }
    Err((field, format!("{value}, expected {least} to {most}")))
}

fn above_zero(field: &'static str, value: f64, most: f64) -> Result<(), (&'static str, String)> {
    if value > 0.0 && value <= most {
        return Ok(());
    }
    Err((
        field,
        format!("{value}, expected more than 0 and at most {most}"),
    ))
}
