//! What attacks cost, as tables of words: one for records, one for adapters.

use crate::adapters::DEFENCES;
use crate::attacks::{AttackRow, RULES};
use crate::table::Outcome;

/// A table of words.
#[derive(Debug)]
pub(crate) struct Costs {
    /// What it shows.
    pub(crate) heading: &'static str,
    /// How to read it.
    pub(crate) note: &'static str,
    /// Rules or defences.
    pub(crate) columns: Vec<&'static str>,
    /// An attack and its cost under each, the mean over the seeds in per cent.
    pub(crate) rows: Vec<(String, Vec<String>)>,
}

/// The tables that were measured.
pub(crate) fn tables(outcome: &Outcome) -> Vec<Costs> {
    [records(outcome), adapters(outcome)]
        .into_iter()
        .filter(|costs| !costs.rows.is_empty())
        .collect()
}

fn records(outcome: &Outcome) -> Costs {
    let labels = outcome.attacks.iter().map(AttackRow::label);
    let rows = distinct(labels)
        .into_iter()
        .map(|label| {
            let of = outcome.attacks.iter().filter(|row| row.label() == label);
            let costs = (0..RULES.len()).map(|rule| {
                let costs = of.clone().filter_map(|row| row.cost_permille.get(rule));
                percent(costs.map(|permille| permille / 1000.0))
            });
            (label.clone(), costs.collect())
        })
        .collect();
    Costs {
        heading: "Records: one of five institutions lies",
        note: "bits more than without it, in per cent; in the row \"none\" than the default rule, where nobody lies",
        columns: RULES.to_vec(),
        rows,
    }
}

fn adapters(outcome: &Outcome) -> Costs {
    let all = &outcome.adapter_attacks;
    let rows = distinct(all.iter().map(|row| row.cell.attack.clone()))
        .into_iter()
        .map(|attack| {
            let costs = DEFENCES.iter().map(|(_, defence)| {
                let of = all
                    .iter()
                    .filter(|row| row.cell.attack == attack && row.cell.defence == defence.name());
                if of.clone().any(|row| row.cell.refused.is_some()) {
                    "refused".to_owned()
                } else {
                    percent(of.filter_map(|row| row.cell.cost))
                }
            });
            (attack.clone(), costs.collect())
        })
        .collect();
    Costs {
        heading: "Adapters: one of five institutions lies",
        note: "bits more than with the honest alone and without a defence, in per cent; merge rule product, the fourth inner round",
        columns: DEFENCES.iter().map(|(_, defence)| defence.name()).collect(),
        rows,
    }
}

fn distinct(names: impl Iterator<Item = String>) -> Vec<String> {
    names.fold(Vec::new(), |mut known, name| {
        if !known.contains(&name) {
            known.push(name);
        }
        known
    })
}

/// The mean of shares, in per cent.
fn percent(shares: impl Iterator<Item = f64>) -> String {
    let (sum, count) = shares.fold((0.0, 0), |(sum, count), share| (sum + share, count + 1));
    if count == 0 {
        return "-".to_owned();
    }
    format!("{:.1}", 100.0 * sum / f64::from(count))
}
