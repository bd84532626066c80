//! The gate: what the sites measured on their private holdouts decides whether a candidate is published.
//!
//! Two conditions, both on bits per byte. No site may fare worse than with the best model it has without the release,
//! by more than the charter's bound: that is the lower of its own source and the pivot, each on its own holdout. The
//! source is usually the best there, and a shared pivot somewhat worse on each single domain; the bound says how much of
//! that the members accept. And the plain mean over the sites must be lower than that of the last release on the same
//! holdouts, or of the pivot where there is none.

use consilium_protocol::InstitutionId;
use consilium_protocol::charter::Charter;
use consilium_protocol::evaluation::Evaluation;
use consilium_protocol::event::Reason;
use serde::Serialize;

/// What the candidate's mean is compared with.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Baseline {
    /// The pivot before the round.
    Pivot,
    /// The last release.
    LastRelease,
}

/// The numbers of one site.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct SiteVerdict {
    /// Who.
    pub institution: InstitutionId,
    /// What it measured.
    pub evaluation: Evaluation,
    /// The lower of source and pivot, in bits per byte.
    pub own_best: f64,
    /// Candidate relative to that, in thousandths; negative is better.
    pub change_permille: f64,
    /// Whether that is within the bound.
    pub within_bound: bool,
}

/// The decision with every number that led to it.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Verdict {
    /// Why the candidate is rejected; `None` when it is to be released.
    pub rejected: Option<Reason>,
    /// The charter's bound, in thousandths.
    pub bound_permille: u32,
    /// Mean bits per byte of the candidate over the sites.
    pub candidate_mean: f64,
    /// Mean bits per byte that it had to beat.
    pub baseline_mean: f64,
    /// Whose mean that is.
    pub baseline: Baseline,
    /// The sites, ascending.
    pub sites: Vec<SiteVerdict>,
}

impl Verdict {
    /// Whether the candidate is to be released.
    #[must_use]
    pub const fn passed(&self) -> bool {
        self.rejected.is_none()
    }
}

/// Decides about a candidate. `previous` is the mean bits per byte of the last release on the same holdouts, if there is
/// one. Sums run in the order of the institutions. A number that is not finite never passes.
#[must_use]
pub fn judge(
    charter: &Charter,
    evaluations: &[(InstitutionId, Evaluation)],
    previous: Option<f64>,
) -> Verdict {
    let bound = 1.0 + f64::from(charter.gate_bound_permille) / 1000.0;
    let mut sites: Vec<_> = evaluations
        .iter()
        .map(|(institution, evaluation)| {
            let candidate = evaluation.candidate.bits_per_byte;
            let own_best = evaluation
                .source
                .bits_per_byte
                .min(evaluation.pivot.bits_per_byte);
            SiteVerdict {
                institution: institution.clone(),
                evaluation: *evaluation,
                own_best,
                change_permille: if own_best > 0.0 {
                    (candidate / own_best - 1.0) * 1000.0
                } else {
                    0.0
                },
                within_bound: candidate <= own_best * bound,
            }
        })
        .collect();
    sites.sort_by(|a, b| a.institution.cmp(&b.institution));
    let mean = |number: fn(&Evaluation) -> f64| {
        let sum: f64 = sites.iter().map(|site| number(&site.evaluation)).sum();
        sum / sites.len().max(1) as f64
    };
    let candidate_mean = mean(|evaluation| evaluation.candidate.bits_per_byte);
    let (baseline, baseline_mean) = match previous {
        Some(previous) => (Baseline::LastRelease, previous),
        None => (
            Baseline::Pivot,
            mean(|evaluation| evaluation.pivot.bits_per_byte),
        ),
    };
    let rejected = if sites.is_empty() {
        Some(Reason::Quorum)
    } else if !sites.iter().all(|site| site.within_bound) {
        Some(Reason::Gate)
    } else if candidate_mean < baseline_mean {
        None
    } else {
        Some(Reason::NoGain)
    };
    Verdict {
        rejected,
        bound_permille: charter.gate_bound_permille,
        candidate_mean,
        baseline_mean,
        baseline,
        sites,
    }
}

#[cfg(test)]
mod tests {
    use consilium_protocol::ConsortiumId;
    use consilium_protocol::evaluation::Score;

    use super::*;

    fn charter(gate_bound_permille: u32) -> Charter {
        Charter {
            consortium: ConsortiumId::new("test").unwrap(),
            log_key: String::new(),
            modes: Vec::new(),
            quorum: 1,
            max_symbols: 16,
            gate_bound_permille,
            members: Vec::new(),
        }
    }

    fn site(name: &str, candidate: f64, pivot: f64, source: f64) -> (InstitutionId, Evaluation) {
        let score = |bits_per_byte| Score {
            bits_per_byte,
            accuracy: None,
        };
        let evaluation = Evaluation {
            candidate: score(candidate),
            pivot: score(pivot),
            source: score(source),
        };
        (InstitutionId::new(name).unwrap(), evaluation)
    }

    #[test]
    fn the_verdict_follows_bound_and_mean() {
        use Reason::{Gate, NoGain, Quorum};
        let better = vec![site("b", 0.55, 0.9, 0.5), site("a", 0.6, 0.9, 0.6)];
        let cases = [
            (
                "within ten per cent of each source",
                100,
                better.clone(),
                None,
                None,
            ),
            (
                "just at the bound",
                250,
                vec![site("a", 0.625, 0.9, 0.5)],
                None,
                None,
            ),
            (
                "one site beyond the bound",
                99,
                better.clone(),
                None,
                Some(Gate),
            ),
            (
                "a source worse than the pivot does not loosen the bound",
                0,
                vec![site("a", 0.95, 0.9, 2.0)],
                None,
                Some(Gate),
            ),
            (
                "no better than the pivot",
                1000,
                vec![site("a", 0.9, 0.9, 0.8)],
                None,
                Some(NoGain),
            ),
            (
                "better than the last release",
                100,
                better.clone(),
                Some(0.576),
                None,
            ),
            (
                "no better than the last release",
                100,
                better,
                Some(0.575),
                Some(NoGain),
            ),
            ("nobody measured", 100, vec![], None, Some(Quorum)),
            (
                "not a number",
                100,
                vec![site("a", f64::NAN, 0.9, 0.5)],
                None,
                Some(Gate),
            ),
        ];
        for (case, bound, evaluations, previous, expected) in cases {
            let verdict = judge(&charter(bound), &evaluations, previous);
            assert_eq!(verdict.rejected, expected, "{case}: {verdict:?}");
        }
    }

    #[test]
    fn the_verdict_shows_every_number() {
        let evaluations = [site("b", 0.55, 0.9, 0.5), site("a", 0.6, 0.9, 1.2)];
        let verdict = judge(&charter(100), &evaluations, None);
        let [a, b] = verdict.sites.as_slice() else {
            panic!("{verdict:?}")
        };
        assert_eq!((a.institution.as_str(), b.institution.as_str()), ("a", "b"));
        assert!((a.own_best - 0.9).abs() < 1e-12 && (b.own_best - 0.5).abs() < 1e-12);
        assert!((b.change_permille - 100.0).abs() < 1e-9 && a.change_permille < 0.0);
        assert!((verdict.candidate_mean - 0.575).abs() < 1e-12);
        assert!((verdict.baseline_mean - 0.9).abs() < 1e-12);
        assert_eq!(verdict.baseline, Baseline::Pivot);
        assert!(verdict.sites.iter().all(|site| site.within_bound));
    }
}
