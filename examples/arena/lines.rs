//! What the comparison is held to: every line on every seed, from the same rows that are written.

use consilium_examples::attacks::records::Attack;
use serde::{Deserialize, Serialize};

use crate::Regime;
use crate::adapters::{AdapterAttack, DEFENCES, Exactness};
use crate::arms::{ARMS, Arm, Role};
use crate::attacks::{AttackRow, RULES};
use crate::decoys::Caught;
use crate::table::{Outcome, Row};
use crate::traffic::Traffic;

/// A promise and what was found.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct Line {
    /// What must hold on every seed.
    pub(crate) promise: String,
    /// Whether it does; none where an arm that it needs was not run.
    pub(crate) holds: Option<bool>,
    /// The figures, per seed.
    pub(crate) found: String,
}

/// A figure of one seed and whether it is good enough; none where an arm is missing.
type Found = Option<(bool, String)>;

/// A promise and how a seed keeps it.
type Promise = (&'static str, fn(&Seed<'_>) -> Found);

/// Every line that these rows can decide.
pub(crate) fn check(outcome: &Outcome) -> Vec<Line> {
    let (rows, attacks) = (&outcome.rows, &outcome.attacks);
    let lines: [Promise; 10] = [
        ("ours: union bits at least 3 % below SFT", below_sft),
        ("ours: union bits below every source", below_sources),
        ("ours: facts at least .5, where chance is .083", facts),
        (
            "ours: recovers .35 of the bits and .5 of the facts",
            recovered,
        ),
        ("permuted records: facts at most .15", control),
        ("8 symbols: within 1 % of 64", narrow),
        ("50 draws: within 1 % of 64 symbols", drawn),
        ("uniform mean: worse than routing", mean),
        ("FedAvg of adapters: shown", fedavg),
        ("InfiFusion: fewer bits than plain ULD", infifusion),
    ];
    let seeds = seeds(rows);
    lines
        .iter()
        .map(|(promise, of)| {
            let found: Vec<Found> = seeds.iter().map(of).collect();
            let known: Vec<&(bool, String)> = found.iter().flatten().collect();
            Line {
                promise: (*promise).to_owned(),
                holds: (known.len() == seeds.len() && !seeds.is_empty())
                    .then(|| known.iter().all(|(holds, _)| *holds)),
                found: known
                    .iter()
                    .map(|(_, figure)| figure.as_str())
                    .collect::<Vec<_>>()
                    .join(", "),
            }
        })
        .chain([
            first(rows),
            unbeaten(rows),
            bounded(attacks),
            harmless(attacks),
            guarded(attacks),
            caught(&outcome.decoys),
            light(&outcome.traffic),
            exact(&outcome.exactness),
        ])
        .chain(defended(&outcome.adapter_attacks))
        .collect()
}

/// Rows of one seed in the regime of random answers, where a gain can come from nowhere but the records.
struct Seed<'a>(Vec<&'a Row>);

fn seeds(rows: &[Row]) -> Vec<Seed<'_>> {
    let of_regime = || rows.iter().filter(|row| row.regime == Regime::Random);
    let mut seeds: Vec<u64> = of_regime().map(|row| row.seed).collect();
    seeds.sort_unstable();
    seeds.dedup();
    seeds
        .into_iter()
        .map(|seed| Seed(of_regime().filter(|row| row.seed == seed).collect()))
        .collect()
}

impl Seed<'_> {
    fn row(&self, arm: &str) -> Option<&Row> {
        self.0.iter().copied().find(|row| row.arm == arm)
    }

    fn bits(&self, arm: &str) -> Option<f64> {
        Some(self.row(arm)?.scores.union())
    }

    fn facts(&self, arm: &str) -> Option<f64> {
        self.row(arm)?.scores.facts().rate()
    }

    /// Bits of an arm relative to those of another.
    fn ratio(&self, arm: &str, to: &str) -> Option<f64> {
        Some(self.bits(arm)? / self.bits(to)?)
    }
}

/// Name of the default among the arms.
const OURS: &str = "guarded";

fn below_sft(seed: &Seed<'_>) -> Found {
    let ratio = seed.ratio(OURS, "sft")?;
    Some((ratio <= 0.97, format!("{ratio:.3}")))
}

fn below_sources(seed: &Seed<'_>) -> Found {
    let sources = ARMS.iter().filter(|arm| arm.role == Role::Source);
    let best = sources
        .map(|arm| seed.bits(arm.id))
        .collect::<Option<Vec<_>>>()?
        .into_iter()
        .fold(f64::INFINITY, f64::min);
    let ours = seed.bits(OURS)?;
    Some((ours < best, format!("{ours:.3} against {best:.3}")))
}

fn facts(seed: &Seed<'_>) -> Found {
    let facts = seed.facts(OURS)?;
    Some((facts >= 0.5, format!("{facts:.3}")))
}

fn recovered(seed: &Seed<'_>) -> Found {
    let [sft, ours, bound] = ["sft", OURS, "centralised"].map(|arm| seed.row(arm));
    let (sft, ours, bound) = (sft?.scores, ours?.scores, bound?.scores);
    let bits = (sft.union() - ours.union()) / (sft.union() - bound.union());
    let rate = |scores: consilium_examples::report::Scores| scores.facts().rate();
    let facts = (rate(ours)? - rate(sft)?) / (rate(bound)? - rate(sft)?);
    Some((
        bits >= 0.35 && facts >= 0.5,
        format!("{bits:.2} and {facts:.2}"),
    ))
}

fn control(seed: &Seed<'_>) -> Found {
    let facts = seed.facts("permuted")?;
    Some((facts <= 0.15, format!("{facts:.3}")))
}

fn narrow(seed: &Seed<'_>) -> Found {
    let ratio = seed.ratio("top8", "dense")?;
    Some((ratio <= 1.01, format!("{ratio:.4}")))
}

fn drawn(seed: &Seed<'_>) -> Found {
    let ratio = seed.ratio("drawn", "dense")?;
    Some((ratio <= 1.01, format!("{ratio:.4}")))
}

fn mean(seed: &Seed<'_>) -> Found {
    let ratio = seed.ratio("mean", OURS)?;
    Some((ratio > 1.0, format!("{ratio:.3}")))
}

fn fedavg(seed: &Seed<'_>) -> Found {
    let (bits, facts) = (seed.bits("fedavg")?, seed.facts("fedavg")?);
    Some((true, format!("{bits:.3} and {facts:.3}")))
}

fn infifusion(seed: &Seed<'_>) -> Found {
    let ratio = seed.ratio("infifusion", "uld")?;
    let sft = seed.ratio("infifusion", "sft")?;
    Some((ratio < 1.0, format!("{ratio:.3} (of SFT {sft:.3})")))
}

/// Whether every attack but collusion costs the default rule at most 5 %.
fn bounded(attacks: &[AttackRow]) -> Line {
    let worst = attacks
        .iter()
        .filter(|row| row.attack != "none" && !row.is_collusion())
        .filter_map(|row| Some((*row.cost_permille.first()? / 10.0, row.label())))
        .max_by(|a, b| a.0.total_cmp(&b.0));
    Line {
        promise: "default rule: every attack of one in five but collusion costs at most 5 %"
            .to_owned(),
        holds: worst.as_ref().map(|(cost, _)| *cost <= 5.0),
        found: worst.map_or_else(String::new, |(cost, label)| {
            format!("{cost:.1} % by {label}")
        }),
    }
}

/// Whether the default rule costs at most 1 % against routing without a guard and against the plain mean where nobody lies.
fn harmless(attacks: &[AttackRow]) -> Line {
    let honest = attacks.iter().filter(|row| row.attack == "none");
    // Others against the default; the other way round it is this.
    let worst = |rule: &str| {
        let at = RULES.iter().position(|name| *name == rule)?;
        let costs = honest.clone().filter_map(|row| row.cost_permille.get(at));
        costs
            .map(|other| 100.0 * (1000.0 / (1000.0 + other) - 1.0))
            .reduce(f64::max)
    };
    let found = worst("softmax").zip(worst("uniform"));
    Line {
        promise:
            "default rule: at most 1 % above softmax routing and the plain mean where nobody lies"
                .to_owned(),
        holds: found.map(|(softmax, mean)| softmax <= 1.0 && mean <= 1.0),
        found: found.map_or_else(String::new, |(softmax, mean)| {
            format!("{softmax:+.1} % and {mean:+.1} %")
        }),
    }
}

/// Whether ExpGuard bears one liar who says the least likely byte, where the plain mean does not.
fn guarded(attacks: &[AttackRow]) -> Line {
    let flips = attacks
        .iter()
        .filter(|row| row.attack == Attack::LeastLikely.name() && !row.only_answers);
    let of = |rule: &str| {
        let at = RULES.iter().position(|name| *name == rule)?;
        let costs = flips.clone().filter_map(|row| row.cost_permille.get(at));
        costs.copied().reduce(f64::max).map(|most| most / 10.0)
    };
    let found = of("exp_guard").zip(of("uniform"));
    Line {
        promise: "least likely byte: ExpGuard within 2 %, the plain mean worse".to_owned(),
        holds: found.map(|(guard, mean)| guard <= 2.0 && mean > guard),
        found: found.map_or_else(String::new, |(guard, mean)| {
            format!("{guard:.1} % against {mean:.1} %")
        }),
    }
}

/// Whether decoys find who reads the public text, and nobody else.
fn caught(found: &[Caught]) -> Line {
    let kept_out = |found: &Caught| found.excluded.join(" and ");
    Line {
        promise: "who reads the text is kept out by decoys, and nobody else".to_owned(),
        holds: (!found.is_empty()).then(|| found.iter().all(Caught::is_just)),
        found: found.iter().map(kept_out).collect::<Vec<_>>().join(", "),
    }
}

/// Whether 8 symbols are at most a fiftieth of dense logits.
fn light(found: &[Traffic]) -> Line {
    let narrow = found.iter().filter(|traffic| traffic.symbols == 8);
    let most = narrow.map(Traffic::share).reduce(f64::max);
    Line {
        promise: "8 symbols: at most 1/50 of the bytes of dense logits".to_owned(),
        holds: most.map(|share| share <= 0.02),
        found: most.map_or_else(String::new, |share| format!("1/{:.0}", 1.0 / share)),
    }
}

/// Whether stacking and the residual give the weighted sum of products, and how far the mean of factors is from it.
fn exact(found: &[Exactness]) -> Line {
    let most = |of: fn(&Exactness) -> f64| found.iter().map(of).reduce(f64::max);
    let figures = most(|of| of.stack)
        .zip(most(|of| of.residual))
        .zip(most(|of| of.factors));
    Line {
        promise: "merged products: stacking and residual within 1e-5 of the sum".to_owned(),
        holds: figures.map(|((stack, residual), _)| stack <= 1e-5 && residual <= 1e-5),
        found: figures.map_or_else(String::new, |((stack, residual), factors)| {
            format!("{stack:.0e} and {residual:.0e}; bias of the mean of factors {factors:.2}")
        }),
    }
}

/// Whether attacks on adapters cost the default defence at most 5 %, and it costs 1 % where nobody lies.
fn defended(cells: &[AdapterAttack]) -> [Line; 2] {
    let by_default = cells
        .iter()
        .map(|row| &row.cell)
        .filter(|cell| cell.defence == DEFENCES[0].1.name());
    let worst = |lies: bool| {
        by_default
            .clone()
            .filter(|cell| cell.attack.starts_with("none") != lies)
            .filter_map(|cell| Some((100.0 * cell.cost?, cell.attack.as_str())))
            .max_by(|a, b| a.0.total_cmp(&b.0))
    };
    let line = |promise: &str, worst: Option<(f64, &str)>, most: f64| Line {
        promise: promise.to_owned(),
        holds: worst.map(|(cost, _)| cost <= most),
        found: worst.map_or_else(String::new, |(cost, by)| format!("{cost:.1} % by {by}")),
    };
    [
        line(
            "default defence: every attack of one in five on adapters costs at most 5 %",
            worst(true),
            5.0,
        ),
        line(
            "default defence: costs at most 1 % where nobody lies",
            worst(false),
            1.0,
        ),
    ]
}

/// Less is better.
const SCORES: [(&str, Score); 2] = [
    ("bits", |seed, arm| seed.bits(arm)),
    ("facts", |seed, arm| Some(1.0 - seed.facts(arm)?)),
];

/// Whether the default is first among all arms of other methods, by mean bits and by mean facts.
fn first(rows: &[Row]) -> Line {
    let seeds = seeds(rows);
    let complete = !seeds.is_empty() && seeds.iter().all(|seed| seed.row(OURS).is_some());
    let roles = [Role::Baseline, Role::Method, Role::Source];
    let best = SCORES.map(|(name, score)| {
        let best = rivals(&seeds, &roles, score).into_iter();
        Some((name, best.max_by(|a, b| a.gain.total_cmp(&b.gain))?))
    });
    let best: Vec<(&str, Rival)> = best.into_iter().flatten().collect();
    let of = |(name, rival): &(&str, Rival)| {
        format!("{name}: {} behind by {:.3}", rival.label, -rival.gain)
    };
    Line {
        promise: "ours: first on bits and on facts of all methods that train sources alone on private text".to_owned(),
        holds: (complete && !best.is_empty()).then(|| best.iter().all(|(_, rival)| rival.gain < 0.0)),
        found: best.iter().map(of).collect::<Vec<_>>().join("; "),
    }
}

/// Standard errors by which the best of some fifteen forms is better only one time in twenty if all are alike (Dunnett, one-sided).
const BEYOND_CHANCE: f64 = 3.0;

/// Whether no other rule or form of the default is better beyond chance. Arms of one seed differ by the chance of training even where
/// their targets hardly do, so the error is that of the mean difference, pooled over all forms.
fn unbeaten(rows: &[Row]) -> Line {
    let seeds = seeds(rows);
    let complete = seeds.len() > 1 && seeds.iter().all(|seed| seed.row(OURS).is_some());
    let (mut holds, mut found) = (true, Vec::new());
    for (name, score) in SCORES {
        let rivals = rivals(&seeds, &[Role::Variant], score);
        let variances = rivals.iter().map(|rival| rival.variance);
        let error = (variances.sum::<f64>() / (rivals.len() * seeds.len()).max(1) as f64).sqrt();
        if let Some(best) = rivals.iter().max_by(|a, b| a.gain.total_cmp(&b.gain)) {
            holds &= best.gain <= BEYOND_CHANCE * error;
            let (label, gain) = (best.label, best.gain);
            found.push(format!(
                "{name}: {label} {gain:+.4}, standard error {error:.4}"
            ));
        }
    }
    Line {
        promise: "ours: no other rule or form of it is better beyond chance".to_owned(),
        holds: (complete && !found.is_empty()).then_some(holds),
        found: found.join("; "),
    }
}

/// An arm against the default, over the seeds.
struct Rival {
    label: &'static str,
    /// Mean by which it is better.
    gain: f64,
    /// Variance of this over the seeds.
    variance: f64,
}

fn rivals(seeds: &[Seed<'_>], roles: &[Role], score: Score) -> Vec<Rival> {
    let of_arm = |arm: &Arm| {
        let gains: Option<Vec<f64>> = seeds
            .iter()
            .map(|seed| Some(score(seed, OURS)? - score(seed, arm.id)?))
            .collect();
        let (gain, variance) = moments(&gains?);
        Some(Rival {
            label: arm.label,
            gain,
            variance,
        })
    };
    let others = ARMS.iter().filter(|arm| roles.contains(&arm.role));
    if seeds.is_empty() {
        return Vec::new();
    }
    others.filter_map(of_arm).collect()
}

/// A figure of an arm on a seed.
type Score = fn(&Seed<'_>, &str) -> Option<f64>;

/// Mean and variance; 0 of a single value.
fn moments(values: &[f64]) -> (f64, f64) {
    let count = values.len().max(1) as f64;
    let mean = values.iter().sum::<f64>() / count;
    let squares: f64 = values.iter().map(|value| (value - mean).powi(2)).sum();
    (mean, squares / (count - 1.0).max(1.0))
}
