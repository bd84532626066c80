//! `consilium-node train` at the command line: options, signals, what is shown and written down while it runs.

mod options;
mod parts;

use std::io::Write as _;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use consilium_protocol::Clock;
use consilium_protocol::time::SystemClock;
use serde_json::{Value, json};
use signal_hook::consts::{SIGINT, SIGTERM};

use crate::args::TrainArgs;
use crate::cli::on_threads;
use crate::config::Config;
use crate::error::NodeError;
use crate::reply::Reply;
use crate::worker::WorkError;
use crate::worker::commands::{self, TrainFile, Trained};
use crate::worker::data::Counts;
use crate::worker::plan::{Granted, machine};
use crate::worker::progress::{TrainingTerminal, human};
use crate::worker::tensorboard::EventFile;
use crate::worker::train::external::train_external;
use crate::worker::train::run::{Event, Shell, StepReport, Watch};
use options::{external_run, of_args};
use parts::with_estimate;

/// Trains. With `json`, stdout is one object a line for everything that happens, and the answer is the last.
pub(crate) fn train(args: &TrainArgs, json: bool) -> Result<Reply, NodeError> {
    let file = of_args(args)?;
    let stop = stop_on_signals()?;
    if args.external {
        return external(args, &file, &|| stop.load(Ordering::Relaxed));
    }
    let trained = on_threads(args.threads, || {
        let mut watch = Watchers {
            terminal: (!json).then(TrainingTerminal::new),
            events: None,
            file: &file,
            json,
        };
        let mut shell = Shell {
            clock: &SystemClock,
            stop: &|| stop.load(Ordering::Relaxed),
            watch: &mut watch,
        };
        commands::train(&file, granted(args), &mut shell)
    })?;
    Ok(reply(&trained, &file))
}

fn granted(args: &TrainArgs) -> Granted {
    Granted {
        host: args.memory,
        device: args.device_memory,
    }
}

/// Has the site's own command train the adapter.
fn external(
    args: &TrainArgs,
    file: &TrainFile,
    stop: &dyn Fn() -> bool,
) -> Result<Reply, NodeError> {
    let config = Config::load(&args.config)?;
    let command = config.external.ok_or_else(|| {
        refuse(
            "train.external",
            &format!("{} has no such table", config.path.display()),
        )
    })?;
    let run = external_run(file, &args.target_modules)?;
    let summary = train_external(&command, &run, stop)?;
    Ok(Reply::done(format!("wrote {}", run.output.display()))
        .with("adapter", run.output.display().to_string())
        .with("layers", summary.layers)
        .with("parameters", summary.parameters))
}

fn refuse(field: &'static str, problem: &str) -> WorkError {
    WorkError::Setting {
        field,
        problem: problem.to_owned(),
    }
}

fn reply(trained: &Trained, file: &TrainFile) -> Reply {
    let output = trained.output.display().to_string();
    let what = if file.lora.is_some() {
        "adapter"
    } else {
        "model"
    };
    let mut reply = Reply::done(format!("wrote {output}")).with(what, output);
    if let Some(loss) = trained.loss {
        reply = reply.with("loss_nats", loss);
    }
    if let Some(best) = trained.best {
        reply = reply
            .with("held_out_loss_nats", best.loss)
            .with("best_step", best.step);
    }
    if let Some(step) = trained.resumed {
        reply = reply.with("resumed_from_step", step);
    }
    let sum = |of: fn(&Counts) -> u64| trained.counts.iter().map(of).sum::<u64>();
    reply
        .with("records", sum(|counts| counts.records))
        .with("bad_records", sum(|counts| counts.bad))
        .with("split_records", sum(|counts| counts.broken))
        .with("shortened_contexts", sum(|counts| counts.shortened))
        .with("run", file.run_folder().display().to_string())
        .with(
            "peak_memory_bytes",
            machine::peak().map_or(Value::Null, Value::from),
        )
}

/// Says what a run needs; the answer is no where it does not fit.
pub(crate) fn plan(args: &TrainArgs, json: bool) -> Result<Reply, NodeError> {
    let file = of_args(args)?;
    let planned = on_threads(args.threads, || {
        let mut terminal = (!json).then(TrainingTerminal::new);
        let mut nobody = ();
        let watch: &mut dyn Watch = match &mut terminal {
            Some(terminal) => terminal,
            None => &mut nobody,
        };
        let mut shell = Shell {
            clock: &SystemClock,
            stop: &|| false,
            watch,
        };
        commands::plan(&file, granted(args), &mut shell)
    })?;
    let mut reply = match planned.refusal {
        None => Reply::done("the run fits"),
        Some(error) => Reply::no(&NodeError::from(error)),
    };
    reply = reply.with("device", json!(planned.device));
    reply = with_estimate(reply, &planned.estimate);
    if let Some(budget) = planned.room.host {
        reply = reply
            .with("available_bytes", budget.bytes)
            .with("available_by", budget.source);
    }
    if let Some(budget) = planned.room.device.and_then(|device| device.budget) {
        reply = reply
            .with("device_available_bytes", budget.bytes)
            .with("device_available_by", budget.source);
    }
    let of_data = if planned.is_sample {
        "at_least"
    } else {
        "tokens_of_all_records"
    };
    let counts = planned.counts;
    let reply = reply
        .with("steps", planned.steps)
        .with("records", counts.records)
        .with("bad_records", counts.bad)
        .with("split_records", counts.broken)
        .with(of_data, counts.tokens);
    let Some(time) = planned.time else {
        return Ok(reply.hint("the device is not here: how long a step takes is not measured"));
    };
    Ok(reply
        .with("tokens_per_step", time.tokens_per_step)
        .with("operations_per_second", time.operations_per_second.round())
        .with("seconds_per_step", time.seconds_per_step)
        .with("seconds", time.seconds.round())
        .with("time", human(time.total())))
}

/// The first signal asks the run to end after its step; it writes a checkpoint first.
fn stop_on_signals() -> Result<Arc<AtomicBool>, NodeError> {
    let stop = Arc::new(AtomicBool::new(false));
    for number in [SIGTERM, SIGINT] {
        signal_hook::flag::register(number, Arc::clone(&stop)).map_err(|source| {
            NodeError::System {
                doing: "watch for signals",
                source,
            }
        })?;
    }
    Ok(stop)
}

/// Everyone who sees what happens in a run.
struct Watchers<'a> {
    terminal: Option<TrainingTerminal>,
    /// Begun with the first step.
    events: Option<EventFile>,
    file: &'a TrainFile,
    json: bool,
}

impl Watch for Watchers<'_> {
    fn event(&mut self, event: Event<'_>) -> Result<(), WorkError> {
        if let Some(terminal) = &mut self.terminal {
            terminal.event(event)?;
        }
        if self.json {
            print_line(&event)?;
        }
        self.draw(&event)
    }
}

impl Watchers<'_> {
    /// Writes what TensorBoard draws.
    fn draw(&mut self, event: &Event<'_>) -> Result<(), WorkError> {
        match event {
            Event::Step(report) => {
                let values = [
                    ("train/loss", narrow(report.loss)),
                    ("train/gradient_norm", narrow(report.norm)),
                    ("train/learning_rate", narrow(report.rate)),
                    ("train/tokens_per_second", narrow(report.tokens_per_second)),
                ];
                let events = match &mut self.events {
                    Some(events) => events,
                    none => none.insert(EventFile::create(&self.file.run_folder(), report.now)?),
                };
                events.scalars(report.now, report.step, &values)
            }
            Event::Evaluated { step, loss, .. } => match &mut self.events {
                Some(events) => events.scalars(
                    SystemClock.now(),
                    *step,
                    &[("held_out/loss", narrow(*loss))],
                ),
                None => Ok(()),
            },
            _ => Ok(()),
        }
    }
}

#[expect(clippy::cast_possible_truncation, reason = "TensorBoard keeps f32")]
const fn narrow(value: f64) -> f32 {
    value as f32
}

/// One line of JSON on stdout, which is flushed, so that a program that reads it knows what is on disk.
fn print_line(event: &Event<'_>) -> Result<(), WorkError> {
    let Some(object) = object(event) else {
        return Ok(());
    };
    let mut out = std::io::stdout().lock();
    writeln!(out, "{object}")
        .and_then(|()| out.flush())
        .map_err(|source| WorkError::Process {
            doing: "write to stdout",
            source,
        })
}

fn object(event: &Event<'_>) -> Option<Value> {
    Some(match event {
        Event::Data { done: false, .. } => return None,
        Event::Data { stage, counts, .. } => {
            json!({ "event": "data", "stage": stage + 1, "counts": counts })
        }
        Event::Resumed { step } => json!({ "event": "resumed", "step": step }),
        Event::Step(StepReport {
            step,
            steps,
            loss,
            norm,
            rate,
            tokens,
            tokens_per_second,
            left,
            now,
        }) => json!({
            "event": "step",
            "step": step,
            "steps": steps,
            "loss_nats": loss,
            "gradient_norm": norm,
            "learning_rate": rate,
            "tokens": tokens,
            "tokens_per_second": tokens_per_second,
            "seconds_left": left.as_secs(),
            "unix_millis": now,
        }),
        Event::Evaluated {
            step,
            loss,
            is_best,
        } => {
            json!({ "event": "evaluated", "step": step, "held_out_loss_nats": loss, "is_best": is_best })
        }
        Event::Checkpoint { step, path } => {
            json!({ "event": "checkpoint", "step": step, "path": path.display().to_string() })
        }
    })
}
