//! Progress for people: a bar where stderr is a terminal, a line in the log for every tenth otherwise.

use std::io::IsTerminal as _;
use std::time::Duration;

use indicatif::{ProgressBar, ProgressStyle};

use super::error::WorkError;
use super::monitor::Monitor;
use super::train::run::{Event, StepReport, Watch};

/// Shows one piece of work.
#[derive(Debug)]
pub struct Terminal {
    what: &'static str,
    bar: Option<ProgressBar>,
    tenths: u64,
}

impl Terminal {
    /// Work that is counted in `what`, for example "steps".
    #[must_use]
    pub fn new(what: &'static str) -> Self {
        let bar = std::io::stderr().is_terminal().then(|| {
            let style = ProgressStyle::with_template(
                "{bar:32} {pos}/{len} {prefix}, {elapsed} of {duration} {msg}",
            );
            ProgressBar::no_length()
                .with_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()))
                .with_prefix(what)
        });
        Self {
            what,
            bar,
            tenths: 0,
        }
    }
}

impl Monitor for Terminal {
    fn advance(&mut self, done: u64, total: u64, value: Option<f64>) -> Result<(), WorkError> {
        if let Some(bar) = &self.bar {
            bar.set_length(total);
            bar.set_position(done);
            if let Some(value) = value {
                bar.set_message(format!("{value:.4}"));
            }
            if done >= total {
                bar.finish_and_clear();
            }
            return Ok(());
        }
        let tenths = done.saturating_mul(10) / total.max(1);
        if tenths != self.tenths {
            self.tenths = tenths;
            let what = self.what;
            tracing::info!(done, total, what, value, "progress");
        }
        Ok(())
    }
}

impl Drop for Terminal {
    fn drop(&mut self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}

/// Shows a training run.
#[derive(Debug)]
pub struct TrainingTerminal {
    bar: Option<ProgressBar>,
    tenths: u64,
}

impl TrainingTerminal {
    /// Nothing is shown yet.
    #[must_use]
    pub fn new() -> Self {
        let bar = std::io::stderr().is_terminal().then(|| {
            let style = ProgressStyle::with_template("{bar:32} {pos}/{len} {msg}");
            ProgressBar::no_length()
                .with_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()))
        });
        Self { bar, tenths: 0 }
    }

    fn step(&mut self, report: &StepReport) {
        let StepReport {
            step,
            steps,
            loss,
            tokens_per_second,
            left,
            ..
        } = *report;
        if let Some(bar) = &self.bar {
            bar.set_length(steps);
            bar.set_position(step);
            let left = human(left);
            bar.set_message(format!(
                "loss {loss:.4}, {tokens_per_second:.0} tokens/s, {left} left"
            ));
            return;
        }
        let tenths = step.saturating_mul(10) / steps.max(1);
        if tenths != self.tenths {
            self.tenths = tenths;
            let (left, tokens_per_second) = (human(left), tokens_per_second.round());
            tracing::info!(step, steps, loss, tokens_per_second, left, "training");
        }
    }

    /// Says something above the bar.
    fn say(&self, line: impl FnOnce()) {
        match &self.bar {
            Some(bar) => bar.suspend(line),
            None => line(),
        }
    }
}

impl Default for TrainingTerminal {
    fn default() -> Self {
        Self::new()
    }
}

impl Watch for TrainingTerminal {
    fn event(&mut self, event: Event<'_>) -> Result<(), WorkError> {
        match event {
            Event::Step(report) => self.step(report),
            Event::Data {
                counts,
                of_bytes,
                done: false,
                ..
            } => {
                if let Some(bar) = &self.bar {
                    bar.set_length(of_bytes);
                    bar.set_position(counts.text_bytes.min(of_bytes));
                    bar.set_message(format!("bytes read, {} records", counts.records));
                }
            }
            Event::Data { stage, counts, .. } => self.say(|| {
                tracing::info!(
                    stage = stage + 1,
                    files = counts.files,
                    records = counts.records,
                    bad = counts.bad,
                    held_out = counts.held_out,
                    split = counts.broken,
                    shortened = counts.shortened,
                    items = counts.items,
                    tokens = counts.tokens,
                    learned = counts.learned,
                    "read the data"
                );
            }),
            Event::Resumed { step } => {
                self.say(|| tracing::info!(step, "goes on from a checkpoint"));
            }
            Event::Evaluated {
                step,
                loss,
                is_best,
            } => self.say(|| tracing::info!(step, loss, is_best, "held-out loss")),
            Event::Checkpoint { step, path } => {
                self.say(|| tracing::debug!(step, path = %path.display(), "checkpoint"));
            }
        }
        Ok(())
    }
}

impl Drop for TrainingTerminal {
    fn drop(&mut self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}

/// A duration in its two largest units.
pub fn human(duration: Duration) -> String {
    let seconds = duration.as_secs();
    let (minutes, hours, days) = (seconds / 60, seconds / 3600, seconds / 86_400);
    if days > 0 {
        format!("{days}d {}h", hours % 24)
    } else if hours > 0 {
        format!("{hours}h {}m", minutes % 60)
    } else if minutes > 0 {
        format!("{minutes}m {}s", seconds % 60)
    } else {
        format!("{seconds}s")
    }
}
