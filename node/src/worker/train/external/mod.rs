//! Training by the site's own command, for models that want more than one device: `torchrun`, Slurm's `srun`, a script.
//!
//! The command is started without a shell, in a process group of its own, and told what to do by its environment:
//!
//! | variable | meaning |
//! |---|---|
//! | `CONSILIUM_BASE_MODEL` | folder of the model to start from |
//! | `CONSILIUM_DATA` | files and folders of records, joined by `:` |
//! | `CONSILIUM_OUTPUT` | an empty folder, into which the adapter goes as PEFT writes it |
//! | `CONSILIUM_RANK`, `CONSILIUM_ALPHA` | rank of the factors, scale of their product times the rank |
//! | `CONSILIUM_TARGET_MODULES` | names of the layers with factors, joined by `,` |
//! | `CONSILIUM_STEPS`, `CONSILIUM_LEARNING_RATE` | steps of the optimiser, highest learning rate |
//! | `CONSILIUM_ROWS`, `CONSILIUM_ROW_TOKENS` | rows of a batch over all processes, tokens of a row |
//! | `CONSILIUM_SEED` | seed of the data's order and the fresh factors |
//!
//! The rest of the environment is this process's own. What the command prints goes to a log file beside the output. When it
//! ends well its folder is checked as a stranger's would be, and only then gets the name of the output.

mod check;
mod process;
#[cfg(test)]
mod tests;

use std::ffi::OsString;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

pub use check::{AdapterSummary, check_adapter};

use crate::config::ExternalCommand;
use crate::worker::error::WorkError;

/// Ends the names of the folder that the command writes into and of its log.
const UNCHECKED: &str = ".unchecked";
const LOG: &str = ".log";

/// Layers with factors where none are named: all linear ones of a Llama block.
pub const TARGETS: [&str; 7] = [
    "q_proj",
    "k_proj",
    "v_proj",
    "o_proj",
    "gate_proj",
    "up_proj",
    "down_proj",
];

/// What the command is to do.
#[derive(Debug, Clone, PartialEq)]
pub struct ExternalRun {
    /// Folder of the model to start from.
    pub base: PathBuf,
    /// Files and folders of records.
    pub data: Vec<PathBuf>,
    /// Folder of the adapter, which does not exist yet.
    pub output: PathBuf,
    /// Rank of the factors, at least 1.
    pub rank: usize,
    /// Scale of their product, times the rank.
    pub alpha: f64,
    /// Names of the layers with factors.
    pub target_modules: Vec<String>,
    /// Steps of the optimiser.
    pub steps: u64,
    /// Highest learning rate.
    pub learning_rate: f64,
    /// Rows of a batch.
    pub rows: usize,
    /// Tokens of a row.
    pub row_tokens: usize,
    /// Seed of the data's order and the fresh factors.
    pub seed: u64,
}

/// Why training by the site's command failed. The texts name the log, whose last lines they quote.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ExternalError {
    /// A value that the environment cannot carry, or a path that cannot be used.
    #[error("{field}: {problem}")]
    Run {
        /// Which.
        field: &'static str,
        /// What is wrong, and what would be right.
        problem: String,
    },
    /// A file or folder of the run.
    #[error("cannot {doing} {}", path.display())]
    File {
        /// What was tried.
        doing: &'static str,
        /// Where.
        path: PathBuf,
        /// Why it failed.
        source: io::Error,
    },
    /// The program cannot be started.
    #[error("cannot start `{program}` of train.external.command; is it installed, and on PATH?")]
    Start {
        /// Program.
        program: String,
        /// Why.
        source: io::Error,
    },
    /// It ended with a failure.
    #[error("`{program}` ended with {status}; its last lines, from {}:\n{last}", log.display())]
    Failed {
        /// Program.
        program: String,
        /// Exit status or signal.
        status: std::process::ExitStatus,
        /// All that it printed.
        log: PathBuf,
        /// The end of that.
        last: String,
    },
    /// It took too long and was ended.
    #[error(
        "`{program}` took more than train.external.timeout_hours, {hours:.2}, and was ended; its last lines, from {}:\n{last}",
        log.display()
    )]
    Timeout {
        /// Program.
        program: String,
        /// The limit.
        hours: f64,
        /// All that it printed.
        log: PathBuf,
        /// The end of that.
        last: String,
    },
    /// What it wrote is no adapter of this model as it was asked for.
    #[error("{}: {field}: {problem}", path.display())]
    Adapter {
        /// File.
        path: PathBuf,
        /// Key or tensor.
        field: String,
        /// What is wrong, and what would be right.
        problem: String,
    },
}

/// Runs the command, checks the adapter that it wrote, and gives it the name of the output.
///
/// # Errors
/// A run that cannot be described, a command that fails or takes too long, an adapter that is not what was asked for, or
/// [`WorkError::Stopped`] once `stop` says so; the command has then ended as well.
pub fn train_external(
    command: &ExternalCommand,
    run: &ExternalRun,
    stop: &dyn Fn() -> bool,
) -> Result<AdapterSummary, WorkError> {
    let environment = run.environment()?;
    if run.output.exists() {
        return Err(refuse("output", "exists; choose another folder, or remove it").into());
    }
    let (unchecked, log) = (beside(&run.output, UNCHECKED), beside(&run.output, LOG));
    let file = |doing, path: &Path| {
        let path = path.to_owned();
        move |source| ExternalError::File {
            doing,
            path,
            source,
        }
    };
    // What an earlier run left there was never checked.
    match fs::remove_dir_all(&unchecked) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            return Err(file("remove", &unchecked)(error).into());
        }
        _ => {}
    }
    fs::create_dir_all(&unchecked).map_err(file("make", &unchecked))?;
    tracing::info!(command = ?command.command, log = %log.display(), "training begins");
    process::run(command, environment, &log, stop)?;
    let summary = check_adapter(&unchecked, run)?;
    fs::rename(&unchecked, &run.output).map_err(file("rename", &unchecked))?;
    Ok(summary)
}

impl ExternalRun {
    /// The variables that describe it.
    fn environment(&self) -> Result<Vec<(&'static str, OsString)>, ExternalError> {
        if self.data.is_empty() || self.target_modules.is_empty() {
            return Err(refuse("data, target_modules", "at least one is needed"));
        }
        if self.rank == 0 || !self.alpha.is_finite() || !self.learning_rate.is_finite() {
            return Err(refuse(
                "rank, alpha, learning_rate",
                "expected a rank of 1 or more and finite numbers",
            ));
        }
        let here = |path: &Path| {
            std::path::absolute(path).map_err(|source| ExternalError::File {
                doing: "find",
                path: path.to_owned(),
                source,
            })
        };
        let data = self
            .data
            .iter()
            .map(|path| here(path))
            .collect::<Result<Vec<_>, _>>()?;
        let data = std::env::join_paths(data)
            .map_err(|_| refuse("data", "a path with `:` cannot be handed over; rename it"))?;
        let name = |name: &String| !name.is_empty() && !name.contains([',', ' ', '\n']);
        if !self.target_modules.iter().all(name) {
            return Err(refuse(
                "target_modules",
                "expected names of layers such as q_proj",
            ));
        }
        let text = |value: &dyn std::fmt::Display| OsString::from(value.to_string());
        Ok(vec![
            ("CONSILIUM_BASE_MODEL", here(&self.base)?.into()),
            ("CONSILIUM_DATA", data),
            (
                "CONSILIUM_OUTPUT",
                here(&beside(&self.output, UNCHECKED))?.into(),
            ),
            ("CONSILIUM_RANK", text(&self.rank)),
            ("CONSILIUM_ALPHA", text(&self.alpha)),
            (
                "CONSILIUM_TARGET_MODULES",
                self.target_modules.join(",").into(),
            ),
            ("CONSILIUM_STEPS", text(&self.steps)),
            ("CONSILIUM_LEARNING_RATE", text(&self.learning_rate)),
            ("CONSILIUM_ROWS", text(&self.rows)),
            ("CONSILIUM_ROW_TOKENS", text(&self.row_tokens)),
            ("CONSILIUM_SEED", text(&self.seed)),
        ])
    }
}

fn refuse(field: &'static str, problem: &str) -> ExternalError {
    ExternalError::Run {
        field,
        problem: problem.to_owned(),
    }
}

/// The path with more at the end of its name.
fn beside(path: &Path, more: &str) -> PathBuf {
    let mut name = path.file_name().unwrap_or_default().to_os_string();
    name.push(more);
    path.with_file_name(name)
}
