//! What `consilium-node train`, `plan`, `score`, `tokens` and `evaluate` do.

mod plan;
mod tokens;
mod train;
mod train_file;

use std::ops::Range;
use std::path::Path;

use consilium_kernels::RecordShape;
use consilium_protocol::evaluation::Score;
use consilium_protocol::reference::ReferenceSet;

use super::error::WorkError;
use super::files::write_atomic;
use super::holdout;
use super::model::load_adapter;
use super::monitor::Monitor;
use super::score::{ScoreStats, score_shard};
use super::source::LoadedModel;
use crate::config::DeviceChoice;
use crate::hub::ModelPlace;

pub use plan::{Planned, plan};
pub use tokens::tokens;
pub(crate) use train::chat_format;
pub use train::{Trained, train};
pub use train_file::{LoraFile, NewModel, StageFile, TrainFile};

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
    device: DeviceChoice,
    reference: &Path,
    items: Option<Range<u64>>,
    shape: &RecordShape,
    output: &Path,
    monitor: &mut dyn Monitor,
) -> Result<ScoreStats, WorkError> {
    let folder = model.place.resolve()?;
    let mut source = LoadedModel::load_on(&folder, device)?;
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
    device: DeviceChoice,
    holdout: &Path,
    monitor: &mut dyn Monitor,
) -> Result<Score, WorkError> {
    let items = holdout::read(holdout)?;
    let mut loaded = LoadedModel::load_on(&ModelPlace::from(model).resolve()?, device)?;
    if let Some(adapter) = adapter {
        load_adapter(&mut loaded.model, adapter)?;
    }
    super::evaluate::evaluate(&loaded, &items, monitor)
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;
    use crate::worker::model::{LoraConfig, save_adapter};
    use crate::worker::plan::Granted;
    use crate::worker::testing::{self, LINES};

    const CPU: DeviceChoice = DeviceChoice::Cpu;

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
        let new = "output = \"first\"\nworker.device = \"cpu\"\nrow_tokens = 30\n[new]\nvocabulary = 300\nhidden_size = 32\n\
                   layers = 1\nheads = 2\nintermediate_size = 40\n";
        fs::write(at("first.toml"), format!("{new}{}", stages(10))).unwrap();
        let second = format!(
            "output = \"second\"\nstart = \"first\"\n[worker]\ndevice = \"cpu\"\n{}",
            stages(30)
        );
        fs::write(at("second.toml"), &second).unwrap();
        let mut scores = Vec::new();
        for name in ["first", "second"] {
            let file = TrainFile::load(&at(&format!("{name}.toml"))).unwrap();
            train(&file, Granted::default(), &mut testing::shell(&mut ())).unwrap();
            let holdout = at("holdout.jsonl");
            scores.push(
                evaluate(&at(name), None, CPU, &holdout, &mut ())
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
        let stats = score(&scored, CPU, &holdout, Some(2..5), &shape, &output, &mut ()).unwrap();
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
        let same = evaluate(&at("second"), Some(&adapter), CPU, &holdout, &mut ()).unwrap();
        assert!(
            (same.bits_per_byte - scores[1]).abs() < 1e-6,
            "a fresh adapter changes nothing"
        );

        for (from, to, named) in [
            ("start = \"first\"", "", "start"),
            ("steps = 30", "epochs = 0", "stages.epochs: 0"),
            ("steps = 30", "", "stages.steps: give steps"),
            ("steps = 30", "steps = 30\nepochs = 1", "leave one out"),
            (
                "device = \"cpu\"",
                "base = \"fp4\"",
                "\"fp4\", expected \"f32\"",
            ),
            ("device = \"cpu\"", "base = \"nf4\"", "worker.base"),
            ("device = \"cpu\"", "offload = true", "worker.offload"),
            ("device = \"cpu\"", "device = \"gpu\"", "`cuda`"),
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
