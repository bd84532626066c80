//! The report as one page: no script, no request, readable on paper and in the dark.

use std::fmt::Write as _;

use super::{
    Arm, Metric, RULE_NOTE, Report, SeedReport, Spread, bars,
    figures::{Figure, Table, learned, run},
    format::{NONE, escape, or_none, three, two},
    recovered,
};

type Tile = (&'static str, Vec<Option<f64>>, fn(f64) -> String);

const STYLE: &str = include_str!("style.css");

const NOTES: &str = "<h2>How to read this</h2>
<dl>
<dt>Bits per byte</dt><dd>Negative log-likelihood of fresh text over its bytes, the end of a line counted as one byte. It does not depend on the tokenizer. Union is the mean of the three domains.</dd>
<dt>SFT</dt><dd>The same pivot and adapters, trained on the labels of the same public text. Its answers are random: this arm shows what the text alone can teach.</dd>
<dt>Centralised</dt><dd>The same pivot and adapters on all private text in one place, which no consortium may do: the bound of bits and facts.</dd>
<dt>Recovered</dt><dd>Share of the way from SFT to centralised training. 0 is no better than SFT, 1 is the bound.</dd>
<dt>Permuted</dt><dd>The same round with records dealt to the wrong items. It must learn nothing: what is gained comes from the records, not from the pipeline.</dd>
<dt>Bars and dots</dt><dd>With one seed, a bar is its value and the line on it the 95 % interval of the count behind it (Wilson). With several, a bar is the mean and each dot is one seed.</dd>
</dl>";

pub(super) fn render(report: &Report) -> String {
    let mut page = String::from(
        "<!doctype html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n\
         <meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\n\
         <meta name=\"color-scheme\" content=\"light dark\">\n\
         <meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">\n\
         <title>Consilium: three institutions, one pivot</title>\n<style>\n",
    );
    page.push_str(STYLE);
    page.push_str("</style>\n</head>\n<body>\n<main>\n");
    header(&mut page, report);
    promises(&mut page, report);
    section(&mut page, "What the pivot learned", &learned(report));
    section(&mut page, "How the round went", &run(report));
    page.push_str("<section>\n<h2>Every number</h2>\n");
    if report.seeds.len() > 1 {
        all_seeds(&mut page, report);
    }
    for seed in &report.seeds {
        one_seed(&mut page, seed);
    }
    let _ = write!(
        page,
        "<p>{} {}</p>\n</section>\n<section class=\"notes\">\n{NOTES}\n</section>\n",
        escape(&report.training),
        escape(RULE_NOTE)
    );
    let _ = writeln!(
        page,
        "<footer>Made by <code>{}</code>. The same numbers are in <code>report.json</code>.</footer>",
        escape(&report.command)
    );
    page.push_str("</main>\n</body>\n</html>\n");
    page
}

fn header(page: &mut String, report: &Report) {
    let all: Vec<bool> = report
        .seeds
        .iter()
        .flat_map(bars)
        .map(|bar| bar.pass)
        .collect();
    let failed = all.iter().filter(|&&pass| !pass).count();
    let seeds: Vec<String> = report
        .seeds
        .iter()
        .map(|seed| seed.seed.to_string())
        .collect();
    let seeds = format!(
        "seed{} {}",
        if seeds.len() == 1 { "" } else { "s" },
        seeds.join(", ")
    );
    let (class, verdict) = if report.passed() {
        ("holds", format!("All {} bars hold, {seeds}", all.len()))
    } else {
        (
            "fails",
            format!("{failed} of {} bars fail, {seeds}", all.len()),
        )
    };
    let notices = report.seeds.iter().filter_map(|seed| {
        let notice = escape(&seed.notice()?);
        Some(format!(
            "<p class=\"verdict fails\">Seed {}: {notice}</p>\n",
            seed.seed
        ))
    });
    let notices: String = notices.collect();
    let _ = write!(
        page,
        "<header>\n<p class=\"brand\">Consilium</p>\n<h1>Three institutions, one pivot</h1>\n\
         <p class=\"lead\">A clinic, a bank and an insurer trained at home and sent next-byte records of public text. \
         Its answers are random, so whatever is true below reached the pivot through records alone.</p>\n\
         <p class=\"verdict {class}\">{verdict}</p>\n{notices}"
    );
    page.push_str("<ul class=\"key\">\n");
    let gain = |seed: &SeedReport| {
        let [fused, sft] = [Arm::Fused, Arm::Sft].map(|arm| seed.value(arm, Metric::Union));
        Some(100.0 * (1.0 - fused? / sft?))
    };
    let facts = |seed: &SeedReport| seed.value(Arm::Fused, Metric::Facts);
    let tiles: [Tile; 4] = [
        (
            "fewer bits than SFT",
            report.seeds.iter().map(gain).collect(),
            |v| format!("{v:.1} %"),
        ),
        (
            "fact accuracy, chance 0.08",
            report.seeds.iter().map(facts).collect(),
            two,
        ),
        (
            "of the bits gap recovered",
            report.seeds.iter().map(|s| recovered(s).bits).collect(),
            two,
        ),
        (
            "of the facts gap recovered",
            report.seeds.iter().map(|s| recovered(s).facts).collect(),
            two,
        ),
    ];
    for (meaning, values, format) in tiles {
        let spread = Spread::of(values);
        let range = spread
            .filter(|_| report.seeds.len() > 1)
            .map(|s| format!("<small>{} to {}</small>", format(s.min), format(s.max)))
            .unwrap_or_default();
        let mean = or_none(spread.map(|s| s.mean), format);
        let _ = writeln!(page, "<li><b>{mean}</b>{range}<span>{meaning}</span></li>");
    }
    page.push_str("</ul>\n</header>\n");
}

fn promises(page: &mut String, report: &Report) {
    let seeds: Vec<_> = report.seeds.iter().map(bars).collect();
    let Some(first) = seeds.first() else { return };
    page.push_str("<section>\n<h2>Bars</h2>\n<div class=\"wide\"><table class=\"bars\">\n<thead><tr><th scope=\"col\">promise</th><th scope=\"col\">limit</th>");
    for seed in &report.seeds {
        let _ = write!(page, "<th scope=\"col\">seed {}</th>", seed.seed);
    }
    page.push_str("</tr></thead>\n<tbody>\n");
    for (at, bar) in first.iter().enumerate() {
        // The limit of one bar is another arm's value and differs between seeds.
        let same = seeds.iter().all(|bars| bars[at].limit == bar.limit);
        let limit = if same {
            or_none(bar.limit, bar.format())
        } else {
            "per seed".to_owned()
        };
        let _ = write!(
            page,
            "<tr><th scope=\"row\">{}</th><td>{} {limit}</td>",
            escape(bar.name),
            bar.sense.sign()
        );
        for bar in seeds.iter().map(|bars| &bars[at]) {
            let (class, word) = if bar.pass {
                ("holds", "holds")
            } else {
                ("fails", "fails")
            };
            let own = if same {
                String::new()
            } else {
                format!(" {} {}", bar.sense.sign(), or_none(bar.limit, bar.format()))
            };
            let value = or_none(bar.value, bar.format());
            let _ = write!(
                page,
                "<td>{value}{own} <em class=\"{class}\">{word}</em></td>"
            );
        }
        page.push_str("</tr>\n");
    }
    page.push_str("</tbody>\n</table></div>\n</section>\n");
}

fn section(page: &mut String, title: &str, figures: &[Figure]) {
    let _ = writeln!(page, "<section>\n<h2>{title}</h2>");
    for figure in figures {
        let _ = write!(
            page,
            "<figure>\n<h3>{}</h3>\n<figcaption>{}</figcaption>\n<div class=\"pair\">\n<div class=\"wide\">{}</div>\n",
            escape(figure.title),
            escape(&figure.caption),
            figure.svg
        );
        numbers(page, figure.title, &figure.table);
        page.push_str("</div>\n</figure>\n");
    }
    page.push_str("</section>\n");
}

fn numbers(page: &mut String, title: &str, table: &Table) {
    let _ = write!(
        page,
        "<div class=\"wide\"><table>\n<caption>{} in numbers</caption>\n<thead><tr>",
        escape(title)
    );
    for head in &table.head {
        match head.as_str() {
            "" => page.push_str("<td></td>"),
            head => _ = write!(page, "<th scope=\"col\">{}</th>", escape(head)),
        }
    }
    page.push_str("</tr></thead>\n<tbody>\n");
    for row in &table.rows {
        page.push_str("<tr>");
        for (at, cell) in row.iter().enumerate() {
            let cell = escape(cell);
            let _ = if at == 0 {
                write!(page, "<th scope=\"row\">{cell}</th>")
            } else {
                write!(page, "<td>{cell}</td>")
            };
        }
        page.push_str("</tr>\n");
    }
    page.push_str("</tbody>\n</table></div>\n");
}

fn all_seeds(page: &mut String, report: &Report) {
    arms(
        page,
        "All seeds: mean, lowest to highest",
        &Arm::label,
        &|arm, metric| {
            let format = if metric.is_bits() { three } else { two };
            report.spread(arm, metric).map_or_else(
                || NONE.to_owned(),
                |s| {
                    let (mean, min, max) = (format(s.mean), format(s.min), format(s.max));
                    format!("{mean}<small>{min} to {max}</small>")
                },
            )
        },
    );
}

fn one_seed(page: &mut String, seed: &SeedReport) {
    arms(
        page,
        &format!("Seed {}", seed.seed),
        &|arm| seed.label(arm),
        &|arm, metric| {
            or_none(
                seed.value(arm, metric),
                if metric.is_bits() { three } else { two },
            )
        },
    );
    let found = recovered(seed);
    let _ = writeln!(
        page,
        "<p>Recovered of the gap from SFT to centralised training: bits {}, facts {}.</p>",
        or_none(found.bits, two),
        or_none(found.facts, two)
    );
}

fn arms(
    page: &mut String,
    caption: &str,
    label: &dyn Fn(Arm) -> &'static str,
    cell: &dyn Fn(Arm, Metric) -> String,
) {
    let _ = write!(
        page,
        "<div class=\"wide\"><table class=\"arms\">\n<caption>{}</caption>\n<thead>\n<tr><td></td>\
         <th scope=\"colgroup\" colspan=\"4\">bits per byte</th><th scope=\"colgroup\" colspan=\"3\">fact accuracy</th>\
         <th scope=\"colgroup\" colspan=\"3\">rule accuracy</th></tr>\n<tr><th scope=\"col\">arm</th>",
        escape(caption)
    );
    for metric in Metric::ALL {
        let _ = write!(page, "<th scope=\"col\">{}</th>", metric.label());
    }
    page.push_str("</tr>\n</thead>\n<tbody>\n");
    for arm in Arm::ALL {
        let class = if arm == Arm::Fused {
            " class=\"strong\""
        } else {
            ""
        };
        let _ = write!(
            page,
            "<tr{class}><th scope=\"row\">{}</th>",
            escape(label(arm))
        );
        for metric in Metric::ALL {
            let _ = write!(page, "<td>{}</td>", cell(arm, metric));
        }
        page.push_str("</tr>\n");
    }
    page.push_str("</tbody>\n</table></div>\n");
}
