//! Logits to next-byte records on one core, in turn with torch.
#![expect(clippy::print_stdout, reason = "a benchmark prints its table")]

#[path = "common/mod.rs"]
mod common;
#[path = "common/vocabulary.rs"]
mod vocabulary;

use consilium_kernels::score::{Branch, ItemTokens, branches_of, records_of};
use consilium_kernels::{Element, RecordShape, Records, Vocab};
use half::{bf16, f16};

use common::{Floors, Twin, against_twin, one_thread};
use vocabulary::{Random, text, vocabulary, write_for_twin};

const SHAPE: RecordShape = RecordShape {
    k: 16,
    fill_permille: 995,
};

struct Setup {
    vocab: Vocab,
    tokens: Vec<u32>,
    branches: Vec<Branch>,
    floors: Floors,
}

fn main() {
    one_thread();
    let floors = Floors::measure();
    println!(
        "read floor {:.1} GB/s; records of k = 16 with a branch row for every fourth token",
        floors.read / 1e9
    );
    println!(
        "{:<12} {:>8} {:>6} {:>6} {:>12} {:>12} {:>7} {:>8}",
        "operation", "V", "rows", "type", "us/row", "torch", "ratio", "of read"
    );
    let mut twin = Twin::start("scoring");
    for (len, rows) in [(32_000, 1024), (151_936, 256)] {
        let (vocab, tokens) = vocabulary(len);
        let tokens = text(&vocab, &tokens, rows - 1);
        let branches = every_fourth(&vocab, &tokens);
        let path = write_for_twin(&format!("scoring-{len}"), &vocab, &tokens);
        let setup = Setup {
            vocab,
            tokens,
            branches,
            floors,
        };
        let case = format!("{} {}", path.display(), setup.branches.len());
        let logits = Random(3).logits(rows * len);
        let after = Random(4).logits(setup.branches.len() * len);
        measure::<f32>(&setup, &logits, &after, &mut twin, &case);
        measure::<bf16>(&setup, &logits, &after, &mut None, &case);
        measure::<f16>(&setup, &logits, &after, &mut None, &case);
        find(&setup, &logits);
    }
}

/// An interior stop of every fourth token that has one.
fn every_fourth(vocab: &Vocab, tokens: &[u32]) -> Vec<Branch> {
    let mut branches = Vec::new();
    for (position, &token) in (0..).zip(tokens) {
        let bytes = vocab.token_bytes(token);
        let rank = (0..vocab.byte_tokens())
            .find(|&rank| bytes.len() > 1 && vocab.token_bytes(rank) == &bytes[..1]);
        if let Some(rank) = rank.filter(|_| branches.len() * 4 <= position as usize) {
            branches.push(Branch {
                position,
                taken: 1,
                rank,
            });
        }
    }
    branches
}

fn measure<T: Element>(
    setup: &Setup,
    logits: &[f32],
    after: &[f32],
    twin: &mut Option<Twin>,
    case: &str,
) {
    let stored = |values: &[f32]| {
        values
            .iter()
            .map(|&value| T::from_f32(value))
            .collect::<Vec<T>>()
    };
    let (logits, after) = (stored(logits), stored(after));
    let items = [ItemTokens {
        tokens: &setup.tokens,
        branches: &setup.branches,
    }];
    let (seconds, compared) = against_twin(twin, case, || {
        let mut out = Records::new(SHAPE.k).expect("16 slots");
        records_of(&setup.vocab, &items, &logits, &after, &SHAPE, &mut out).expect("finite logits");
        out
    });
    let bytes = (logits.len() + after.len()) * size_of::<T>();
    report::<T>("records", setup, seconds, compared, bytes);
}

fn find(setup: &Setup, logits: &[f32]) {
    let seconds = common::alone(|| branches_of(&setup.vocab, &[&setup.tokens], logits, 1e-3));
    report::<f32>("branches", setup, seconds, None, size_of_val(logits));
}

fn report<T: Element>(
    name: &str,
    setup: &Setup,
    seconds: f64,
    compared: Option<common::Compared>,
    bytes: usize,
) {
    let rows = setup.tokens.len() + 1;
    let micros = |seconds: f64| format!("{:.1}", seconds / rows as f64 * 1e6);
    println!(
        "{name:<12} {:>8} {rows:>6} {:>6} {:>12} {:>12} {:>7} {:>7.0}%",
        setup.vocab.len(),
        format!("{:?}", T::DTYPE),
        micros(seconds),
        compared.map_or_else(|| "-".into(), |compared| micros(compared.theirs)),
        compared.map_or_else(|| "-".into(), |compared| format!("{:.1}", compared.ratio)),
        100.0 * bytes as f64 / seconds / setup.floors.read,
    );
}
