//! Every rule and every form of a target: the same bytes in any order and on any number of threads, and what each is for.

use consilium_kernels::code;
use consilium_protocol::manifest::{FusionRule, Manifest, SymbolSpace, TargetForm, TargetTail};
use consilium_protocol::reference::ReferenceSet;
use consilium_protocol::shard::{Header, Shard, Symbols};
use consilium_protocol::{Digest, InstitutionId};

use super::super::{check_reference, check_shard, fuse_shard};
use super::{id, manifest};

const NAMES: [&str; 9] = [
    "softmax",
    "min_ce",
    "causal",
    "confidence",
    "uniform",
    "log_average",
    "median",
    "trimmed_mean",
    "exp_guard",
];

fn forms() -> [TargetForm; 6] {
    let plain = TargetForm::default();
    [
        plain,
        TargetForm {
            tail: TargetTail::Ghost,
            ..plain
        },
        TargetForm {
            tail: TargetTail::Dropped,
            ..plain
        },
        TargetForm {
            symbols: Some(1),
            ..plain
        },
        TargetForm {
            symbols: Some(9),
            ..plain
        },
        TargetForm {
            symbols: Some(2),
            tail: TargetTail::Dropped,
            draws: 50,
        },
    ]
}

/// Five items of bytes that are tokens as well: each byte a token with its own number, and token 300 for the end.
pub(super) fn reference() -> ReferenceSet {
    let lines = ["abcab", "bcaac", "ccabb", "aabbc", "cabca"].map(|text| {
        let mut tokens: Vec<_> = text.bytes().map(|byte| (u32::from(byte), 1)).collect();
        tokens.push((300, 0));
        format!(
            "{{\"target\":{text:?},\"unlabeled\":[[1,2]],\"tokens\":{}}}\n",
            serde_json::to_string(&tokens).unwrap()
        )
    });
    ReferenceSet::parse(lines.concat().as_bytes()).unwrap()
}

pub(super) fn round(rule: FusionRule, space: SymbolSpace) -> (Manifest, ReferenceSet) {
    let set = reference();
    let manifest = Manifest {
        reference: set.digest(),
        items: 5,
        shard_items: 5,
        symbol_space: space,
        symbols: 3,
        members: "abcde".split_terminator("").skip(1).map(id).collect(),
        fusion: rule,
        ..manifest(rule)
    };
    (manifest, set)
}

fn tokens() -> SymbolSpace {
    SymbolSpace::Tokens {
        tokenizer: Digest::of(b"tokenizer"),
        size: 400,
    }
}

/// Three symbols a position: `shift` 0 gives the observed one most of the mass, by `probability`; another shift names a
/// neighbour of it.
pub(super) fn shard(manifest: &Manifest, set: &ReferenceSet, probability: f64, shift: u8) -> Shard {
    let is_bytes = manifest.symbol_space == SymbolSpace::Bytes;
    let (mut symbols, mut codes, mut end, mut tail) = (vec![], vec![], vec![], vec![]);
    let mut offsets = vec![0];
    for item in set.items() {
        let target = item.target.as_bytes();
        for place in 0..=target.len() {
            let observed = target
                .get(place)
                .map_or(300, |byte| u32::from(byte + shift));
            let rest = (1.0 - probability) / 4.0;
            let at_end = place == target.len() && is_bytes;
            let mut listed = [
                (u32::from(b'a'), rest),
                (u32::from(b'z'), rest),
                (observed, probability),
            ];
            if at_end {
                listed[2] = (u32::from(b'q'), rest);
            } else if listed[0].0 == observed {
                listed[0].0 = u32::from(b'A');
            }
            listed.sort_unstable_by_key(|(symbol, _)| *symbol);
            symbols.extend(listed.map(|(symbol, _)| symbol));
            codes.extend(listed.map(|(_, mass)| code::encode(mass)));
            end.push(if at_end && shift == 0 {
                code::encode(probability)
            } else {
                code::encode(rest)
            });
            let listed: f64 = listed.iter().map(|(_, mass)| mass).sum();
            let of_end = if is_bytes {
                code::decode(*end.last().unwrap())
            } else {
                0.0
            };
            tail.push(code::encode(1.0 - listed - of_end));
        }
        offsets.push(u64::try_from(end.len()).unwrap());
    }
    let bytes = || {
        symbols
            .iter()
            .map(|&symbol| u8::try_from(symbol).unwrap())
            .collect()
    };
    Shard {
        header: Header::new(set.digest(), 0..5, manifest.symbol_space, 3),
        symbols: if is_bytes {
            Symbols::Bytes(bytes())
        } else {
            Symbols::Tokens(symbols)
        },
        codes,
        end,
        tail,
        missed: vec![255; 10],
        offsets,
    }
}

fn sources(manifest: &Manifest, set: &ReferenceSet) -> Vec<(InstitutionId, Shard)> {
    [
        ("a", 0.6, 0),
        ("b", 0.5, 0),
        ("c", 0.55, 0),
        ("d", 0.5, 1),
        ("e", 0.62, 0),
    ]
    .map(|(name, probability, shift)| (id(name), shard(manifest, set, probability, shift)))
    .to_vec()
}

#[test]
fn neither_arrival_nor_threads_change_a_byte_of_any_rule() {
    for space in [SymbolSpace::Bytes, tokens()] {
        for name in NAMES {
            for form in forms() {
                let (mut manifest, set) = round(FusionRule::named(name).unwrap(), space);
                manifest.targets = form;
                manifest.to_text().unwrap();
                let mut sources = sources(&manifest, &set);
                for (who, shard) in &sources {
                    check_shard(&manifest, &set, 0, who, shard).unwrap();
                }
                let fused = fuse_shard(&manifest, &set, 0, &sources).unwrap();
                let bytes = fused.targets.to_bytes().unwrap();
                assert_eq!(fused.targets.header.symbols, form.slots(3));
                for weights in &fused.routing.weights {
                    assert_eq!(weights.iter().sum::<u32>(), 65_536, "{name}");
                }
                for threads in [1, 3] {
                    sources.rotate_left(1);
                    sources.swap(0, 2);
                    let pool = rayon::ThreadPoolBuilder::new()
                        .num_threads(threads)
                        .build()
                        .unwrap();
                    let again = pool.install(|| fuse_shard(&manifest, &set, 0, &sources).unwrap());
                    assert_eq!(again.targets.to_bytes().unwrap(), bytes, "{name} {form:?}");
                    assert_eq!(again, fused, "{name} {form:?}");
                }
            }
        }
    }
}

#[test]
fn a_label_that_nobody_lists_has_the_mass_of_the_tail_and_what_is_no_label_has_not() {
    for space in [SymbolSpace::Bytes, tokens()] {
        let (mut manifest, set) = round(FusionRule::Uniform, space);
        // It names a neighbour of every symbol that was observed.
        let sources = [(id("d"), shard(&manifest, &set, 0.5, 1))];
        let with_labels = fuse_shard(&manifest, &set, 0, &sources).unwrap().targets;
        manifest.targets.tail = TargetTail::Ghost;
        let ghost = fuse_shard(&manifest, &set, 0, &sources).unwrap().targets;
        let k = usize::from(ghost.header.symbols);
        let symbols = |shard: &Shard, position: usize| -> Vec<u32> {
            let slots = position * k..(position + 1) * k;
            match &shard.symbols {
                Symbols::Bytes(bytes) => bytes[slots].iter().copied().map(u32::from).collect(),
                Symbols::Tokens(tokens) => tokens[slots].to_vec(),
            }
        };
        let mut moved = 0;
        for (index, item) in set.items().iter().enumerate() {
            let positions = ghost.item(index).unwrap();
            for (place, (position, &(observed, _))) in positions.zip(&item.tokens).enumerate() {
                let (before, after) = (symbols(&ghost, position), symbols(&with_labels, position));
                let is_label = !item.unlabeled.contains(&(place..place + 1));
                let is_end = observed == 300 && space == SymbolSpace::Bytes;
                if is_label && !is_end && !before.contains(&observed) {
                    let slot = after.iter().position(|&symbol| symbol == observed).unwrap();
                    assert_eq!(with_labels.codes[position * k + slot], ghost.tail[position]);
                    assert_eq!(with_labels.tail[position], 255);
                    moved += 1;
                } else {
                    assert_eq!(after, before);
                    assert_eq!(with_labels.tail[position], ghost.tail[position]);
                }
            }
        }
        assert!(moved > 5, "{moved}");
    }
}

/// Mean probability of the observed bytes in the fused record.
fn known(manifest: &Manifest, set: &ReferenceSet, sources: &[(InstitutionId, Shard)]) -> f64 {
    let targets = fuse_shard(manifest, set, 0, sources).unwrap().targets;
    let Symbols::Bytes(symbols) = &targets.symbols else {
        panic!("bytes")
    };
    let k = usize::from(targets.header.symbols);
    let mut sum = 0.0;
    let mut count = 0.0;
    for (index, item) in set.items().iter().enumerate() {
        for (byte, place) in item.target.bytes().zip(targets.item(index).unwrap()) {
            let slots = place * k..(place + 1) * k;
            let at = symbols[slots.clone()]
                .iter()
                .position(|&symbol| symbol == byte);
            sum += at.map_or(0.0, |at| code::decode(targets.codes[slots.start + at]));
            count += 1.0;
        }
    }
    sum / count
}

#[test]
fn a_liar_who_knows_as_much_as_the_others_elsewhere_does_not_move_a_robust_rule() {
    // The liar is right about half of the items, so that it is competent, and names neighbours in one.
    for (name, least) in [
        ("median", 0.52),
        ("trimmed_mean", 0.52),
        ("exp_guard", 0.53),
    ] {
        let rule = match FusionRule::named(name).unwrap() {
            FusionRule::Median { .. } => FusionRule::Median {
                competence_millibits: 8000,
            },
            FusionRule::TrimmedMean { trim_permille, .. } => FusionRule::TrimmedMean {
                competence_millibits: 8000,
                trim_permille,
            },
            _ => FusionRule::ExpGuard {
                competence_millibits: 8000,
                eta_permille: 20_000,
                sharpness: 0,
            },
        };
        let (manifest, set) = round(rule, SymbolSpace::Bytes);
        let sources: Vec<_> = sources(&manifest, &set).into_iter().take(4).collect();
        let honest = known(&manifest, &set, &sources[..3]);
        let attacked = known(&manifest, &set, &sources);
        let (uniform, _) = round(FusionRule::Uniform, SymbolSpace::Bytes);
        let mean = known(&uniform, &set, &sources);
        assert!(
            attacked >= least && attacked > mean + 0.05,
            "{name}: {honest} {attacked} {mean}"
        );
    }
}

#[test]
fn of_sources_that_are_trusted_alike_a_guard_hears_the_one_that_knows_the_item() {
    // Two are no majority: nothing is known against either.
    let guard = |sharpness| FusionRule::ExpGuard {
        competence_millibits: 8000,
        eta_permille: 20_000,
        sharpness,
    };
    let weights = |rule| {
        let (manifest, set) = round(rule, SymbolSpace::Bytes);
        let sources: Vec<_> = sources(&manifest, &set)
            .into_iter()
            .skip(2)
            .take(2)
            .collect();
        fuse_shard(&manifest, &set, 0, &sources)
            .unwrap()
            .routing
            .weights
    };
    let softmax = weights(FusionRule::Softmax { sharpness: 3 });
    assert_eq!(weights(guard(3)), softmax);
    assert_ne!(weights(guard(0)), softmax);
}

#[test]
fn the_incompetent_have_no_part_in_a_robust_rule() {
    let (manifest, set) = round(FusionRule::named("median").unwrap(), SymbolSpace::Bytes);
    let fused = fuse_shard(&manifest, &set, 0, &sources(&manifest, &set)).unwrap();
    for weights in &fused.routing.weights {
        assert_eq!(weights[3], 0);
        assert_eq!(weights[0], 16_384);
    }
}

#[test]
fn tokens_are_routed_by_what_the_reference_set_says_was_observed() {
    let (manifest, set) = round(FusionRule::named("min_ce").unwrap(), tokens());
    let fused = fuse_shard(&manifest, &set, 0, &sources(&manifest, &set)).unwrap();
    let expected = vec![vec![0, 0, 0, 0, 65_536]; 5];
    assert_eq!(fused.routing.weights, expected);
    // Four labelled bytes and the end; one token touches the span.
    assert_eq!(fused.routing.bytes, [5; 5]);
    assert!(matches!(fused.targets.symbols, Symbols::Tokens(_)));
    assert_eq!(
        check_reference(&manifest, &set).map_err(|error| error.to_string()),
        Ok(())
    );
    let silent = ReferenceSet::parse(b"{\"target\":\"ab\"}\n").unwrap();
    let error = check_reference(&manifest, &silent).unwrap_err().to_string();
    assert!(error.contains("item 0 has no field tokens"), "{error}");
    let small = Manifest {
        symbol_space: SymbolSpace::Tokens {
            tokenizer: Digest::of(b"tokenizer"),
            size: 300,
        },
        ..manifest
    };
    let error = check_reference(&small, &set).unwrap_err().to_string();
    assert!(error.contains("token 300"), "{error}");
}

#[test]
fn samples_follow_the_seed_of_the_manifest_and_no_other_item() {
    let (mut manifest, set) = round(FusionRule::named("softmax").unwrap(), SymbolSpace::Bytes);
    manifest.targets.draws = 12;
    let sources = sources(&manifest, &set);
    let first = fuse_shard(&manifest, &set, 0, &sources).unwrap().targets;
    manifest.seed += 1;
    let second = fuse_shard(&manifest, &set, 0, &sources).unwrap().targets;
    assert_ne!(first.codes, second.codes);
    // Items 1 and 2 start alike at both ends of the shard's order, yet draw apart.
    let per_item: Vec<_> = (0..5)
        .map(|item| first.codes[first.item(item).unwrap().start * 3..][..18].to_vec())
        .collect();
    assert!(per_item.windows(2).all(|pair| pair[0] != pair[1]));
}
