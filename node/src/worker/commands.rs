//! What `consilium-node train`, `score` and `evaluate` do.

use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use consilium_kernels::RecordShape;
use consilium_protocol::evaluation::Score;
use consilium_protocol::reference::ReferenceSet;
use serde::Deserialize;

use super::data::{Record, cut, read_records, tokenize};
use super::error::WorkError;
use super::files::write_atomic;
use super::holdout;
use super::model::{ModelConfig, load_adapter};
use super::monitor::Monitor;
use super::score::{ScoreStats, score_shard};
use super::source::LoadedModel;
use super::tokenizer::{Tokenizer, train_bpe};
use super::train::{TrainConfig, TrainError, Trainer};
use crate::hub::ModelPlace;

/// A training run as a TOML file. Unknown keys are refused; relative paths start at the file's folder.
///
/// ```toml
/// output = "source"        # folder to write
/// start = "pivot"          # folder to start from, or [new]
/// seed = 1
///
/// [[stages]]
/// text = ["notes.txt", "letters.jsonl"]
/// steps = 250
/// learning_rate = 3e-3
/// ```
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TrainFile {
    /// Folder of the trained model.
    pub output: PathBuf,
    /// Folder of the model to start from.
    pub start: Option<PathBuf>,
    /// A model of random weights to start from.
    pub new: Option<NewModel>,
    /// Rows of a step.
    #[serde(default = "rows")]
    pub rows: usize,
    /// Tokens of a row; longer records are cut.
    #[serde(default = "row_tokens")]
    pub row_tokens: usize,
    /// Seed of random weights and of the data's order.
    #[serde(default)]
    pub seed: u64,
    /// Trained one after the other, each with a learning rate that rises and falls.
    pub stages: Vec<StageFile>,
}

/// A model of random weights.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
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

/// One stage.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct StageFile {
    /// Files of records: JSON lines, or plain text with one record a line.
    pub text: Vec<PathBuf>,
    /// Steps of the optimiser.
    pub steps: u64,
    /// Highest learning rate.
    pub learning_rate: f64,
}

/// One stage in memory.
#[derive(Debug, Clone, PartialEq)]
pub struct Stage {
    /// What is learned.
    pub records: Vec<Record>,
    /// Steps of the optimiser.
    pub steps: u64,
    /// Highest learning rate.
    pub rate: f64,
}

/// Rows of a step.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Packing {
    /// Rows.
    pub rows: usize,
    /// Tokens of one row.
    pub row_tokens: usize,
}

const fn rows() -> usize {
    12
}

const fn row_tokens() -> usize {
    96
}

impl TrainFile {
    /// Reads a file.
    ///
    /// # Errors
    /// The first thing that is wrong with it.
    pub fn load(path: &Path) -> Result<Self, WorkError> {
        let text = std::fs::read_to_string(path).map_err(|source| WorkError::Read {
            path: path.to_owned(),
            source,
        })?;
        let refuse = |problem: &str| WorkError::File {
            path: path.to_owned(),
            problem: problem.trim_end().to_owned(),
        };
        let mut file: Self = toml::from_str(&text).map_err(|error| refuse(&error.to_string()))?;
        if file.start.is_some() == file.new.is_some() {
            return Err(refuse(
                "start: name a folder to start from, or describe a model in [new], not both",
            ));
        }
        if let Some(new) = &file.new
            && new.tokenizer.is_some() == new.vocabulary.is_some()
        {
            return Err(refuse(
                "new.tokenizer: name its folder, or give new.vocabulary the size of one to make, not both",
            ));
        }
        if file.stages.is_empty() {
            return Err(refuse("stages: at least one [[stages]] is needed"));
        }
        let folder = path.parent().unwrap_or_else(|| Path::new("."));
        let mut paths = vec![&mut file.output];
        paths.extend(&mut file.start);
        paths.extend(file.new.iter_mut().filter_map(|new| new.tokenizer.as_mut()));
        paths.extend(file.stages.iter_mut().flat_map(|stage| &mut stage.text));
        for path in paths {
            *path = folder.join(&path);
        }
        Ok(file)
    }
}

/// Trains a model as a file says, writes its folder, and returns the mean loss of the last step in nats.
///
/// # Errors
/// A file cannot be read or written, or training fails.
pub fn train(file: &TrainFile, monitor: &mut dyn Monitor) -> Result<f64, WorkError> {
    let stages = file
        .stages
        .iter()
        .map(|stage| {
            let mut records = Vec::new();
            for path in &stage.text {
                records.extend(read_records(path).map_err(TrainError::from)?);
            }
            Ok(Stage {
                records,
                steps: stage.steps,
                rate: stage.learning_rate,
            })
        })
        .collect::<Result<Vec<_>, WorkError>>()?;
    let model = match (&file.start, &file.new) {
        (Some(folder), _) => LoadedModel::load(folder)?,
        (None, Some(new)) => new_model(new, &stages, file.seed)?,
        (None, None) => {
            return Err(WorkError::Setting {
                field: "start",
                problem: "name a folder to start from, or describe a model in [new]".to_owned(),
            });
        }
    };
    let packing = Packing {
        rows: file.rows,
        row_tokens: file.row_tokens,
    };
    let (model, loss) = train_stages(model, &stages, packing, file.seed, monitor)?;
    model.save(&file.output)?;
    Ok(loss)
}

/// Trains all weights on one stage after the other; adapters, if any, are folded in first. Returns the model and the mean
/// loss of the last step in nats.
///
/// # Errors
/// Records that cannot be tokenised, a run that diverges, or a monitor that says stop.
pub fn train_stages(
    mut loaded: LoadedModel,
    stages: &[Stage],
    packing: Packing,
    seed: u64,
    monitor: &mut dyn Monitor,
) -> Result<(LoadedModel, f64), WorkError> {
    let total = stages.iter().map(|stage| stage.steps).sum();
    let end_of_record = loaded.tokenizer.start_of_record();
    let row_tokens = packing.row_tokens.min(loaded.model.config().max_positions);
    let (mut done, mut loss) = (0, 0.0);
    for (index, stage) in (0_u64..).zip(stages) {
        let items = tokenize(&loaded.tokenizer, &stage.records).map_err(TrainError::from)?;
        let items = cut(items, row_tokens).into();
        let mut model = loaded.model;
        model.train_all()?;
        let config = TrainConfig {
            rows: packing.rows,
            length: row_tokens,
            ..TrainConfig::new(stage.steps, stage.rate, seed.wrapping_add(index))
        };
        let vocab = &loaded.vocab;
        let mut trainer = Trainer::new(model, vocab, items, end_of_record, config)?;
        while !trainer.is_done() {
            loss = trainer.step()?.loss;
            done += 1;
            monitor.advance(done, total, Some(loss))?;
        }
        loaded.model = trainer.into_model();
    }
    Ok((loaded, loss))
}

/// The model that scores.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ScoredModel {
    /// Where it is.
    pub place: ModelPlace,
    /// Whether its chat template wraps the contexts of items.
    pub chat_template: bool,
}

/// Scores `items` (all if absent) of a reference file with a model and writes the shard.
///
/// # Errors
/// A file cannot be read or written, or scoring fails.
pub fn score(
    model: &ScoredModel,
    reference: &Path,
    items: Option<Range<u64>>,
    shape: &RecordShape,
    output: &Path,
    monitor: &mut dyn Monitor,
) -> Result<ScoreStats, WorkError> {
    let folder = model.place.resolve()?;
    let mut source = LoadedModel::load(&folder)?;
    if model.chat_template {
        source.use_chat_template(&folder)?;
    }
    let bytes = std::fs::read(reference).map_err(|source| WorkError::Read {
        path: reference.to_owned(),
        source,
    })?;
    let reference = ReferenceSet::parse(&bytes).map_err(|error| WorkError::File {
        path: reference.to_owned(),
        problem: error.to_string(),
    })?;
    let items = items.unwrap_or_else(|| 0..reference.items().len() as u64);
    let scored = score_shard(&source, &reference, items, shape, monitor)?;
    let bytes = scored.shard.to_bytes()?;
    write_atomic(output, [bytes.as_slice()]).map_err(|source| WorkError::Write {
        path: output.to_owned(),
        source,
    })?;
    Ok(scored.stats)
}

/// Measures the model of a folder, with the adapter of a PEFT folder if one is given, on a holdout file.
///
/// # Errors
/// A file cannot be read, or the model cannot be measured.
pub fn evaluate(
    model: &Path,
    adapter: Option<&Path>,
    holdout: &Path,
    monitor: &mut dyn Monitor,
) -> Result<Score, WorkError> {
    let items = holdout::read(holdout)?;
    let mut loaded = LoadedModel::load(&ModelPlace::from(model).resolve()?)?;
    if let Some(adapter) = adapter {
        load_adapter(&mut loaded.model, adapter)?;
    }
    super::evaluate::evaluate(&loaded, &items, monitor)
}

fn new_model(new: &NewModel, stages: &[Stage], seed: u64) -> Result<LoadedModel, WorkError> {
    let tokenizer = match (&new.tokenizer, new.vocabulary, stages.first()) {
        (Some(folder), _, _) => Tokenizer::load(folder)?,
        (None, Some(size), Some(stage)) => {
            let texts = stage
                .records
                .iter()
                .flat_map(|record| [record.context.as_str(), record.target.as_str()]);
            train_bpe(texts, size)?
        }
        _ => {
            return Err(WorkError::Setting {
                field: "new.tokenizer",
                problem: "name its folder, or give the size of a new vocabulary".to_owned(),
            });
        }
    };
    let mut config = ModelConfig::llama(
        tokenizer.size(),
        new.hidden_size,
        new.layers,
        new.heads,
        new.intermediate_size,
    );
    config.eos = vec![tokenizer.end_of_record()];
    LoadedModel::random(Arc::new(tokenizer), config, seed)
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;
    use crate::worker::model::{LoraConfig, save_adapter};
    use crate::worker::testing::LINES;

    #[test]
    fn a_model_is_trained_from_nothing_then_on_scored_and_evaluated() {
        let folder = tempfile::tempdir().unwrap();
        let at = |name: &str| folder.path().join(name);
        fs::write(at("text.txt"), LINES.join("\n")).unwrap();
        let jsonl = |line: &&str| format!("{{\"target\":\"{line}\"}}\n");
        fs::write(
            at("holdout.jsonl"),
            LINES.iter().map(jsonl).collect::<String>(),
        )
        .unwrap();
        let stages = |steps: u64| {
            format!("[[stages]]\ntext = [\"text.txt\"]\nsteps = {steps}\nlearning_rate = 3e-3\n")
        };
        let new = "output = \"first\"\nrow_tokens = 30\n[new]\nvocabulary = 300\nhidden_size = 32\n\
                   layers = 1\nheads = 2\nintermediate_size = 40\n";
        fs::write(at("first.toml"), format!("{new}{}", stages(10))).unwrap();
        let second = format!("output = \"second\"\nstart = \"first\"\n{}", stages(30));
        fs::write(at("second.toml"), &second).unwrap();
        let mut scores = Vec::new();
        for name in ["first", "second"] {
            let file = TrainFile::load(&at(&format!("{name}.toml"))).unwrap();
            train(&file, &mut ()).unwrap();
            let holdout = at("holdout.jsonl");
            scores.push(
                evaluate(&at(name), None, &holdout, &mut ())
                    .unwrap()
                    .bits_per_byte,
            );
        }
        assert!(scores[1] < 0.9 * scores[0], "{scores:?}");

        let shape = RecordShape {
            k: 4,
            fill_permille: 995,
        };
        let output = at("shard.safetensors");
        let holdout = at("holdout.jsonl");
        let scored = ScoredModel {
            place: at("second").into(),
            chat_template: false,
        };
        let stats = score(&scored, &holdout, Some(2..5), &shape, &output, &mut ()).unwrap();
        let shard = consilium_protocol::shard::Shard::parse(&fs::read(output).unwrap()).unwrap();
        assert_eq!(
            (shard.header.items(), shard.positions()),
            (2..5, stats.positions)
        );

        let mut adapted = LoadedModel::load(&at("second")).unwrap();
        let lora = LoraConfig {
            rank: 2,
            alpha: 4.0,
            embeddings_and_head: true,
        };
        adapted.model.attach_lora(lora, 5).unwrap();
        save_adapter(&adapted.model, &at("adapter"), "second").unwrap();
        let adapter = at("adapter");
        let same = evaluate(&at("second"), Some(&adapter), &holdout, &mut ()).unwrap();
        assert!(
            (same.bits_per_byte - scores[1]).abs() < 1e-6,
            "a fresh adapter changes nothing"
        );

        for (from, to, named) in [
            ("start = \"first\"", "", "start"),
            (
                "start = \"first\"",
                "start = \"first\"\nsteps = 3",
                "unknown field",
            ),
            ("[[stages]]", "[[stage]]", "unknown field"),
        ] {
            fs::write(at("bad.toml"), second.replacen(from, to, 1)).unwrap();
            let error = TrainFile::load(&at("bad.toml")).unwrap_err().to_string();
            assert!(
                error.contains(named) && error.contains("bad.toml"),
                "{error}"
            );
        }
    }
}
