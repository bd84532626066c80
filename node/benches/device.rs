//! Tokens a second of a LoRA step on a device, and which share of its matrix products' peak that is; `torch/device.py` is the same
//! step with transformers and peft, run in turn where `CONSILIUM_BENCH_PYTHON` names a Python that has them.
//!
//! A Llama of 1.1 billion random weights on an NVIDIA device:
//! `CONSILIUM_BENCH_PYTHON=python cargo bench -p consilium-node --features cuda --bench device -- --device cuda`.
//! Without arguments, a tiny one on the processors, which only shows that it runs. `--offload` keeps the layers in the host's
//! memory; `--layers`, `--rows` and so on change the shape.

use std::collections::BTreeMap;
use std::process::{Command, Stdio};
use std::time::Instant;

use candle_core::{DType, Device, Tensor};
use consilium_kernels::loss::{ItemLoss, NO_LABEL, Term};
use consilium_kernels::{TokenKind, Vocab};
use consilium_node::config::DeviceChoice;
use consilium_node::worker::model::{
    BaseStorage, LoraConfig, Model, ModelConfig, Packed, Placement, random_as,
};
use consilium_node::worker::train::{AdamW, AdamWConfig, TrainError};

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// Numbers by name: TinyLlama's shape on a device, a toy's elsewhere.
const LARGE: [(&str, usize); 11] = [
    ("width", 2048),
    ("layers", 22),
    ("heads", 32),
    ("kv-heads", 4),
    ("inner", 5632),
    ("vocabulary", 32000),
    ("rank", 16),
    ("rows", 8),
    ("length", 1024),
    ("steps", 20),
    ("matrix", 8192),
];
const TINY: [usize; 11] = [64, 2, 4, 2, 160, 500, 4, 2, 48, 4, 256];

/// Steps that are not timed.
const WARM: usize = 3;

struct Settings {
    numbers: BTreeMap<&'static str, usize>,
    device: String,
    checkpoint: bool,
    offload: bool,
}

impl Settings {
    fn of(mut args: impl Iterator<Item = String>) -> Result<Self, String> {
        let (mut device, mut checkpoint, mut offload) = ("cpu".to_owned(), false, false);
        let mut given = BTreeMap::new();
        while let Some(arg) = args.next() {
            let name = arg.trim_start_matches("--");
            match name {
                // Cargo's own word for benchmarks.
                "bench" => {}
                "checkpoint" => checkpoint = true,
                "offload" => offload = true,
                "device" => device = args.next().ok_or("--device: cpu or cuda")?,
                _ => {
                    let known = LARGE.iter().find(|(known, _)| *known == name);
                    let (known, _) = known.ok_or_else(|| format!("unknown option {arg}"))?;
                    let value = args.next().and_then(|value| value.parse().ok());
                    let value = value.filter(|value| *value > 0);
                    given.insert(*known, value.ok_or_else(|| format!("{arg}: a number"))?);
                }
            }
        }
        let is_large = device == "cuda";
        let usual = LARGE.iter().zip(TINY);
        let mut numbers: BTreeMap<_, _> = usual
            .map(|((name, large), tiny)| (*name, if is_large { *large } else { tiny }))
            .collect();
        numbers.extend(given);
        Ok(Self {
            numbers,
            device,
            checkpoint,
            offload,
        })
    }

    fn number(&self, name: &str) -> usize {
        self.numbers[name]
    }

    fn placement(&self) -> Result<Placement, String> {
        match self.device.as_str() {
            "cuda" => {
                let placement = DeviceChoice::Cuda.placement();
                let placement = placement.map_err(|error| error.to_string())?;
                let placement = placement.ok_or_else(|| "no device".to_owned())?;
                Ok(placement.with_offload(self.offload))
            }
            "cpu" => Ok(Placement::new(Device::Cpu, DType::F32).with_offload(self.offload)),
            other => Err(format!("--device {other}: cpu or cuda")),
        }
    }

    /// Operations of the matrix products of a step, the second forward pass of `--checkpoint` left out: two for each weight and
    /// token in the forward pass and two for the gradient of its input, four for the factors' own products and gradients beside
    /// these, and half of the square of scores, twice forward and four times backward.
    fn operations(&self, weights: usize, factors: usize) -> f64 {
        let tokens = (self.number("rows") * self.number("length")) as f64;
        let scores = (self.number("layers") * self.number("width") * self.number("length")) as f64;
        tokens * (4.0 * weights as f64 + 6.0 * factors as f64 + 6.0 * scores)
    }
}

struct Job {
    model: Model,
    vocab: Vocab,
    optimiser: AdamW,
    batch: Packed,
    labels: Vec<u32>,
}

impl Job {
    fn new(settings: &Settings, placement: &Placement) -> Self {
        let size = settings.number("vocabulary");
        let spellings: Vec<String> = (1..size).map(|id| format!("t{id}")).collect();
        let tokens = spellings
            .iter()
            .map(|text| TokenKind::Bytes(text.as_bytes()));
        let vocab = Vocab::new(std::iter::once(TokenKind::EndOfRecord).chain(tokens))
            .expect("a plain vocabulary");
        let config = ModelConfig {
            kv_heads: settings.number("kv-heads"),
            ..ModelConfig::llama(
                size,
                settings.number("width"),
                settings.number("layers"),
                settings.number("heads"),
                settings.number("inner"),
            )
        };
        let storage = BaseStorage {
            placement: Some(placement.clone()),
            ..BaseStorage::default()
        };
        let order = vocab.id_of_rank().to_vec();
        let mut model = random_as(config, order, 1, &storage).expect("a plain model");
        let rank = settings.number("rank");
        let lora = LoraConfig {
            rank,
            alpha: 2.0 * rank as f64,
            embeddings_and_head: false,
        };
        model.attach_lora(lora, 1).expect("a plain model");
        model.checkpoint_activations(settings.checkpoint);
        let mut batch = Packed::default();
        let mut labels = Vec::new();
        for row in 0..settings.number("rows") {
            let id = |i: usize| 1 + (row * 7919 + i * i * 31 + i * 17) % (size - 1);
            let id = |i| u32::try_from(id(i)).expect("a small vocabulary");
            let length = settings.number("length");
            batch.push((0..length).map(id));
            labels.extend((1..length).map(|i| model.rank_of_id()[id(i) as usize]));
            labels.push(NO_LABEL);
        }
        let optimiser = AdamW::new(&model, AdamWConfig::default()).expect("memory");
        Self {
            model,
            vocab,
            optimiser,
            batch,
            labels,
        }
    }

    fn step(&mut self) -> f64 {
        let count = self.batch.tokens.len();
        let rows = (0u32..).take(count).collect();
        let terms = [Term::Labels {
            labels: &self.labels,
            weight: 1.0 / count as f32,
        }];
        let items = [ItemLoss {
            tokens: &[],
            terms: &terms,
        }];
        let pass = self.model.forward(&self.batch, rows);
        let pass = pass.expect("a fitting batch");
        let (loss, gradients) = pass
            .backward::<TrainError>(&self.vocab, &items)
            .expect("finite numbers");
        self.optimiser
            .step(&mut self.model, &gradients, 1e-4)
            .expect("finite gradients");
        loss
    }
}

/// Seconds of some work, the device's included.
fn seconds(device: &Device, work: impl FnOnce()) -> f64 {
    device.synchronize().expect("a working device");
    #[expect(clippy::disallowed_methods, reason = "a benchmark reads the clock")]
    let start = Instant::now();
    work();
    device.synchronize().expect("a working device");
    start.elapsed().as_secs_f64()
}

/// Operations a second of a large matrix product.
fn peak(side: usize, placement: &Placement) -> f64 {
    let square = || {
        let values = Tensor::rand(-1f32, 1f32, (side, side), &placement.device);
        values.and_then(|values| values.to_dtype(placement.dtype))
    };
    let (a, b) = (square().expect("memory"), square().expect("memory"));
    let product = || drop(a.matmul(&b).expect("memory"));
    product();
    let times = 10;
    let seconds = seconds(&placement.device, || (0..times).for_each(|_| product()));
    2.0 * (side * side * side * times) as f64 / seconds
}

/// The median step of the twin in Python, in seconds.
fn twin(settings: &Settings) -> Option<f64> {
    let python = std::env::var_os("CONSILIUM_BENCH_PYTHON")?;
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/benches/torch/device.py");
    let mut command = Command::new(python);
    command.args([script, "--device", &settings.device]);
    for (name, number) in &settings.numbers {
        command.args([format!("--{name}"), number.to_string()]);
    }
    if settings.checkpoint {
        command.arg("--checkpoint");
    }
    let output = command.stderr(Stdio::inherit()).output().ok()?;
    String::from_utf8(output.stdout).ok()?.trim().parse().ok()
}

#[expect(clippy::print_stdout, reason = "a benchmark prints rates")]
fn run(settings: &Settings) -> Result<(), String> {
    let placement = settings.placement()?;
    let peak = peak(settings.number("matrix"), &placement);
    let mut job = Job::new(settings, &placement);
    let weights = job.model.base_bytes() / placement.dtype.size_in_bytes();
    let table = settings.number("vocabulary") * settings.number("width");
    let adapter = job.model.adapter().map_err(|error| error.to_string())?;
    let factors = adapter.values().map(|tensor| tensor.values.len()).sum();
    let mut losses = (0..WARM).map(|_| job.step()).collect::<Vec<_>>();
    let mut times: Vec<f64> = (0..settings.number("steps"))
        .map(|_| seconds(&placement.device, || losses.push(job.step())))
        .collect();
    times.sort_by(f64::total_cmp);
    let median = times[times.len() / 2];
    let tokens = job.batch.tokens.len() as f64;
    let (first, last) = (losses[0], losses[losses.len() - 1]);
    println!(
        "{weights} weights, {factors} in factors, {tokens} tokens a step, {:?}",
        placement.dtype
    );
    println!("loss {first:.4} to {last:.4}");
    let achieved = settings.operations(weights - table, factors) / median;
    println!(
        "{:.0} tokens/s, step {:.2} ms (best {:.2}); {:.2} of {:.2} Tflop/s: {:.1} %",
        tokens / median,
        median * 1e3,
        times[0] * 1e3,
        achieved * 1e-12,
        peak * 1e-12,
        100.0 * achieved / peak
    );
    if settings.device == "cuda"
        && let Ok(bytes) = consilium_kernels::cuda::device()
            .and_then(consilium_kernels::cuda::Device::memory_in_use)
    {
        println!("{bytes} bytes of the device are in use");
    }
    drop(job);
    match twin(settings) {
        Some(theirs) => println!(
            "transformers and peft: {:.0} tokens/s; we take {:.2} times theirs",
            tokens / theirs,
            theirs / median
        ),
        None => println!(
            "transformers and peft: not run, CONSILIUM_BENCH_PYTHON names no Python that has them"
        ),
    }
    Ok(())
}

fn main() -> Result<(), String> {
    run(&Settings::of(std::env::args().skip(1))?)
}
