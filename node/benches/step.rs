//! Tokens a second of a training step at the sizes of the example consortium, and of scoring.
//!
//! One thread, seconds of processor time:
//! `RAYON_NUM_THREADS=1 CANDLE_NUM_THREADS=1 cargo bench -p consilium-node --bench step`

use std::hint::black_box;
use std::sync::Arc;

use consilium_kernels::{TokenKind, Vocab};
use consilium_node::worker::data::Item;
use consilium_node::worker::model::{LoraConfig, Model, ModelConfig, Packed, random};
use consilium_node::worker::train::{TrainConfig, Trainer};

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

const VOCABULARY: usize = 400;
const STEPS: u64 = 60;

/// Items of 10 to 40 tokens.
fn items() -> Arc<[Item]> {
    (0..600u32)
        .map(|i| {
            let len = 10 + i * 7 % 31;
            let target = (0..len)
                .map(|j| 1 + (i * 31 + j * j * 7 + j) % 399)
                .collect();
            Item::new(Vec::new(), target)
        })
        .collect()
}

fn vocab() -> Vocab {
    let spellings: Vec<String> = (1..VOCABULARY).map(|id| format!("t{id}")).collect();
    let bytes = spellings
        .iter()
        .map(|text| TokenKind::Bytes(text.as_bytes()));
    Vocab::new(std::iter::once(TokenKind::EndOfRecord).chain(bytes)).expect("a plain vocabulary")
}

fn model(vocab: &Vocab, layers: usize) -> Model {
    let config = ModelConfig::llama(VOCABULARY, 128, layers, 4, 344);
    random(config, vocab.id_of_rank().to_vec(), 1).expect("a plain model")
}

/// Seconds that this thread has run, which other load on the machine does not stretch.
fn seconds() -> f64 {
    let text = std::fs::read_to_string("/proc/thread-self/schedstat").expect("Linux");
    let nanoseconds = text
        .split_whitespace()
        .next()
        .and_then(|field| field.parse::<f64>().ok());
    nanoseconds.expect("time on the processor") * 1e-9
}

#[expect(clippy::print_stdout, reason = "a benchmark prints times")]
fn measure(name: &str, vocab: &Vocab, model: Model) {
    let config = TrainConfig::new(STEPS, 1e-3, 1);
    let mut trainer = Trainer::new(model, vocab, items(), 0, config).expect("items fit");
    let mut rates = Vec::new();
    let (mut tokens, mut start) = (0, seconds());
    while !trainer.is_done() {
        let progress = trainer.step().expect("a finite step");
        tokens += progress.tokens;
        if progress.step.is_multiple_of(10) {
            rates.push(tokens as f64 / (seconds() - start));
            (tokens, start) = (0, seconds());
        }
    }
    rates.sort_by(f64::total_cmp);
    println!(
        "{name}: {:.0} tokens/s (best {:.0})",
        rates[rates.len() / 2],
        rates[rates.len() - 1]
    );
}

#[expect(clippy::print_stdout, reason = "a benchmark prints times")]
fn main() {
    let vocab = vocab();
    let mut source = model(&vocab, 2);
    source.train_all().expect("plain weights");
    measure("source, 2 layers, all weights", &vocab, source);
    let mut full = model(&vocab, 3);
    full.train_all().expect("plain weights");
    measure("pivot, 3 layers, all weights", &vocab, full);
    let mut pivot = model(&vocab, 3);
    let lora = LoraConfig {
        rank: 32,
        alpha: 64.0,
        embeddings_and_head: true,
    };
    pivot.attach_lora(lora, 1).expect("plain weights");
    measure(
        "pivot, 3 layers, rank 32, embeddings and head",
        &vocab,
        pivot,
    );

    let scorer = model(&vocab, 2);
    let mut batch = Packed::default();
    for item in items().iter().take(100) {
        batch.push(std::iter::once(0).chain(item.target.iter().copied()));
    }
    let rows: Vec<u32> = (0u32..).take(batch.tokens.len()).collect();
    let start = seconds();
    for _ in 0..20 {
        black_box(scorer.score(&batch, &rows).expect("a plain batch"));
    }
    let rate = (20 * rows.len()) as f64 / (seconds() - start);
    println!("score, 2 layers: {rate:.0} tokens/s");
}
