//! The comparison as one page: no script, no request.

use std::fmt::Write as _;

use crate::Regime;
use crate::arms::{ARMS, Role};
use crate::costs;
use crate::table::{COLUMNS, Column, Outcome, show};

const STYLE: &str = "body{font:15px/1.5 system-ui,sans-serif;max-width:72rem;margin:2rem auto;padding:0 1rem;\
color-scheme:light dark}table{border-collapse:collapse;width:100%}th,td{text-align:right;padding:.25rem .6rem;\
border-bottom:1px solid #8884}th:first-child,td:first-child{text-align:left}.bar{display:inline-block;height:.7rem;\
background:#888;vertical-align:middle}.ours .bar{background:#0a7d5a}.bound .bar,.control .bar{background:#c9a227}\
.chart td{border:0}.fails{color:#b00020;font-weight:600}small{opacity:.75}";

/// The page.
pub(crate) fn render(outcome: &Outcome) -> String {
    let mut page = format!(
        "<!doctype html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n\
         <meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\n\
         <meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">\n\
         <title>Consilium: fusion methods side by side</title>\n<style>{STYLE}</style>\n</head>\n<body>\n\
         <h1>Fusion methods side by side</h1>\n<p>Same pivot, same {} steps, same public text for every arm. Bits per byte on \
         fresh text of all domains: less is better. Facts: one of twelve answers, chance .083. Bars show the mean over the \
         seeds.</p>\n",
        outcome.steps
    );
    for regime in outcome.regimes() {
        let _ = writeln!(page, "<h2>{}</h2>", regime.label());
        for column in &COLUMNS[..2] {
            chart(&mut page, outcome, regime, column);
        }
        table(&mut page, outcome, regime);
    }
    attacks(&mut page, outcome);
    page.push_str("<h2>Promises</h2>\n<table>\n");
    for line in &outcome.lines {
        let (class, verdict) = match line.holds {
            Some(true) => ("", "holds"),
            Some(false) => ("fails", "fails"),
            None => ("", "not run"),
        };
        let _ = writeln!(
            page,
            "<tr class=\"{class}\"><td>{}</td><td>{verdict}</td><td>{}</td></tr>",
            line.promise, line.found
        );
    }
    let _ = write!(
        page,
        "</table>\n<footer><p><small>Made by <code>{}</code>; the same numbers are in <code>arena.json</code>.</small></p>\
         </footer>\n</body>\n</html>\n",
        outcome.command
    );
    page
}

/// What each attack costs.
fn attacks(page: &mut String, outcome: &Outcome) {
    for costs in costs::tables(outcome) {
        let _ = write!(
            page,
            "<h2>{}</h2>\n<p>{}</p>\n<table>\n<tr><th>attack</th>",
            costs.heading, costs.note
        );
        for column in costs.columns {
            let _ = write!(page, "<th>{column}</th>");
        }
        page.push_str("</tr>\n");
        for (label, cells) in costs.rows {
            let _ = write!(page, "<tr><td>{label}</td>");
            for cell in cells {
                let _ = write!(page, "<td>{cell}</td>");
            }
            page.push_str("</tr>\n");
        }
        page.push_str("</table>\n");
    }
}

fn class(role: Role) -> &'static str {
    match role {
        Role::Ours => "ours",
        Role::Bound => "bound",
        Role::Control => "control",
        Role::Source | Role::Baseline | Role::Method | Role::Variant | Role::Private => "",
    }
}

/// Bars of one column, all arms that ran.
fn chart(page: &mut String, outcome: &Outcome, regime: Regime, column: &Column) {
    let values: Vec<_> = ARMS
        .iter()
        .filter_map(|arm| Some((arm, outcome.spread(arm.id, regime, column)?)))
        .collect();
    let most = values
        .iter()
        .map(|(_, spread)| spread.mean)
        .fold(f64::MIN_POSITIVE, f64::max);
    let _ = writeln!(page, "<h3>{}</h3>\n<table class=\"chart\">", column.0);
    for (arm, spread) in values {
        let _ = writeln!(
            page,
            "<tr class=\"{}\"><td>{}</td><td style=\"width:60%;text-align:left\"><span class=\"bar\" \
             style=\"width:{:.1}%\"></span> {:.3}</td></tr>",
            class(arm.role),
            arm.label,
            85.0 * spread.mean / most,
            spread.mean
        );
    }
    page.push_str("</table>\n");
}

fn table(page: &mut String, outcome: &Outcome, regime: Regime) {
    page.push_str("<table>\n<tr><th>arm</th>");
    for (heading, _) in COLUMNS {
        let _ = write!(page, "<th>{heading}</th>");
    }
    page.push_str("</tr>\n");
    for arm in ARMS {
        let cells: Vec<_> = COLUMNS
            .iter()
            .map(|column| outcome.spread(arm.id, regime, column))
            .collect();
        if cells.iter().all(Option::is_none) {
            continue;
        }
        let _ = write!(
            page,
            "<tr class=\"{}\"><td>{}<br><small>{}</small></td>",
            class(arm.role),
            arm.label,
            arm.origin
        );
        for cell in cells {
            let _ = write!(
                page,
                "<td>{}</td>",
                cell.map_or_else(|| "-".to_owned(), show)
            );
        }
        page.push_str("</tr>\n");
    }
    page.push_str("</table>\n");
}
