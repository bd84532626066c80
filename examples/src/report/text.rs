//! The report for a terminal, 100 columns wide.

use std::fmt::Write as _;

use super::{
    Arm, Bar, Metric, RULE_NOTE, Report, SeedReport, Traffic, bars,
    format::{NONE, bytes, or_none, percent, seconds, three, two, wrapped},
    recovered,
};
use crate::world::{Domain, RuleSet};

/// Width of the first column.
const LABEL: usize = 22;
/// Width of the page.
const PAGE: usize = 100;

pub(super) fn render(report: &Report, colour: bool) -> String {
    let mut page = Page {
        text: String::new(),
        colour,
    };
    for seed in &report.seeds {
        page.seed(seed, &report.training);
    }
    if report.seeds.len() > 1 {
        page.summary(report);
    }
    page.text
}

struct Page {
    text: String,
    colour: bool,
}

impl Page {
    fn line(&mut self, line: &str) {
        self.text.push_str(line.trim_end());
        self.text.push('\n');
    }

    fn heading(&mut self, heading: &str) {
        let bold = self.paint("1", heading);
        self.line("");
        self.line(&bold);
    }

    fn paint(&self, code: &str, text: &str) -> String {
        if self.colour {
            format!("\x1b[{code}m{text}\x1b[0m")
        } else {
            text.to_owned()
        }
    }

    fn seed(&mut self, seed: &SeedReport, training: &str) {
        self.heading(&format!("Seed {}", seed.seed));
        self.line("");
        if let Some(notice) = seed.notice() {
            for line in wrapped(&notice, PAGE) {
                let line = self.paint("1;31", &line);
                self.line(&line);
            }
            self.line("");
        }
        self.arms(seed);
        let recovered = recovered(seed);
        self.line("");
        self.line(&format!(
            "recovered of the gap from SFT to centralised: bits {}, facts {}",
            or_none(recovered.bits, two),
            or_none(recovered.facts, two)
        ));
        for note in [training, RULE_NOTE] {
            for line in wrapped(note, PAGE) {
                self.line(&line);
            }
        }
        self.traffic(&seed.traffic);
        self.routing(seed);
        self.time(seed);
        self.bars(&bars(seed));
    }

    fn arms(&mut self, seed: &SeedReport) {
        self.line(&format!(
            "{:LABEL$}{:>32}{:>28}{:>18}",
            "", "bits per byte", "fact accuracy", "rule accuracy"
        ));
        let cells = |cell: &dyn Fn(Metric) -> String| {
            Metric::ALL
                .into_iter()
                .fold(String::new(), |mut row, metric| {
                    let _ = write!(row, "{:>width$}", cell(metric), width = width(metric));
                    row
                })
        };
        self.line(&format!(
            "{:LABEL$}{}",
            "arm",
            cells(&|metric| metric.label().to_owned())
        ));
        for arm in Arm::ALL {
            let row = cells(&|metric| {
                or_none(
                    seed.value(arm, metric),
                    if metric.is_bits() { three } else { two },
                )
            });
            let row = format!("{:LABEL$}{row}", seed.label(arm));
            let row = if arm == Arm::Fused {
                self.paint("1", &row)
            } else {
                row
            };
            self.line(&row);
        }
        let chance = cells(&|metric| metric.chance().map_or_else(String::new, two));
        self.line(&format!("{:LABEL$}{chance}", "chance"));
    }

    fn traffic(&mut self, traffic: &[Traffic]) {
        self.heading("Bytes sent");
        self.line(&format!(
            "{:LABEL$}{:>11}{:>11}{:>12}{:>11}{:>20}",
            "node", "records", "adapters", "evaluation", "all", "dense f16 logits"
        ));
        for node in traffic {
            let [records, adapters, evaluation, sent, dense] = [
                node.records,
                node.adapters,
                node.evaluation,
                node.sent(),
                node.dense,
            ]
            .map(|count| bytes(count as f64));
            self.line(&format!(
                "{:LABEL$}{records:>11}{adapters:>11}{evaluation:>12}{sent:>11}{dense:>20}",
                node.node.name()
            ));
        }
    }

    fn routing(&mut self, seed: &SeedReport) {
        self.heading("Mean routing weights");
        let wide = seed
            .routing
            .iter()
            .map(|row| row.about.chars().count())
            .max()
            .unwrap_or(0);
        let wide = wide.max(LABEL - 2) + 2;
        let [clinic, bank, insurer] = Domain::ALL.map(Domain::name);
        self.line(&format!(
            "{:wide$}{:>7}{clinic:>9}{bank:>9}{insurer:>9}{:>10}{:>8}",
            "reference items", "items", "on owners", "mixed"
        ));
        for row in &seed.routing {
            let [clinic, bank, insurer] = row.weights.map(two);
            self.line(&format!(
                "{:wide$}{:>7}{clinic:>9}{bank:>9}{insurer:>9}{:>10}{:>8}",
                row.about,
                row.items,
                three(row.owners),
                two(row.mixed)
            ));
        }
    }

    fn time(&mut self, seed: &SeedReport) {
        self.heading("Truncation error of the merge, by inner round");
        let errors: Vec<String> = seed.truncation.iter().copied().map(percent).collect();
        self.line(&if errors.is_empty() {
            NONE.to_owned()
        } else {
            errors.join("  ")
        });
        self.heading("Seconds");
        for phase in &seed.phases {
            self.line(&format!("{:40}{:>8}", phase.name, seconds(phase.seconds)));
        }
        self.line(&format!("{:40}{:>8}", "whole run", seconds(seed.seconds)));
    }

    fn bars(&mut self, bars: &[Bar]) {
        self.heading("Bars");
        for bar in bars {
            let verdict = if bar.pass {
                self.paint("32", "holds")
            } else {
                self.paint("1;31", "FAILS")
            };
            self.line(&format!(
                "{:40}{:>8} {} {:<8}{verdict}",
                bar.name,
                or_none(bar.value, bar.format()),
                bar.sense.sign(),
                or_none(bar.limit, bar.format()),
            ));
        }
    }

    fn summary(&mut self, report: &Report) {
        self.heading(&format!(
            "All {} seeds: mean (lowest to highest)",
            report.seeds.len()
        ));
        let columns = [
            (Metric::Union, "union bits/byte"),
            (Metric::Facts, "fact accuracy"),
            (Metric::Rule(RuleSet::C), "rule accuracy, C"),
        ];
        let head = columns.map(|(_, name)| format!("{name:>26}")).concat();
        self.line(&format!("{:LABEL$}{head}", "arm"));
        for arm in Arm::ALL {
            let cells = columns.map(|(metric, _)| {
                let spread = report.spread(arm, metric).map_or_else(
                    || NONE.to_owned(),
                    |s| format!("{:.3} ({:.3} to {:.3})", s.mean, s.min, s.max),
                );
                format!("{spread:>26}")
            });
            let row = format!("{:LABEL$}{}", arm.label(), cells.concat());
            let row = if arm == Arm::Fused {
                self.paint("1", &row)
            } else {
                row
            };
            self.line(&row);
        }
    }
}

fn width(metric: Metric) -> usize {
    match metric {
        Metric::Bits(_) | Metric::Union => 8,
        Metric::Facts => 6,
        Metric::OneOwner => 10,
        Metric::TwoOwners => 12,
        Metric::Rule(_) => 6,
    }
}
