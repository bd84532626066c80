//! The main job, end to end, on one machine: three institutions with three tokenizers fuse what they know.
//!
//! ```sh
//! cargo run --release --example consortium
//! cargo run --release --example consortium -- --seeds 1,2,3
//! cargo run --release --example consortium -- --pivot FOLDER --source bank=FOLDER   # models of yours
//! cargo run --release --example consortium -- --tune 240,720   # how the arms' rates and steps were chosen
//! ```
//!
//! The program starts itself as `consilium-aggregator` and `consilium-node`: real processes, real certificates, real QUIC
//! on loopback. What it prints is measured on test sets that no training saw.

mod given;
mod run;
mod transcript;
mod tune;

use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, Result};
use clap::Parser;
use consilium_examples::lab::clock;
use consilium_examples::lab::folder::claim;
use consilium_examples::report::Report;

use crate::given::{Given, NamedFolder};

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

#[derive(Debug, Parser)]
#[command(
    name = "consortium",
    about = "Three institutions fuse what they know; see the table at the end"
)]
struct Arguments {
    /// Seeds of data, models and order; one run each.
    #[arg(long, value_delimiter = ',', default_value = "1")]
    seeds: Vec<u64>,
    /// Folder that the run leaves behind; an earlier run's is replaced.
    #[arg(long, default_value = "consortium-run")]
    out: PathBuf,
    /// Folder of a pivot, as on the Hugging Face hub, in place of the built-in one.
    #[arg(long, value_name = "FOLDER")]
    pivot: Option<PathBuf>,
    /// Folder of an institution's own model in place of the built-in one: clinic, bank or insurer. May be repeated.
    #[arg(long, value_name = "NAME=FOLDER")]
    source: Vec<NamedFolder>,
    /// Instead of a round: train SFT and the centralised bound for these counts of steps over a grid of rates.
    #[arg(long, value_delimiter = ',', value_name = "STEPS")]
    tune: Vec<u64>,
}

fn main() -> ExitCode {
    let program = std::env::args_os().next().unwrap_or_default();
    match Path::new(&program).file_name().and_then(OsStr::to_str) {
        Some("consilium-aggregator") => consilium_aggregator::cli::main(std::env::args_os()),
        Some("consilium-node") => consilium_node::cli::main(std::env::args_os()),
        _ => match consortium(&Arguments::parse()) {
            Ok(true) => ExitCode::SUCCESS,
            Ok(false) => ExitCode::FAILURE,
            Err(error) => {
                clock::say(&format!("error: {error:#}"));
                ExitCode::from(2)
            }
        },
    }
}

/// Runs every seed and prints the report. True if every seed ended with a release and every bar holds, or if bars do not apply
/// because models were given.
fn consortium(arguments: &Arguments) -> Result<bool> {
    let given = Given::new(
        arguments.pivot.as_deref(),
        &arguments.source,
        &arguments.out,
    )?;
    claim(&arguments.out, "consortium")?;
    if !arguments.tune.is_empty() {
        for &seed in &arguments.seeds {
            let folder = arguments.out.join(format!("tune-{seed}"));
            clock::result(&tune::tune(seed, &arguments.tune, &given, &folder)?);
        }
        return Ok(true);
    }
    let mut report = Report {
        command: command(arguments),
        training: format!("{}{}", run::training(), given.note()),
        seeds: Vec::new(),
    };
    for &seed in &arguments.seeds {
        let folder = arguments.out.join(format!("seed-{seed}"));
        report
            .seeds
            .push(run::seed(seed, &given, &folder).with_context(|| format!("seed {seed}"))?);
        report.write_files(&arguments.out)?;
    }
    clock::result(&report.text(std::io::IsTerminal::is_terminal(&std::io::stdout())));
    clock::say(&format!(
        "report: {}",
        arguments.out.join("report.html").display()
    ));
    Ok(report.passed() || (given.any() && report.released()))
}

fn command(arguments: &Arguments) -> String {
    let seeds: Vec<String> = arguments.seeds.iter().map(u64::to_string).collect();
    let mut command = format!(
        "cargo run --release --example consortium -- --seeds {}",
        seeds.join(",")
    );
    if let Some(pivot) = &arguments.pivot {
        command += &format!(" --pivot {}", pivot.display());
    }
    for NamedFolder { domain, folder } in &arguments.source {
        command += &format!(" --source {}={}", domain.name(), folder.display());
    }
    command
}
