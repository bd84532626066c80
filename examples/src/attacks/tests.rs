//! Attacks do what their papers say, and a table shows what a defence is worth.

use consilium_protocol::manifest::{Defence, Distillation, MergeRule, Training};
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};

use super::adapters::{Adapter, Attack, Values, alie_z};
use super::table::{Cell, Scene, error_of_sum, relative_error, table};

const LAYER: &str = "base_model.model.model.layers.0.self_attn.q_proj";
const HEAD: &str = "base_model.model.lm_head.weight";
const SIZES: [usize; 3] = [24, 20, 2];

fn training() -> Training {
    Training {
        inner_rounds: 8,
        local_steps: 1,
        rows: 1,
        row_tokens: 8,
        learning_rate_micros: 1,
        warmup_permille: 0,
        final_permille: 0,
        cross_entropy_permille: 0,
        rank: 2,
        alpha: 2,
        target_modules: vec!["q_proj".to_owned()],
        modules_to_save: vec!["lm_head".to_owned()],
        outer_rate_permille: 700,
        outer_momentum_permille: 700,
        distillation: Distillation::Trie,
        merge: MergeRule::Product,
        defence: Defence::None,
    }
}

/// Draws that all members share, `common` times, and `own` times draws of the member; A is shared.
fn adapter(seed: u64, common: f32, own: f32) -> Adapter {
    let [rows, columns, rank] = SIZES;
    let mut shared = ChaCha8Rng::seed_from_u64(0);
    let mut draws = ChaCha8Rng::seed_from_u64(seed);
    let unit = |draws: &mut ChaCha8Rng| (draws.next_u32() >> 8) as f32 / (1 << 23) as f32 - 1.0;
    let mut tensor = |shape: [usize; 2], common: f32, own: f32| Values {
        shape: shape.to_vec(),
        values: (0..shape[0] * shape[1])
            .map(|_| common * unit(&mut shared) + own * unit(&mut draws))
            .collect(),
    };
    let tensors = [
        (
            format!("{LAYER}.lora_A.weight"),
            tensor([rank, columns], 1.0, 0.0),
        ),
        (
            format!("{LAYER}.lora_B.weight"),
            tensor([rows, rank], common, own),
        ),
        (HEAD.to_owned(), tensor([10, columns], common, own)),
    ];
    Adapter(tensors.into())
}

fn start() -> Adapter {
    adapter(1, 0.0, 0.0)
}

fn members(count: u64) -> Vec<Adapter> {
    (2..2 + count).map(|seed| adapter(seed, 0.3, 0.1)).collect()
}

fn values(adapter: &Adapter) -> Vec<f32> {
    let moving = adapter
        .0
        .iter()
        .filter(|(name, _)| !name.ends_with("lora_A.weight"));
    moving
        .flat_map(|(_, tensor)| tensor.values.clone())
        .collect()
}

fn sent(attack: Attack, honest: &[Adapter]) -> Adapter {
    attack
        .apply(&start(), &adapter(99, 0.3, 0.1), honest, 5)
        .unwrap()
}

#[test]
fn updates_are_scaled_as_the_attack_says() {
    let (honest, own) = (members(4), values(&adapter(99, 0.3, 0.1)));
    let times = |by: f32| -> Vec<f32> { own.iter().map(|value| by * value).collect() };
    assert_eq!(values(&sent(Attack::SignFlip, &honest)), times(-1.0));
    assert_eq!(
        values(&sent(Attack::Scaled { by: 100.0 }, &honest)),
        times(100.0)
    );
    assert_eq!(sent(Attack::Zero, &honest), start());
    assert_eq!(sent(Attack::Copy, &honest), honest[0]);
    let ipm = values(&sent(Attack::Ipm { epsilon: 0.5 }, &honest));
    let all: Vec<_> = honest.iter().map(values).collect();
    for (index, got) in ipm.iter().enumerate() {
        let mean = all.iter().map(|values| values[index]).sum::<f32>() / 4.0;
        assert!((got + 0.5 * mean).abs() < 1e-6, "{got} {mean}");
    }
    let noise = values(&sent(Attack::Noise { scale: 10.0 }, &honest));
    let size = |values: &[f32]| values.iter().map(|v| v * v).sum::<f32>().sqrt();
    assert!((size(&noise) / size(&own) / 10.0 - 1.0).abs() < 0.15);
    let bomb = sent(Attack::NanBomb, &honest);
    assert_eq!(values(&bomb).iter().filter(|v| v.is_nan()).count() + 1, 2);
}

#[test]
fn hidden_attacks_stay_as_close_as_honest_members_are() {
    let honest = members(6);
    let distance = |a: &Adapter, b: &Adapter| -> f64 {
        let pairs = values(a).into_iter().zip(values(b));
        pairs
            .map(|(a, b)| (f64::from(a) - f64::from(b)).powi(2))
            .sum()
    };
    let all = |from: &Adapter| {
        honest
            .iter()
            .map(|to| distance(from, to))
            .collect::<Vec<_>>()
    };
    let max = |values: &[f64]| values.iter().copied().fold(0.0, f64::max);
    let widest = max(&honest.iter().map(|h| max(&all(h))).collect::<Vec<_>>());
    let got = max(&all(&sent(Attack::MinMax, &honest)));
    assert!(got <= widest && got > 0.99 * widest, "{got} {widest}");
    let sums: Vec<f64> = honest.iter().map(|h| all(h).iter().sum()).collect();
    let got: f64 = all(&sent(Attack::MinSum, &honest)).iter().sum();
    assert!(
        got <= max(&sums) && got > 0.99 * max(&sums),
        "{got} {sums:?}"
    );
    // Of 50 with 24 who lie, 2 must be won over: 24 / 26 of the honest lie below the quantile 1.43.
    assert!((alie_z(50, 24) - 1.426).abs() < 0.01, "{}", alie_z(50, 24));
    assert!(alie_z(5, 1).abs() < 1e-6);
}

#[test]
fn defences_hold_where_the_plain_mean_does_not() {
    let (start, adapters) = (start(), members(5));
    let training = training();
    let scene = Scene {
        training: &training,
        start: &start,
        adapters: &adapters,
        dishonest: 1,
        seed: 5,
    };
    let product = MergeRule::Product;
    let rules = [(product, Defence::None), (product, Defence::Standard)];
    let attacks = Attack::all(5, 1);
    let length = |adapter: &Adapter| {
        let values = adapter.0.values().flat_map(|tensor| &tensor.values);
        Ok(values.map(|value| f64::from(value.abs())).sum::<f64>())
    };
    let cells = table(scene, &attacks, &rules, &length).unwrap();
    assert_eq!(cells.len(), 2 * (attacks.len() + 1));
    let cell = |attack: &str, defence: &str| -> &Cell {
        let found = cells
            .iter()
            .find(|c| c.attack == attack && c.defence == defence);
        found.unwrap_or_else(|| panic!("{attack} {defence}"))
    };
    assert!(cell("none", "none").error.unwrap() < 1e-6);
    for attack in ["sign flip", "noise x10", "scaled x100", "IPM 100"] {
        let [plain, guarded] = ["none", "standard"].map(|d| cell(attack, d).error.unwrap());
        assert!(plain > 0.3 && guarded < 0.3, "{attack}: {plain} {guarded}");
    }
    for attack in ["noise x10", "scaled x100", "IPM 100"] {
        let [plain, guarded] = ["none", "standard"].map(|d| cell(attack, d).cost.unwrap());
        assert!(guarded.abs() < plain.abs(), "{attack}: {plain} {guarded}");
    }
    assert_eq!(cell("zero (free rider)", "standard").excluded, 1);
    // Of two copies the later one is left out, here the honest one: what counts is the same.
    for attack in ["zero (free rider)", "copy"] {
        assert!(cell(attack, "standard").error.unwrap() < 0.1, "{attack}");
    }
    let bomb = cell("NaN bomb", "standard");
    assert_eq!((bomb.error, bomb.cost), (None, None));
    assert!(
        bomb.refused.as_deref().unwrap().contains("member-0000"),
        "{bomb:?}"
    );
    assert!(relative_error(&start, &adapters[0], &adapters[0]).unwrap() < 1e-6);
}

#[test]
fn an_adapter_that_is_no_mean_of_products_is_told_by_how_far_it_is_off() {
    let members = members(3);
    let parts = [members[0].clone(), members[0].clone()];
    assert!(error_of_sum(&parts, &members[0]).unwrap() < 1e-6);
    let mut half = members[0].clone();
    for (name, tensor) in &mut half.0 {
        if name.contains(".lora_B") {
            tensor.values.iter_mut().for_each(|value| *value /= 2.0);
        }
    }
    assert!((error_of_sum(&parts, &half).unwrap() - 0.5).abs() < 1e-6);
    assert!(error_of_sum(&members[..2], &members[2]).unwrap() > 0.1);
}
