//! The charts of the page, each with the table of the numbers it draws.

use super::{
    Arm, Metric, Phase, RULE_NOTE, Report, SeedReport, Spread, Traffic,
    format::{bytes, or_none, percent, seconds, three, two},
    metrics::wilson,
    svg::{Axis, Cell, Chart, Row, Shares, bars, shares},
};
use crate::world::{Domain, RuleSet};

/// A chart with its words and its numbers.
#[derive(Debug)]
pub(super) struct Figure {
    pub(super) title: &'static str,
    pub(super) caption: String,
    pub(super) svg: String,
    pub(super) table: Table,
}

/// Rows of text; the first column names the row.
#[derive(Debug)]
pub(super) struct Table {
    pub(super) head: Vec<String>,
    pub(super) rows: Vec<Vec<String>>,
}

/// Whether the pivot learned what the institutions know.
pub(super) fn learned(report: &Report) -> Vec<Figure> {
    let rules = RuleSet::ALL.map(Metric::Rule);
    vec![
        Figure::of(
            "Bits per byte on the union",
            "Mean over the three domains on fresh text; lower is better. A source is good at home and poor elsewhere.",
            &by_arm(report, "Union bits per byte by arm", &[Metric::Union], &[]),
            report,
        ),
        Figure::of(
            "Fact accuracy",
            "180 facts, twelve candidate answers each. Public text holds every question with a random answer.",
            &by_arm(
                report,
                "Fact accuracy by arm",
                &[Metric::Facts],
                &[(1.0 / 12.0, "chance")],
            ),
            report,
        ),
        Figure::of(
            "Rule accuracy by combination set",
            &format!(
                "Two words decide a number. A: in private and public text. B: in public text only, with random numbers. C: in no training text. {RULE_NOTE}"
            ),
            &by_arm(
                report,
                "Rule accuracy by arm and set",
                &rules,
                &[(0.2, "chance")],
            ),
            report,
        ),
    ]
}

/// What the round cost and how it was fused.
pub(super) fn run(report: &Report) -> Vec<Figure> {
    let mut figures = vec![
        Figure::of(
            "Bytes sent per node",
            "Logarithmic scale. Dense: f16 logits over the source's whole vocabulary at the same positions; they were not sent.",
            &traffic(report),
            report,
        ),
        routing(report),
        Figure::of(
            "Truncation error of the merge",
            "What the merged adapters lose when their product is cut back to the rank, relative to its norm, by inner round.",
            &rounds(report),
            report,
        ),
        Figure::of(
            "Seconds per phase",
            "Wall clock. Phases may overlap, so they need not add up to the whole run.",
            &phases(report),
            report,
        ),
    ];
    figures.retain(|figure| !figure.table.rows.is_empty());
    figures
}

impl Figure {
    fn of(title: &'static str, caption: &str, chart: &Chart, report: &Report) -> Self {
        Self {
            title,
            caption: caption.to_owned(),
            svg: bars(chart),
            table: table(chart, report),
        }
    }
}

fn by_arm(
    report: &Report,
    label: &str,
    metrics: &[Metric],
    marks: &[(f64, &'static str)],
) -> Chart {
    let bits = metrics.iter().any(|metric| metric.is_bits());
    let rows = Arm::ALL
        .into_iter()
        .map(|arm| Row {
            label: arm.label().to_owned(),
            accent: arm == Arm::Fused,
            cells: metrics
                .iter()
                .map(|&metric| cell(report, arm, metric))
                .collect(),
        })
        .collect();
    Chart {
        label: label.to_owned(),
        series: metrics.iter().map(|metric| metric.label()).collect(),
        rows,
        axis: Axis::Linear,
        tail: 62.0,
        marks: marks.to_vec(),
        format: if bits { three } else { two },
    }
}

fn cell(report: &Report, arm: Arm, metric: Metric) -> Cell {
    let values = report
        .seeds
        .iter()
        .map(|seed| seed.value(arm, metric))
        .collect();
    let interval = match report.seeds.as_slice() {
        [seed] => seed
            .arm(arm)
            .and_then(|result| metric.tally(&result.scores))
            .and_then(wilson),
        _ => None,
    };
    Cell { values, interval }
}

fn traffic(report: &Report) -> Chart {
    type Part = (&'static str, fn(&Traffic) -> u64);
    const PARTS: [Part; 5] = [
        ("records", |node| node.records),
        ("adapters", |node| node.adapters),
        ("evaluation", |node| node.evaluation),
        ("all sent", Traffic::sent),
        ("dense logits, not sent", |node| node.dense),
    ];
    let value = |seed: &SeedReport, node: Domain, part: fn(&Traffic) -> u64| {
        seed.traffic
            .iter()
            .find(|traffic| traffic.node == node)
            .map(|found| part(found) as f64)
    };
    let rows = Domain::ALL
        .into_iter()
        .map(|node| Row {
            label: node.name().to_owned(),
            accent: false,
            cells: PARTS
                .iter()
                .map(|&(_, part)| Cell {
                    values: report
                        .seeds
                        .iter()
                        .map(|seed| value(seed, node, part))
                        .collect(),
                    interval: None,
                })
                .collect(),
        })
        .collect();
    Chart {
        label: "Bytes sent per node by kind, against dense logits, logarithmic scale".to_owned(),
        series: PARTS.iter().map(|&(name, _)| name).collect(),
        rows,
        axis: Axis::Log,
        tail: 190.0,
        marks: Vec::new(),
        format: bytes,
    }
}

fn routing(report: &Report) -> Figure {
    let mut labels: Vec<&str> = Vec::new();
    for row in report.seeds.iter().flat_map(|seed| seed.routing.iter()) {
        if !labels.contains(&row.about.as_str()) {
            labels.push(&row.about);
        }
    }
    let mut chart = Shares {
        label: "Mean routing weight of each institution by sort of reference item".to_owned(),
        series: Domain::ALL.map(Domain::name).to_vec(),
        rows: Vec::new(),
    };
    let mut head = vec!["reference items".to_owned(), "items".to_owned()];
    head.extend(Domain::ALL.map(|domain| domain.name().to_owned()));
    head.extend(["on owners", "on owners, lowest", "mixed"].map(str::to_owned));
    let mut table = Table {
        head,
        rows: Vec::new(),
    };
    for about in labels {
        let rows: Vec<_> = report
            .seeds
            .iter()
            .filter_map(|seed| seed.routing.iter().find(|row| row.about == about))
            .collect();
        let mean = |of: &dyn Fn(&super::RoutingRow) -> f64| {
            rows.iter().map(|row| of(row)).sum::<f64>() / rows.len() as f64
        };
        let weights: Vec<f64> = (0..3).map(|at| mean(&|row| row.weights[at])).collect();
        let lowest = rows.iter().map(|row| row.owners).reduce(f64::min);
        let mut cells = vec![
            about.to_owned(),
            format!("{:.0}", mean(&|row| row.items as f64)),
        ];
        cells.extend(weights.iter().copied().map(two));
        cells.extend([three(mean(&|row| row.owners)), or_none(lowest, three)]);
        cells.push(two(mean(&|row| row.mixed)));
        table.rows.push(cells);
        chart.rows.push((about.to_owned(), weights));
    }
    Figure {
        title: "Mean routing weights",
        caption: "How the fused target was weighted, from the records alone. Owners are those whose private text holds the answer; mixed is the share of items with no weight above 0.9."
            .to_owned(),
        svg: shares(&chart),
        table,
    }
}

fn rounds(report: &Report) -> Chart {
    let count = report
        .seeds
        .iter()
        .map(|seed| seed.truncation.len())
        .max()
        .unwrap_or(0);
    let error = |round: usize| -> Vec<Option<f64>> {
        report
            .seeds
            .iter()
            .map(|seed| seed.truncation.get(round).copied())
            .collect()
    };
    single(
        "Relative truncation error by inner round",
        "error",
        (0..count).map(|round| (format!("inner round {}", round + 1), error(round))),
        percent,
    )
}

fn phases(report: &Report) -> Chart {
    let mut names: Vec<&str> = Vec::new();
    for Phase { name, .. } in report.seeds.iter().flat_map(|seed| seed.phases.iter()) {
        if !names.contains(&name.as_str()) {
            names.push(name);
        }
    }
    let spent = |name: &str| -> Vec<Option<f64>> {
        let find = |seed: &SeedReport| {
            seed.phases
                .iter()
                .find(|p| p.name == name)
                .map(|p| p.seconds)
        };
        report.seeds.iter().map(find).collect()
    };
    let rows = names.into_iter().map(|name| (name.to_owned(), spent(name)));
    let whole = report.seeds.iter().map(|seed| Some(seed.seconds)).collect();
    single(
        "Seconds per phase",
        "time",
        rows.chain([("whole run".to_owned(), whole)]),
        seconds,
    )
}

fn single(
    label: &str,
    name: &'static str,
    rows: impl Iterator<Item = (String, Vec<Option<f64>>)>,
    format: fn(f64) -> String,
) -> Chart {
    Chart {
        label: label.to_owned(),
        series: vec![name],
        rows: rows
            .map(|(label, values)| Row {
                label,
                accent: false,
                cells: vec![Cell {
                    values,
                    interval: None,
                }],
            })
            .collect(),
        axis: Axis::Linear,
        tail: 62.0,
        marks: Vec::new(),
        format,
    }
}

/// The values that a chart draws.
fn table(chart: &Chart, report: &Report) -> Table {
    if report.seeds.len() == 1 {
        across(chart)
    } else {
        down(chart, report)
    }
}

/// One seed: a column per series, each with its interval where there is one.
fn across(chart: &Chart) -> Table {
    let mut head = vec![String::new()];
    for (at, series) in chart.series.iter().enumerate() {
        head.push((*series).to_owned());
        if intervals(chart, at) {
            head.push("95 % interval".to_owned());
        }
    }
    let row = |row: &Row| {
        let mut cells = vec![row.label.clone()];
        for (at, cell) in row.cells.iter().enumerate() {
            let value = cell.values.first().copied().flatten();
            cells.push(or_none(value, chart.format));
            if intervals(chart, at) {
                cells.push(cell.interval.map_or_else(String::new, |(low, high)| {
                    format!("{} to {}", (chart.format)(low), (chart.format)(high))
                }));
            }
        }
        cells
    };
    Table {
        head,
        rows: chart.rows.iter().map(row).collect(),
    }
}

fn intervals(chart: &Chart, series: usize) -> bool {
    chart
        .rows
        .iter()
        .any(|row| row.cells[series].interval.is_some())
}

/// Several seeds: a row per series, a column per seed, then mean and range.
fn down(chart: &Chart, report: &Report) -> Table {
    let mut head = vec![String::new()];
    head.extend(
        report
            .seeds
            .iter()
            .map(|seed| format!("seed {}", seed.seed)),
    );
    head.extend(["mean", "lowest", "highest"].map(str::to_owned));
    let mut rows = Vec::new();
    for row in &chart.rows {
        for (cell, series) in row.cells.iter().zip(&chart.series) {
            let label = match row.cells.len() {
                1 => row.label.clone(),
                _ => format!("{}, {series}", row.label),
            };
            let spread = Spread::of(cell.values.iter().copied());
            let parts = [
                spread.map(|s| s.mean),
                spread.map(|s| s.min),
                spread.map(|s| s.max),
            ];
            let mut cells = vec![label];
            cells.extend(
                cell.values
                    .iter()
                    .map(|&value| or_none(value, chart.format)),
            );
            cells.extend(parts.map(|part| or_none(part, chart.format)));
            rows.push(cells);
        }
    }
    Table { head, rows }
}
