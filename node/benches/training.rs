//! A step of training with LoRA: tokens a second in turn with torch, and the memory it takes.
//!
//! `CONSILIUM_BENCH_PYTHON=python RAYON_NUM_THREADS=2 cargo bench -p consilium-node --bench training [speed|memory|large]`
//!
//! `torch/step.py` is the other side and says what its cases are. Where Python cannot import what a case needs, the case
//! is left out. Memory is the peak of a process of its own beyond what it had before the first step, weights included in
//! "whole". Both sides use as many threads.

#![expect(clippy::print_stdout, reason = "a benchmark prints its table")]

#[path = "training/child.rs"]
mod child;
#[path = "training/job.rs"]
mod job;

use std::path::Path;

use child::{Python, memory_of, memory_of_python};
use job::{Job, Loss, Shape, Weights};

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// Steps after those that warm up; an odd number.
const REPETITIONS: usize = 7;

fn main() {
    let words: Vec<String> = std::env::args().skip(1).collect();
    match words.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        ["child", shape, weights] => println!("{}", job::peak(shape, weights)),
        ["speed"] => speed(),
        ["memory"] => memory(),
        ["large"] => large(),
        _ => {
            speed();
            memory();
            large();
        }
    }
}

/// Seconds by the clock and of processors.
#[derive(Clone, Copy)]
struct Times {
    clock: f64,
    cpu: f64,
}

fn speed() {
    let threads = rayon::current_num_threads();
    println!("tokens/s, threads: {threads}, load: {}", load());
    println!(
        "{:<10} {:<8} {:>9} {:>9} {:>7} {:>14}",
        "ours", "torch", "tokens/s", "torch", "ratio", "ratio of CPU s"
    );
    let mut python = Python::start(threads);
    for (name, loss, theirs) in [
        ("labels", Loss::Labels, "plain"),
        ("labels", Loss::Labels, "peft"),
        ("targets", Loss::Listed, "listed"),
        ("targets", Loss::Listed, "gkd"),
        ("targets", Loss::Listed, "gold"),
    ] {
        let mut job = Job::new(Shape::SMALL, &Weights::default(), loss);
        compare(name, &mut job, python.as_mut(), theirs);
    }
    for weights in Weights::ALL {
        let mut job = Job::new(Shape::SMALL, &weights, Loss::Labels);
        compare(&weights.name(), &mut job, python.as_mut(), "plain");
    }
}

/// A step of ours, and the twin's if there is one.
type Pair = (Times, Option<Times>);

fn compare(name: &str, job: &mut Job, mut python: Option<&mut Python>, theirs: &str) {
    job.step();
    job.step();
    if let Some(twin) = &mut python {
        let is_there = twin.step(theirs).is_some() && twin.step(theirs).is_some();
        if !is_there {
            println!("{name:<10} {theirs:<8} is left out: Python cannot import what it needs");
            return;
        }
    }
    let mut pairs = Vec::new();
    for _ in 0..REPETITIONS {
        let ours = child::timed(|| job.step());
        pairs.push((ours, python.as_mut().and_then(|twin| twin.step(theirs))));
    }
    let median = |pick: &dyn Fn(&Pair) -> Option<f64>| {
        let mut values: Vec<f64> = pairs.iter().filter_map(pick).collect();
        values.sort_by(f64::total_cmp);
        values.get(values.len() / 2).copied()
    };
    let tokens = job.tokens() as f64;
    let text = |value: Option<f64>, digits: usize| {
        value.map_or_else(|| "-".into(), |value| format!("{value:.digits$}"))
    };
    println!(
        "{name:<10} {theirs:<8} {:>9} {:>9} {:>7} {:>14}",
        text(median(&|pair| Some(tokens / pair.0.clock)), 0),
        text(median(&|pair| Some(tokens / pair.1?.clock)), 0),
        text(median(&|pair| Some(pair.1?.clock / pair.0.clock)), 2),
        text(median(&|pair| Some(pair.1?.cpu / pair.0.cpu)), 2),
    );
}

fn memory() {
    println!("\nmemory of a step, MB beyond the model; base: MB of frozen weights");
    for case in ["plain", "peft"] {
        match memory_of_python(case) {
            Some(bytes) => println!("torch {case:<18} {:>7.1}", megabytes(bytes)),
            None => println!("torch {case} is left out"),
        }
    }
    table("small");
}

fn large() {
    println!("\n12 layers of width 1024, 2 rows of 128 tokens: MB");
    table("large");
}

fn table(shape: &str) {
    println!("{:<24} {:>7} {:>7} {:>7}", "ours", "step", "base", "whole");
    for weights in Weights::ALL {
        let name = weights.name();
        let Some([step, base, whole]) = memory_of(shape, &name) else {
            println!("{name} failed");
            continue;
        };
        println!(
            "{name:<24} {:>7.1} {:>7.1} {:>7.1}",
            megabytes(step),
            megabytes(base),
            megabytes(whole)
        );
    }
}

fn megabytes(bytes: f64) -> f64 {
    bytes / 1e6
}

fn load() -> String {
    std::fs::read_to_string(Path::new("/proc/loadavg"))
        .unwrap_or_default()
        .trim()
        .to_owned()
}
