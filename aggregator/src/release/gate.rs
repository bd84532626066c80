//! The gate: what the sites measured on their private holdouts decides whether a candidate is published.
//!
//! Two conditions, both on bits per byte. No site may fare worse than with the best model it has without the release,
//! by more than the charter's bound: that is the lower of its own source and the pivot, each on its own holdout, or the
//! pivot alone where the site could not measure its source (one behind a server is shown no private text). The
//! source is usually the best there, and a shared pivot somewhat worse on each single domain; the bound says how much of
//! that the members accept. And the plain mean over the sites must be lower than that of the last release on the same
//! holdouts, or of the pivot where there is none.
//!
//! What the last release scored is what the sites measured in its round, when it was the candidate. A site's old figure
//! counts only as long as its pivot figure stays what it was: the pivot is the same, so another figure means another
//! holdout.

use consilium_protocol::InstitutionId;
use consilium_protocol::charter::Charter;
use consilium_protocol::evaluation::Evaluation;
use consilium_protocol::event::Reason;
use serde::Serialize;

/// Largest change of a site's pivot figure, relative, that is still the same holdout: another machine or another number of
/// threads moves it less.
const SAME_HOLDOUT: f64 = 1e-3;

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
    /// The lower of source, if it was measured, and pivot, in bits per byte.
    pub own_best: f64,
    /// Candidate relative to that, in thousandths; negative is better.
    pub change_permille: f64,
    /// Whether that is within the bound.
    pub within_bound: bool,
    /// Bits per byte of the last release on the same holdout, where it was measured.
    pub last_release: Option<f64>,
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
    /// The same over those sites alone that the baseline was measured at.
    pub compared_mean: f64,
    /// Mean bits per byte that this had to beat.
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

/// Decides about a candidate. `before` are the evaluations of the last release in its own round, empty if there is none.
/// Sums run in the order of the institutions. A number that is not finite never passes.
#[must_use]
pub fn judge(
    charter: &Charter,
    evaluations: &[(InstitutionId, Evaluation)],
    before: &[(InstitutionId, Evaluation)],
) -> Verdict {
    let bound = 1.0 + f64::from(charter.gate_bound_permille) / 1000.0;
    let mut sites: Vec<_> = evaluations
        .iter()
        .map(|(institution, evaluation)| {
            let then = before.iter().find(|(who, _)| who == institution);
            site(institution, evaluation, then.map(|(_, then)| then), bound)
        })
        .collect();
    sites.sort_by(|a, b| a.institution.cmp(&b.institution));
    let candidate = |site: &SiteVerdict| site.evaluation.candidate.bits_per_byte;
    let candidate_mean = mean(sites.iter().map(candidate)).unwrap_or(0.0);
    let compared = sites.iter().filter(|site| site.last_release.is_some());
    let last = mean(sites.iter().filter_map(|site| site.last_release));
    let (baseline, compared_mean, baseline_mean) = match (mean(compared.map(candidate)), last) {
        (Some(compared), Some(last)) => (Baseline::LastRelease, compared, last),
        _ => {
            let pivots = sites.iter().map(|site| site.evaluation.pivot.bits_per_byte);
            (Baseline::Pivot, candidate_mean, mean(pivots).unwrap_or(0.0))
        }
    };
    let rejected = if sites.is_empty() {
        Some(Reason::Quorum)
    } else if !sites.iter().all(|site| site.within_bound) {
        Some(Reason::Gate)
    } else if compared_mean < baseline_mean {
        None
    } else {
        Some(Reason::NoGain)
    };
    Verdict {
        rejected,
        bound_permille: charter.gate_bound_permille,
        candidate_mean,
        compared_mean,
        baseline_mean,
        baseline,
        sites,
    }
}

fn site(
    institution: &InstitutionId,
    evaluation: &Evaluation,
    then: Option<&Evaluation>,
    bound: f64,
) -> SiteVerdict {
    let candidate = evaluation.candidate.bits_per_byte;
    let pivot = evaluation.pivot.bits_per_byte;
    let source = evaluation.source.map(|score| score.bits_per_byte);
    let own_best = source.map_or(pivot, |source| source.min(pivot));
    let is_same =
        |then: &&Evaluation| (then.pivot.bits_per_byte - pivot).abs() <= SAME_HOLDOUT * pivot;
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
        last_release: then
            .filter(is_same)
            .map(|then| then.candidate.bits_per_byte),
    }
}

fn mean(values: impl Iterator<Item = f64>) -> Option<f64> {
    let (count, sum) = values.fold((0_u32, 0.0), |(count, sum), value| (count + 1, sum + value));
    (count > 0).then(|| sum / f64::from(count))
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
            source: Some(score(source)),
        };
        (InstitutionId::new(name).unwrap(), evaluation)
    }

    #[test]
    fn a_site_whose_source_was_not_measured_is_held_to_the_pivot() {
        let (name, mut evaluation) = site("a", 0.95, 0.9, 0.5);
        evaluation.source = None;
        let verdict = judge(&charter(100), &[(name, evaluation)], &[]);
        assert!((verdict.sites[0].own_best - 0.9).abs() < 1e-12);
        assert!(
            verdict.sites[0].within_bound,
            "0.95 is within ten per cent of 0.9"
        );
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
                vec![],
                None,
            ),
            (
                "just at the bound",
                250,
                vec![site("a", 0.625, 0.9, 0.5)],
                vec![],
                None,
            ),
            (
                "one site beyond the bound",
                99,
                better.clone(),
                vec![],
                Some(Gate),
            ),
            (
                "a source worse than the pivot does not loosen the bound",
                0,
                vec![site("a", 0.95, 0.9, 2.0)],
                vec![],
                Some(Gate),
            ),
            (
                "no better than the pivot",
                1000,
                vec![site("a", 0.9, 0.9, 0.8)],
                vec![],
                Some(NoGain),
            ),
            (
                "better than the last release",
                100,
                better.clone(),
                vec![site("a", 0.602, 0.9, 0.6), site("b", 0.55, 0.9, 0.5)],
                None,
            ),
            (
                "no better than the last release",
                100,
                better.clone(),
                vec![site("a", 0.609, 0.9, 0.6), site("b", 0.54, 0.9, 0.5)],
                Some(NoGain),
            ),
            (
                "worse than the last release at the one site that was there",
                100,
                better.clone(),
                vec![site("b", 0.54, 0.9, 0.5), site("c", 2.0, 0.9, 0.5)],
                Some(NoGain),
            ),
            (
                "the last release was measured on other holdouts",
                100,
                better,
                vec![site("a", 0.1, 0.8, 0.6), site("b", 0.1, 1.0, 0.5)],
                None,
            ),
            ("nobody measured", 100, vec![], vec![], Some(Quorum)),
            (
                "not a number",
                100,
                vec![site("a", f64::NAN, 0.9, 0.5)],
                vec![],
                Some(Gate),
            ),
        ];
        for (case, bound, evaluations, before, expected) in cases {
            let verdict = judge(&charter(bound), &evaluations, &before);
            assert_eq!(verdict.rejected, expected, "{case}: {verdict:?}");
        }
    }

    #[test]
    fn the_verdict_shows_every_number() {
        let evaluations = [site("b", 0.55, 0.9, 0.5), site("a", 0.6, 0.9, 1.2)];
        let verdict = judge(&charter(100), &evaluations, &[]);
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
