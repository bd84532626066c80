//! Hidden states to loss and gradient on one core, in turn with torch.
#![expect(clippy::print_stdout, reason = "a benchmark prints its table")]

#[path = "common/mod.rs"]
mod common;
#[path = "common/vocabulary.rs"]
mod vocabulary;

use consilium_kernels::loss::{ItemLoss, Tail, Term};
use consilium_kernels::{Head, Records, Vocab, Weights};
use half::bf16;

use common::{Twin, against_twin, one_thread};
use vocabulary::{Random, byte_target, text, vocabulary, write_for_twin};

const WIDTH: usize = 1024;
const K: usize = 32;

fn main() {
    one_thread();
    println!(
        "head of width {WIDTH}; tokens: KL on {K} listed tokens and the rest; trie: trie loss and labels"
    );
    println!(
        "{:<7} {:<8} {:>8} {:>6} {:>6} {:>10} {:>10} {:>7} {:>10}",
        "loss", "head", "V", "rows", "type", "ms/row", "torch", "ratio", "GFLOP/s"
    );
    let mut twin = Twin::start("head");
    // A size alone limits the run to it.
    let only: Option<usize> = std::env::args().find_map(|word| word.parse().ok());
    for (len, rows) in [(32_000, 128), (32_000, 512), (151_936, 128)] {
        if only.is_none_or(|only| only == len) {
            shape(len, rows, &mut twin);
        }
    }
}

fn shape(len: usize, rows: usize, twin: &mut Option<Twin>) {
    let (vocab, tokens) = vocabulary(len);
    let tokens = text(&vocab, &tokens, rows - 1);
    let path = write_for_twin(&format!("head-{len}-{rows}"), &vocab, &tokens);
    let path = path.display();
    let mut random = Random(1);
    let weights: Vec<f32> = random
        .logits(len * WIDTH)
        .iter()
        .map(|value| value / 80.0)
        .collect();
    let hidden = random.logits(rows * WIDTH);
    let mut labels = tokens.clone();
    labels.push(vocab.end_ranks().start);
    let (listed, bytes) = (token_target(len, rows), byte_target(&vocab, &tokens, 16));
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
    let case = |terms| Case {
        vocab: &vocab,
        hidden: &hidden,
        item: ItemLoss {
            tokens: &tokens,
            terms,
        },
    };
    for (name, terms) in [("tokens", &of_tokens[..]), ("trie", &of_bytes[..])] {
        for state in ["frozen", "trained"] {
            let ask = format!("{name} {path} {WIDTH} {state}");
            case(terms).measure(name, state, Weights::F32(&weights), twin, &ask);
        }
    }
    let narrow: Vec<bf16> = weights
        .iter()
        .map(|&weight| bf16::from_f32(weight))
        .collect();
    case(&of_bytes).measure("trie", "frozen", Weights::Bf16(&narrow), &mut None, "");
}

struct Case<'a> {
    vocab: &'a Vocab,
    hidden: &'a [f32],
    item: ItemLoss<'a>,
}

impl Case<'_> {
    fn measure(
        &self,
        name: &str,
        state: &str,
        weights: Weights<'_>,
        twin: &mut Option<Twin>,
        ask: &str,
    ) {
        let (len, rows) = (self.vocab.len(), self.hidden.len() / WIDTH);
        let head = Head::new(self.vocab, weights, WIDTH).expect("one row per token");
        let mut grad = vec![0.0; self.hidden.len()];
        let is_trained = state == "trained";
        let mut grad_weight = is_trained.then(|| vec![0.0; len * WIDTH]);
        let (seconds, compared) = against_twin(twin, ask, || {
            head.loss(
                self.hidden,
                &[self.item],
                &mut grad,
                grad_weight.as_deref_mut(),
            )
            .expect("finite logits")
        });
        let millis = |seconds: f64| format!("{:.3}", seconds / rows as f64 * 1e3);
        let products = if is_trained { 3 } else { 2 };
        println!(
            "{name:<7} {state:<8} {len:>8} {rows:>6} {:>6} {:>10} {:>10} {:>7} {:>10.1}",
            match weights {
                Weights::F32(_) => "f32",
                Weights::Bf16(_) => "bf16",
                Weights::F16(_) => "f16",
                Weights::Packed(_) => "packed",
            },
            millis(seconds),
            compared.map_or_else(|| "-".into(), |compared| millis(compared.theirs)),
            compared.map_or_else(|| "-".into(), |compared| format!("{:.2}", compared.ratio)),
            2e-9 * (products * rows * len * WIDTH) as f64 / seconds,
        );
    }
}

fn token_target(len: usize, rows: usize) -> Records<u32> {
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
