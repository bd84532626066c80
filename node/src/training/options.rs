//! A training run as its options describe it.

use crate::args::TrainArgs;
use crate::config::Memory;
use crate::hub::ModelPlace;
use crate::worker::WorkError;
use crate::worker::commands::{LoraFile, StageFile, TrainFile};
use crate::worker::train::external::{ExternalRun, TARGETS};

use super::refuse;

/// Learning rates where none is named.
const RATE: f64 = 1e-4;
const ADAPTER_RATE: f64 = 2e-4;

/// Tokens of a row where there is no file.
const ROW_TOKENS: usize = 1024;

/// Rows of a batch where there is no file.
const ROWS: usize = 4;

/// The run that the options describe, on top of a file if there is one.
pub(super) fn of_args(args: &TrainArgs) -> Result<TrainFile, WorkError> {
    let mut file = match (&args.file, &args.output, &args.start) {
        (Some(path), _, _) => TrainFile::load(path)?,
        (None, Some(output), Some(start)) => {
            let rate = args.learning_rate.unwrap_or(match args.lora_rank {
                Some(_) => ADAPTER_RATE,
                None => RATE,
            });
            // Options replace the length below, or the check asks for one.
            let mut stage = StageFile::new(args.data.clone(), 1, rate);
            stage.steps = None;
            TrainFile {
                rows: ROWS,
                row_tokens: ROW_TOKENS,
                ..TrainFile::new(output.clone(), start.clone(), stage)
            }
        }
        _ => {
            let problem = "name a file, or --start, --data, --output, and --steps or --epochs";
            return Err(refuse("file", problem));
        }
    };
    stage_of_args(args, &mut file)?;
    if let Some(start) = &args.start {
        let folder = ModelPlace::from(start.as_path()).resolve()?;
        (file.start, file.new) = (Some(folder), None);
    }
    file.output = args.output.clone().unwrap_or(file.output);
    file.run = args.run.clone().or(file.run);
    file.rows = args.rows.unwrap_or(file.rows);
    file.row_tokens = args.row_tokens.unwrap_or(file.row_tokens);
    file.accumulate = args.accumulate.unwrap_or(file.accumulate);
    file.held_out = args.held_out.unwrap_or(file.held_out);
    file.checkpoint_every = args.checkpoint_every.unwrap_or(file.checkpoint_every);
    file.seed = args.seed.unwrap_or(file.seed);
    file.max_bad_rows = args.max_bad_rows.unwrap_or(file.max_bad_rows);
    if let Some(rank) = args.lora_rank {
        let embeddings_and_head = file.lora.is_some_and(|lora| lora.embeddings_and_head);
        file.lora = Some(LoraFile {
            rank,
            alpha: args.lora_alpha,
            embeddings_and_head,
        });
    }
    let held = file.worker;
    file.worker = Memory {
        base: args.base.unwrap_or(held.base),
        checkpoint_activations: args
            .checkpoint_activations
            .unwrap_or(held.checkpoint_activations),
        offload: args.offload.unwrap_or(held.offload),
        device: args.device.unwrap_or(held.device),
    };
    file.check()
        .map_err(|(field, problem)| WorkError::Setting { field, problem })?;
    Ok(file)
}

/// Replaces what options say of the only stage.
fn stage_of_args(args: &TrainArgs, file: &mut TrainFile) -> Result<(), WorkError> {
    let length = (args.steps, args.epochs);
    if args.data.is_empty() && args.learning_rate.is_none() && length == (None, None) {
        return Ok(());
    }
    let [stage] = file.stages.as_mut_slice() else {
        return Err(refuse(
            "--data, --steps, --epochs, --learning-rate",
            "the file has several stages; change them in the file",
        ));
    };
    if !args.data.is_empty() {
        stage.text.clone_from(&args.data);
    }
    if length != (None, None) {
        (stage.steps, stage.epochs) = length;
    }
    stage.learning_rate = args.learning_rate.unwrap_or(stage.learning_rate);
    Ok(())
}

/// What the command is told; what it could not be told is refused.
pub(super) fn external_run(file: &TrainFile, modules: &[String]) -> Result<ExternalRun, WorkError> {
    let (Some(base), Some(lora), [stage]) = (&file.start, file.lora, file.stages.as_slice()) else {
        let problem =
            "a command trains an adapter in one stage: give start, a LoRA rank and one stage";
        return Err(refuse("--external", problem));
    };
    if lora.embeddings_and_head {
        return Err(refuse(
            "lora.embeddings_and_head",
            "a command trains factors alone",
        ));
    }
    if file.held_out > 0.0 {
        return Err(refuse(
            "held_out",
            "a command is not told what to hold out; leave it out",
        ));
    }
    if file.worker != Memory::default() {
        let problem = "the command decides how it holds the model; leave them out";
        let fields = "base, checkpoint_activations, offload, device";
        return Err(refuse(fields, problem));
    }
    let Some(steps) = stage.steps else {
        let problem = "the command does not know the rows of an epoch; give --steps";
        return Err(refuse("epochs", problem));
    };
    let usual = || TARGETS.map(str::to_owned).to_vec();
    Ok(ExternalRun {
        base: base.clone(),
        data: stage.text.clone(),
        output: file.output.clone(),
        rank: lora.rank,
        alpha: lora.alpha(),
        target_modules: if modules.is_empty() {
            usual()
        } else {
            modules.to_vec()
        },
        steps,
        learning_rate: stage.learning_rate,
        rows: file.rows.saturating_mul(file.accumulate),
        row_tokens: file.row_tokens,
        seed: file.seed,
    })
}
