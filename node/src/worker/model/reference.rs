//! The decoder again, in f64 and candle's plain operations: logits and every gradient of the fused
//! blocks must agree with it.

use std::collections::BTreeMap;

use candle_core::{D, DType, Device, Tensor, Var};
use consilium_kernels::loss::{ItemLoss, Term};
use consilium_kernels::{TokenKind, Vocab};

use super::lora::Lora;
use super::*;
use crate::worker::train::TrainError;

type Variables = BTreeMap<String, Var>;

fn f64_variables(tensors: &NamedTensors) -> Variables {
    let variable = |(name, tensor): (&String, &NamedTensor)| {
        let values = Tensor::from_vec(tensor.values.clone(), tensor.shape.clone(), &Device::Cpu);
        let values = values.unwrap().to_dtype(DType::F64).unwrap();
        (name.clone(), Var::from_tensor(&values).unwrap())
    };
    tensors.iter().map(variable).collect()
}

fn linear(all: &Variables, lora: Option<f64>, module: &str, x: &Tensor) -> Tensor {
    let weight = &all[&format!("{module}.weight")];
    let mut y = x.matmul(&weight.t().unwrap()).unwrap();
    if let Some(bias) = all.get(&format!("{module}.bias")) {
        y = y.broadcast_add(bias).unwrap();
    }
    if let Some(scale) = lora {
        let a = &all[&format!("base_model.model.{module}.lora_A.weight")];
        let b = &all[&format!("base_model.model.{module}.lora_B.weight")];
        let low = x
            .matmul(&a.t().unwrap())
            .unwrap()
            .matmul(&b.t().unwrap())
            .unwrap();
        y = (y + (low * scale).unwrap()).unwrap();
    }
    y
}

fn norm(x: &Tensor, weight: &Tensor, eps: f64) -> Tensor {
    let mean = x.sqr().unwrap().mean_keepdim(D::Minus1).unwrap();
    let root = (mean + eps).unwrap().sqrt().unwrap();
    x.broadcast_div(&root)
        .unwrap()
        .broadcast_mul(weight)
        .unwrap()
}

fn rope(x: &Tensor, config: &ModelConfig, positions: usize) -> Tensor {
    let (dim, half) = (config.head_dim, config.rope.rotated(config.head_dim) / 2);
    let table = rope::table(&config.rope, dim, positions);
    let table = table.angles(positions);
    let unit = |pair: usize| {
        (0..dim)
            .map(|d| f32::from(u8::from(d == pair)))
            .collect::<Vec<_>>()
    };
    let mut angles = [Vec::new(), Vec::new()];
    for position in 0..positions {
        for pair in 0..half {
            let mut out = vec![0f32; dim];
            table.rotate(&unit(pair), position, 1.0, &mut out);
            angles[0].push(f64::from(out[pair]));
            angles[1].push(f64::from(out[pair + half]));
        }
    }
    let [cos, sin] = angles.map(|a| Tensor::from_vec(a, (positions, half), &Device::Cpu).unwrap());
    let (a, b) = (
        x.narrow(1, 0, half).unwrap(),
        x.narrow(1, half, half).unwrap(),
    );
    let first = ((&a * &cos).unwrap() - (&b * &sin).unwrap()).unwrap();
    let second = ((&b * &cos).unwrap() + (&a * &sin).unwrap()).unwrap();
    let rest = x.narrow(1, 2 * half, dim - 2 * half).unwrap();
    Tensor::cat(&[first, second, rest], 1).unwrap()
}

/// Outputs of layers that a family may have fused into one.
fn apart(
    all: &Variables,
    lora: Option<f64>,
    prefix: &str,
    modules: &[&str],
    widths: &[usize],
    x: &Tensor,
) -> Vec<Tensor> {
    let outputs = modules
        .iter()
        .map(|module| linear(all, lora, &format!("{prefix}.{module}"), x));
    let joined = Tensor::cat(&outputs.collect::<Vec<_>>(), 1).unwrap();
    let mut first = 0;
    let narrow = |&width: &usize| {
        first += width;
        joined.narrow(1, first - width, width).unwrap()
    };
    widths.iter().map(narrow).collect()
}

/// Logits of one item, columns by id.
fn logits(config: &ModelConfig, all: &Variables, lora: Option<f64>, tokens: &[u32]) -> Tensor {
    let (len, dim) = (tokens.len(), config.head_dim);
    let ids = Tensor::new(tokens, &Device::Cpu).unwrap();
    let embedding = &all["model.embed_tokens.weight"];
    let mut x = embedding.index_select(&ids, 0).unwrap();
    for layer in 0..config.layers {
        let window = config.window(layer).unwrap_or(len);
        let sees = |row: usize, column: usize| column <= row && column + window > row;
        let hidden: Vec<f64> = (0..len * len)
            .map(|i| if sees(i / len, i % len) { 0.0 } else { -1e30 })
            .collect();
        let mask = Tensor::from_vec(hidden, (len, len), &Device::Cpu).unwrap();
        let prefix = format!("model.layers.{layer}");
        let weight = &all[&format!("{prefix}.input_layernorm.weight")];
        let h = norm(&x, weight, config.rms_norm_eps);
        let (attention, feed_forward) = (format!("{prefix}.self_attn"), format!("{prefix}.mlp"));
        let modules = config.family.attention_modules()[0];
        let widths = [config.heads, config.kv_heads, config.kv_heads].map(|heads| heads * dim);
        let qkv = apart(all, lora, &attention, modules, &widths, &h);
        let [q, k, v] = <[Tensor; 3]>::try_from(qkv).unwrap();
        let head_norm = |x: Tensor, name: &str| match all.get(&format!("{attention}.{name}.weight"))
        {
            Some(weight) => norm(&x, weight, config.rms_norm_eps),
            None => x,
        };
        let mut heads = Vec::new();
        for head in 0..config.heads {
            let group = head / (config.heads / config.kv_heads);
            let q = head_norm(q.narrow(1, head * dim, dim).unwrap(), "q_norm");
            let k = head_norm(k.narrow(1, group * dim, dim).unwrap(), "k_norm");
            let (q, k) = (rope(&q, config, len), rope(&k, config, len));
            let v = v.narrow(1, group * dim, dim).unwrap().contiguous().unwrap();
            let scores = q.matmul(&k.t().unwrap()).unwrap();
            let scores = ((scores / (dim as f64).sqrt()).unwrap() + &mask).unwrap();
            let peak = scores.max_keepdim(1).unwrap().detach();
            let e = scores.broadcast_sub(&peak).unwrap().exp().unwrap();
            let p = e.broadcast_div(&e.sum_keepdim(1).unwrap()).unwrap();
            heads.push(p.matmul(&v).unwrap());
        }
        let mixed = Tensor::cat(&heads, 1).unwrap();
        x = (x + linear(all, lora, &format!("{attention}.o_proj"), &mixed)).unwrap();
        let weight = &all[&format!("{prefix}.post_attention_layernorm.weight")];
        let h = norm(&x, weight, config.rms_norm_eps);
        let modules = config.family.feed_forward_modules()[0];
        let widths = [config.intermediate_size; 2];
        let gate_up = apart(all, lora, &feed_forward, modules, &widths, &h);
        let active = (gate_up[0].silu().unwrap() * &gate_up[1]).unwrap();
        x = (x + linear(all, lora, &format!("{feed_forward}.down_proj"), &active)).unwrap();
    }
    let h = norm(&x, &all["model.norm.weight"], config.rms_norm_eps);
    let head = all.get("lm_head.weight").unwrap_or(embedding);
    h.matmul(&head.t().unwrap()).unwrap()
}

pub(super) fn noise(seed: u64, len: usize) -> Vec<f32> {
    use rand::{RngExt, SeedableRng};
    let mut rng = rand_chacha::ChaCha12Rng::seed_from_u64(seed);
    (0..len).map(|_| rng.random::<f32>() - 0.5).collect()
}

/// Weights large enough that attention and gates are far from linear.
pub(super) fn roughened(mut model: Model) -> Model {
    for (seed, bank) in (7..).zip(model.base_banks()) {
        bank.edit(|values| {
            let noise = noise(seed, values.len());
            values
                .iter_mut()
                .zip(noise)
                .for_each(|(value, noise)| *value += 0.5 * noise);
        })
        .unwrap();
    }
    model.order_tied_head().unwrap();
    model
}

pub(super) fn order(vocab: u32) -> Vec<u32> {
    (0..vocab).map(|rank| (rank * 7 + 3) % vocab).collect()
}

pub(super) fn batch(config: &ModelConfig) -> Packed {
    let mut batch = Packed::default();
    for (item, len) in [5usize, 1, 18, 33].into_iter().enumerate() {
        batch.push(
            (0..len)
                .map(|i| u32::try_from((item * 31 + i * i * 5 + i) % config.vocab_size).unwrap()),
        );
    }
    batch
}

/// Largest difference relative to the largest reference value.
fn assert_close(what: &str, got: &[f32], want: &[f64]) {
    assert_eq!(got.len(), want.len(), "{what}");
    let scale = want.iter().fold(1e-6f64, |m, w| m.max(w.abs()));
    let worst = got
        .iter()
        .zip(want)
        .map(|(g, w)| (f64::from(*g) - w).abs())
        .fold(0.0, f64::max)
        / scale;
    assert!(
        worst < 2e-5,
        "{what}: relative error {worst:e} at scale {scale:e}"
    );
}

fn by_id(model: &Model, row: &[f32]) -> Vec<f32> {
    model
        .rank_of_id()
        .iter()
        .map(|&rank| row[rank as usize])
        .collect()
}

/// All weights by name, the head in the order of ids.
fn named(model: &Model) -> NamedTensors {
    let mut named = NamedTensors::new();
    for bank in model
        .base_banks()
        .into_iter()
        .chain(model.lora.iter().flat_map(Lora::banks))
    {
        bank.read(|values| {
            for slot in bank.slots() {
                let mut values = values[slot.range()].to_vec();
                if slot.name == "lm_head.weight" {
                    values = model.in_id_order(&values);
                }
                named.insert(
                    slot.name.clone(),
                    NamedTensor {
                        shape: slot.shape.clone(),
                        values,
                    },
                );
            }
        })
        .unwrap();
    }
    named
}

/// Logits, and gradients of a cross-entropy with a weight of its own for each row, against the reference.
fn compare(model: &Model, lora: Option<f64>) {
    let config = model.config().clone();
    let (batch, vocab) = (batch(&config), config.vocab_size);
    let rows: Vec<u32> = (0u32..)
        .take(batch.tokens.len())
        .filter(|row| row % 4 != 1)
        .collect();
    let weights = noise(99, rows.len());
    let labels: Vec<u32> = (0u32..)
        .take(rows.len())
        .map(|row| (row * 7 + 3) % 29)
        .collect();

    let all = f64_variables(&named(model));
    let items = batch
        .segments
        .iter()
        .map(|s| &batch.tokens[s.start..s.start + s.len]);
    let items: Vec<Tensor> = items
        .map(|tokens| logits(&config, &all, lora, tokens))
        .collect();
    let reference = Tensor::cat(&items, 0).unwrap();
    let rows_tensor = Tensor::new(rows.as_slice(), &Device::Cpu).unwrap();
    let reference = reference.index_select(&rows_tensor, 0).unwrap();
    let order = vocabulary(model);
    let sums = reference.exp().unwrap().sum_keepdim(1).unwrap();
    let log_p = reference.broadcast_sub(&sums.log().unwrap()).unwrap();
    let labels_by_id: Vec<u32> = labels
        .iter()
        .map(|&rank| order.id_of_rank()[rank as usize])
        .collect();
    let labels_by_id = Tensor::from_vec(labels_by_id, (rows.len(), 1), &Device::Cpu).unwrap();
    let factors: Vec<f64> = weights.iter().map(|&weight| -f64::from(weight)).collect();
    let factors = Tensor::from_vec(factors, (rows.len(), 1), &Device::Cpu).unwrap();
    let want = (log_p.gather(&labels_by_id, 1).unwrap() * factors)
        .unwrap()
        .sum_all()
        .unwrap();
    let store = want.backward().unwrap();

    let hidden = model.score(&batch, &rows).unwrap().hidden;
    let got: Vec<f32> = model
        .logits(&hidden)
        .unwrap()
        .chunks(vocab)
        .flat_map(|row| by_id(model, row))
        .collect();
    assert_close(
        "logits",
        &got,
        &reference.flatten_all().unwrap().to_vec1::<f64>().unwrap(),
    );
    let terms: Vec<[Term<'_>; 1]> = labels
        .chunks(1)
        .zip(&weights)
        .map(|(labels, &weight)| [Term::Labels { labels, weight }])
        .collect();
    let goals: Vec<ItemLoss<'_>> = terms
        .iter()
        .map(|terms| ItemLoss { tokens: &[], terms })
        .collect();
    let pass = model.forward(&batch, rows).unwrap();
    let (loss, gradients) = pass.backward::<TrainError>(&order, &goals).unwrap();
    let want = want.to_scalar::<f64>().unwrap();
    assert!(
        (loss - want).abs() <= 1e-5 * want.abs().max(1.0),
        "{loss} against {want}"
    );
    let mut compared = 0;
    gradients
        .each(model, |name, gradient| {
            let want = store.get(&all[name]).unwrap().flatten_all().unwrap();
            let got = match name {
                "lm_head.weight" => model.in_id_order(gradient),
                _ => gradient.to_vec(),
            };
            assert!(gradient.iter().any(|g| *g != 0.0), "{name} got no gradient");
            assert_close(name, &got, &want.to_vec1::<f64>().unwrap());
            compared += 1;
        })
        .unwrap();
    let modules = config.family.modules().count();
    let per_layer = if lora.is_some() {
        2 * modules
    } else {
        2 + modules
    };
    assert!(compared >= config.layers * per_layer, "{compared} tensors");
}

/// A vocabulary whose ranks are the model's: one byte for each rank, the last ends a record.
pub(super) fn vocabulary(model: &Model) -> Vocab {
    let ranks = model.rank_of_id();
    let bytes: Vec<[u8; 1]> = ranks
        .iter()
        .map(|&rank| [u8::try_from(rank).unwrap()])
        .collect();
    let last = ranks.len() - 1;
    let kinds = bytes.iter().map(|byte| match usize::from(byte[0]) {
        rank if rank == last => TokenKind::EndOfRecord,
        _ => TokenKind::Bytes(byte),
    });
    let vocab = Vocab::new(kinds).unwrap();
    assert_eq!(vocab.rank_of_id(), ranks);
    vocab
}

pub(super) fn tiny() -> ModelConfig {
    ModelConfig::llama(29, 24, 2, 3, 20)
}

#[test]
fn llama_equals_the_plain_f64_decoder_in_logits_and_gradients() {
    let mut model = roughened(random(tiny(), order(29), 1).unwrap());
    model.train_all().unwrap();
    compare(&model, None);
}

#[test]
fn qwen2_with_grouped_queries_bias_and_tied_head_does_too() {
    let config = ModelConfig {
        family: Family::Qwen2,
        heads: 4,
        kv_heads: 2,
        head_dim: 10,
        tied: true,
        qkv_bias: true,
        ..tiny()
    };
    let mut model = roughened(random(config, order(29), 2).unwrap());
    model.train_all().unwrap();
    compare(&model, None);
}

/// Every 33-token item is longer than the window and than the original length.
pub(super) fn families() -> [ModelConfig; 3] {
    let sliding = |layers: &[bool]| {
        Some(SlidingWindow {
            positions: 7,
            layers: layers.to_vec(),
        })
    };
    [
        ModelConfig {
            family: Family::Mistral,
            sliding: sliding(&[true, true]),
            ..tiny()
        },
        ModelConfig {
            family: Family::Qwen3,
            heads: 4,
            kv_heads: 2,
            head_dim: 10,
            sliding: sliding(&[false, true]),
            ..tiny()
        },
        ModelConfig {
            family: Family::Phi3,
            rope: Rope {
                partial: 0.5,
                scaling: Some(RopeScaling::Long {
                    short: vec![1.0, 1.5],
                    long: vec![2.0, 5.0],
                    original: 20,
                    attention: 1.2,
                }),
                ..Rope::new(10_000.0)
            },
            ..tiny()
        },
    ]
}

#[test]
fn windows_normalised_heads_and_fused_layers_do_too() {
    for config in families() {
        let mut model = roughened(random(config.clone(), order(29), 5).unwrap());
        model.train_all().unwrap();
        compare(&model, None);
        let lora = LoraConfig {
            rank: 3,
            alpha: 6.0,
            embeddings_and_head: false,
        };
        model.attach_lora(lora, 4).unwrap();
        roughen_adapters(&model);
        compare(&model, Some(2.0));
    }
}

pub(super) fn roughen_adapters(model: &Model) {
    for (seed, bank) in (70..).zip(model.lora.as_ref().unwrap().banks()) {
        let noise = noise(seed, bank.len());
        bank.edit(|values| {
            values
                .iter_mut()
                .zip(noise)
                .for_each(|(v, n)| *v += 0.3 * n);
        })
        .unwrap();
    }
}

#[test]
fn adapters_on_all_layers_do_too_whichever_way_the_products_are_taken() {
    // Rank 16 of width 24 takes dW first; rank 2 takes the factors; the wide layer is never merged.
    for (rank, inner) in [(16, 20), (2, 20), (2, 4000)] {
        let config = ModelConfig {
            intermediate_size: inner,
            ..tiny()
        };
        let mut model = roughened(random(config, order(29), 3).unwrap());
        let lora = LoraConfig {
            rank,
            alpha: 2.0 * rank as f64,
            embeddings_and_head: true,
        };
        model.attach_lora(lora, 4).unwrap();
        roughen_adapters(&model);
        compare(&model, Some(2.0));
    }
}
