//! Commands and options of the program.

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand, ValueEnum};
use consilium_protocol::{ConsortiumId, InstitutionId};

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
    /// Take part in rounds until stopped: agent and worker.
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
    /// Train a model on private text.
    Train(TrainArgs),
    /// Score a reference set with a model: the records that a round would ask for.
    Score(ScoreArgs),
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

#[derive(Debug, Args)]
pub(crate) struct TrainArgs {
    /// The training run: a TOML file with the text, the model to start from and the stages.
    pub(crate) file: PathBuf,
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
    #[command(flatten)]
    pub(crate) threads: Threads,
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
    #[command(flatten)]
    pub(crate) threads: Threads,
}

#[derive(Debug, Clone, Copy, Args)]
pub(crate) struct Threads {
    /// Threads; all cores without it.
    #[arg(long, value_parser = clap::value_parser!(u16).range(1..=1024))]
    pub(crate) threads: Option<u16>,
}
