//! Charts as inline SVG. Colours are classes of the page's style sheet, so light, dark and print follow it.

use std::fmt::Write as _;

use super::{
    Spread,
    format::{NONE, escape, two},
};

const WIDTH: f64 = 960.0;
const LABEL_END: f64 = 172.0;
const PLOT_START: f64 = 184.0;
const ROW_GAP: f64 = 13.0;

/// A chart of horizontal bars, one row per thing compared.
#[derive(Debug)]
pub(super) struct Chart {
    /// What a reader who cannot see the chart is told.
    pub(super) label: String,
    /// Names of a row's bars; one for a plain chart.
    pub(super) series: Vec<&'static str>,
    pub(super) rows: Vec<Row>,
    pub(super) axis: Axis,
    /// Room for the value after the longest bar.
    pub(super) tail: f64,
    /// Lines across the plot, with what they mean.
    pub(super) marks: Vec<(f64, &'static str)>,
    pub(super) format: fn(f64) -> String,
}

#[derive(Debug)]
pub(super) struct Row {
    pub(super) label: String,
    /// Set apart from the other rows.
    pub(super) accent: bool,
    pub(super) cells: Vec<Cell>,
}

/// What one bar shows.
#[derive(Debug)]
pub(super) struct Cell {
    /// One value per seed; the bar is their mean.
    pub(super) values: Vec<Option<f64>>,
    /// Uncertainty of a single value.
    pub(super) interval: Option<(f64, f64)>,
}

#[derive(Clone, Copy, Debug)]
pub(super) enum Axis {
    /// From zero.
    Linear,
    /// Bars have no length on it: thin stems with a dot.
    Log,
}

/// Share of a whole, drawn as a row of segments.
#[derive(Debug)]
pub(super) struct Shares {
    pub(super) label: String,
    pub(super) series: Vec<&'static str>,
    /// Label and shares that sum to 1.
    pub(super) rows: Vec<(String, Vec<f64>)>,
}

struct Scale {
    axis: Axis,
    from: f64,
    to: f64,
    end: f64,
}

impl Scale {
    fn of(chart: &Chart) -> Self {
        let cells = chart.rows.iter().flat_map(|row| row.cells.iter());
        let values: Vec<f64> = cells
            .flat_map(|cell| {
                let interval = cell.interval.map(|(low, high)| [low, high]);
                cell.values
                    .iter()
                    .flatten()
                    .copied()
                    .chain(interval.into_iter().flatten())
            })
            .chain(chart.marks.iter().map(|&(at, _)| at))
            .collect();
        let top = values.iter().copied().fold(f64::MIN_POSITIVE, f64::max);
        let end = WIDTH - chart.tail;
        match chart.axis {
            Axis::Linear => Self {
                axis: chart.axis,
                from: 0.0,
                to: top,
                end,
            },
            Axis::Log => {
                let low = values
                    .iter()
                    .copied()
                    .filter(|&value| value > 0.0)
                    .fold(top, f64::min);
                let (from, to) = (low.log10().floor(), top.log10().ceil());
                Self {
                    axis: chart.axis,
                    from,
                    to: to.max(from + 1.0),
                    end,
                }
            }
        }
    }

    fn x(&self, value: f64) -> f64 {
        let at = match self.axis {
            Axis::Linear => value,
            Axis::Log => value.max(1.0).log10().max(self.from),
        };
        PLOT_START + (at - self.from) / (self.to - self.from) * (self.end - PLOT_START)
    }

    fn ticks(&self) -> Vec<f64> {
        match self.axis {
            Axis::Linear => {
                let step = step(self.to / 6.0);
                (0..=6)
                    .map(|n| f64::from(n) * step)
                    .filter(|&at| at <= self.to * 1.001)
                    .collect()
            }
            Axis::Log => (0..=15)
                .map(f64::from)
                .filter(|&decade| (self.from..=self.to).contains(&decade))
                .map(|decade| 10_f64.powf(decade))
                .collect(),
        }
    }
}

/// The next round number: 1, 2 or 5 times a power of ten.
fn step(least: f64) -> f64 {
    let power = 10_f64.powf(least.log10().floor());
    [1.0, 2.0, 5.0]
        .into_iter()
        .map(|round| round * power)
        .find(|&step| step >= least * 0.999)
        .unwrap_or(10.0 * power)
}

pub(super) fn bars(chart: &Chart) -> String {
    let scale = Scale::of(chart);
    let (pitch, thick) = if chart.series.len() > 1 {
        (14.0, 9.0)
    } else {
        (18.0, 16.0)
    };
    let top = if chart.marks.is_empty() { 6.0 } else { 24.0 };
    let bottom = chart
        .rows
        .iter()
        .fold(top, |y, row| y + row.cells.len() as f64 * pitch + ROW_GAP);
    let mut svg = open(&chart.label, bottom + 18.0);
    for tick in scale.ticks() {
        let x = scale.x(tick);
        let _ = write!(
            svg,
            r#"<line class="grid" x1="{x:.1}" x2="{x:.1}" y1="{top}" y2="{bottom:.1}"/>"#
        );
        text(
            &mut svg,
            x,
            bottom + 14.0,
            "tick middle",
            &tick_label(chart, tick),
        );
    }
    let mut y = top + ROW_GAP / 2.0;
    for row in &chart.rows {
        let height = row.cells.len() as f64 * pitch;
        let class = if row.accent {
            "name end strong"
        } else {
            "name end"
        };
        text(
            &mut svg,
            LABEL_END,
            y + height / 2.0 + 4.5,
            class,
            &row.label,
        );
        for (at, cell) in row.cells.iter().enumerate() {
            let middle = y + (at as f64 + 0.5) * pitch;
            draw(&mut svg, chart, &scale, row, at, cell, middle, thick);
        }
        y += height + ROW_GAP;
    }
    for &(at, meaning) in &chart.marks {
        let x = scale.x(at);
        let _ = write!(
            svg,
            r#"<line class="mark" x1="{x:.1}" x2="{x:.1}" y1="18" y2="{bottom:.1}"/>"#
        );
        text(&mut svg, x, 13.0, "tick middle", meaning);
    }
    svg + "</svg>"
}

fn draw(
    svg: &mut String,
    chart: &Chart,
    scale: &Scale,
    row: &Row,
    at: usize,
    cell: &Cell,
    middle: f64,
    thick: f64,
) {
    let Some(Spread { mean, .. }) = Spread::of(cell.values.iter().copied()) else {
        return text(svg, PLOT_START + 6.0, middle + 4.0, "value", NONE);
    };
    let x = scale.x(mean);
    let tone = if chart.series.len() > 1 {
        format!("s{at}")
    } else if row.accent {
        "accent".to_owned()
    } else {
        "calm".to_owned()
    };
    let width = (x - PLOT_START).max(1.0);
    match scale.axis {
        Axis::Linear => {
            let y = middle - thick / 2.0;
            let _ = write!(
                svg,
                r#"<rect class="{tone}" x="{PLOT_START}" y="{y:.1}" width="{width:.1}" height="{thick}" rx="1.5"/>"#
            );
        }
        Axis::Log => {
            let _ = write!(
                svg,
                r#"<line class="stem" x1="{PLOT_START}" x2="{x:.1}" y1="{middle:.1}" y2="{middle:.1}"/><circle class="{tone}" cx="{x:.1}" cy="{middle:.1}" r="4.5"/>"#
            );
        }
    }
    let mut reach = x;
    if cell.values.len() > 1 {
        for x in cell.values.iter().flatten().map(|&value| scale.x(value)) {
            let _ = write!(
                svg,
                r#"<circle class="dot" cx="{x:.1}" cy="{middle:.1}" r="2.4"/>"#
            );
            reach = reach.max(x);
        }
    } else if let Some((low, high)) = cell.interval {
        let (low, high) = (scale.x(low), scale.x(high));
        let _ = write!(
            svg,
            r#"<line class="whisker" x1="{low:.1}" x2="{high:.1}" y1="{middle:.1}" y2="{middle:.1}"/>"#
        );
        reach = reach.max(high);
    }
    let mut value = (chart.format)(mean);
    if let [_, _, ..] = chart.series.as_slice() {
        let _ = write!(value, "  {}", chart.series[at]);
    }
    text(
        svg,
        reach + 8.0,
        middle + 4.0,
        if row.accent { "value strong" } else { "value" },
        &value,
    );
}

pub(super) fn shares(chart: &Shares) -> String {
    const THICK: f64 = 20.0;
    const PITCH: f64 = 29.0;
    const START: f64 = 224.0;
    let height = 30.0 + chart.rows.len() as f64 * PITCH;
    let mut svg = open(&chart.label, height);
    let mut x = START;
    for (at, name) in chart.series.iter().enumerate() {
        let _ = write!(
            svg,
            r#"<rect class="s{at}" x="{x:.1}" y="4" width="11" height="11" rx="2"/>"#
        );
        text(&mut svg, x + 17.0, 14.0, "tick", name);
        x += 90.0;
    }
    for (row, (label, parts)) in chart.rows.iter().enumerate() {
        let y = 28.0 + row as f64 * PITCH;
        text(&mut svg, START - 12.0, y + 14.5, "name end", label);
        let mut x = START;
        for (at, &part) in parts.iter().enumerate() {
            let width = part * (WIDTH - START - 4.0);
            let _ = write!(
                svg,
                r#"<rect class="s{at}" x="{x:.1}" y="{y:.1}" width="{:.1}" height="{THICK}"/>"#,
                (width - 1.0).max(0.0)
            );
            if width > 34.0 {
                text(
                    &mut svg,
                    x + width / 2.0,
                    y + 14.5,
                    "inside middle",
                    &two(part),
                );
            }
            x += width;
        }
    }
    svg + "</svg>"
}

fn open(label: &str, height: f64) -> String {
    format!(
        r#"<svg role="img" aria-label="{}" viewBox="0 0 {WIDTH} {height:.0}" preserveAspectRatio="xMinYMin">"#,
        escape(label)
    )
}

fn text(svg: &mut String, x: f64, y: f64, class: &str, content: &str) {
    let _ = write!(
        svg,
        r#"<text class="{class}" x="{x:.1}" y="{y:.1}">{}</text>"#,
        escape(content)
    );
}

/// Ticks are round numbers: no trailing zeros.
fn tick_label(chart: &Chart, tick: f64) -> String {
    let full = (chart.format)(tick);
    let (number, unit) = full.split_at(full.find(' ').unwrap_or(full.len()));
    match number.contains('.') {
        true => format!(
            "{}{unit}",
            number.trim_end_matches('0').trim_end_matches('.')
        ),
        false => full,
    }
}
