//! What makes the world an honest test.

use std::collections::{BTreeMap, BTreeSet};

use super::{
    ANSWERS, Domain, Kind, NUMBERS, PublicItem, RuleSet, Sizes, World,
    corpora::Line,
    draw::{Dice, Stream},
    truth::Truth,
};

const SEEDS: [u64; 3] = [1, 2, 3];

fn world(seed: u64) -> World {
    World::generate(seed, &Sizes::default())
}

fn truth(seed: u64) -> Truth {
    Truth::draw(&mut Dice::new(seed, Stream::Truth))
}

/// Bytes of an item's spans, in order.
fn spans(public: &PublicItem) -> Vec<&str> {
    public
        .item
        .unlabeled
        .iter()
        .map(|span| public.item.target.get(span.clone()).unwrap())
        .collect()
}

#[test]
fn a_world_is_a_function_of_seed_and_sizes() {
    let (one, again, other) = (world(1), world(1), world(2));
    assert_eq!(one, again);
    assert_ne!(one.public, other.public);
    assert_ne!(one.institutions, other.institutions);

    let folder = tempfile::tempdir().unwrap();
    let (a, b) = (folder.path().join("a"), folder.path().join("b"));
    let (at_a, at_b) = (one.write_files(&a).unwrap(), again.write_files(&b).unwrap());
    let bytes = |path: &std::path::Path| std::fs::read(path).unwrap();
    assert_eq!(bytes(&at_a.public), bytes(&at_b.public));
    assert_eq!(bytes(&at_a.private[2]), bytes(&at_b.private[2]));
}

#[test]
fn the_data_of_a_seed_never_change() {
    let world = world(1);
    let seen = [
        world.institutions[0].private[0].as_str(),
        world.institutions[1].private[0].as_str(),
        world.public[0].item.target.as_str(),
        world.tests.rules[0].item.context.as_str(),
    ];
    assert_eq!(
        seen, GOLDEN,
        "a change here invalidates every published number"
    );
}

const GOLDEN: [&str; 4] = [
    "ref neho -> use zuruba 25mg.",
    "geda ruvida tuhamo dokulu bute gosi kavesu monoli papi.",
    "ref kovi -> use buduve 40ug.",
    "for fipuza mavilo -> give",
];

#[test]
fn resizing_one_text_leaves_the_others_alone() {
    let full = world(1);
    let small = World::generate(
        1,
        &Sizes {
            public_items: 90,
            true_answers_permille: 0,
            ..Sizes::default()
        },
    );
    assert_eq!(full.institutions, small.institutions);
    assert_eq!(full.tests, small.tests);
    assert_eq!(small.public.len(), 90);
}

#[test]
fn texts_are_mixed_as_declared() {
    let world = world(1);
    for institution in &world.institutions {
        let count = |start: &str| {
            institution
                .private
                .iter()
                .filter(|line| line.starts_with(start))
                .count()
        };
        assert_eq!(institution.private.len(), 5_000);
        assert_eq!((count("ref "), count("for ")), (2_500, 1_000));
        let asked = institution
            .holdout
            .iter()
            .filter(|item| !item.choices.is_empty())
            .count();
        assert_eq!((institution.holdout.len(), asked), (200, 100));
    }
    let mut kinds = BTreeMap::new();
    for public in &world.public {
        *kinds.entry((public.kind, public.owners.len())).or_insert(0) += 1;
    }
    let narrative = [((Kind::Narrative, 1), 450), ((Kind::Narrative, 3), 450)];
    let facts = [((Kind::Fact, 1), 1_170), ((Kind::Fact, 2), 630)];
    let expected = facts
        .into_iter()
        .chain([((Kind::Rule, 1), 1_800)])
        .chain(narrative)
        .collect();
    assert_eq!(kinds, expected);
}

#[test]
fn a_third_of_the_facts_has_a_second_owner_who_was_told_them() {
    for seed in SEEDS {
        let (world, truth) = (world(seed), truth(seed));
        let shared = world
            .tests
            .facts
            .iter()
            .filter(|fact| fact.also.is_some())
            .count();
        assert_eq!((shared, world.tests.facts.len()), (63, 180));
        for institution in &world.institutions {
            let mut told: BTreeMap<&str, BTreeSet<&str>> = BTreeMap::new();
            for line in institution
                .private
                .iter()
                .filter(|line| line.starts_with("ref "))
            {
                told.entry(line.split(' ').nth(1).unwrap())
                    .or_default()
                    .insert(line);
            }
            for fact in &truth.facts {
                let line = Line::fact(&truth, fact, fact.answer, fact.number).whole();
                let key = line.split(' ').nth(1).unwrap();
                let expected: &[&str] = if fact.known_to(institution.domain) {
                    &[&line]
                } else {
                    &[]
                };
                let said: Vec<&str> = told.get(key).into_iter().flatten().copied().collect();
                assert_eq!(said, expected, "{} of {key}", institution.domain);
            }
        }
    }
}

#[test]
fn public_answers_do_not_depend_on_the_truth() {
    for seed in SEEDS {
        let (world, truth) = (world(seed), truth(seed));
        let mut table = vec![0.0; ANSWERS * ANSWERS];
        let (mut right, mut verbatim, mut asked) = (0, 0, 0);
        for public in world
            .public
            .iter()
            .filter(|public| public.kind == Kind::Fact)
        {
            let fact = truth
                .facts
                .iter()
                .find(|fact| {
                    public
                        .item
                        .target
                        .starts_with(&Line::fact(&truth, fact, 0, 0).prompt)
                })
                .unwrap();
            let said = spans(public);
            let answer = truth
                .lexicon
                .answers
                .iter()
                .position(|word| word == said[0])
                .unwrap();
            table[fact.answer * ANSWERS + answer] += 1.0;
            asked += 1;
            right += usize::from(answer == fact.answer);
            verbatim += usize::from(answer == fact.answer && NUMBERS[fact.number] == said[1]);
        }
        // 1,800 draws: 150 right by chance, standard deviation 11.7; 30 lines verbatim, 5.4.
        assert_eq!(asked, 1_800);
        assert!(
            (105..=195).contains(&right),
            "seed {seed}: {right} of 1800 answers are true"
        );
        assert!(
            (10..=50).contains(&verbatim),
            "seed {seed}: {verbatim} true lines are public"
        );
        // Chi-square with 121 degrees of freedom: mean 121, standard deviation 15.6.
        let expected = f64::from(asked) / table.len() as f64;
        let chi: f64 = table
            .iter()
            .map(|seen: &f64| (seen - expected).powi(2) / expected)
            .sum();
        assert!(
            chi < 185.0,
            "seed {seed}: chi-square of truth and public answer {chi:.1}"
        );
    }
}

#[test]
fn public_rule_numbers_do_not_depend_on_the_truth() {
    for seed in SEEDS {
        let (world, truth) = (world(seed), truth(seed));
        let outcomes: BTreeMap<String, usize> = truth
            .combinations
            .iter()
            .map(|of| (Line::rule(&truth, of, 0).prompt, of.outcome))
            .collect();
        let right = world
            .public
            .iter()
            .filter(|public| public.kind == Kind::Rule)
            .filter(|public| {
                let (prompt, _) = public.item.target.rsplit_once(' ').unwrap();
                spans(public)[0] == NUMBERS[outcomes[prompt]]
            })
            .count();
        // 1,800 draws: 360 right by chance, standard deviation 17.
        assert!(
            (292..=428).contains(&right),
            "seed {seed}: {right} of 1800 numbers are true"
        );
    }
}

#[test]
fn combinations_stay_in_their_sets() {
    for seed in SEEDS {
        let (world, truth) = (world(seed), truth(seed));
        let prompts = |line: &str| line.rsplit_once(' ').map(|(prompt, _)| prompt.to_owned());
        let private: BTreeSet<String> = world
            .institutions
            .iter()
            .flat_map(|institution| institution.private.iter())
            .chain(
                world
                    .institutions
                    .iter()
                    .flat_map(|institution| institution.holdout.iter().map(|item| &item.target)),
            )
            .filter_map(|line| prompts(line))
            .collect();
        let public: BTreeSet<String> = world
            .public
            .iter()
            .filter_map(|public| prompts(&public.item.target))
            .collect();
        let mut sizes = BTreeMap::new();
        for of in &truth.combinations {
            let prompt = Line::rule(&truth, of, 0).prompt;
            let seen = (private.contains(&prompt), public.contains(&prompt));
            let expected = match of.set {
                RuleSet::A => (true, true),
                RuleSet::B => (false, true),
                RuleSet::C => (false, false),
            };
            assert_eq!(seen, expected, "seed {seed}: {prompt} of set {:?}", of.set);
            *sizes.entry(of.set).or_insert(0) += 1;
        }
        assert_eq!(
            sizes,
            [(RuleSet::A, 1_032), (RuleSet::B, 348), (RuleSet::C, 348)].into()
        );
    }
}

#[test]
fn unlabeled_spans_cover_exactly_the_answers() {
    let (world, truth) = (world(1), truth(1));
    for public in &world.public {
        let target = &public.item.target;
        match (public.kind, spans(public).as_slice()) {
            (Kind::Fact, [answer, number]) => {
                let unit = Domain::ALL
                    .map(Domain::unit)
                    .into_iter()
                    .find(|unit| target.ends_with(&format!("-> use {answer} {number}{unit}.")));
                assert!(unit.is_some(), "{target}");
                assert!(
                    truth.lexicon.answers.iter().any(|word| word == answer),
                    "{target}"
                );
                assert!(NUMBERS.contains(number), "{target}");
            }
            (Kind::Rule, [number]) => {
                let unit = public.owners[0].unit();
                assert!(
                    target.ends_with(&format!("-> give {number}{unit}.")),
                    "{target}"
                );
                assert!(NUMBERS.contains(number), "{target}");
            }
            (Kind::Narrative, []) => {}
            (kind, spans) => panic!("{kind:?} {target} has spans {spans:?}"),
        }
    }
    let json = serde_json::to_value(&world.public[0].item).unwrap();
    assert!(
        json["unlabeled"]
            .as_array()
            .unwrap()
            .iter()
            .all(serde_json::Value::is_array),
        "{json}"
    );
}

#[test]
fn a_constant_guess_scores_chance() {
    let world = world(1);
    let mut right = BTreeMap::new();
    for question in &world.tests.facts {
        let at = question
            .item
            .choices
            .iter()
            .position(|choice| *choice == question.item.target);
        *right.entry(at.unwrap()).or_insert(0) += 1;
        assert!(
            question
                .item
                .choices
                .iter()
                .all(|c| c.len() == question.item.target.len())
        );
        assert!(!question.item.context.ends_with(' '));
    }
    assert_eq!(right, (0..ANSWERS).map(|answer| (answer, 15)).collect());

    let mut right = BTreeMap::new();
    for question in &world.tests.rules {
        let at = question
            .item
            .choices
            .iter()
            .position(|choice| *choice == question.item.target);
        *right.entry((question.set, at.unwrap())).or_insert(0) += 1;
    }
    let cells = RuleSet::ALL
        .into_iter()
        .flat_map(|set| (0..5).map(move |at| ((set, at), 30)));
    assert_eq!(right, cells.collect());
}
