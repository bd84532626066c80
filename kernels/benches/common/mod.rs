//! Back-to-back timing of an operation against its twin in Python, and against the memory floors of the machine.
//!
//! A twin is a script beside this folder, `torch/NAME.py`. It runs as a child process that repeats one case each time it
//! is asked, so that repetitions of both sides alternate and a busy neighbour hits both alike. `CONSILIUM_BENCH_PYTHON`
//! names the interpreter (default `python3`); where it cannot import the twin's packages, ratios are left out.
#![allow(
    dead_code,
    unreachable_pub,
    reason = "each benchmark uses a part of this"
)]

use std::hint::black_box;
use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::time::Instant;

/// Repetitions after one that warms up; an odd number, so that the median is one of them.
pub(crate) const REPETITIONS: usize = 7;

/// Seconds that one call takes.
pub(crate) fn seconds<T>(work: impl FnOnce() -> T) -> f64 {
    #[expect(clippy::disallowed_methods, reason = "a benchmark reads the clock")]
    let start = Instant::now();
    black_box(work());
    start.elapsed().as_secs_f64()
}

/// Middle value.
pub(crate) fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    sorted[sorted.len() / 2]
}

/// Median seconds of an operation by itself.
pub(crate) fn alone<T>(mut work: impl FnMut() -> T) -> f64 {
    seconds(&mut work);
    let times: Vec<f64> = (0..REPETITIONS).map(|_| seconds(&mut work)).collect();
    median(&times)
}

/// Median seconds of two operations, repetition by repetition in turn, and the median of their quotients `b / a`.
pub(crate) fn in_turn<A, B>(mut a: impl FnMut() -> A, mut b: impl FnMut() -> B) -> Compared {
    seconds(&mut a);
    seconds(&mut b);
    let pairs: Vec<(f64, f64)> = (0..REPETITIONS)
        .map(|_| (seconds(&mut a), seconds(&mut b)))
        .collect();
    Compared::of(&pairs)
}

/// Medians of paired repetitions.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Compared {
    /// Seconds of the first.
    pub(crate) ours: f64,
    /// Seconds of the second.
    pub(crate) theirs: f64,
    /// Times that the first is faster.
    pub(crate) ratio: f64,
}

impl Compared {
    fn of(pairs: &[(f64, f64)]) -> Self {
        let column =
            |pick: fn(&(f64, f64)) -> f64| median(&pairs.iter().map(pick).collect::<Vec<_>>());
        Self {
            ours: column(|pair| pair.0),
            theirs: column(|pair| pair.1),
            ratio: column(|pair| pair.1 / pair.0),
        }
    }
}

/// A running twin.
pub(crate) struct Twin {
    child: Child,
    ask: ChildStdin,
    answers: BufReader<ChildStdout>,
}

impl Twin {
    /// Starts `torch/NAME.py` on one thread; `None`, said aloud, where Python or its packages are missing.
    pub(crate) fn start(name: &str) -> Option<Self> {
        let python = std::env::var("CONSILIUM_BENCH_PYTHON").unwrap_or_else(|_| "python3".into());
        let script = Path::new(env!("CARGO_MANIFEST_DIR"))
            .join("benches/torch")
            .join(format!("{name}.py"));
        let child = Command::new(&python)
            .arg(&script)
            .envs(
                ["OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"]
                    .map(|name| (name, "1")),
            )
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn();
        let Ok(mut child) = child else {
            println!("no twin: {python} does not start; set CONSILIUM_BENCH_PYTHON");
            return None;
        };
        let ask = child.stdin.take()?;
        let answers = BufReader::new(child.stdout.take()?);
        let mut twin = Self {
            child,
            ask,
            answers,
        };
        match twin.line() {
            Some(line) if line.trim() == "ready" => Some(twin),
            _ => {
                println!(
                    "no twin: {} failed to start; see the message above",
                    script.display()
                );
                None
            }
        }
    }

    /// Seconds of one repetition of a case; a case's first repetition also prepares its inputs, untimed.
    pub(crate) fn repeat(&mut self, case: &str) -> Option<f64> {
        writeln!(self.ask, "{case}").ok()?;
        self.line()?.trim().parse().ok()
    }

    fn line(&mut self) -> Option<String> {
        let mut line = String::new();
        (self.answers.read_line(&mut line).ok()? > 0).then_some(line)
    }
}

impl Drop for Twin {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Times an operation in turn with a case of a twin.
pub(crate) fn against_twin<T>(
    twin: &mut Option<Twin>,
    case: &str,
    mut work: impl FnMut() -> T,
) -> (f64, Option<Compared>) {
    seconds(&mut work);
    let Some(twin) = twin else {
        return (alone(work), None);
    };
    twin.repeat(case);
    let mut pairs = Vec::new();
    for _ in 0..REPETITIONS {
        let ours = seconds(&mut work);
        let Some(theirs) = twin.repeat(case) else {
            println!("the twin failed at: {case}");
            return (alone(work), None);
        };
        pairs.push((ours, theirs));
    }
    let compared = Compared::of(&pairs);
    (compared.ours, Some(compared))
}

/// Bytes per second of this machine's memory on one core, arrays far beyond the caches.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Floors {
    /// Read, in four sequential streams that are asked for ahead.
    pub(crate) read: f64,
    /// Copy, counting bytes read and bytes written.
    pub(crate) copy: f64,
}

impl Floors {
    /// Measures both.
    pub(crate) fn measure() -> Self {
        const WORDS: usize = 64 << 20;
        const STREAMS: usize = 4;
        let source: Vec<u64> = (0..WORDS as u64).collect();
        let mut copy = vec![0u64; WORDS];
        let bytes = (WORDS * 8) as f64;
        let (parts, _) = source.as_chunks::<{ WORDS / STREAMS }>();
        let read = alone(|| {
            // Eight sums, and several streams asked for ahead: one stream alone does not keep memory busy.
            let mut sums = [0u64; 8];
            for at in (0..WORDS / STREAMS).step_by(8) {
                for part in parts {
                    ask_ahead(&part[at]);
                    for (sum, word) in sums.iter_mut().zip(&part[at..at + 8]) {
                        *sum = sum.wrapping_add(*word);
                    }
                }
            }
            sums
        });
        let copied = alone(|| {
            copy.copy_from_slice(&source);
            black_box(&copy);
        });
        Self {
            read: bytes / read,
            copy: 2.0 * bytes / copied,
        }
    }
}

/// Asks for what is read a kilobyte later, where the machine can.
fn ask_ahead(word: &u64) {
    #[cfg(target_arch = "x86_64")]
    {
        use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
        let place = std::ptr::from_ref(word).wrapping_byte_add(1024);
        #[expect(unsafe_code, reason = "prefetching takes an address")]
        // SAFETY: any address may be asked for; where there is nothing, nothing happens.
        unsafe {
            _mm_prefetch::<_MM_HINT_T0>(place.cast());
        }
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = word;
}

/// Pins nothing, but makes rayon run on the calling thread alone: all figures are of one core.
pub(crate) fn one_thread() {
    rayon::ThreadPoolBuilder::new()
        .num_threads(1)
        .build_global()
        .expect("the first use of the pool");
}
