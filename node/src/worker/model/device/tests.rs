use candle_core::{DType, Device};
use consilium_kernels::loss::{ItemLoss, NO_LABEL, Term};
use consilium_kernels::quant::Format;
use consilium_kernels::{TokenKind, Vocab};

use crate::worker::model::reference::{batch, families, order, roughen_adapters, roughened, tiny};
use crate::worker::model::*;
use crate::worker::train::TrainError;

/// Ranks 5 and 6 spell the same, two end a record, and the last is no token of a text.
fn vocabulary() -> Vocab {
    let mut bytes = [[0u8; 1]; 29];
    for (id, rank) in order(29).into_iter().zip(0u8..) {
        bytes[id as usize] = [rank - u8::from(rank > 5)];
    }
    let kind = |byte: &'static [u8; 1]| match byte[0] {
        25 | 26 => TokenKind::EndOfRecord,
        27 => TokenKind::Ignored,
        _ => TokenKind::Bytes(byte),
    };
    let bytes: &'static [[u8; 1]; 29] = Box::leak(Box::new(bytes));
    let vocab = Vocab::new(bytes.iter().map(kind)).unwrap();
    assert_eq!(vocab.id_of_rank(), order(29));
    vocab
}

/// Items of very different and of almost the same length.
fn packed(config: &ModelConfig) -> Packed {
    let mut batch = batch(config);
    for (item, len) in [(4, 17u32), (5, 30), (6, 28)] {
        batch.push((0..len).map(|i| (item * 13 + i * i * 3 + i) % 29));
    }
    batch
}

fn on_host_memory(dtype: DType) -> Placement {
    Placement::new(Device::Cpu, dtype)
}

fn placed(model: &Model, placement: Placement) -> Model {
    let mut copy = model.duplicate().unwrap();
    copy.place(placement).unwrap();
    copy
}

/// Largest difference relative to the largest value that is wanted.
fn difference(got: &[f32], want: &[f32]) -> f32 {
    assert_eq!(got.len(), want.len());
    let scale = want
        .iter()
        .fold(1e-6f32, |most, value| most.max(value.abs()));
    let pairs = got.iter().zip(want);
    pairs.map(|(g, w)| (g - w).abs()).fold(0.0, f32::max) / scale
}

/// Loss and gradients of an item of plain labels, after it one of two terms, which takes the way over the host, and a term
/// of all rows.
fn gradients(model: &Model, vocab: &Vocab) -> (f64, Gradients) {
    let batch = packed(model.config());
    let rows: Vec<u32> = (0u32..)
        .take(batch.tokens.len())
        .filter(|row| row % 4 != 1)
        .collect();
    let labels: Vec<u32> = (0u32..)
        .take(rows.len())
        .map(|row| (row * 7 + 3) % 28)
        .collect();
    let mut labels = labels;
    labels[2] = NO_LABEL;
    let (first, second) = labels.split_at(rows.len() / 2);
    let plain = [Term::Labels {
        labels: first,
        weight: 0.7,
    }];
    let twice = [
        Term::Labels {
            labels: second,
            weight: 0.3,
        },
        Term::Labels {
            labels: second,
            weight: 0.2,
        },
    ];
    let items = [plain.as_slice(), &twice].map(|terms| ItemLoss { tokens: &[], terms });
    let pass = model.forward(&batch, rows).unwrap();
    // A further term, of hidden states, that gives a trained head a slope along its first column.
    let width = model.config().hidden_size;
    let more: &FurtherLoss<'_> = &|_, hidden, by_hidden, by_head| {
        for (sum, h) in by_hidden.iter_mut().zip(hidden) {
            *sum += h / 50.0;
        }
        for row in by_head
            .into_iter()
            .flat_map(|by| by.chunks_exact_mut(width))
        {
            row[0] += 0.1;
        }
        Ok(hidden.iter().map(|h| f64::from(h * h) / 100.0).sum())
    };
    let found = pass.backward_with::<TrainError>(vocab, &items, Some(more));
    found.unwrap()
}

/// The host's operations and the device's must agree in loss, all gradients, hidden states and branches.
fn compare(host: &Model, device: &Model) {
    let vocab = vocabulary();
    let (want_loss, want) = gradients(host, &vocab);
    let (got_loss, got) = gradients(device, &vocab);
    assert!(
        (got_loss - want_loss).abs() < 1e-5 * want_loss.abs(),
        "{got_loss} {want_loss}"
    );
    let mut all = Vec::new();
    want.each(host, |name, gradient| {
        all.push((name.to_owned(), gradient.to_vec()));
    })
    .unwrap();
    let mut all = all.into_iter();
    got.each(device, |name, gradient| {
        let (wanted, want) = all.next().unwrap();
        assert_eq!(name, wanted);
        assert!(gradient.iter().any(|g| *g != 0.0), "{name} got no gradient");
        let worst = difference(gradient, &want);
        assert!(worst < 5e-5, "{name}: {worst:e}");
    })
    .unwrap();
    assert!(all.next().is_none(), "a tensor got no gradient");
    compare_scores(host, device, 5e-5);
}

fn compare_scores(host: &Model, device: &Model, tolerance: f32) {
    let batch = packed(host.config());
    let rows: Vec<u32> = (0u32..).take(batch.tokens.len()).step_by(3).collect();
    let want = host.score(&batch, &rows).unwrap();
    let got = device.score(&batch, &rows).unwrap();
    let worst = difference(&got.hidden, &want.hidden);
    assert!(worst < tolerance, "hidden states: {worst:e}");
    let branch = |item, prefix, token| BranchToken {
        item,
        prefix,
        token,
    };
    let branches = [
        branch(0, 0, 4),
        branch(0, 5, 7),
        branch(2, 17, 1),
        branch(3, 9, 2),
        branch(3, 33, 8),
    ];
    let want = host.branch_hidden(&want.kv, &branches).unwrap();
    let got = device.branch_hidden(&got.kv, &branches).unwrap();
    let worst = difference(&got, &want);
    assert!(worst < tolerance, "branches: {worst:e}");
}

/// Both ways to hold activations, and with the frozen layers elsewhere.
fn compare_everywhere(host: &Model) {
    let placement = on_host_memory(DType::F32);
    let mut device = placed(host, placement.clone());
    compare(host, &device);
    device.checkpoint_activations(true);
    compare(host, &device);
    device.place(placement.with_offload(true)).unwrap();
    compare(host, &device);
}

fn grouped() -> ModelConfig {
    ModelConfig {
        family: Family::Qwen2,
        heads: 4,
        kv_heads: 2,
        head_dim: 10,
        qkv_bias: true,
        ..tiny()
    }
}

#[test]
fn all_weights_train_on_a_device_as_on_the_host_in_every_family() {
    let llama = [
        tiny(),
        ModelConfig {
            tied: true,
            ..grouped()
        },
        grouped(),
    ];
    for config in llama.into_iter().chain(families()) {
        let mut model = roughened(random(config, order(29), 1).unwrap());
        model.train_all().unwrap();
        compare_everywhere(&model);
    }
}

#[test]
fn adapters_train_on_a_device_as_on_the_host_in_every_family() {
    let llama = [
        tiny(),
        ModelConfig {
            tied: true,
            ..grouped()
        },
    ];
    for config in llama.into_iter().chain(families()) {
        for embeddings_and_head in [false, true] {
            let mut model = roughened(random(config.clone(), order(29), 1).unwrap());
            let lora = LoraConfig {
                rank: 3,
                alpha: 6.0,
                embeddings_and_head,
            };
            model.attach_lora(lora, 4).unwrap();
            roughen_adapters(&model);
            compare_everywhere(&model);
        }
    }
}

#[test]
fn a_base_in_fewer_bits_is_decoded_for_the_device() {
    let storage = BaseStorage {
        format: Format::Int8,
        tables: true,
        ..BaseStorage::default()
    };
    let mut model = random_as(tiny(), order(29), 1, &storage).unwrap();
    let lora = LoraConfig {
        rank: 3,
        alpha: 6.0,
        embeddings_and_head: false,
    };
    model.attach_lora(lora, 4).unwrap();
    roughen_adapters(&model);
    compare(&model, &placed(&model, on_host_memory(DType::F32)));
}

#[test]
fn an_adapter_that_is_attached_to_a_placed_model_follows_it() {
    let storage = BaseStorage {
        placement: Some(on_host_memory(DType::F32)),
        ..BaseStorage::default()
    };
    let lora = LoraConfig {
        rank: 3,
        alpha: 6.0,
        embeddings_and_head: true,
    };
    let [mut host, mut device] = [BaseStorage::default(), storage]
        .map(|storage| random_as(tiny(), order(29), 1, &storage).unwrap());
    for model in [&mut host, &mut device] {
        model.attach_lora(lora, 4).unwrap();
    }
    assert_eq!(device.adapter().unwrap(), host.adapter().unwrap());
    roughen_adapters(&host);
    device.set_adapter(&host.adapter().unwrap()).unwrap();
    compare(&host, &device);
}

/// In bf16 every gradient must point where that of f32 does.
#[test]
fn adapters_on_a_bf16_base_get_the_gradients_of_f32() {
    let mut model = random(tiny(), order(29), 1).unwrap();
    let lora = LoraConfig {
        rank: 3,
        alpha: 6.0,
        embeddings_and_head: false,
    };
    model.attach_lora(lora, 4).unwrap();
    roughen_adapters(&model);
    let device = placed(&model, on_host_memory(DType::BF16));
    let vocab = vocabulary();
    let ((want_loss, want), (got_loss, got)) =
        (gradients(&model, &vocab), gradients(&device, &vocab));
    assert!(
        (got_loss / want_loss - 1.0).abs() < 0.01,
        "{got_loss} {want_loss}"
    );
    let mut all = Vec::new();
    want.each(&model, |_, gradient| all.push(gradient.to_vec()))
        .unwrap();
    let mut all = all.into_iter();
    got.each(&device, |name, gradient| {
        let want = all.next().unwrap();
        let dot = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f32>();
        let cosine = dot(gradient, &want) / (dot(gradient, gradient) * dot(&want, &want)).sqrt();
        assert!(cosine > 0.995, "{name}: {cosine}");
    })
    .unwrap();
    compare_scores(&model, &device, 0.05);
}
