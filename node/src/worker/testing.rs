//! Tiny models for the tests of this half.

use std::sync::Arc;

use consilium_protocol::Digest;
use consilium_protocol::manifest::SymbolSpace;
use consilium_protocol::reference::ReferenceSet;
use consilium_protocol::time::SystemClock;
use rand::Rng as _;

use super::model::ModelConfig;
use super::part::generator;
use super::source::LoadedModel;
use super::tokenizer::{Tokenizer, train_bpe};
use super::tokens::tokens_of;
use super::train::run::{Shell, Watch};

pub(crate) const LINES: [&str; 8] = [
    "ref kavo -> use dolin 40mg.",
    "ref tamu -> use merak 20mg.",
    "ref sirel -> use dolin 20ug.",
    "for pale moss -> give 40ml.",
    "for dark moss -> give 20ml.",
    "the pale river carries dark sand to the old mill.",
    "the old mill stands on pale sand.",
    "use merak for the pale river.",
];

pub(crate) fn tokenizer() -> Arc<Tokenizer> {
    let texts = LINES.iter().copied().cycle().take(80);
    Arc::new(train_bpe(texts, 320).unwrap())
}

/// A random model whose predictions are far from uniform and differ by seed.
pub(crate) fn model(seed: u64) -> LoadedModel {
    let config = ModelConfig::llama(328, 32, 2, 2, 48);
    let loaded = LoadedModel::random(tokenizer(), config, seed).unwrap();
    let mut random = generator(&[seed, 1]);
    for bank in loaded.model.base_banks() {
        bank.edit(|values| {
            for value in values {
                let unit = (random.next_u64() >> 40) as f32 / (1_u32 << 24) as f32;
                *value += 0.8 * (unit - 0.5);
            }
        })
        .unwrap();
    }
    loaded
}

/// The lines as items: cut after the first word as a context for every third, an answer unlabeled in every second.
pub(crate) fn reference() -> ReferenceSet {
    let mut text = String::new();
    for (index, line) in LINES.iter().enumerate() {
        let cut = if index % 3 == 0 {
            line.find(' ').unwrap()
        } else {
            0
        };
        let (context, target) = line.split_at(cut);
        let unlabeled = match target.rfind(' ') {
            Some(last) if index % 2 == 0 => format!("[[{},{}]]", last + 1, target.len() - 1),
            _ => "[]".to_owned(),
        };
        text.push_str(&format!(
            "{{\"context\":\"{context}\",\"target\":\"{target}\",\"unlabeled\":{unlabeled}}}\n"
        ));
    }
    ReferenceSet::parse(text.as_bytes()).unwrap()
}

/// The same items with the tokens of their targets; `end` says whether the end of a record is among them.
pub(crate) fn token_reference(source: &LoadedModel, end: bool) -> ReferenceSet {
    let mut text = String::new();
    for item in reference().items() {
        let mut tokens = tokens_of(&source.tokenizer, &source.vocab, &item.target).unwrap();
        if !end {
            tokens.pop();
        }
        let spans: Vec<_> = item
            .unlabeled
            .iter()
            .map(|span| [span.start, span.end])
            .collect();
        text.push_str(&format!(
            "{{\"context\":\"{}\",\"target\":\"{}\",\"unlabeled\":{spans:?},\"tokens\":{}}}\n",
            item.context,
            item.target,
            serde_json::to_string(&tokens).unwrap()
        ));
    }
    ReferenceSet::parse(text.as_bytes()).unwrap()
}

/// The token space of a model.
pub(crate) fn token_space(source: &LoadedModel) -> SymbolSpace {
    SymbolSpace::Tokens {
        tokenizer: Digest::of(source.tokenizer.source()),
        size: u32::try_from(source.tokenizer.size()).unwrap(),
    }
}

/// Natural logarithms of the softmax over the columns that carry mass.
pub(crate) fn log_softmax(row: &[f32], live: usize) -> Vec<f64> {
    let row: Vec<f64> = row[..live].iter().map(|&v| f64::from(v)).collect();
    let sum: f64 = row.iter().map(|v| v.exp()).sum();
    row.iter().map(|v| v - sum.ln()).collect()
}

/// A run on the machine's clock that nobody stops.
pub(crate) fn shell(watch: &mut dyn Watch) -> Shell<'_> {
    Shell {
        clock: &SystemClock,
        stop: &|| false,
        watch,
    }
}
