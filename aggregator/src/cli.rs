//! Command line: standard output is the result, standard error is talk.

#![expect(
    clippy::print_stdout,
    clippy::print_stderr,
    reason = "this module is the program's voice"
)]

use std::ffi::OsString;
use std::io::Write as _;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use clap::{Args, Parser, Subcommand, ValueEnum};
use consilium_protocol::reference::ReferenceSet;
use consilium_protocol::time::{Clock, SystemClock};
use tracing_subscriber::EnvFilter;

use crate::app;
use crate::config::{Config, ConfigError};
use crate::decoys::{self, Shares};
use crate::rounds::driver::overview_path;
use crate::rounds::request::{self, OpenRequest, OpenResponse};

const ANSWER: Duration = Duration::from_secs(60);
const POLL: Duration = Duration::from_millis(50);
/// How long fusion that runs at the end of the server may go on.
const STRAGGLERS: Duration = Duration::from_secs(2);

#[derive(Debug, Parser)]
#[command(
    name = "consilium-aggregator",
    version,
    about = "Fuses what institutions contribute; has neither data nor model code"
)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Runs the server until SIGTERM or SIGINT.
    Serve(Serve),
    /// Rounds.
    #[command(subcommand)]
    Round(Round),
    /// Writes a copy of a reference set with decoys, and the secret key that says where they are.
    Decoys(Decoys),
    /// Shows the newest round and its members.
    Status(Status),
    /// Rebuilds the index from log and artefacts; the server must not be running.
    Reindex(Common),
}

#[derive(Debug, Args)]
struct Common {
    /// Configuration file.
    #[arg(long, value_name = "FILE", env = "CONSILIUM_AGGREGATOR_CONFIG")]
    config: PathBuf,
}

#[derive(Debug, Args)]
struct Serve {
    #[command(flatten)]
    common: Common,
    /// Form of the log on standard error; RUST_LOG chooses what is in it.
    #[arg(long, value_enum, default_value_t = LogFormat::Text)]
    log_format: LogFormat,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum LogFormat {
    /// For people.
    Text,
    /// One object a line.
    Json,
}

#[derive(Debug, Subcommand)]
enum Round {
    /// Opens a round on the running server and prints its number and manifest.
    Open(Open),
}

#[derive(Debug, Args)]
struct Open {
    #[command(flatten)]
    common: Common,
    /// Changes one setting of the manifest, for example training.inner_rounds=4 or fusion.rule=min_ce.
    #[arg(long, value_name = "KEY=VALUE")]
    set: Vec<String>,
    /// Key of the reference set's decoys, as `decoys` wrote it; its digest goes into the manifest.
    #[arg(long, value_name = "FILE")]
    decoys: Option<PathBuf>,
    /// Prints the settings instead of opening a round.
    #[arg(long)]
    dry_run: bool,
}

#[derive(Debug, Args)]
struct Decoys {
    /// Reference set to copy.
    #[arg(long, value_name = "FILE")]
    reference: PathBuf,
    /// Where the set with decoys is written; this one goes to the members.
    #[arg(long, value_name = "FILE")]
    out: PathBuf,
    /// Where the key is written; keep it to yourself until the round's records are closed.
    #[arg(long, value_name = "FILE")]
    key: PathBuf,
    /// Items that get a decoy, in thousandths.
    #[arg(long, value_name = "PERMILLE", default_value_t = 20)]
    decoys: u32,
    /// Items that nobody trains on and that contributions are measured on, in thousandths.
    #[arg(long, value_name = "PERMILLE", default_value_t = 0)]
    holdout: u32,
}

#[derive(Debug, Args)]
struct Status {
    #[command(flatten)]
    common: Common,
    /// One JSON object.
    #[arg(long)]
    json: bool,
}

/// Runs the program with the given arguments, the program's name first.
pub fn main(arguments: impl Iterator<Item = OsString>) -> ExitCode {
    let arguments = match Arguments::try_parse_from(arguments) {
        Ok(arguments) => arguments,
        Err(error) => {
            // The parser knows whether this is help or a complaint.
            let _ = error.print();
            return ExitCode::from(u8::try_from(error.exit_code()).unwrap_or(2));
        }
    };
    match run(arguments) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            let usage = error.downcast_ref::<ConfigError>().is_some() || error.is::<Usage>();
            ExitCode::from(if usage { 2 } else { 1 })
        }
    }
}

/// A mistake on the command line.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
struct Usage(String);

fn run(arguments: Arguments) -> Result<()> {
    match arguments.command {
        Command::Serve(serve) => {
            start_log(serve.log_format);
            let config = Config::load(&serve.common.config)?;
            let runtime = tokio::runtime::Builder::new_multi_thread()
                .enable_all()
                .build()?;
            let served = runtime.block_on(app::serve(&config));
            // What still computes can be computed again; nothing of it was promised.
            runtime.shutdown_timeout(STRAGGLERS);
            served
        }
        Command::Round(Round::Open(open)) => open_round(&open),
        Command::Decoys(decoys) => plant_decoys(&decoys),
        Command::Status(status) => show_status(&status),
        Command::Reindex(common) => {
            let slots = app::reindex(&Config::load(&common.config)?)?;
            println!("{slots} contributions indexed");
            Ok(())
        }
    }
}

fn start_log(format: LogFormat) {
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new("info"));
    let builder = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr);
    match format {
        LogFormat::Text => builder.with_ansi(false).init(),
        LogFormat::Json => builder.json().init(),
    }
}

fn open_round(open: &Open) -> Result<()> {
    let mut wanted = OpenRequest::default();
    for assignment in &open.set {
        wanted = wanted.set(assignment).map_err(Usage)?;
    }
    if let Some(path) = &open.decoys {
        let key = std::fs::read_to_string(path).with_context(|| path.display().to_string())?;
        wanted.decoy_key = Some(key);
    }
    if open.dry_run {
        println!("{}", serde_json::to_string_pretty(&wanted)?);
        return Ok(());
    }
    let config = Config::load(&open.common.config)?;
    let folder = request::folder(&config.data_dir);
    std::fs::create_dir_all(&folder).with_context(|| folder.display().to_string())?;
    let now = SystemClock.now().0;
    let path = folder.join(format!("{now:020}-{}.request", std::process::id()));
    request::write_atomically(&path, &wanted).with_context(|| path.display().to_string())?;
    let answer = request::response_path(&path);
    let Some(bytes) = wait_for(&answer) else {
        let _ = std::fs::remove_file(&path);
        bail!(
            "no answer within {} s: is `consilium-aggregator serve` running on {}?",
            ANSWER.as_secs(),
            config.data_dir.display()
        );
    };
    std::fs::remove_file(&answer).with_context(|| answer.display().to_string())?;
    match serde_json::from_slice(&bytes)? {
        OpenResponse::Opened { round, manifest } => {
            println!("round {round}\nmanifest {manifest}");
            Ok(())
        }
        OpenResponse::Refused { problem } => bail!("the round was not opened: {problem}"),
    }
}

fn plant_decoys(wanted: &Decoys) -> Result<()> {
    let shown = |path: &PathBuf| path.display().to_string();
    let bytes = std::fs::read(&wanted.reference).with_context(|| shown(&wanted.reference))?;
    let set = ReferenceSet::parse(&bytes).with_context(|| shown(&wanted.reference))?;
    let mut secret = [0; 32];
    getrandom::fill(&mut secret).context("random numbers of the system")?;
    let shares = Shares {
        decoy_permille: wanted.decoys,
        holdout_permille: wanted.holdout,
    };
    let (text, key) =
        decoys::plant(&set, shares, secret).map_err(|error| Usage(error.to_string()))?;
    let json = serde_json::to_vec_pretty(&key)?;
    for (path, bytes) in [(&wanted.out, &text), (&wanted.key, &json)] {
        let mut options = std::fs::OpenOptions::new();
        // Never over a set or key that a round may need.
        let file = options.write(true).create_new(true).mode(0o600).open(path);
        let mut file = file.with_context(|| shown(path))?;
        file.write_all(bytes)
            .and_then(|()| file.sync_all())
            .with_context(|| shown(path))?;
    }
    println!(
        "reference {}\nitems {}\ndecoys {}\nholdout {}",
        key.reference,
        set.items().len(),
        key.decoys.len(),
        key.holdout.len()
    );
    Ok(())
}

#[expect(
    clippy::disallowed_methods,
    reason = "waits for another process's file"
)]
fn wait_for(path: &std::path::Path) -> Option<Vec<u8>> {
    let mut waited = Duration::ZERO;
    while waited < ANSWER {
        if let Ok(bytes) = std::fs::read(path) {
            return Some(bytes);
        }
        std::thread::sleep(POLL);
        waited = waited.saturating_add(POLL);
    }
    None
}

fn show_status(status: &Status) -> Result<()> {
    let config = Config::load(&status.common.config)?;
    let path = overview_path(&config.data_dir);
    let text = std::fs::read_to_string(&path)
        .with_context(|| format!("{}: has the server ever run?", path.display()))?;
    if status.json {
        println!("{text}");
        return Ok(());
    }
    let overview: serde_json::Value = serde_json::from_str(&text)?;
    let word = |value: &serde_json::Value| match value {
        serde_json::Value::String(text) => text.clone(),
        serde_json::Value::Null => "-".to_owned(),
        other => other.to_string(),
    };
    println!("consortium  {}", word(&overview["consortium"]));
    println!("listening   {}", word(&overview["listening"]));
    println!("log         {} entries", word(&overview["log_size"]));
    let round = &overview["round"];
    if round.is_null() {
        println!("round       none yet");
        return Ok(());
    }
    println!(
        "round       {}, {}",
        word(&round["round"]),
        word(&round["phase"])
    );
    println!(
        "merged      {} of {}",
        word(&round["merged"]),
        word(&round["inner_rounds"])
    );
    println!("release     {}", word(&round["release"]));
    for member in round["members"].as_array().into_iter().flatten() {
        println!(
            "  {:<20} connections {}, shards {}, adapters {}, evaluated {}",
            word(&member["institution"]),
            word(&member["connections"]),
            word(&member["shards"]),
            word(&member["adapters"]),
            word(&member["evaluated"]),
        );
    }
    Ok(())
}
