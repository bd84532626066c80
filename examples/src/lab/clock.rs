//! Times the phases of a run and tells the reader what goes on.

#![expect(
    clippy::print_stdout,
    clippy::print_stderr,
    reason = "this module is the voice of the examples"
)]
#![expect(
    clippy::disallowed_methods,
    reason = "wall-clock seconds are a result of the example"
)]

use std::time::Instant;

use crate::report::Phase;

/// Stopwatch of one run.
#[derive(Debug)]
pub struct Clock {
    start: Instant,
    lap: Instant,
    phases: Vec<Phase>,
}

impl Clock {
    /// Starts now.
    pub fn start() -> Self {
        let start = Instant::now();
        Self {
            start,
            lap: start,
            phases: Vec::new(),
        }
    }

    /// Says what begins now.
    pub fn begin(&mut self, what: &str) {
        self.lap = Instant::now();
        say(&format!(
            "{:7.1} s  {what}",
            self.start.elapsed().as_secs_f64()
        ));
    }

    /// Notes how long it took since the last beginning.
    pub fn end(&mut self, name: &str) {
        self.note(name, self.lap.elapsed().as_secs_f64());
    }

    /// Notes a time measured elsewhere.
    pub fn note(&mut self, name: &str, seconds: f64) {
        self.phases.push(Phase {
            name: name.to_owned(),
            seconds,
        });
    }

    /// Phases and the time in all.
    pub fn finish(self) -> (Vec<Phase>, f64) {
        (self.phases, self.start.elapsed().as_secs_f64())
    }
}

/// Talk: standard error.
pub fn say(text: &str) {
    eprintln!("{text}");
}

/// The result: standard output.
pub fn result(text: &str) {
    println!("{text}");
}
