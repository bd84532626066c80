use std::sync::Arc;

use consilium_kernels::Vocab;

use super::*;
use crate::worker::data::{Item, Record, tokenize};
use crate::worker::model::{LoraConfig, Model, ModelConfig, random};
use crate::worker::tokenizer::train_bpe;

/// Items of a small regular language, and its vocabulary.
fn language() -> (Arc<[Item]>, Vocab) {
    let texts: Vec<String> = (0..60)
        .map(|i| format!("ref k{} -> use {}mg.", i % 20, (i % 20) * 3 % 7))
        .collect();
    let tokenizer = train_bpe(texts.iter().map(String::as_str), 280).unwrap();
    let record = |(index, text): (usize, &String)| {
        let (context, target) = text.split_at(if index % 2 == 0 { 0 } else { 6 });
        Record {
            context: context.into(),
            target: target.into(),
        }
    };
    let records: Vec<Record> = texts.iter().enumerate().map(record).collect();
    let items = tokenize(&tokenizer, &records).unwrap().into();
    (items, tokenizer.vocab(280).unwrap())
}

fn model(vocab: &Vocab, tied: bool) -> Model {
    let config = ModelConfig {
        tied,
        ..ModelConfig::llama(vocab.len(), 32, 2, 4, 48)
    };
    let mut model = random(config, vocab.id_of_rank().to_vec(), 1).unwrap();
    model.train_all().unwrap();
    model
}

fn config(steps: u64, rate: f64) -> TrainConfig {
    TrainConfig {
        rows: 4,
        length: 48,
        ..TrainConfig::new(steps, rate, 3)
    }
}

/// Trains, checks that every trainable tensor gets a gradient at the end, and returns the losses.
fn losses(model: Model, expected_tensors: usize, config: TrainConfig) -> (Vec<f64>, Model) {
    let (items, vocab) = language();
    let mut trainer = Trainer::new(model, &vocab, items, 0, config).unwrap();
    let mut losses = Vec::new();
    while !trainer.is_done() {
        losses.push(trainer.step().unwrap().loss);
    }
    let batch = trainer.batches.next_batch().unwrap();
    let (_, gradients) = trainer.gradients(&batch, 1.0).unwrap();
    let mut tensors = 0;
    gradients
        .each(trainer.model(), |name, gradient| {
            assert!(gradient.iter().any(|g| *g != 0.0), "{name} got no gradient");
            assert!(
                gradient.iter().all(|g| g.is_finite()),
                "{name} got {gradient:?}"
            );
            tensors += 1;
        })
        .unwrap();
    assert_eq!(tensors, expected_tensors);
    (losses, trainer.into_model())
}

#[test]
fn the_loss_falls_and_every_tensor_gets_a_gradient() {
    let (_, vocab) = language();
    for (tied, tensors) in [(false, 21), (true, 20)] {
        let (losses, _) = losses(model(&vocab, tied), tensors, config(60, 1e-2));
        assert!(losses[0] > 5.0 && losses[59] < 1.0, "{losses:?}");
    }
}

#[test]
fn adapters_with_embeddings_and_head_learn_and_the_base_stays() {
    let (_, vocab) = language();
    for (embeddings_and_head, tensors, most) in [(true, 30, 1.0), (false, 28, 5.2)] {
        let mut model = model(&vocab, false);
        let before = model.weights().unwrap();
        model
            .attach_lora(
                LoraConfig {
                    rank: 8,
                    alpha: 16.0,
                    embeddings_and_head,
                },
                5,
            )
            .unwrap();
        let (losses, mut model) = losses(model, tensors, config(60, 1e-2));
        assert!(losses[59] < most, "{losses:?}");
        let adapter = model.adapter().unwrap();
        assert_eq!(adapter.len(), tensors);
        let mut zero = adapter.clone();
        for (name, tensor) in &mut zero {
            match name.strip_prefix("base_model.model.") {
                Some(name) if before.contains_key(name) => *tensor = before[name].clone(),
                _ => tensor.values.fill(0.0),
            }
        }
        model.set_adapter(&zero).unwrap();
        assert_eq!(
            model.weights().unwrap(),
            before,
            "only the adapter was trained"
        );
    }
}

#[test]
fn a_resumed_run_is_bit_identical() {
    let (items, vocab) = language();
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("checkpoint.safetensors");
    let run = |lora: bool| {
        let mut model = model(&vocab, false);
        if lora {
            let config = LoraConfig {
                rank: 4,
                alpha: 8.0,
                embeddings_and_head: true,
            };
            model.attach_lora(config, 2).unwrap();
        }
        let config = TrainConfig {
            accumulate: 2,
            ..config(6, 1e-2)
        };
        Trainer::new(model, &vocab, Arc::clone(&items), 0, config).unwrap()
    };
    for lora in [false, true] {
        let mut whole = run(lora);
        let mut first = run(lora);
        for _ in 0..6 {
            whole.step().unwrap();
        }
        for _ in 0..3 {
            first.step().unwrap();
        }
        first.checkpoint(&path).unwrap();
        let mut second = run(lora);
        second.resume(&path).unwrap();
        while !second.is_done() {
            second.step().unwrap();
        }
        let weights = second.model().weights().unwrap();
        assert_eq!(weights, whole.model().weights().unwrap());
        assert_ne!(weights, first.model().weights().unwrap());
    }
    let bytes = std::fs::read(&path).unwrap();
    std::fs::write(&path, &bytes[..bytes.len() - 5]).unwrap();
    let error = run(true).resume(&path).unwrap_err().to_string();
    assert!(
        error.contains("checkpoint.safetensors: not a whole safetensors file"),
        "{error}"
    );
    std::fs::write(&path, &bytes).unwrap();
    let error = run(false).resume(&path).unwrap_err().to_string();
    assert!(error.contains("is missing"), "{error}");
}

#[test]
fn a_diverging_run_stops_with_its_step() {
    let (items, vocab) = language();
    let config = config(50, 1e30);
    let error = train_language_model(model(&vocab, false), &vocab, items, 0, config, |_| {});
    let error = error.unwrap_err();
    assert!(
        matches!(error, TrainError::Loss(_) | TrainError::NotFinite { .. }),
        "{error}"
    );
}
