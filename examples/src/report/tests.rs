//! One set of numbers, three faces.

use std::fs;

use super::{
    Arm, ArmResult, Metric, Phase, RULE_NOTE, Report, RoutingRow, Scores, SeedReport, Tally,
    Traffic, bars, format, metrics::wilson, recovered,
};
use crate::world::{Domain, RuleSet};

fn tally(rate: f64, asked: u32) -> Tally {
    let mut tally = Tally::default();
    for at in 0..asked {
        tally.count(f64::from(at) < rate * f64::from(asked));
    }
    tally
}

fn arms(shift: f64, worse: f64) -> Vec<ArmResult> {
    let arm = |arm, bits: [f64; 3], facts: f64, rules: [f64; 3]| ArmResult {
        arm,
        scores: Scores {
            bits,
            one_owner: tally(facts, 117),
            two_owners: tally(facts, 63),
            rules: rules.map(|rate| tally(rate, 150)),
        },
    };
    let fused = [0.625, 0.62 + worse, 0.63].map(|bits| bits + shift);
    vec![
        arm(
            Arm::Source(Domain::Clinic),
            [0.51, 2.52, 2.41],
            0.48,
            [0.44, 0.42, 0.38],
        ),
        arm(
            Arm::Source(Domain::Bank),
            [2.13, 0.50, 2.14],
            0.51,
            [0.45, 0.41, 0.40],
        ),
        arm(
            Arm::Source(Domain::Insurer),
            [2.08, 2.16, 0.53],
            0.52,
            [0.43, 0.41, 0.39],
        ),
        arm(
            Arm::PivotBefore,
            [0.88, 0.87, 0.866],
            0.106,
            [0.20, 0.19, 0.21],
        ),
        arm(Arm::Sft, [0.75, 0.742, 0.74], 0.117, [0.19, 0.25, 0.24]),
        arm(
            Arm::Fused,
            fused,
            0.961 - shift,
            [0.82, 0.76, 0.65 - 3.0 * shift],
        ),
        arm(
            Arm::Centralised,
            [0.54, 0.53, 0.535],
            1.0,
            [0.93, 0.65, 0.67],
        ),
        arm(Arm::Permuted, [2.81, 2.86, 2.88], 0.089, [0.18, 0.22, 0.20]),
    ]
}

/// Invented numbers of a plausible size; `worse` lifts the bits of the fused arm.
fn seed(seed: u64, worse: f64) -> SeedReport {
    let shift = seed as f64 * 0.006;
    let arms = arms(shift, worse);
    let traffic = Domain::ALL
        .into_iter()
        .zip([54_100_000, 51_300_000, 48_900_000])
        .map(|(node, dense)| Traffic {
            node,
            records: 802_413,
            adapters: 9_420_160,
            evaluation: 1_812,
            dense,
        })
        .collect();
    let route = |about: &str, items, weights, owners, mixed| RoutingRow {
        about: about.to_owned(),
        items,
        weights,
        owners,
        mixed,
    };
    let routing = vec![
        route(
            "clinic facts, one owner",
            390,
            [0.998, 0.001, 0.001],
            0.998,
            0.0,
        ),
        route(
            "bank facts, one owner",
            390,
            [0.002, 0.997, 0.001],
            0.997,
            0.0,
        ),
        route(
            "insurer facts, one owner",
            390,
            [0.001, 0.001, 0.998],
            0.998,
            0.0,
        ),
        route("facts, two owners", 630, [0.34, 0.33, 0.33], 0.999, 0.97),
        route("rules", 1800, [0.334, 0.333, 0.333], 1.0, 0.0),
        route(
            "narrative of one domain",
            450,
            [0.34, 0.32, 0.34],
            0.95,
            0.08,
        ),
        route("narrative of all", 450, [0.33, 0.35, 0.32], 1.0, 0.99),
    ];
    let phases = [
        ("corpora and tokenizers", 1.4),
        ("sources at home", 31.2),
        ("pivot before", 7.9),
        ("records", 9.4),
        ("fusion", 0.4),
        ("8 inner rounds", 74.5),
        ("comparison arms", 61.0),
        ("evaluation", 12.3),
    ];
    SeedReport {
        seed,
        rejected: None,
        arms,
        traffic,
        routing,
        truncation: vec![0.174, 0.095, 0.063, 0.042, 0.030, 0.022, 0.016, 0.012],
        phases: phases
            .map(|(name, seconds)| Phase {
                name: name.to_owned(),
                seconds,
            })
            .to_vec(),
        seconds: 198.0 + shift,
    }
}

fn report(seeds: Vec<SeedReport>) -> Report {
    Report {
        command: "cargo run --release --example consortium".to_owned(),
        training: "SFT and centralised: one trainer of 360 steps.".to_owned(),
        seeds,
    }
}

#[test]
fn good_numbers_pass_and_each_bar_fails_alone() {
    assert!(report(vec![seed(1, 0.0), seed(2, 0.0)]).passed());
    assert!(!report(Vec::new()).passed());

    let failing = |change: &dyn Fn(&mut SeedReport)| -> Vec<&str> {
        let mut seed = seed(1, 0.0);
        change(&mut seed);
        bars(&seed)
            .iter()
            .filter(|bar| !bar.pass)
            .map(|bar| bar.name)
            .collect()
    };
    assert_eq!(
        failing(&|seed| seed.arms[4].scores.bits = [0.66; 3])[0],
        "union bits saved against SFT"
    );
    assert_eq!(
        failing(&|seed| seed.arms[1].scores.bits = [0.6; 3]),
        ["union bits, below the best source"]
    );
    let right = |seed: &mut SeedReport, arm: usize, rate: f64| {
        seed.arms[arm].scores.one_owner = tally(rate, 117);
        seed.arms[arm].scores.two_owners = tally(rate, 63);
    };
    assert_eq!(failing(&|seed| right(seed, 5, 0.84)), ["fact accuracy"]);
    assert_eq!(
        failing(&|seed| seed.arms[5].scores.rules[2] = tally(0.49, 150)),
        ["rule accuracy on unseen combinations"]
    );
    assert_eq!(
        failing(&|seed| seed.arms[6].scores.bits = [0.4; 3]),
        ["recovered bits"]
    );
    assert_eq!(failing(&|seed| right(seed, 4, 0.86)), ["recovered facts"]);
    assert_eq!(
        failing(&|seed| right(seed, 7, 0.25)),
        ["fact accuracy of the control"]
    );
    assert_eq!(failing(&|seed| seed.seconds = 300.0), ["seconds"]);
}

#[test]
fn what_was_not_measured_does_not_pass() {
    let mut without = seed(1, 0.0);
    without
        .arms
        .retain(|result| result.arm != Arm::Source(Domain::Bank));
    let source = &bars(&without)[1];
    assert_eq!((source.limit, source.pass), (None, false));

    let mut poisoned = seed(1, 0.0);
    poisoned.arms[5].scores.bits[0] = f64::NAN;
    let failed: Vec<usize> = bars(&poisoned)
        .iter()
        .enumerate()
        .filter(|(_, bar)| !bar.pass)
        .map(|(at, _)| at)
        .collect();
    assert_eq!(failed, [0, 1, 4]);
    let text = report(vec![poisoned]).text(false);
    assert!(!text.contains("NaN"), "{text}");
}

#[test]
fn a_run_without_a_release_does_not_pass_and_every_face_says_why() {
    let mut candidate = seed(1, 0.0);
    candidate.rejected = Some("the gate <rejected> it".to_owned());
    let mut nothing = candidate.clone();
    nothing.seed = 2;
    nothing.arms.retain(|result| result.arm != Arm::Fused);
    let report = report(vec![candidate, nothing, seed(3, 0.0)]);
    assert!(bars(&report.seeds[0]).iter().all(|bar| bar.pass));
    assert!(!report.released() && !report.passed());
    let (text, html) = (report.text(false), report.html());
    let plain = text.split_whitespace().collect::<Vec<_>>().join(" ");
    assert!(plain.contains("released: the gate <rejected> it; the row of the fused arm is"));
    assert!(plain.contains("the gate <rejected> it; there was no candidate"));
    assert_eq!(text.matches("fused, rejected").count(), 2, "{text}");
    assert_eq!(html.matches("fused, rejected").count(), 2);
    assert_eq!(html.matches("the gate &lt;rejected&gt; it").count(), 2);
    assert!(text.lines().all(|line| line.chars().count() <= 100));
    let json: serde_json::Value = serde_json::from_str(&report.json().unwrap()).unwrap();
    assert_eq!(json["passed"], false);
    assert_eq!(json["seeds"][0]["rejected"], "the gate <rejected> it");
    assert_eq!(json["seeds"][2]["rejected"], serde_json::Value::Null);
}

#[test]
fn recovered_is_none_when_the_bound_is_no_bound() {
    let mut flat = seed(1, 0.0);
    let found = recovered(&flat);
    // (.744 - .631) / (.744 - .535)
    assert!((found.bits.unwrap() - 0.5407).abs() < 1e-3, "{found:?}");
    flat.arms[6].scores.bits = flat.arms[4].scores.bits;
    assert_eq!(recovered(&flat).bits, None);
    let spread = |seeds| report(seeds).spread(Arm::Fused, Metric::Union);
    assert!(spread(vec![seed(1, 0.0), seed(2, 0.0)]).is_some());
    let mut without = seed(2, 0.0);
    without.arms.clear();
    assert_eq!(
        spread(vec![seed(1, 0.0), without]),
        None,
        "a seed is left out of the mean"
    );
}

#[test]
fn intervals_are_wilsons() {
    // Newcombe 1998, table I: 81 of 263.
    let (low, high) = wilson(Tally {
        right: 81,
        asked: 263,
    })
    .unwrap();
    assert!(
        (low - 0.2553).abs() < 1e-4 && (high - 0.3662).abs() < 1e-4,
        "{low} {high}"
    );
    assert_eq!(wilson(Tally::default()), None);
}

#[test]
fn bytes_keep_three_digits() {
    let written = [
        0.0,
        999.0,
        999.6,
        1_004.0,
        99_960.0,
        54_100_000.0,
        999_600_000.0,
    ]
    .map(format::bytes);
    assert_eq!(
        written,
        [
            "0 B", "999 B", "1.00 kB", "1.00 kB", "100 kB", "54.1 MB", "1.00 GB"
        ]
    );
}

#[test]
fn all_faces_show_the_same_numbers() {
    let report = report(vec![seed(1, 0.0), seed(2, 0.02), seed(3, 0.25)]);
    let (text, html) = (report.text(false), report.html());
    let json: serde_json::Value = serde_json::from_str(&report.json().unwrap()).unwrap();
    assert_eq!(json["passed"], false);
    for (at, seed) in report.seeds.iter().enumerate() {
        for arm in Arm::ALL {
            for metric in [Metric::Union, Metric::Facts, Metric::Rule(RuleSet::C)] {
                let value = seed.value(arm, metric).unwrap();
                let shown = if metric == Metric::Union {
                    format::three
                } else {
                    format::two
                };
                let key = match metric {
                    Metric::Union => "bits_union",
                    Metric::Facts => "facts",
                    _ => "rule_c",
                };
                let there = json["seeds"][at]["table"][arm.id()][key].as_f64().unwrap();
                assert!((there - value).abs() < 1e-12, "{arm:?} {metric:?}");
                assert!(text.contains(&shown(value)) && html.contains(&shown(value)));
            }
        }
    }
    assert!(text.contains("FAILS") && html.contains(">fails<"));
    // Where the fused pivot lies above its bound, a reader is told why.
    let plain = text.split_whitespace().collect::<Vec<_>>().join(" ");
    for note in [report.training.as_str(), RULE_NOTE] {
        assert!(plain.contains(note), "{note}\n{text}");
        assert!(html.contains(&format::escape(note)), "{note}");
    }
    assert!(
        text.lines().all(|line| line.chars().count() <= 100),
        "{text}"
    );
}

#[test]
fn the_page_needs_nothing_but_itself() {
    let mut hostile = seed(1, 0.0);
    hostile.phases[0].name = "<script>alert(\"&\")</script>".to_owned();
    for report in [
        report(vec![hostile]),
        report(vec![seed(1, 0.0), seed(2, 0.01)]),
    ] {
        let html = report.html();
        for banned in [
            "<script", "http://", "https://", "src=", "href=", "url(", "@import",
        ] {
            assert!(!html.contains(banned), "{banned}");
        }
        let (charts, tables) = (
            html.matches("role=\"img\"").count(),
            html.matches("<table").count(),
        );
        assert_eq!(charts, 7);
        assert!(tables > charts, "a chart without its table");
        assert_eq!(html.matches("aria-label=").count(), charts);
        assert!(!html.contains("NaN") && !html.contains("inf\""));
        for tag in ["svg", "table", "figure", "section", "div", "tr", "td", "th"] {
            let opened = html.matches(&format!("<{tag}>")).count()
                + html.matches(&format!("<{tag} ")).count();
            assert_eq!(opened, html.matches(&format!("</{tag}>")).count(), "{tag}");
        }
    }
}

#[test]
fn files_are_written() {
    let folder = tempfile::tempdir().unwrap();
    let report = report(vec![seed(1, 0.0), seed(2, 0.02), seed(3, 0.25)]);
    report.write_files(&folder.path().join("new")).unwrap();
    let html = fs::read_to_string(folder.path().join("new/report.html")).unwrap();
    assert_eq!(html, report.html());
    assert!(folder.path().join("new/report.json").exists());
}

#[test]
#[ignore = "writes into the folder named by REPORT_PREVIEW for a look in a browser"]
fn preview() {
    let folder = std::env::var_os("REPORT_PREVIEW").expect("a folder");
    let folder = std::path::Path::new(&folder);
    report(vec![seed(1, 0.0)])
        .write_files(&folder.join("one"))
        .unwrap();
    let three = report(vec![seed(1, 0.0), seed(2, 0.02), seed(3, 0.25)]);
    three.write_files(&folder.join("three")).unwrap();
    println!("{}", three.text(true));
}
