//! What the arms scored, and the same as text.

use std::fmt::Write as _;

use consilium_examples::report::{Scores, Spread};
use serde::{Deserialize, Serialize};

use crate::Regime;
use crate::adapters::{AdapterAttack, Exactness};
use crate::arms::{ARMS, Role, named};
use crate::attacks::AttackRow;
use crate::costs;
use crate::decoys::Caught;
use crate::lines::Line;
use crate::traffic::Traffic;

/// One arm on one seed.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct Row {
    /// The arm's name.
    pub(crate) arm: String,
    /// What the public text says.
    pub(crate) regime: Regime,
    /// The seed.
    pub(crate) seed: u64,
    /// Its answers.
    #[serde(flatten)]
    pub(crate) scores: Scores,
}

/// Everything that a run found.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub(crate) struct Outcome {
    /// What makes it again.
    pub(crate) command: String,
    /// Steps of every trained arm.
    pub(crate) steps: u64,
    /// What was promised, and whether it holds.
    pub(crate) lines: Vec<Line>,
    /// Every arm on every seed.
    pub(crate) rows: Vec<Row>,
    /// Every attack on records on every seed.
    pub(crate) attacks: Vec<AttackRow>,
    /// Every attack on adapters on every seed.
    pub(crate) adapter_attacks: Vec<AdapterAttack>,
    /// Whom decoys keep out, on every seed.
    pub(crate) decoys: Vec<Caught>,
    /// What records cost on the wire, on every seed.
    pub(crate) traffic: Vec<Traffic>,
    /// How exact merge rules are, on every seed.
    pub(crate) exactness: Vec<Exactness>,
}

/// A column: heading, value of an arm, decimals.
pub(crate) type Column = (&'static str, fn(&Scores) -> Option<f64>);

/// Columns of the table.
pub(crate) const COLUMNS: [Column; 5] = [
    ("bits, union", |scores| Some(scores.union())),
    ("facts", |scores| scores.facts().rate()),
    ("rule, private", |scores| scores.rules[0].rate()),
    ("rule, public only", |scores| scores.rules[1].rate()),
    ("rule, nowhere", |scores| scores.rules[2].rate()),
];

impl Row {
    /// One line for who waits.
    pub(crate) fn line(&self) -> String {
        let label = named(&self.arm).map_or(self.arm.as_str(), |arm| arm.label);
        let cells: Vec<String> = COLUMNS
            .iter()
            .map(|(_, of)| of(&self.scores).map_or_else(|| "-".to_owned(), |v| format!("{v:.3}")))
            .collect();
        format!("           {label:<32}{}", cells.join("  "))
    }
}

impl Outcome {
    /// Regimes in which anything ran, ascending.
    pub(crate) fn regimes(&self) -> Vec<Regime> {
        let mut regimes: Vec<Regime> = self.rows.iter().map(|row| row.regime).collect();
        regimes.sort_unstable();
        regimes.dedup();
        regimes
    }

    /// A column of an arm in a regime, over the seeds.
    pub(crate) fn spread(&self, arm: &str, regime: Regime, column: &Column) -> Option<Spread> {
        let rows = self
            .rows
            .iter()
            .filter(|row| row.arm == arm && row.regime == regime);
        Spread::of(rows.map(|row| (column.1)(&row.scores)))
    }
}

/// The table of each regime and the pass lines, for a terminal.
pub(crate) fn render(outcome: &Outcome) -> String {
    let mut text = String::new();
    for regime in outcome.regimes() {
        let _ = write!(
            text,
            "\n{}; {} steps per arm; mean (least to most) over the seeds; * ours, + ours in another form\n{:<32}",
            regime.label(),
            outcome.steps,
            "arm"
        );
        for (heading, _) in COLUMNS {
            let _ = write!(text, "{heading:>22}");
        }
        text.push('\n');
        for arm in ARMS {
            let cells: Vec<Option<Spread>> = COLUMNS
                .iter()
                .map(|column| outcome.spread(arm.id, regime, column))
                .collect();
            if cells.iter().all(Option::is_none) {
                continue;
            }
            let mark = match arm.role {
                Role::Ours => "*",
                Role::Variant => "+",
                _ => "",
            };
            let _ = write!(text, "{:<32}", format!("{}{mark}", arm.label));
            for cell in cells {
                let _ = write!(text, "{:>22}", cell.map_or_else(|| "-".to_owned(), show));
            }
            text.push('\n');
        }
    }
    attacks(&mut text, outcome);
    text.push_str("\nPromises\n");
    for line in &outcome.lines {
        let verdict = match line.holds {
            Some(true) => "holds",
            Some(false) => "FAILS",
            None => "not run",
        };
        let _ = writeln!(text, "{verdict:<9}{} {}", line.promise, line.found);
    }
    text
}

/// Costs of attacks.
fn attacks(text: &mut String, outcome: &Outcome) {
    for costs in costs::tables(outcome) {
        let _ = write!(
            text,
            "\n{}\n{}\n{:<42}",
            costs.heading, costs.note, "attack"
        );
        for column in costs.columns {
            let _ = write!(text, "{column:>18}");
        }
        text.push('\n');
        for (label, cells) in costs.rows {
            let _ = write!(text, "{label:<42}");
            for cell in cells {
                let _ = write!(text, "{cell:>18}");
            }
            text.push('\n');
        }
    }
}

/// Mean and range.
pub(crate) fn show(spread: Spread) -> String {
    format!("{:.3} ({:.3}-{:.3})", spread.mean, spread.min, spread.max)
}
