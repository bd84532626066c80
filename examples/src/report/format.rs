//! Numbers as people read them.

/// What stands for a number that there is none of.
pub(super) const NONE: &str = "–";

/// Two decimals: accuracies, weights, fractions.
pub(super) fn two(value: f64) -> String {
    format!("{value:.2}")
}

/// Three decimals: bits per byte.
pub(super) fn three(value: f64) -> String {
    format!("{value:.3}")
}

/// Seconds, with a decimal while it matters.
pub(super) fn seconds(value: f64) -> String {
    if value < 10.0 {
        format!("{value:.1} s")
    } else {
        format!("{value:.0} s")
    }
}

/// A relative error in per cent.
pub(super) fn percent(value: f64) -> String {
    format!("{:.1} %", value * 100.0)
}

/// Decimal multiples of a byte, three significant digits.
pub(super) fn bytes(value: f64) -> String {
    let (scaled, unit) = [(1e9, "GB"), (1e6, "MB"), (1e3, "kB")]
        .into_iter()
        .find(|&(unit, _)| value >= 0.9995 * unit)
        .map_or((value, "B"), |(unit, name)| (value / unit, name));
    match scaled {
        _ if unit == "B" => format!("{value:.0} B"),
        tens if tens >= 99.95 => format!("{tens:.0} {unit}"),
        ones if ones >= 9.995 => format!("{ones:.1} {unit}"),
        small => format!("{small:.2} {unit}"),
    }
}

/// Text in lines of at most `width` characters, broken at blanks.
pub(super) fn wrapped(text: &str, width: usize) -> Vec<String> {
    let mut lines: Vec<String> = Vec::new();
    for word in text.split_whitespace() {
        match lines.last_mut() {
            Some(line) if line.chars().count() + 1 + word.chars().count() <= width => {
                line.push(' ');
                line.push_str(word);
            }
            _ => lines.push(word.to_owned()),
        }
    }
    lines
}

/// A number or the dash.
pub(super) fn or_none(value: Option<f64>, format: fn(f64) -> String) -> String {
    value.map_or_else(|| NONE.to_owned(), format)
}

/// Text for element content and quoted attributes.
pub(super) fn escape(text: &str) -> String {
    let mut safe = String::with_capacity(text.len());
    for letter in text.chars() {
        match letter {
            '&' => safe.push_str("&amp;"),
            '<' => safe.push_str("&lt;"),
            '>' => safe.push_str("&gt;"),
            '"' => safe.push_str("&quot;"),
            other => safe.push(other),
        }
    }
    safe
}
