//! Hidden states to loss and gradient on one core, in turn with torch.
#![expect(clippy::print_stdout, reason = "a benchmark prints its table")]

#[path = "common/mod.rs"]
mod common;
#[path = "common/vocabulary.rs"]
mod vocabulary;

use consilium_kernels::loss::{ItemLoss, Tail, Term};
use consilium_kernels::{Head, Records, Weights};
use half::bf16;

use common::{Twin, against_twin, one_thread};
use vocabulary::{Random, vocabulary};

const WIDTH: usize = 1024;
const K: usize = 32;

fn main() {
    one_thread();
    println!("head of width {WIDTH}, frozen; KL on {K} listed tokens and the rest");
    println!(
        "{:>8} {:>6} {:>6} {:>10} {:>10} {:>7} {:>10}",
        "V", "rows", "type", "ms/row", "torch", "ratio", "GFLOP/s"
    );
    let mut twin = Twin::start("head");
    for (len, rows) in [(32_000, 128), (151_936, 64)] {
        let (vocab, _) = vocabulary(len);
        let mut random = Random(1);
        let weights: Vec<f32> = random
            .logits(len * WIDTH)
            .iter()
            .map(|value| value / 80.0)
            .collect();
        let hidden = random.logits(rows * WIDTH);
        let target = target(len, rows);
        let terms = [Term::Tokens {
            target: target.view(),
            weight: 1.0,
            tail: Tail::Ghost,
        }];
        let items = [ItemLoss {
            tokens: &[],
            terms: &terms,
        }];
        let mut grad = vec![0.0; hidden.len()];
        let narrow: Vec<bf16> = weights
            .iter()
            .map(|&weight| bf16::from_f32(weight))
            .collect();
        let mut no_twin = None;
        for (name, weights, twin) in [
            ("f32", Weights::F32(&weights), &mut twin),
            ("bf16", Weights::Bf16(&narrow), &mut no_twin),
        ] {
            let head = Head::new(&vocab, weights, WIDTH).expect("one row per token");
            let (seconds, compared) =
                against_twin(twin, &format!("{rows} {len} {WIDTH} {K}"), || {
                    head.loss(&hidden, &items, &mut grad, None)
                        .expect("finite logits")
                });
            let millis = |seconds: f64| format!("{:.3}", seconds / rows as f64 * 1e3);
            println!(
                "{len:>8} {rows:>6} {name:>6} {:>10} {:>10} {:>7} {:>10.1}",
                millis(seconds),
                compared.map_or_else(|| "-".into(), |compared| millis(compared.theirs)),
                compared.map_or_else(|| "-".into(), |compared| format!("{:.2}", compared.ratio)),
                4e-9 * (rows * len * WIDTH) as f64 / seconds,
            );
        }
    }
}

fn target(len: usize, rows: usize) -> Records<u32> {
    let mut random = Random(2);
    let mut symbols = Vec::new();
    for _ in 0..rows {
        let mut ids = Vec::new();
        while ids.len() < K {
            ids.push(random.below(len));
            ids.sort_unstable();
            ids.dedup();
        }
        symbols.extend(ids);
    }
    Records::from_columns(K, symbols, vec![80; rows * K], vec![], vec![80; rows])
        .expect("ascending ids")
}
