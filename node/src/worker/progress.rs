//! Progress for people: a bar where stderr is a terminal, a line in the log for every tenth otherwise.

use std::io::IsTerminal as _;

use indicatif::{ProgressBar, ProgressStyle};

use super::error::WorkError;
use super::monitor::Monitor;

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
