//! Every fusion method on the same work, side by side: same pivot, same steps, same seeds, same public text.
//!
//! ```sh
//! cargo run --release --example arena                                    # every arm, three seeds, both regimes
//! cargo run --release --example arena -- --seeds 1 --arm sft,softmax,min_ce --regime random
//! ```
//!
//! Four institutions with four tokenizers. Everything runs in this process and calls the very functions that a round
//! calls; what goes over the wire is the subject of the `consortium` example. A method that loses is printed like one that wins.

mod adapters;
mod arms;
mod attacks;
mod bench;
mod costs;
mod decoys;
mod exchange;
mod html;
mod lines;
mod private;
mod recipes;
mod sites;
mod table;
mod tokens;
mod traffic;

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, Result};
use clap::{Parser, ValueEnum};
use consilium_examples::lab::clock::{result, say};
use consilium_examples::lab::folder::claim;
use consilium_examples::lab::measure::measure;
use consilium_examples::lab::parallel::{Job, in_parallel};
use serde::{Deserialize, Serialize};

use crate::arms::{ARMS, Arm};
use crate::bench::Bench;
use crate::table::{Outcome, Row};

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// What the public text says about the answers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Regime {
    /// Every answer is drawn at random: what is true can only come from the institutions.
    Random,
    /// Three in ten answers are true, as where public text is an instruction set with good answers.
    Labelled,
}

impl Regime {
    /// Share of true answers, in thousandths.
    pub(crate) fn true_answers_permille(self) -> usize {
        match self {
            Self::Random => 0,
            Self::Labelled => 300,
        }
    }

    /// Name in tables.
    pub(crate) fn label(self) -> &'static str {
        match self {
            Self::Random => "public answers random",
            Self::Labelled => "30 % of the public answers true",
        }
    }
}

#[derive(Debug, Parser)]
#[command(
    name = "arena",
    about = "Every fusion method on the same work, side by side"
)]
struct Arguments {
    /// Seeds of data, models and order.
    #[arg(long, value_delimiter = ',', default_value = "1,2,3")]
    seeds: Vec<u64>,
    /// Arms to run, by name; all by default.
    #[arg(long, value_delimiter = ',', value_name = "NAME")]
    arm: Vec<String>,
    /// What the public text says about the answers; both by default.
    #[arg(long, value_delimiter = ',', default_value = "random,labelled")]
    regime: Vec<Regime>,
    /// Optimiser steps of every arm that is trained.
    #[arg(long, default_value_t = 360)]
    steps: u64,
    /// Folder that the run leaves behind; an earlier run's is replaced.
    #[arg(long, default_value = "arena-run")]
    out: PathBuf,
    /// Leaves out the tables of attacks.
    #[arg(long)]
    no_attacks: bool,
    /// Prints the names of all arms and where they come from, and ends.
    #[arg(long)]
    list: bool,
}

fn main() -> ExitCode {
    match arena(&Arguments::parse()) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            say(&format!("error: {error:#}"));
            ExitCode::from(2)
        }
    }
}

/// Runs the arms and prints the tables. True if no pass line fails.
fn arena(arguments: &Arguments) -> Result<bool> {
    if arguments.list {
        result(&arms::list());
        return Ok(true);
    }
    let arms = chosen(&arguments.arm)?;
    claim(&arguments.out, "arena")?;
    let mut outcome = Outcome {
        command: command(arguments),
        steps: arguments.steps,
        ..Outcome::default()
    };
    for &regime in &arguments.regime {
        for &seed in &arguments.seeds {
            let name = format!("{}-{seed}", regime.true_answers_permille());
            let bench = Bench::prepare(seed, regime, arguments.steps, &arguments.out.join(name))?;
            let traffic = bench.traffic()?;
            for traffic in &traffic {
                say(&traffic.line());
            }
            outcome.traffic.extend(traffic);
            outcome.rows.extend(run(&bench, &arms)?);
            if regime == Regime::Random && !arguments.no_attacks {
                say("           attacks on records against rules");
                outcome.attacks.extend(attacks::table(&bench)?);
                outcome.decoys.push(decoys::caught(&bench)?);
                say("           attacks on adapters against defences");
                outcome.exactness.push(adapters::exactness(&bench)?);
                outcome.adapter_attacks.extend(adapters::attacks(&bench)?);
            }
        }
    }
    outcome.lines = lines::check(&outcome);
    let write = |name: &str, content: String| {
        let path = arguments.out.join(name);
        std::fs::write(&path, content).with_context(|| path.display().to_string())
    };
    write("arena.json", serde_json::to_string_pretty(&outcome)? + "\n")?;
    write("arena.html", html::render(&outcome))?;
    result(&table::render(&outcome));
    result(&format!(
        "{} and arena.json",
        arguments.out.join("arena.html").display()
    ));
    Ok(outcome.lines.iter().all(|line| line.holds != Some(false)))
}

/// The arms of one seed in one regime, as many at a time as there are cores.
fn run(bench: &Bench, arms: &[&'static Arm]) -> Result<Vec<Row>> {
    let jobs: Vec<Job<'_, Row>> = arms
        .iter()
        .map(|arm| {
            let job: Job<'_, Row> = Box::new(move || {
                let model = (arm.make)(bench)
                    .with_context(|| format!("arm {} of seed {}", arm.id, bench.world.seed))?;
                let row = Row {
                    arm: arm.id.to_owned(),
                    regime: bench.regime,
                    seed: bench.world.seed,
                    scores: measure(&model, &bench.world)?,
                };
                say(&row.line());
                Ok(row)
            });
            job
        })
        .collect();
    in_parallel(jobs)
}

fn chosen(names: &[String]) -> Result<Vec<&'static Arm>> {
    if names.is_empty() {
        return Ok(ARMS.iter().collect());
    }
    names
        .iter()
        .map(|name| {
            ARMS.iter()
                .find(|arm| arm.id == name)
                .with_context(|| format!("no arm is called {name:?}; see --list"))
        })
        .collect()
}

fn command(arguments: &Arguments) -> String {
    let seeds: Vec<String> = arguments.seeds.iter().map(u64::to_string).collect();
    let mut command = format!(
        "cargo run --release --example arena -- --seeds {} --steps {}",
        seeds.join(","),
        arguments.steps
    );
    if !arguments.arm.is_empty() {
        command += &format!(" --arm {}", arguments.arm.join(","));
    }
    command
}
