//! `report.json`: what was measured, and next to it everything derived from it.

use std::collections::BTreeMap;

use serde::Serialize;

use super::{Arm, Bar, Metric, RULE_NOTE, Recovered, Report, SeedReport, Spread, bars, recovered};
use crate::world::{Domain, RuleSet};

const SCHEMA: &str = "consilium/example-report/1";

#[derive(Serialize)]
struct Document<'a> {
    schema: &'static str,
    command: &'a str,
    training: &'a str,
    rule_note: &'static str,
    passed: bool,
    seeds: Vec<Seed<'a>>,
    /// Arm, then metric; over all seeds.
    summary: BTreeMap<&'static str, BTreeMap<&'static str, Option<Spread>>>,
}

#[derive(Serialize)]
struct Seed<'a> {
    #[serde(flatten)]
    measured: &'a SeedReport,
    /// Arm, then metric.
    table: BTreeMap<&'static str, BTreeMap<&'static str, Option<f64>>>,
    recovered: Recovered,
    bars: Vec<Bar>,
}

pub(super) fn render(report: &Report) -> serde_json::Result<String> {
    let document = Document {
        schema: SCHEMA,
        command: &report.command,
        training: &report.training,
        rule_note: RULE_NOTE,
        passed: report.passed(),
        seeds: report
            .seeds
            .iter()
            .map(|measured| Seed {
                measured,
                table: table(|arm, metric| measured.value(arm, metric)),
                recovered: recovered(measured),
                bars: bars(measured),
            })
            .collect(),
        summary: table(|arm, metric| report.spread(arm, metric)),
    };
    serde_json::to_string_pretty(&document).map(|json| json + "\n")
}

fn table<T>(cell: impl Fn(Arm, Metric) -> T) -> BTreeMap<&'static str, BTreeMap<&'static str, T>> {
    let row = |arm: Arm| {
        Metric::ALL
            .into_iter()
            .map(|m| (id(m), cell(arm, m)))
            .collect()
    };
    Arm::ALL
        .into_iter()
        .map(|arm| (arm.id(), row(arm)))
        .collect()
}

fn id(metric: Metric) -> &'static str {
    match metric {
        Metric::Bits(Domain::Clinic) => "bits_clinic",
        Metric::Bits(Domain::Bank) => "bits_bank",
        Metric::Bits(Domain::Insurer) => "bits_insurer",
        Metric::Union => "bits_union",
        Metric::Facts => "facts",
        Metric::OneOwner => "facts_one_owner",
        Metric::TwoOwners => "facts_two_owners",
        Metric::Rule(RuleSet::A) => "rule_a",
        Metric::Rule(RuleSet::B) => "rule_b",
        Metric::Rule(RuleSet::C) => "rule_c",
    }
}
