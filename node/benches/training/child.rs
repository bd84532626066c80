//! Processes that are timed or measured: the twin in Python, and this program with other words.

use std::io::{BufRead, BufReader, Write};
use std::path::PathBuf;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::time::Instant;

use super::Times;

/// The twin.
pub(crate) struct Python {
    child: Child,
    ask: ChildStdin,
    answers: BufReader<ChildStdout>,
}

fn command(threads: usize) -> Command {
    let python = std::env::var("CONSILIUM_BENCH_PYTHON").unwrap_or_else(|_| "python3".into());
    let script = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("benches/torch/step.py");
    let mut command = Command::new(python);
    let threads = threads.to_string();
    command
        .arg(script)
        .env("OMP_NUM_THREADS", &threads)
        .env("MKL_NUM_THREADS", &threads)
        .stderr(Stdio::null())
        .stdin(Stdio::piped())
        .stdout(Stdio::piped());
    command
}

impl Python {
    /// Starts it; `None`, said aloud, where Python or torch is missing.
    pub(crate) fn start(threads: usize) -> Option<Self> {
        let started = command(threads).spawn().ok().and_then(|mut child| {
            let ask = child.stdin.take()?;
            let answers = BufReader::new(child.stdout.take()?);
            Some(Self {
                child,
                ask,
                answers,
            })
        });
        let ready = started.and_then(|mut twin| (twin.line()?.trim() == "ready").then_some(twin));
        if ready.is_none() {
            println!("no torch: set CONSILIUM_BENCH_PYTHON to a Python that imports it");
        }
        ready
    }

    /// Seconds of one step of a case.
    pub(crate) fn step(&mut self, case: &str) -> Option<Times> {
        writeln!(self.ask, "{case}").ok()?;
        let line = self.line()?;
        let mut numbers = line.split_whitespace().map(str::parse);
        let clock = numbers.next()?.ok()?;
        let cpu = numbers.next()?.ok()?;
        Some(Times { clock, cpu })
    }

    fn line(&mut self) -> Option<String> {
        let mut line = String::new();
        (self.answers.read_line(&mut line).ok()? > 0).then_some(line)
    }
}

impl Drop for Python {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Bytes of a case's step beyond the model.
pub(crate) fn memory_of_python(case: &str) -> Option<f64> {
    let output = command(rayon::current_num_threads())
        .args(["memory", case])
        .output()
        .ok()?;
    String::from_utf8(output.stdout).ok()?.trim().parse().ok()
}

/// Bytes of a step beyond the model, of the base, and of the whole process.
pub(crate) fn memory_of(shape: &str, weights: &str) -> Option<[f64; 3]> {
    let output = Command::new(std::env::current_exe().ok()?)
        .args(["child", shape, weights])
        .output()
        .ok()?;
    let text = String::from_utf8(output.stdout).ok()?;
    let mut numbers = text.split_whitespace().map(str::parse);
    let mut next = || numbers.next()?.ok();
    Some([next()?, next()?, next()?])
}

/// Times a piece of work of this process.
pub(crate) fn timed<T>(work: impl FnOnce() -> T) -> Times {
    #[expect(clippy::disallowed_methods, reason = "a benchmark reads the clock")]
    let start = Instant::now();
    let before = cpu_seconds();
    std::hint::black_box(work());
    Times {
        clock: start.elapsed().as_secs_f64(),
        cpu: cpu_seconds() - before,
    }
}

/// Seconds that the threads of this process have run.
fn cpu_seconds() -> f64 {
    let threads = std::fs::read_dir("/proc/self/task").expect("Linux");
    let nanoseconds = threads.filter_map(|thread| {
        let text = std::fs::read_to_string(thread.ok()?.path().join("schedstat")).ok()?;
        text.split_whitespace().next()?.parse::<f64>().ok()
    });
    nanoseconds.sum::<f64>() * 1e-9
}

/// A line of `/proc/self/status`, in bytes.
pub(crate) fn status(field: &str) -> f64 {
    let text = std::fs::read_to_string("/proc/self/status").expect("Linux");
    let line = text.lines().find(|line| line.starts_with(field));
    let kilobytes = line.and_then(|line| line.split_whitespace().nth(1)?.parse::<f64>().ok());
    kilobytes.expect("a number") * 1024.0
}
