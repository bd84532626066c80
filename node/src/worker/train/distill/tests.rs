use consilium_kernels::RecordShape;
use consilium_kernels::loss::NO_LABEL;
use consilium_protocol::manifest::{Defence, Distillation, MergeRule, SymbolSpace};
use consilium_protocol::reference::ReferenceSet;
use consilium_protocol::shard::{Header, Shard, Symbols};

use super::*;
use crate::worker::model::LoraConfig;
use crate::worker::score::score_shard;
use crate::worker::testing::{model, reference};

pub(super) const PART: [u64; 6] = [5, 1, 0, 7, 2, 4];

fn settings(local_steps: u64) -> Settings {
    Settings {
        rows: 2,
        row_tokens: 40,
        local_steps,
        schedule: Schedule::linear(1e-2, 2 * local_steps),
        lora: LoraConfig {
            rank: 4,
            alpha: 8.0,
            embeddings_and_head: true,
        }
        .into(),
        optimiser: AdamWConfig::default(),
        seed: 11,
        label_unlabeled: false,
        freeze_a: false,
    }
}

pub(super) fn distiller(local_steps: u64) -> Distiller {
    Distiller::new(model(1), settings(local_steps)).unwrap()
}

/// Records of another model.
fn targets(reference: &ReferenceSet) -> Targets {
    let shape = RecordShape {
        k: 16,
        fill_permille: 995,
    };
    let teacher = model(2);
    let wanted: Vec<u64> = (0..8).collect();
    Targets::gather(reference, &wanted, 8, |_| {
        let scored = score_shard(&teacher, reference, 0..8, &shape, &mut ())?;
        Ok(scored.shard.to_bytes()?)
    })
    .unwrap()
}

/// Certainty of what is there.
fn one_hot(reference: &ReferenceSet) -> Targets {
    let mut shard = Shard {
        header: Header::new(reference.digest(), 0..8, SymbolSpace::Bytes, 1),
        symbols: Symbols::Bytes(Vec::new()),
        codes: Vec::new(),
        end: Vec::new(),
        tail: Vec::new(),
        missed: vec![255; 16],
        offsets: vec![0],
    };
    let mut symbols = Vec::new();
    for item in reference.items() {
        symbols.extend_from_slice(item.target.as_bytes());
        symbols.push(b'x');
        shard.codes.extend(vec![0; item.target.len()]);
        shard.codes.push(255);
        shard.end.extend(vec![255; item.target.len()]);
        shard.end.push(0);
        shard.tail.extend(vec![255; item.positions()]);
        shard.offsets.push(symbols.len() as u64);
    }
    shard.symbols = Symbols::Bytes(symbols);
    let wanted: Vec<u64> = (0..8).collect();
    Targets::gather(reference, &wanted, 8, |_| Ok(shard.to_bytes()?)).unwrap()
}

/// Linear layers of a Llama, and what may be trained whole beside them.
const TARGETS: [&str; 7] = [
    "q_proj",
    "k_proj",
    "v_proj",
    "o_proj",
    "gate_proj",
    "up_proj",
    "down_proj",
];
const SAVED: [&str; 2] = ["embed_tokens", "lm_head"];

#[test]
fn the_loss_falls_and_every_tensor_of_the_adapter_moves() {
    let reference = reference();
    let (items, targets) = (reference.items(), targets(&reference));
    for objective in [
        Objective::CrossEntropy,
        Objective::Trie {
            targets: &targets,
            cross_entropy: 0.1,
        },
    ] {
        let mut distiller = distiller(12);
        let before = distiller.student.model.adapter().unwrap();
        let plan = distiller.plan(items, &PART, 0).unwrap();
        let first = distiller.run(&plan, items, objective, &mut ()).unwrap();
        let plan = distiller.plan(items, &PART, 1).unwrap();
        let second = distiller.run(&plan, items, objective, &mut ()).unwrap();
        assert!(second < 0.9 * first, "{objective:?}: {first} to {second}");
        let after = distiller.student.model.adapter().unwrap();
        assert_eq!(before.len(), 2 * 14 + 2);
        for (name, tensor) in &before {
            assert_ne!(tensor, &after[name], "{name} did not move");
        }
    }
}

#[test]
fn items_that_are_not_owned_are_learned_from_labels_alone() {
    let reference = reference();
    let (items, targets) = (reference.items(), targets(&reference));
    let distiller = distiller(3);
    let plan = distiller.plan(items, &PART, 0).unwrap();
    let batch = &plan.batches().unwrap().next_batch().unwrap();
    let step = Step {
        plan: &plan,
        items,
        batch,
    };
    let loss = |objective: Objective<'_>| distiller.gradients(&step, objective).unwrap().0;
    let owned_by = |owned: &BTreeSet<u64>| {
        loss(Objective::OwnedTrie {
            targets: &targets,
            owned,
            cross_entropy: 0.1,
        })
    };
    let all = BTreeSet::from(PART);
    let trie = loss(Objective::Trie {
        targets: &targets,
        cross_entropy: 0.1,
    });
    let plain = loss(Objective::CrossEntropy);
    assert!((owned_by(&all) - trie).abs() < 1e-9);
    assert!((owned_by(&BTreeSet::new()) - plain).abs() < 1e-9);
    let one = BTreeSet::from([plan.indices[batch.items[0].item]]);
    let mixed = owned_by(&one);
    assert!((mixed - trie).abs() > 1e-3 && (mixed - plain).abs() > 1e-3);
}

#[test]
fn text_is_learned_and_its_order_follows_from_the_inner_round() {
    let texts: Vec<Item> = {
        let student = model(1);
        let items = crate::worker::testing::LINES.iter();
        items
            .map(|line| student.whole_item("", line).unwrap())
            .collect()
    };
    let items = Items::from(Arc::<[Item]>::from(texts));
    let mut one = distiller(12);
    let first = one.run_text(items.clone(), 0, &mut ()).unwrap();
    let again = distiller(12).run_text(items.clone(), 0, &mut ()).unwrap();
    assert_eq!(first.to_bits(), again.to_bits());
    let other = distiller(12).run_text(items.clone(), 1, &mut ()).unwrap();
    assert_ne!(first.to_bits(), other.to_bits());
    let second = one.run_text(items, 1, &mut ()).unwrap();
    assert!(second < 0.9 * first, "{first} to {second}");
}

#[test]
fn one_hot_targets_give_the_gradient_of_cross_entropy_through_the_whole_model() {
    let reference = reference();
    let (items, targets) = (reference.items(), one_hot(&reference));
    let mut distiller = distiller(3);
    // Fresh B is zero, which would hide the gradient of A.
    let plan = distiller.plan(items, &PART, 0).unwrap();
    distiller
        .run(&plan, items, Objective::CrossEntropy, &mut ())
        .unwrap();
    distiller.settings.label_unlabeled = true;
    let gradients = |objective| {
        let batch = &plan.batches().unwrap().next_batch().unwrap();
        let step = Step {
            plan: &plan,
            items,
            batch,
        };
        let (loss, gradients) = distiller.gradients(&step, objective).unwrap();
        let mut all = Vec::new();
        gradients
            .each(&distiller.student.model, |name, gradient| {
                assert!(gradient.iter().any(|&g| g != 0.0), "{name} has no gradient");
                all.extend_from_slice(gradient);
            })
            .unwrap();
        (loss, all)
    };
    let trie = gradients(Objective::Trie {
        targets: &targets,
        cross_entropy: 0.0,
    });
    let mixed = gradients(Objective::Trie {
        targets: &targets,
        cross_entropy: 0.5,
    });
    let plain = gradients(Objective::CrossEntropy);
    let scale = plain.1.iter().fold(0.0_f32, |most, g| most.max(g.abs()));
    for (loss, gradient) in [trie, mixed] {
        assert!((loss - plain.0).abs() < 1e-5, "{loss} against {}", plain.0);
        for (got, want) in gradient.iter().zip(&plain.1) {
            assert!((got - want).abs() < 2e-5 * scale, "{got} against {want}");
        }
    }
}

#[test]
fn a_restart_between_inner_rounds_changes_nothing() {
    let reference = reference();
    let (items, targets) = (reference.items(), targets(&reference));
    let objective = Objective::Trie {
        targets: &targets,
        cross_entropy: 0.1,
    };
    let inner = |distiller: &mut Distiller, inner, start: &[u8]| {
        distiller.set_start(start).unwrap();
        let plan = distiller.plan(items, &PART, inner).unwrap();
        distiller.run(&plan, items, objective, &mut ()).unwrap();
        distiller.adapter_bytes().unwrap()
    };
    // What the aggregator would send: here just another adapter than the node's own.
    let other = Distiller::new(
        model(1),
        Settings {
            seed: 12,
            ..settings(4)
        },
    )
    .unwrap();
    let start = other.adapter_bytes().unwrap();

    let mut one = distiller(4);
    let first = inner(&mut one, 0, &start);
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("state");
    one.save_state(&path).unwrap();
    let uninterrupted = inner(&mut one, 1, &start);

    let mut two = distiller(4);
    two.restore_state(&path).unwrap();
    assert_eq!(inner(&mut two, 1, &start), uninterrupted);
    let mut fresh = distiller(4);
    assert_eq!(inner(&mut fresh, 0, &start), first, "the same round again");
    let mut reset = distiller(4);
    assert_ne!(
        inner(&mut reset, 1, &start),
        uninterrupted,
        "the optimiser's state matters"
    );
}

#[test]
fn an_adapter_reads_back_and_another_pivots_is_refused() {
    let mut distiller = distiller(2);
    let bytes = distiller.adapter_bytes().unwrap();
    let items = reference();
    let plan = distiller.plan(items.items(), &PART, 0).unwrap();
    distiller
        .run(&plan, items.items(), Objective::CrossEntropy, &mut ())
        .unwrap();
    assert_ne!(distiller.adapter_bytes().unwrap(), bytes);
    distiller.set_start(&bytes).unwrap();
    assert_eq!(distiller.adapter_bytes().unwrap(), bytes);
    let lora = AdapterConfig {
        rank: 5,
        ..settings(1).lora
    };
    let other = Distiller::new(
        model(1),
        Settings {
            lora,
            ..settings(1)
        },
    )
    .unwrap();
    assert!(
        distiller
            .set_start(&other.adapter_bytes().unwrap())
            .is_err()
    );
    assert!(distiller.set_start(b"{}").is_err());
    assert_eq!(
        distiller.adapter_bytes().unwrap(),
        bytes,
        "changed by a refused adapter"
    );
}

#[test]
fn tokens_that_touch_an_unlabeled_span_are_no_labels() {
    let reference = reference();
    let distiller = distiller(2);
    let plan = distiller.plan(reference.items(), &[0], 0).unwrap();
    let step = Step {
        plan: &plan,
        items: reference.items(),
        batch: &plan.batches().unwrap().next_batch().unwrap(),
    };
    let item = &reference.items()[0];
    let span = item.unlabeled[0].clone();
    assert_eq!(item.target.get(span.clone()), Some("40mg"));
    let labels = step.labels(&distiller.student, false).unwrap();
    let all = step.labels(&distiller.student, true).unwrap();
    let mut start = 0;
    for (label, rank) in labels.iter().zip(&all).take(plan.tokens[0].target.len()) {
        let length = distiller.student.vocab.token_bytes(*rank).len();
        let touches = (start..start + length).any(|byte| span.contains(&byte));
        assert_eq!(
            *label == NO_LABEL,
            touches,
            "bytes {start} to {}",
            start + length
        );
        start += length;
    }
    assert_eq!(start, item.target.len());
    assert!(labels.contains(&NO_LABEL));
    assert!(!all.contains(&NO_LABEL));
}

#[test]
fn what_this_version_cannot_train_is_refused_by_name() {
    let training = |modules: &[&str], save: &[&str]| Training {
        inner_rounds: 8,
        local_steps: 30,
        rows: 12,
        row_tokens: 96,
        learning_rate_micros: 10_000,
        warmup_permille: 50,
        final_permille: 20,
        cross_entropy_permille: 100,
        rank: 32,
        alpha: 64,
        target_modules: modules.iter().map(|&m| m.to_owned()).collect(),
        modules_to_save: save.iter().map(|&m| m.to_owned()).collect(),
        outer_rate_permille: 700,
        outer_momentum_permille: 700,
        distillation: Distillation::Trie,
        merge: MergeRule::Product,
        defence: Defence::None,
    };
    let settings = Settings::of(&training(&TARGETS, &SAVED), 9).unwrap();
    assert_eq!(settings.schedule.steps, 240);
    assert!(settings.lora.saves_head && settings.lora.saves_embedding);
    let plain = Settings::of(&training(&TARGETS, &[]), 9).unwrap();
    assert!(!plain.lora.saves_head && !plain.lora.saves_embedding);
    for (training, field) in [
        (training(&[], &[]), "target_modules"),
        (training(&TARGETS, &["norm"]), "modules_to_save"),
    ] {
        let error = Settings::of(&training, 9).unwrap_err().to_string();
        assert!(error.starts_with(field), "{error}");
    }
}

#[test]
fn a_frozen_a_stays_while_everything_else_moves() {
    let reference = reference();
    let mut distiller = distiller(4);
    distiller.settings.freeze_a = true;
    let before = distiller.student.model.adapter().unwrap();
    let plan = distiller.plan(reference.items(), &PART, 0).unwrap();
    let objective = Objective::CrossEntropy;
    distiller
        .run(&plan, reference.items(), objective, &mut ())
        .unwrap();
    let after = distiller.student.model.adapter().unwrap();
    for (name, tensor) in &before {
        let stayed = *tensor == after[name];
        assert_eq!(stayed, name.ends_with(".lora_A.weight"), "{name}");
    }
}

#[test]
fn stacked_factors_of_a_higher_rank_mean_the_same_product() {
    let reference = reference();
    let mut distiller = distiller(4);
    let plan = distiller.plan(reference.items(), &PART, 0).unwrap();
    let objective = Objective::CrossEntropy;
    distiller
        .run(&plan, reference.items(), objective, &mut ())
        .unwrap();
    let mut stacked = distiller.student.model.adapter().unwrap();
    for (name, tensor) in &mut stacked {
        let once = tensor.values.clone();
        if name.ends_with(".lora_A.weight") {
            tensor.values.extend(once);
            tensor.shape[0] *= 2;
        } else if name.ends_with(".lora_B.weight") {
            let rows = once.chunks(tensor.shape[1]);
            let halves = rows.flat_map(|row| row.iter().chain(row).map(|value| value / 2.0));
            tensor.values = halves.collect();
            tensor.shape[1] *= 2;
        }
    }
    let bytes = [
        distiller.adapter_bytes().unwrap(),
        tensors::encode(&stacked).unwrap(),
    ];
    let item = &reference.items()[0];
    let bits = bytes.map(|bytes| {
        let mut pivot = model(1);
        pivot.apply_adapter(settings(4).lora, &bytes).unwrap();
        let texts = [(&*item.context, &*item.target)];
        crate::worker::evaluate::bits_per_byte(&pivot, texts, &mut ()).unwrap()
    });
    assert!((bits[0] / bits[1] - 1.0).abs() < 1e-5, "{bits:?}");
}
