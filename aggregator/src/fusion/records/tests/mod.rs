//! Rules of fusion over shards.

use consilium_kernels::code;
use consilium_protocol::manifest::{
    Deadlines, Defence, Distillation, FusionRule, MergeRule, Mode, Screening, TargetForm, Training,
};
use consilium_protocol::shard::Symbols;
use consilium_protocol::{ConsortiumId, Digest, RoundId};

use super::*;

mod rules;
mod watch;

const TEXT: &str =
    "{\"target\":\"ab\"}\n{\"target\":\"cxxd\",\"unlabeled\":[[1,3]]}\n{\"target\":\"e\"}\n";

fn id(name: &str) -> InstitutionId {
    InstitutionId::new(name).unwrap()
}

fn manifest(fusion: FusionRule) -> Manifest {
    Manifest {
        consortium: ConsortiumId::new("test").unwrap(),
        round: RoundId(1),
        mode: Mode::Unified,
        charter: Digest::of(b"charter"),
        pivot: Digest::of(b"pivot"),
        reference: Digest::of(TEXT.as_bytes()),
        items: 3,
        symbol_space: SymbolSpace::Bytes,
        symbols: 2,
        fill_permille: 995,
        shard_items: 2,
        fusion,
        targets: TargetForm::default(),
        screening: Screening::default(),
        training: Training {
            inner_rounds: 1,
            local_steps: 1,
            rows: 1,
            row_tokens: 8,
            learning_rate_micros: 1,
            warmup_permille: 0,
            final_permille: 0,
            cross_entropy_permille: 0,
            rank: 1,
            alpha: 1,
            target_modules: Vec::new(),
            modules_to_save: Vec::new(),
            outer_rate_permille: 700,
            outer_momentum_permille: 700,
            distillation: Distillation::Trie,
            merge: MergeRule::Product,
            defence: Defence::None,
        },
        members: vec![id("a"), id("b"), id("c")],
        quorum: 1,
        deadlines: Deadlines {
            contribute_seconds: 1,
            distil_seconds: 1,
            evaluate_seconds: 1,
        },
        max_weight: None,
        seed: 1,
        previous_release: None,
    }
}

/// Records that give each observed byte of the shard's items this probability; `blind` items get 1/8 instead.
fn shard(manifest: &Manifest, index: u32, probability: f64, blind: &[usize]) -> Shard {
    let set = ReferenceSet::parse(TEXT.as_bytes()).unwrap();
    shard_of(&set, manifest, index, probability, blind)
}

fn shard_of(
    set: &ReferenceSet,
    manifest: &Manifest,
    index: u32,
    probability: f64,
    blind: &[usize],
) -> Shard {
    let range = manifest.shard_range(index);
    let header = Header::new(
        set.digest(),
        range.clone(),
        SymbolSpace::Bytes,
        manifest.symbols,
    );
    let mut shard = Shard {
        header,
        symbols: Symbols::Bytes(Vec::new()),
        codes: Vec::new(),
        end: Vec::new(),
        tail: Vec::new(),
        missed: Vec::new(),
        offsets: vec![0],
    };
    let mut symbols = Vec::new();
    for item in range {
        let index = usize::try_from(item).unwrap();
        let item = &set.items()[index];
        let p = if blind.contains(&index) {
            0.125
        } else {
            probability
        };
        for byte in item.target.bytes() {
            symbols.extend([byte, byte]);
            shard.codes.extend([code::encode(p), u8::MAX]);
            shard.end.push(u8::MAX);
            shard.tail.push(code::encode(1.0 - p));
        }
        symbols.extend([b'z', b'z']);
        shard.codes.extend([code::encode(1.0 - p), u8::MAX]);
        shard.end.push(code::encode(p));
        shard.tail.push(u8::MAX);
        shard.missed.extend([255, 255]);
        shard.offsets.push(u64::try_from(shard.end.len()).unwrap());
    }
    shard.symbols = Symbols::Bytes(symbols);
    shard
}

#[test]
fn each_item_follows_the_source_that_knows_it_in_any_order() {
    let manifest = manifest(FusionRule::Softmax { sharpness: 20 });
    let set = ReferenceSet::parse(TEXT.as_bytes()).unwrap();
    let mut sources = vec![
        (id("c"), shard(&manifest, 0, 0.125, &[])),
        (id("a"), shard(&manifest, 0, 0.9, &[1])),
        (id("b"), shard(&manifest, 0, 0.9, &[0])),
    ];
    let fused = fuse_shard(&manifest, &set, 0, &sources).unwrap();
    let routing = &fused.routing;
    assert_eq!(routing.institutions, [id("a"), id("b"), id("c")]);
    assert_eq!(routing.weights, [[65_536, 0, 0], [0, 65_536, 0]]);
    // Two bytes and the end; of the second item two bytes are no label.
    assert_eq!(routing.bytes, [3, 3]);
    let known = 3 * u64::from(code::encode(0.9));
    assert_eq!(routing.sixteenths, [[known, 144, 144], [144, known, 144]]);
    assert_eq!(routing.totals()[0].sixteenths, known + 144);
    assert_eq!(fused.targets.offsets, [0, 3, 8]);
    let bytes = fused.targets.to_bytes().unwrap();
    for _ in 0..3 {
        sources.rotate_left(1);
        let again = fuse_shard(&manifest, &set, 0, &sources).unwrap();
        assert_eq!(again.targets.to_bytes().unwrap(), bytes);
        assert_eq!(again, fused);
    }
    let last = [(id("a"), shard(&manifest, 1, 0.9, &[]))];
    assert_eq!(
        fuse_shard(&manifest, &set, 1, &last)
            .unwrap()
            .targets
            .offsets,
        [0, 2]
    );
}

#[test]
fn without_a_declared_span_each_position_follows_what_came_before_it() {
    let text = "{\"target\":\"ab\"}\n{\"target\":\"cxxd\"}\n{\"target\":\"e\"}\n";
    let set = ReferenceSet::parse(text.as_bytes()).unwrap();
    let guard = |competence_millibits| FusionRule::ExpGuard {
        competence_millibits,
        eta_permille: 40_000,
        sharpness: 20,
    };
    let of = |rule, blind: &[&[usize]]| {
        let manifest = Manifest {
            reference: set.digest(),
            ..manifest(rule)
        };
        let sources: Vec<_> = ["a", "b", "c"]
            .into_iter()
            .zip(blind)
            .map(|(name, blind)| (id(name), shard_of(&set, &manifest, 0, 0.9, blind)))
            .collect();
        let fused = fuse_shard(&manifest, &set, 0, &sources).unwrap();
        let slots = usize::from(fused.targets.header.symbols);
        let first_slots = fused.targets.codes.iter().copied().step_by(slots);
        (first_slots.collect::<Vec<u8>>(), fused.routing.weights)
    };
    let mean = |probabilities: &[f64]| {
        code::encode(probabilities.iter().sum::<f64>() / probabilities.len() as f64)
    };
    let (even, known) = (mean(&[0.9, 0.125]), code::encode(0.9));
    for rule in [FusionRule::Softmax { sharpness: 20 }, guard(500)] {
        let (first_slots, weights) = of(rule, &[&[1], &[0]]);
        assert_eq!(first_slots[..2], [even, known], "{rule:?}");
        assert_eq!(first_slots[3..7], [even, known, known, known], "{rule:?}");
        assert_eq!(weights, [[65_536, 0], [0, 65_536]], "{rule:?}");
    }
    // Where nothing is known yet, a guard still knows who is far from the others.
    let third: [&[usize]; 3] = [&[], &[], &[0, 1]];
    let first = |rule| of(rule, &third).0[0];
    let softmax = first(FusionRule::Softmax { sharpness: 20 });
    assert_eq!(softmax, mean(&[0.9, 0.9, 0.125]));
    assert!(first(guard(8000)) < softmax, "codes fall as masses grow");
}

#[test]
fn a_shard_that_is_not_the_one_asked_for_is_refused_by_name() {
    let manifest = manifest(FusionRule::Uniform);
    let set = ReferenceSet::parse(TEXT.as_bytes()).unwrap();
    let good = shard(&manifest, 0, 0.9, &[]);
    assert!(check_shard(&manifest, &set, 0, &id("b"), &good).is_ok());
    let mut heavy = good.clone();
    heavy.tail.fill(0);
    let mut shifted = good.clone();
    shifted.offsets = vec![0, 4, 8];
    for bad in [shard(&manifest, 1, 0.9, &[]), heavy, shifted] {
        let sources = [(id("a"), good.clone()), (id("b"), bad)];
        let error = fuse_shard(&manifest, &set, 0, &sources).unwrap_err();
        assert!(
            matches!(&error, FusionError::Shard { institution, shard: 0, .. } if *institution == id("b")),
            "{error}"
        );
    }
    let twice = [(id("a"), good.clone()), (id("a"), good.clone())];
    assert!(matches!(
        fuse_shard(&manifest, &set, 0, &twice),
        Err(FusionError::Twice(_))
    ));
    assert!(matches!(
        fuse_shard(&manifest, &set, 0, &[]),
        Err(FusionError::Nothing)
    ));
    let other = ReferenceSet::parse(b"{\"target\":\"ab\"}\n").unwrap();
    let error = fuse_shard(&manifest, &other, 0, &[(id("a"), good.clone())]).unwrap_err();
    assert!(matches!(error, FusionError::Reference(_)), "{error}");
    let error = fuse_shard(&manifest, &set, 7, &[(id("a"), good)]).unwrap_err();
    assert!(matches!(error, FusionError::Reference(_)), "{error}");
}
