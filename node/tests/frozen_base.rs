//! Adapters train on a base of 16, 8 and 4 bits as on one of f32, and on a base in a file as on one in memory.

#![cfg(test)]

use std::sync::Arc;

use consilium_kernels::quant::Format;
use consilium_kernels::{TokenKind, Vocab};
use consilium_node::worker::data::Item;
use consilium_node::worker::model::{
    BaseStorage, Family, LoraConfig, Model, ModelConfig, OffloadFile, load_folder, load_folder_as,
    random, save_folder,
};
use consilium_node::worker::train::{TrainConfig, Trainer};

/// Real text that does not change, as bytes.
const TEXT: &str = include_str!("../../LICENSE");

/// Steps of an adapter.
const STEPS: u64 = 40;

const LORA: LoraConfig = LoraConfig {
    rank: 8,
    alpha: 16.0,
    embeddings_and_head: false,
};

/// Token 0 ends a record, token `b + 1` is byte `b`.
fn vocab() -> Vocab {
    let bytes: Vec<[u8; 1]> = (0..=255).map(|byte| [byte]).collect();
    let tokens = bytes.iter().map(|byte| TokenKind::Bytes(byte));
    Vocab::new(std::iter::once(TokenKind::EndOfRecord).chain(tokens)).unwrap()
}

/// The text in pieces of 60 bytes: the first half, or the second in capitals, which the first hardly has.
fn items(second: bool) -> Arc<[Item]> {
    let (a, b) = TEXT.as_bytes().split_at(TEXT.len() / 2);
    let text = if second {
        b.to_ascii_uppercase()
    } else {
        a.to_vec()
    };
    text.chunks_exact(60)
        .map(|piece| {
            Item::new(
                Vec::new(),
                piece.iter().map(|&byte| u32::from(byte) + 1).collect(),
            )
        })
        .collect()
}

fn train(model: Model, vocab: &Vocab, second: bool, steps: u64, rate: f64) -> (Vec<f64>, Model) {
    let config = TrainConfig {
        rows: 6,
        length: 64,
        ..TrainConfig::new(steps, rate, 3)
    };
    let mut trainer = Trainer::new(model, vocab, items(second), 0, config).unwrap();
    let mut losses = Vec::new();
    while !trainer.is_done() {
        losses.push(trainer.step().unwrap().loss);
    }
    (losses, trainer.into_model())
}

/// Losses of an adapter's training on the second half of the text, and the adapter's model.
fn adapt(
    folder: &std::path::Path,
    vocab: &Vocab,
    storage: &BaseStorage,
    again: bool,
) -> (Vec<f64>, Model) {
    let order = vocab.id_of_rank().to_vec();
    let mut model = load_folder_as(folder, order, storage).unwrap();
    model.attach_lora(LORA, 5).unwrap();
    model.checkpoint_activations(again);
    train(model, vocab, true, STEPS, 3e-3)
}

fn stored(format: Format) -> BaseStorage {
    BaseStorage {
        format,
        tables: true,
        ..BaseStorage::default()
    }
}

#[test]
fn adapters_learn_on_a_small_base_what_they_learn_on_a_large_one() {
    let vocab = vocab();
    let config = ModelConfig::llama(257, 64, 2, 4, 172);
    let mut base = random(config, vocab.id_of_rank().to_vec(), 1).unwrap();
    base.train_all().unwrap();
    let (_, base) = train(base, &vocab, false, 80, 1e-2);
    let folder = tempfile::tempdir().unwrap();
    save_folder(&base, folder.path()).unwrap();

    let plain = BaseStorage::default();
    let (want, model) = adapt(folder.path(), &vocab, &plain, false);
    let (bytes, adapter) = (model.base_bytes() as f64, model.adapter().unwrap());
    let mean = |losses: &[f64]| losses.iter().sum::<f64>() / losses.len() as f64;
    let learned = mean(&want[..8]) - mean(&want[want.len() - 8..]);
    println!("f32: loss falls by {learned:.3}");
    assert!(learned > 0.3, "nothing is learned: {want:?}");

    for (format, tolerance, share) in [
        (Format::Bf16, 0.01, 0.51),
        (Format::Int8, 0.01, 0.35),
        (Format::Nf4, 0.03, 0.25),
    ] {
        let (got, model) = adapt(folder.path(), &vocab, &stored(format), false);
        let worst = got
            .iter()
            .zip(&want)
            .map(|(got, want)| (got / want - 1.0).abs());
        let worst = worst.fold(0.0, f64::max);
        let share_of_base = model.base_bytes() as f64 / bytes;
        println!(
            "{}: loss off by {worst:.5} at most, base {share_of_base:.3}",
            format.name()
        );
        assert!(worst < tolerance, "{format:?}: {worst}\n{got:?}\n{want:?}");
        assert!(share_of_base < share, "{format:?}: {share_of_base}");
    }

    let file = Arc::new(OffloadFile::create(folder.path()).unwrap());
    let offloaded = BaseStorage {
        offload: Some(file),
        ..BaseStorage::default()
    };
    for (storage, again) in [(&plain, true), (&offloaded, false), (&offloaded, true)] {
        let (got, model) = adapt(folder.path(), &vocab, storage, again);
        assert_eq!(got, want, "{storage:?}");
        assert_eq!(model.adapter().unwrap(), adapter);
    }
}

#[test]
fn a_small_base_trains_like_the_f32_base_of_its_decoded_weights() {
    let vocab = vocab();
    let order = || vocab.id_of_rank().to_vec();
    for (tied, format) in [
        (false, Format::Nf4),
        (true, Format::Int8),
        (true, Format::Bf16),
    ] {
        let config = ModelConfig {
            tied,
            family: Family::Qwen2,
            qkv_bias: true,
            kv_heads: 2,
            ..ModelConfig::llama(257, 64, 2, 4, 40)
        };
        let [first, second] = [(); 2].map(|()| tempfile::tempdir().unwrap());
        let mut model = random(config, order(), 2).unwrap();
        model.train_all().unwrap();
        // Biases are zero before.
        let (_, model) = train(model, &vocab, false, 3, 1e-2);
        save_folder(&model, first.path()).unwrap();
        let small = load_folder_as(first.path(), order(), &stored(format)).unwrap();
        save_folder(&small, second.path()).unwrap();
        let mut models = [small, load_folder(second.path(), order()).unwrap()];
        let [got, want] = models.each_mut().map(|model| {
            model.attach_lora(LORA, 5).unwrap();
            train(model.duplicate().unwrap(), &vocab, true, 3, 1e-2)
        });
        for (got, want) in got.0.iter().zip(&want.0) {
            assert!((got - want).abs() < 1e-5, "{format:?}: {got} for {want}");
        }
        let refused = models[0].train_all().unwrap_err().to_string();
        assert!(refused.contains("fewer bits"), "{refused}");
    }
}
