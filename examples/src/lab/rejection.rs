//! Why a round ended without a release, in words and with the figures that decided.

use std::fmt::Write as _;

use consilium_aggregator::release::{Baseline, Verdict};
use consilium_protocol::InstitutionId;
use consilium_protocol::event::Reason;

/// One sentence without a full stop. `verdict` are the figures of the gate, where it came to one.
#[must_use]
pub fn in_words(reason: Reason, blamed: &[InstitutionId], verdict: &Verdict) -> String {
    let names: Vec<&str> = blamed.iter().map(InstitutionId::as_str).collect();
    let mut words = match reason {
        Reason::Gate => beyond_the_bound(verdict),
        Reason::NoGain => {
            let baseline = match verdict.baseline {
                Baseline::Pivot => "the pivot's",
                Baseline::LastRelease => "the last release's",
            };
            format!(
                "the gate rejected the candidate: on the sites' private holdouts it takes {:.4} bits per byte in the mean, \
                 which is not below {baseline} {:.4}",
                verdict.compared_mean, verdict.baseline_mean
            )
        }
        Reason::Quorum => "too few members answered before a deadline".to_owned(),
        Reason::Operator => "the operator ended the round".to_owned(),
        Reason::Screening => {
            "screening kept so many sources out that the quorum is missed".to_owned()
        }
        Reason::PublicGate => {
            "on the public holdout the fusion is better without one member".to_owned()
        }
    };
    if !names.is_empty() {
        let _ = write!(words, ": {}", names.join(", "));
    }
    words
}

fn beyond_the_bound(verdict: &Verdict) -> String {
    let sites = verdict.sites.iter().filter(|site| !site.within_bound);
    let sites: Vec<String> = sites
        .map(|site| {
            format!(
                "{} measures {:.4} bits per byte on its private holdout, {:.0} thousandths above its own best of {:.4}",
                site.institution,
                site.evaluation.candidate.bits_per_byte,
                site.change_permille,
                site.own_best
            )
        })
        .collect();
    format!(
        "the gate rejected the candidate: {}; the charter allows {}",
        sites.join("; "),
        verdict.bound_permille
    )
}

#[cfg(test)]
mod tests {
    use consilium_aggregator::release::judge;
    use consilium_protocol::ConsortiumId;
    use consilium_protocol::charter::Charter;
    use consilium_protocol::evaluation::{Evaluation, Score};

    use super::*;

    fn words(candidate: [f64; 2]) -> String {
        let charter = Charter {
            consortium: ConsortiumId::new("test").unwrap(),
            log_key: String::new(),
            modes: Vec::new(),
            quorum: 1,
            max_symbols: 16,
            gate_bound_permille: 100,
            members: Vec::new(),
        };
        let score = |bits_per_byte| Score {
            bits_per_byte,
            accuracy: None,
        };
        let names = ["bank", "clinic"].map(|name| InstitutionId::new(name).unwrap());
        let evaluations: Vec<_> = names
            .into_iter()
            .zip(candidate)
            .map(|(name, candidate)| {
                let evaluation = Evaluation {
                    candidate: score(candidate),
                    pivot: score(2.0),
                    source: Some(score(1.0)),
                };
                (name, evaluation)
            })
            .collect();
        let verdict = judge(&charter, &evaluations, &[]);
        in_words(verdict.rejected.expect("a rejection"), &[], &verdict)
    }

    #[test]
    fn the_words_name_the_site_beyond_the_bound_and_every_figure() {
        let words = words([1.5, 1.05]);
        for part in ["bank", "1.5000", "500 thousandths", "1.0000", "allows 100"] {
            assert!(words.contains(part), "{part}: {words}");
        }
        assert!(!words.contains("clinic"), "{words}");
    }

    #[test]
    fn no_gain_is_told_with_both_means() {
        let verdict = Verdict {
            rejected: Some(Reason::NoGain),
            bound_permille: 100,
            candidate_mean: 1.25,
            compared_mean: 1.25,
            baseline_mean: 1.2,
            baseline: Baseline::Pivot,
            sites: Vec::new(),
        };
        let words = in_words(Reason::NoGain, &[], &verdict);
        assert!(
            words.contains("1.2500") && words.contains("the pivot's 1.2000"),
            "{words}"
        );
        let blamed = [InstitutionId::new("bank").unwrap()];
        let words = in_words(Reason::PublicGate, &blamed, &verdict);
        assert!(words.ends_with(": bank"), "{words}");
    }
}
