//! What screening and accounts say of shards that give their source away, or spoil the fusion.

use consilium_kernels::code;
use consilium_protocol::InstitutionId;
use consilium_protocol::decoys::{Decoy, DecoyKey};
use consilium_protocol::manifest::{Finding, FusionRule, Manifest, SymbolSpace};
use consilium_protocol::reference::ReferenceSet;
use consilium_protocol::shard::{Shard, Symbols};

use super::id;
use super::rules::{reference, round, shard};
use crate::fusion::{Accountant, Accounts, Screen, Screened, holdout};

fn key(set: &ReferenceSet) -> DecoyKey {
    let decoy = |item, from, to| Decoy { item, from, to };
    DecoyKey::new(
        set.digest(),
        [1; 32],
        vec![decoy(0, 2, 4), decoy(3, 3, 5)],
        vec![1],
    )
}

/// Gives the decoys' positions of `shard` what `other` has there.
fn splice(shard: &mut Shard, other: &Shard, key: &DecoyKey) {
    let (Symbols::Bytes(to), Symbols::Bytes(from)) = (&mut shard.symbols, &other.symbols) else {
        panic!("bytes")
    };
    for decoy in &key.decoys {
        let start = usize::try_from(decoy.item * 6).unwrap();
        for position in (start + decoy.from as usize)..(start + decoy.to as usize) {
            let slots = position * 3..position * 3 + 3;
            to[slots.clone()].copy_from_slice(&from[slots.clone()]);
            shard.codes[slots.clone()].copy_from_slice(&other.codes[slots]);
            shard.tail[position] = other.tail[position];
            shard.end[position] = other.end[position];
        }
    }
}

fn screened(
    manifest: &Manifest,
    set: &ReferenceSet,
    key: &DecoyKey,
    sources: &[(InstitutionId, Shard)],
) -> Screened {
    let mut screen = Screen::new(manifest, set, Some(key));
    screen.add(0, sources).unwrap();
    screen.finish()
}

fn softmax() -> (Manifest, ReferenceSet) {
    round(FusionRule::Softmax { sharpness: 20 }, SymbolSpace::Bytes)
}

/// Knows the text, and is surprised where it is wrong.
fn honest(manifest: &Manifest, set: &ReferenceSet, probability: f64) -> Shard {
    let mut known = shard(manifest, set, probability, 0);
    splice(&mut known, &shard(manifest, set, probability, 1), &key(set));
    known
}

#[test]
fn a_source_that_reads_the_text_is_not_surprised_by_wrong_words_and_is_kept_out() {
    let (manifest, set) = softmax();
    let key = key(&set);
    let mut sources = vec![
        (id("a"), honest(&manifest, &set, 0.6)),
        (id("b"), honest(&manifest, &set, 0.5)),
        (id("cheat"), shard(&manifest, &set, 0.9, 0)),
    ];
    let found = screened(&manifest, &set, &key, &sources);
    assert_eq!(found.decoys, 2);
    assert_eq!(found.excluded, [id("cheat")], "{found:?}");
    let [flag] = found.flags.as_slice() else {
        panic!("{found:?}")
    };
    assert_eq!((flag.finding, flag.of.clone()), (Finding::Decoy, None));
    // Two bytes a decoy at .9, two sixteenths each.
    assert_eq!((flag.measured, flag.bound), (250, 2000));
    sources.reverse();
    assert_eq!(screened(&manifest, &set, &key, &sources), found);
    let mut lenient = manifest;
    lenient.screening.exclude_decoy = false;
    let found = screened(&lenient, &set, &key, &sources);
    assert_eq!((found.flags.len(), found.excluded.len()), (1, 0));
}

#[test]
fn copies_and_constants_are_told_from_the_honest() {
    let (mut manifest, set) = softmax();
    let key = key(&set);
    let model = honest(&manifest, &set, 0.6);
    let mut copy = model.clone();
    // One code in ten off by a step does not hide it.
    copy.codes
        .iter_mut()
        .step_by(10)
        .for_each(|code| *code = code.saturating_sub(1));
    let mut uniform = model.clone();
    let positions = uniform.tail.len();
    uniform.symbols = Symbols::Bytes([1, 2, 3].repeat(positions));
    uniform.codes = vec![code::encode(1.0 / 257.0); 3 * positions];
    uniform.end = vec![code::encode(1.0 / 257.0); positions];
    uniform.tail = vec![code::encode(253.0 / 257.0); positions];
    let sources = vec![
        (id("a"), model),
        (id("b"), honest(&manifest, &set, 0.5)),
        (id("copy"), copy),
        (id("idle"), uniform),
    ];
    let found = screened(&manifest, &set, &key, &sources);
    let seen: Vec<_> = found
        .flags
        .iter()
        .map(|flag| {
            (
                flag.institution.as_str(),
                flag.finding,
                flag.of.as_ref().map(InstitutionId::as_str),
            )
        })
        .collect();
    assert_eq!(
        seen,
        [
            ("copy", Finding::Duplicate, Some("a")),
            ("idle", Finding::Constant, None),
        ]
    );
    assert!(
        found.excluded.is_empty(),
        "the default policy only reports these"
    );
    manifest.screening.exclude_duplicate = true;
    manifest.screening.exclude_free_rider = true;
    let found = screened(&manifest, &set, &key, &sources);
    assert_eq!(found.excluded, ["copy", "idle"].map(id));
}

fn accounts(manifest: &Manifest, sources: &[(InstitutionId, Shard)]) -> Accounts {
    let set = reference();
    let names: Vec<_> = sources.iter().map(|(who, _)| who.clone()).collect();
    let mut accountant = Accountant::new(manifest, &set, &names, holdout(manifest, &set, None));
    accountant.add(0, sources).unwrap();
    accountant.finish().unwrap()
}

#[test]
fn values_add_up_and_do_not_depend_on_arrival() {
    let (manifest, set) = softmax();
    let mut sources = vec![
        (id("a"), shard(&manifest, &set, 0.6, 0)),
        (id("b"), shard(&manifest, &set, 0.6, 0)),
        (id("c"), shard(&manifest, &set, 0.6, 1)),
    ];
    let found = accounts(&manifest, &sources);
    assert_eq!((found.coalitions, found.items, found.orders), (7, 5, None));
    let [all] = found.domains.as_slice() else {
        panic!("{found:?}")
    };
    assert_eq!((all.domain.as_str(), all.bytes), ("all", 25));
    let sum: f64 = all.members.iter().map(|member| member.shapley).sum();
    assert!((sum - (8.0 - all.fused)).abs() < 1e-12, "{found:?}");
    let [a, b, c] = all.members.as_slice() else {
        panic!("{found:?}")
    };
    assert!(
        (a.shapley - b.shapley).abs() < 1e-12 && a.shapley > c.shapley + 1.0,
        "{found:?}"
    );
    assert!(
        a.leave_one_out.abs() < 1e-12 && c.alone > a.alone + 1.0,
        "{found:?}"
    );
    sources.rotate_left(1);
    assert_eq!(accounts(&manifest, &sources), found);
}

#[test]
fn the_public_gate_names_the_member_without_which_the_fusion_is_better() {
    let blamed = |rule| {
        let (manifest, set) = round(rule, SymbolSpace::Bytes);
        let sources = [("a", 0.9, 0), ("b", 0.8, 0), ("liar", 0.9, 1)]
            .map(|(name, p, shift)| (id(name), shard(&manifest, &set, p, shift)));
        accounts(&manifest, &sources).blamed(100).cloned()
    };
    assert_eq!(blamed(FusionRule::Uniform), Some(id("liar")));
    assert_eq!(blamed(FusionRule::Softmax { sharpness: 20 }), None);
    assert_eq!(blamed(FusionRule::MinCe), None);
}

#[test]
fn many_institutions_are_sampled_and_still_add_up() {
    let (manifest, set) = softmax();
    let sources: Vec<_> = (0..11)
        .map(|i| {
            (
                id(&format!("m{i:02}")),
                shard(&manifest, &set, 0.4 + 0.04 * f64::from(i), 0),
            )
        })
        .collect();
    let found = accounts(&manifest, &sources);
    assert_eq!(found.orders, Some(55));
    let members = &found.domains[0].members;
    let sum: f64 = members.iter().map(|member| member.shapley).sum();
    assert!((sum - (8.0 - found.fused)).abs() < 1e-9);
    assert!(members[10].shapley > members[0].shapley);
    assert!(
        members
            .iter()
            .all(|member| member.standard_error.is_some_and(f64::is_finite))
    );
}
