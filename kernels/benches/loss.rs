//! Losses with their gradient in place on one core, in turn with torch.
#![expect(clippy::print_stdout, reason = "a benchmark prints its table")]

#[path = "common/mod.rs"]
mod common;
#[path = "common/vocabulary.rs"]
mod vocabulary;

use consilium_kernels::loss::{ItemLoss, Tail, Term, loss_in_place};
use consilium_kernels::{Element, Records, Vocab};
use half::bf16;

use common::{Floors, REPETITIONS, Twin, against_twin, one_thread};
use vocabulary::{Random, byte_target, text, vocabulary, write_for_twin};

struct Setup<'a> {
    vocab: &'a Vocab,
    item: ItemLoss<'a>,
    logits: &'a [f32],
    floors: Floors,
}

fn main() {
    one_thread();
    let floors = Floors::measure();
    println!(
        "copy floor {:.1} GB/s; logits are read and overwritten by the gradient",
        floors.copy / 1e9
    );
    println!(
        "{:<14} {:>8} {:>6} {:>6} {:>10} {:>10} {:>7} {:>8}",
        "operation", "V", "rows", "type", "us/row", "torch", "ratio", "of copy"
    );
    let mut twin = Twin::start("loss");
    for (len, rows) in [(32_000, 512), (151_936, 112)] {
        let (vocab, tokens) = vocabulary(len);
        let tokens = text(&vocab, &tokens, rows - 1);
        let path = write_for_twin(&format!("loss-{len}"), &vocab, &tokens);
        let path = path.display();
        let logits = Random(3).logits(rows * len);
        let mut labels = tokens.clone();
        labels.push(vocab.end_ranks().start);
        let listed = token_target(&vocab, &labels, 32);
        let bytes = byte_target(&vocab, &tokens, 16);
        let of_tokens = [Term::Tokens {
            target: listed.view(),
            weight: 1.0,
            tail: Tail::Ghost,
        }];
        let of_bytes = [
            Term::Trie {
                target: bytes.view(),
                weight: 0.9,
            },
            Term::Labels {
                labels: &labels,
                weight: 0.1,
            },
        ];
        let of_places = [Term::Sorted {
            target: listed.view(),
            weight: 1.0,
        }];
        let few = token_target(&vocab, &labels, 10);
        let of_scores = [
            Term::Standardised {
                target: few.view(),
                weight: 0.5,
                temperature: 1.0,
            },
            Term::Labels {
                labels: &labels,
                weight: 0.5,
            },
        ];
        for (name, terms) in [
            ("tokens", &of_tokens[..]),
            ("trie", &of_bytes),
            ("sorted", &of_places),
            ("standardised", &of_scores),
        ] {
            let item = ItemLoss {
                tokens: &tokens,
                terms,
            };
            let setup = Setup {
                vocab: &vocab,
                item,
                logits: &logits,
                floors,
            };
            measure::<f32>(name, &setup, &mut twin, &format!("{name} {path}"));
            measure::<bf16>(name, &setup, &mut None, "");
        }
    }
}

/// The observed token and others, `k` in all.
fn token_target(vocab: &Vocab, labels: &[u32], k: usize) -> Records<u32> {
    let mut random = Random(5);
    let (mut symbols, mut codes) = (Vec::new(), Vec::new());
    for &label in labels {
        let mut ids = vec![vocab.id_of_rank()[label as usize]];
        while ids.len() < k {
            ids.push(random.below(vocab.len()));
            ids.sort_unstable();
            ids.dedup();
        }
        codes.extend(ids.iter().map(|&id| {
            if vocab.rank_of_id()[id as usize] == label {
                16
            } else {
                110
            }
        }));
        symbols.extend(ids);
    }
    Records::from_columns(k, symbols, codes, vec![], vec![60; labels.len()]).expect("ascending ids")
}

fn measure<T: Element>(name: &str, setup: &Setup<'_>, twin: &mut Option<Twin>, case: &str) {
    // Every repetition overwrites its logits, so each has its own, made before the clock runs.
    let mut fresh: Vec<Vec<T>> = (0..=REPETITIONS)
        .map(|_| {
            setup
                .logits
                .iter()
                .map(|&value| T::from_f32(value))
                .collect()
        })
        .collect();
    let mut used = Vec::new();
    let (seconds, compared) = against_twin(twin, case, || {
        let mut logits = fresh
            .pop()
            .or_else(|| used.pop())
            .expect("one per repetition");
        let loss = loss_in_place(setup.vocab, &[setup.item], &mut logits).expect("finite logits");
        used.push(logits);
        loss
    });
    let rows = setup.logits.len() / setup.vocab.len();
    let micros = |seconds: f64| format!("{:.1}", seconds / rows as f64 * 1e6);
    println!(
        "{name:<14} {:>8} {rows:>6} {:>6} {:>10} {:>10} {:>7} {:>7.0}%",
        setup.vocab.len(),
        format!("{:?}", T::DTYPE),
        micros(seconds),
        compared.map_or_else(|| "-".into(), |compared| micros(compared.theirs)),
        compared.map_or_else(|| "-".into(), |compared| format!("{:.1}", compared.ratio)),
        100.0 * (2 * setup.logits.len() * size_of::<T>()) as f64 / seconds / setup.floors.copy,
    );
}
