//! Commands and options of the program.

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand, ValueEnum};
use consilium_kernels::quant::Format;
use consilium_protocol::{ConsortiumId, InstitutionId};

use crate::config::{DeviceChoice, format};
use crate::scorer::{RawServer, ScorerError, ScorerSettings};

/// The program at an institution: trains, scores, and takes part in rounds.
#[derive(Debug, Parser)]
#[command(name = "consilium-node", version, about, arg_required_else_help = true)]
pub(crate) struct Cli {
    /// Print one JSON object instead of lines.
    #[arg(long, global = true)]
    pub(crate) json: bool,
    /// Form of the log on stderr; RUST_LOG says how much of it.
    #[arg(long, global = true, value_enum, default_value_t = LogFormat::Text)]
    pub(crate) log_format: LogFormat,
    #[command(subcommand)]
    pub(crate) command: Command,
}

/// Form of the log.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum LogFormat {
    /// Lines for people.
    Text,
    /// One object a line.
    Json,
}

impl LogFormat {
    pub(crate) const fn name(self) -> &'static str {
        match self {
            Self::Text => "text",
            Self::Json => "json",
        }
    }
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Write a configuration and make this site's keys. Nothing is ever replaced.
    Init(InitArgs),
    /// Take part in rounds until stopped: agent, worker, and scorer where the source is behind a server.
    Run(ConfigArgs),
    /// Only the half with the network, keys, gate and ledger.
    Agent(ConfigArgs),
    /// Only the half with data and models; it needs no network.
    Worker {
        #[command(flatten)]
        config: ConfigArgs,
        /// End when the process that started this one is gone.
        #[arg(long, hide = true)]
        supervised: bool,
    },
    /// Only the part that asks the site's model server to score public text; it is given no private file.
    Scorer(ScorerArgs),
    /// Train a model on private text, or go on with a run that was interrupted.
    Train(TrainArgs),
    /// Say what a training run would need, memory and time, and whether it fits this machine.
    Plan(TrainArgs),
    /// Score a reference set with a model: the records that a round would ask for.
    Score(ScoreArgs),
    /// Write the tokens of a reference set's targets into it, for a round in token space, and print what the round names.
    Tokens(TokensArgs),
    /// Measure a model on private items.
    Evaluate(EvaluateArgs),
    /// What this node did and is doing, from its files.
    Status(ConfigArgs),
    /// The record of everything that left this site.
    Ledger {
        #[command(subcommand)]
        command: LedgerCommand,
    },
}

#[derive(Debug, Subcommand)]
pub(crate) enum LedgerCommand {
    /// Print every line.
    Show(ConfigArgs),
    /// Check the chain.
    Verify(ConfigArgs),
}

#[derive(Debug, Args)]
pub(crate) struct ConfigArgs {
    /// The configuration file.
    #[arg(
        long,
        short,
        env = "CONSILIUM_NODE_CONFIG",
        default_value = "node.toml"
    )]
    pub(crate) config: PathBuf,
}

#[derive(Debug, Args)]
pub(crate) struct InitArgs {
    /// Name of the consortium: a-z, 0-9 and '-'.
    #[arg(long)]
    pub(crate) consortium: ConsortiumId,
    /// Name of this institution: a-z, 0-9 and '-'.
    #[arg(long)]
    pub(crate) institution: InstitutionId,
    /// Where the aggregator listens, host:port.
    #[arg(long)]
    pub(crate) aggregator: String,
    /// Folder of the configuration.
    #[arg(long, default_value = ".")]
    pub(crate) out: PathBuf,
}

/// A run is a file, options, or a file some of whose values options replace.
#[derive(Debug, Args)]
pub(crate) struct TrainArgs {
    /// The training run: a TOML file with the text, the model to start from and the stages.
    #[arg(required_unless_present_all = ["start", "data", "output"])]
    pub(crate) file: Option<PathBuf>,
    /// Folder of the model to start from.
    #[arg(long, value_name = "FOLDER")]
    pub(crate) start: Option<PathBuf>,
    /// Files or folders of records (JSON lines, Parquet, text), in place of those of the file's only stage.
    #[arg(long, value_name = "PATH", num_args = 1..)]
    pub(crate) data: Vec<PathBuf>,
    /// Folder to write.
    #[arg(long, value_name = "FOLDER")]
    pub(crate) output: Option<PathBuf>,
    /// Folder of checkpoints and TensorBoard events.
    #[arg(long, value_name = "FOLDER")]
    pub(crate) run: Option<PathBuf>,
    /// Steps of the optimiser.
    #[arg(long)]
    pub(crate) steps: Option<u64>,
    /// How often every record is learned, in place of a number of steps.
    #[arg(long, conflicts_with = "steps")]
    pub(crate) epochs: Option<f64>,
    /// Highest learning rate; 1e-4 without it, 2e-4 for adapters.
    #[arg(long)]
    pub(crate) learning_rate: Option<f64>,
    /// Rows of a batch.
    #[arg(long)]
    pub(crate) rows: Option<usize>,
    /// Tokens of a row; 1024 without a file.
    #[arg(long)]
    pub(crate) row_tokens: Option<usize>,
    /// Batches whose gradients are added up for one step.
    #[arg(long)]
    pub(crate) accumulate: Option<usize>,
    /// Train adapters of this rank and write a PEFT folder.
    #[arg(long, value_name = "RANK")]
    pub(crate) lora_rank: Option<usize>,
    /// Scale of the adapters times their rank; twice the rank without it.
    #[arg(long, value_name = "ALPHA", requires = "lora_rank")]
    pub(crate) lora_alpha: Option<f64>,
    /// How the weights of the model are stored while adapters of it are trained: f32, bf16, int8 or nf4 (4 bits).
    #[arg(long, value_name = "FORMAT", value_parser = format::parse)]
    pub(crate) base: Option<Format>,
    /// Compute activations again in the backward pass rather than keep them: less memory, a third more work.
    #[arg(long, value_name = "BOOL", num_args = 0..=1, require_equals = true, default_missing_value = "true")]
    pub(crate) checkpoint_activations: Option<bool>,
    /// Leave the weights of the layers in a file in the run's folder, beside an NVIDIA device in the host's memory, and read one
    /// layer at a time.
    #[arg(long, value_name = "BOOL", num_args = 0..=1, require_equals = true, default_missing_value = "true")]
    pub(crate) offload: Option<bool>,
    /// Where the model computes; auto without it.
    #[arg(long, value_enum, value_name = "DEVICE")]
    pub(crate) device: Option<DeviceChoice>,
    /// Share of the records that is held out; the weights that do best on it are kept.
    #[arg(long, value_name = "SHARE")]
    pub(crate) held_out: Option<f64>,
    /// Steps between checkpoints.
    #[arg(long, value_name = "STEPS")]
    pub(crate) checkpoint_every: Option<u64>,
    /// Seed of the data's order and of fresh adapters.
    #[arg(long)]
    pub(crate) seed: Option<u64>,
    /// Bad records that are skipped before the next one ends the run; 0 without it.
    #[arg(long, value_name = "N")]
    pub(crate) max_bad_rows: Option<u64>,
    /// Memory that the run may take, such as 8GiB; what the machine and its control groups have left without it.
    #[arg(long, value_name = "SIZE", value_parser = bytes)]
    pub(crate) memory: Option<u64>,
    /// The same of an NVIDIA device, what it has free without it. `plan` takes it for a device that is elsewhere too.
    #[arg(long, value_name = "SIZE", value_parser = bytes)]
    pub(crate) device_memory: Option<u64>,
    /// Train by the site's own command, `[train.external]` of node.toml; writes the adapter of --lora-rank.
    #[arg(long)]
    pub(crate) external: bool,
    /// The node.toml that has the command.
    #[arg(long, env = "CONSILIUM_NODE_CONFIG", default_value = "node.toml")]
    pub(crate) config: PathBuf,
    /// Layers that the command gives factors; those of Llama's attention and feed-forward without it.
    #[arg(
        long,
        value_name = "NAMES",
        value_delimiter = ',',
        requires = "external"
    )]
    pub(crate) target_modules: Vec<String>,
    #[command(flatten)]
    pub(crate) threads: Threads,
}

#[derive(Debug, Args)]
pub(crate) struct ScoreArgs {
    /// Model folder, or its name in the local Hugging Face cache.
    #[arg(long)]
    pub(crate) model: PathBuf,
    /// Reference set, JSON lines.
    #[arg(long)]
    pub(crate) reference: PathBuf,
    /// Shard to write.
    #[arg(long)]
    pub(crate) out: PathBuf,
    /// First item, from 0.
    #[arg(long, requires = "last")]
    pub(crate) first: Option<u64>,
    /// Item after the last; all items without it.
    #[arg(long)]
    pub(crate) last: Option<u64>,
    /// Symbol slots per position (K).
    #[arg(long, default_value_t = 16, value_parser = clap::value_parser!(u16).range(1..=256))]
    pub(crate) symbols: u16,
    /// Mass that the slots hold before the rest goes to the tail, in thousandths.
    #[arg(long, default_value_t = 995, value_parser = clap::value_parser!(u32).range(500..=1000))]
    pub(crate) fill_permille: u32,
    /// Wrap what an item gives in the model's own chat template.
    #[arg(long)]
    pub(crate) chat_template: bool,
    /// Where the model computes.
    #[arg(long, value_enum, value_name = "DEVICE", default_value = "auto")]
    pub(crate) device: DeviceChoice,
    #[command(flatten)]
    pub(crate) threads: Threads,
}

#[derive(Debug, Args)]
pub(crate) struct TokensArgs {
    /// Model folder, or its name in the local Hugging Face cache: the pivot.
    #[arg(long)]
    pub(crate) model: PathBuf,
    /// Reference set, JSON lines.
    #[arg(long)]
    pub(crate) reference: PathBuf,
    /// Reference set to write.
    #[arg(long)]
    pub(crate) out: PathBuf,
}

#[derive(Debug, Args)]
pub(crate) struct ScorerArgs {
    /// The spool of node.toml.
    #[arg(long)]
    pub(crate) spool: PathBuf,
    /// Folder with the source's config.json and tokenizer.
    #[arg(long)]
    pub(crate) source: PathBuf,
    /// Wrap what an item gives in the source's own chat template.
    #[arg(long)]
    pub(crate) chat_template: bool,
    #[command(flatten)]
    pub(crate) server: RawServer,
    /// Ask about three tokens, say what the server gives, and end.
    #[arg(long)]
    pub(crate) probe: bool,
    /// End when the process that started this one is gone.
    #[arg(long, hide = true)]
    pub(crate) supervised: bool,
}

impl ScorerArgs {
    /// Checks the values.
    pub(crate) fn settings(&self) -> Result<ScorerSettings, ScorerError> {
        let server = self
            .server
            .clone()
            .check()
            .map_err(|wrong| ScorerError::Setting {
                key: wrong.key,
                value: wrong.value,
                expected: wrong.expected,
            })?;
        Ok(ScorerSettings {
            spool: self.spool.clone(),
            source: self.source.clone(),
            chat_template: self.chat_template,
            server,
        })
    }
}

#[derive(Debug, Args)]
pub(crate) struct EvaluateArgs {
    /// Model folder, or its name in the local Hugging Face cache.
    #[arg(long)]
    pub(crate) model: PathBuf,
    /// Adapter on top of it: a PEFT folder.
    #[arg(long)]
    pub(crate) adapter: Option<PathBuf>,
    /// Items, JSON lines.
    #[arg(long)]
    pub(crate) data: PathBuf,
    /// Where the model computes.
    #[arg(long, value_enum, value_name = "DEVICE", default_value = "auto")]
    pub(crate) device: DeviceChoice,
    #[command(flatten)]
    pub(crate) threads: Threads,
}

#[derive(Debug, Clone, Copy, Args)]
pub(crate) struct Threads {
    /// Threads; all cores without it.
    #[arg(long, value_parser = clap::value_parser!(u16).range(1..=1024))]
    pub(crate) threads: Option<u16>,
}

/// A number of bytes with a unit: `512MiB`, `8GiB`, `16GB`; without one, bytes.
fn bytes(text: &str) -> Result<u64, String> {
    let (number, unit) = match text.find(|c: char| c.is_ascii_alphabetic()) {
        Some(at) => text.split_at(at),
        None => (text, ""),
    };
    let factor = match unit.to_ascii_lowercase().as_str() {
        "" | "b" => 1.0,
        "kb" => 1e3,
        "mb" => 1e6,
        "gb" => 1e9,
        "tb" => 1e12,
        "k" | "kib" => 1024.0,
        "m" | "mib" => f64::from(1 << 20),
        "g" | "gib" => f64::from(1 << 30),
        "t" | "tib" => f64::from(1 << 30) * 1024.0,
        other => return Err(format!("unit `{other}`, expected one such as MiB or GiB")),
    };
    let number: f64 = number
        .trim()
        .parse()
        .map_err(|_| "expected a number such as 8GiB")?;
    let bytes = number * factor;
    if !(1.0..=1e18).contains(&bytes) {
        return Err("expected more than nothing, and at most 1e18 bytes".to_owned());
    }
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "checked to be in range"
    )]
    let bytes = bytes as u64;
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_have_units() {
        assert_eq!(bytes("8GiB"), Ok(8 << 30));
        assert_eq!(bytes("1.5 mib"), Ok(3 << 19));
        assert_eq!(bytes("2GB"), Ok(2_000_000_000));
        assert_eq!(bytes("77"), Ok(77));
        for bad in ["", "GiB", "8XB", "-1", "0", "nan", "1e30"] {
            assert!(bytes(bad).is_err(), "{bad}");
        }
    }
}
