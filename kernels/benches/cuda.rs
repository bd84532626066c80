//! The CUDA kernels against the bandwidth of the device's memory, and the fused head by itself; its twin is
//! `torch/cuda_head.py`.
//!
//! ```text
//! cargo bench -p consilium-kernels --features cuda --bench cuda [rows] [head]
//! CONSILIUM_OWN_GEMM=1 ... head        the crate's own matrix product instead of cuBLAS
//! ```
#![expect(clippy::print_stdout, reason = "a benchmark prints its table")]
#![expect(
    clippy::cast_possible_truncation,
    reason = "random numbers below small bounds"
)]

#[path = "common/mod.rs"]
mod common;

use std::collections::BTreeSet;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use common::{median, seconds};
use consilium_kernels::cuda::{Device, Logits, LossJob, ResidentHead, Scoring, device};
use consilium_kernels::loss::{ItemLoss, Term};
use consilium_kernels::{Element, RecordShape, Records, TokenKind, Vocab};
use half::bf16;

const SLOTS: usize = 16;

/// Tokens of an item; its rows are one more.
const ITEM: usize = 255;

struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    fn below(&mut self, bound: usize) -> usize {
        (self.next() % bound as u64) as usize
    }

    /// Sum of two uniform values in -scale..scale.
    fn value(&mut self, scale: f32) -> f32 {
        let bits = self.next();
        let part = |bits: u64| (bits & 0xffff) as f32 / 32768.0 - 1.0;
        (part(bits) + part(bits >> 16)) * scale * 0.5
    }
}

/// All single bytes, and words as a tokenizer has them: half start with a space, letters are skewed.
fn vocabulary(size: usize) -> Vocab {
    let mut random = Random(size as u64 | 1);
    let mut tokens: BTreeSet<Vec<u8>> = (0..=255).map(|byte| vec![byte]).collect();
    while tokens.len() < size - 2 {
        let mut token = Vec::new();
        if random.below(2) == 0 {
            token.push(b' ');
        }
        for _ in 0..2 + random.below(6) {
            let letter = random.below(26).min(random.below(26));
            let upper = token.len() < 2 && random.below(5) == 0;
            token.push(if upper { b'A' } else { b'a' } + letter as u8);
        }
        tokens.insert(token);
    }
    let kinds = tokens.iter().map(|token| TokenKind::Bytes(token));
    Vocab::new(kinds.chain([TokenKind::EndOfRecord, TokenKind::Ignored])).expect("a vocabulary")
}

struct Items {
    tokens: Vec<Vec<u32>>,
    targets: Vec<Records>,
}

impl Items {
    fn new(vocab: &Vocab, rows: usize) -> Self {
        let mut random = Random(7);
        let bound = vocab.byte_tokens() as usize;
        let tokens: Vec<Vec<u32>> = (0..rows / (ITEM + 1))
            .map(|_| (0..ITEM).map(|_| random.below(bound) as u32).collect())
            .collect();
        let targets = tokens
            .iter()
            .map(|tokens| target(vocab, tokens, &mut random))
            .collect();
        Self { tokens, targets }
    }

    fn tokens(&self) -> Vec<&[u32]> {
        self.tokens.iter().map(Vec::as_slice).collect()
    }

    fn terms(&self) -> Vec<[Term<'_>; 1]> {
        let terms = self.targets.iter().map(|target| {
            [Term::Trie {
                target: target.view(),
                weight: 1e-3,
            }]
        });
        terms.collect()
    }
}

/// Sixteen bytes per position, the observed one among them.
fn target(vocab: &Vocab, tokens: &[u32], random: &mut Random) -> Records {
    let bytes: Vec<u8> = tokens
        .iter()
        .flat_map(|&rank| vocab.token_bytes(rank))
        .copied()
        .collect();
    let (mut symbols, mut codes) = (Vec::new(), Vec::new());
    for position in 0..=bytes.len() {
        let mut listed = BTreeSet::from([bytes.get(position).copied().unwrap_or(b' ')]);
        while listed.len() < SLOTS {
            listed.insert(b' ' + random.below(95) as u8);
        }
        codes.extend(listed.iter().map(|byte| {
            if bytes.get(position) == Some(byte) {
                8
            } else {
                90
            }
        }));
        symbols.extend(listed);
    }
    let positions = bytes.len() + 1;
    Records::from_columns(
        SLOTS,
        symbols,
        codes,
        vec![200; positions],
        vec![100; positions],
    )
    .expect("records")
}

fn items_of<'a>(items: &'a Items, terms: &'a [[Term<'a>; 1]]) -> Vec<ItemLoss<'a>> {
    let pairs = items.tokens.iter().zip(terms);
    pairs
        .map(|(tokens, terms)| ItemLoss { tokens, terms })
        .collect()
}

/// Median seconds of the device over eleven runs.
fn timed(device: &Device, mut work: impl FnMut()) -> f64 {
    work();
    let times: Vec<f64> = (0..11)
        .map(|_| {
            let timed = device.time(|| {
                work();
                Ok(())
            });
            timed.expect("a device that works")
        })
        .collect();
    median(&times)
}

fn rows<T: Element>(device: &Device, copy: f64, size: usize, count: usize) {
    let vocab = vocabulary(size);
    let items = Items::new(&vocab, count);
    let mut random = Random(11);
    let values: Vec<T> = (0..count * size)
        .map(|_| T::from_f32(random.value(10.0)))
        .collect();
    let mut logits = Logits::upload(device, &values).expect("memory");
    let bytes = logits.bytes() as f64;
    let report = |what: &str, seconds: f64, bytes: f64| {
        println!(
            "{what:28} {:?} V={size:6} P={count:5} {:9.3} ms {:7.1} GB/s {:5.1} % of copy",
            T::DTYPE,
            seconds * 1e3,
            bytes / seconds / 1e9,
            100.0 * bytes / seconds / copy
        );
    };
    {
        let tokens = items.tokens();
        let scoring = Scoring::new(device, &vocab, &tokens, &logits).expect("a job");
        let sums = timed(device, || scoring.sum().expect("a device that works"));
        report("segment sums", sums, bytes);
        let shape = RecordShape {
            k: SLOTS,
            fill_permille: 995,
        };
        let records = || {
            scoring.sum().expect("a device that works");
            let mut out = Records::new(SLOTS).expect("records");
            scoring
                .records(&vocab, None, &shape, &mut out)
                .expect("finite logits");
            out
        };
        records();
        let wall: Vec<f64> = (0..7).map(|_| seconds(records)).collect();
        report("records, wall clock", median(&wall), bytes);
    }
    let terms = items.terms();
    let losses = items_of(&items, &terms);
    let job = LossJob::new(device, &vocab, &losses, &mut logits).expect("a job");
    let time = timed(device, || job.run().expect("a device that works"));
    report("loss and gradient in place", time, 2.0 * bytes);
    println!("    loss {:.6}", job.loss().expect("finite logits"));
}

fn head(device: &'static Device) {
    const SIZE: usize = 151_936;
    const WIDTH: usize = 4096;
    let vocab = vocabulary(SIZE);
    let mut random = Random(13);
    let weights: Vec<bf16> = (0..SIZE * WIDTH)
        .map(|_| bf16::from_f32(random.value(0.02)))
        .collect();
    let head = ResidentHead::new(device, &vocab, &weights, WIDTH).expect("memory");
    drop(weights);
    let product = if device.has_blas() {
        "cuBLAS"
    } else {
        "own product"
    };
    let resident = device.memory_in_use().expect("a device that works");
    for count in [1024, 8192] {
        let items = Items::new(&vocab, count);
        let terms = items.terms();
        let losses = items_of(&items, &terms);
        let states: Vec<bf16> = (0..count * WIDTH)
            .map(|_| bf16::from_f32(random.value(1.0)))
            .collect();
        let mut hidden = head.hidden(&states).expect("memory");
        let before = device.memory_in_use().expect("a device that works");
        let (done, peak) = (AtomicBool::new(false), AtomicUsize::new(0));
        std::thread::scope(|scope| {
            scope.spawn(|| {
                while !done.load(Ordering::Relaxed) {
                    peak.fetch_max(device.memory_in_use().unwrap_or(0), Ordering::Relaxed);
                }
            });
            for _ in 0..2 {
                head.loss(&losses, &mut hidden, None)
                    .expect("finite logits");
            }
            done.store(true, Ordering::Relaxed);
        });
        let wall: Vec<f64> = (0..7)
            .map(|_| {
                seconds(|| {
                    head.loss(&losses, &mut hidden, None)
                        .expect("finite logits")
                })
            })
            .collect();
        let time = median(&wall);
        let work = 4.0 * count as f64 * SIZE as f64 * WIDTH as f64;
        println!(
            "fused head, {product:12} bf16 V={SIZE} d={WIDTH} P={count:5} {:9.3} ms {:6.1} TFLOP/s, scratch {} MiB \
             (weights and hidden states: {} MiB)",
            time * 1e3,
            work / time / 1e12,
            peak.load(Ordering::Relaxed).saturating_sub(before) >> 20,
            before >> 20,
        );
    }
    println!("    resident before hidden states: {} MiB", resident >> 20);
}

fn main() {
    let parts: Vec<String> = std::env::args()
        .skip(1)
        .filter(|part| !part.starts_with('-'))
        .collect();
    let wanted = |part: &str| parts.is_empty() || parts.iter().any(|other| other == part);
    let device = match device() {
        Ok(device) => device,
        Err(reason) => {
            println!("nothing to measure: {reason}");
            return;
        }
    };
    println!("{}", device.name());
    if wanted("rows") {
        let copy = device.copy_bandwidth().expect("a device that works");
        println!(
            "copy within the device: {:.1} GB/s read and written",
            copy / 1e9
        );
        rows::<f32>(device, copy, 32_000, 4096);
        rows::<bf16>(device, copy, 32_000, 8192);
        rows::<f32>(device, copy, 151_936, 1024);
        rows::<bf16>(device, copy, 151_936, 2048);
        rows::<bf16>(device, copy, 151_935, 2048);
    }
    if wanted("head") {
        head(device);
    }
}
