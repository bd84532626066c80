//! Text that several tests train tokenizers on and ask about.

/// Forty lines of one form.
pub(crate) fn lines() -> Vec<String> {
    let words = ["dolin", "merak", "tamu", "sirel", "kavo"];
    (0..40)
        .map(|i| {
            format!(
                "ref {}-{i} -> use {} {}0mg.",
                words[i % 5],
                words[i / 5 % 5],
                i % 4
            )
        })
        .collect()
}
