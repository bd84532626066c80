//! Losses on the largest logits of teachers with other tokenizers, compared by their place in descending order.
//!
//! A teacher's logits are taken where a token of the teacher and one of the pivot begin at the same byte of the target;
//! other rows of the pivot have no such loss. What the losses are says `consilium_kernels::loss`.

use std::collections::{BTreeMap, BTreeSet};

use consilium_kernels::head::GraphItem;
use consilium_kernels::loss::Term;
use consilium_kernels::{Records, bytes, code};
use consilium_protocol::manifest::Distillation;
use consilium_protocol::reference;
use rayon::prelude::*;

use super::{Distiller, Objective, Plan, Step, item_at};
use crate::worker::error::WorkError;
use crate::worker::monitor::Monitor;
use crate::worker::source::LoadedModel;

/// What is compared.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum SortedLoss {
    /// Probabilities (Universal Logit Distillation, arXiv 2402.12030).
    Probability,
    /// The softmax of standardised logits (InfiFusion, arXiv 2501.02795).
    Standardised {
        /// Divides the standardised logits; above zero.
        temperature: f32,
    },
    /// The same, and the features of the logits' graph over an item (InfiGFusion, arXiv 2505.13893).
    Graph {
        /// Divides the standardised logits; above zero.
        temperature: f32,
        /// Weight of the graph's term relative to the other.
        weight: f32,
    },
}

impl SortedLoss {
    /// What a manifest says; none where it compares records of bytes, or nothing.
    #[must_use]
    pub fn of(distillation: &Distillation) -> Option<Self> {
        let share = |permille: u32| permille as f32 / 1000.0;
        match *distillation {
            Distillation::Labels
            | Distillation::Trie
            | Distillation::TrieListed
            | Distillation::DualTrie => None,
            Distillation::Uld { .. } => Some(Self::Probability),
            Distillation::Infifusion {
                temperature_permille,
                ..
            } => Some(Self::Standardised {
                temperature: share(temperature_permille),
            }),
            Distillation::Infigfusion {
                temperature_permille,
                graph_permille,
                ..
            } => Some(Self::Graph {
                temperature: share(temperature_permille),
                weight: share(graph_permille),
            }),
        }
    }
}

/// One teacher's K largest log-probabilities, by item.
#[derive(Debug)]
pub struct AlignedLogits {
    symbols: usize,
    items: BTreeMap<u64, Aligned>,
}

#[derive(Debug)]
struct Aligned {
    /// One position per row of the pivot; those that are not compared list one symbol without mass, which has no loss.
    records: Records<u32>,
    /// Rows that are compared.
    compared: usize,
    /// At the teacher's own positions, `[T, K]`.
    logits: Vec<f32>,
}

/// A teacher, and what it speaks of.
#[derive(Debug, Clone, Copy)]
pub struct Teacher<'a> {
    /// Its logits.
    pub logits: &'a AlignedLogits,
    /// Items that are learned from it; all that it has without.
    pub owned: Option<&'a BTreeSet<u64>>,
}

impl AlignedLogits {
    /// No items yet; `symbols` (K) logits a position.
    #[must_use]
    pub const fn new(symbols: usize) -> Self {
        Self {
            symbols,
            items: BTreeMap::new(),
        }
    }

    /// Takes an item: `logits` `[T, K]` are the natural logarithms of the teacher's K largest probabilities at each of its
    /// positions, in descending order, and `rows` says for each of the pivot's rows, the end's the last, which of these
    /// positions predicts what comes next there.
    ///
    /// # Errors
    /// Lengths that do not fit, no logits a position, or a number that is no log-probability.
    pub fn insert(
        &mut self,
        item: u64,
        logits: Vec<f32>,
        rows: &[Option<usize>],
    ) -> Result<(), WorkError> {
        let k = self.symbols;
        let refuse = |problem: &str| WorkError::Targets(format!("item {item}: {problem}"));
        if k == 0 || !logits.len().is_multiple_of(k) {
            return Err(refuse("logits are not K a position"));
        }
        if !bytes::are_finite(&logits) {
            return Err(refuse("a logit is not finite"));
        }
        let listed: Vec<u32> = (0..).take(k).collect();
        let mut records = Columns::default();
        for row in rows {
            let Some(position) = *row else {
                records.symbols.extend(vec![0; k]);
                records.codes.extend(vec![code::FLOOR; k]);
                records.tail.push(code::FLOOR);
                continue;
            };
            let shares = logits
                .get(position * k..(position + 1) * k)
                .ok_or_else(|| refuse("a row names a position that is not there"))?;
            let shares: Vec<f64> = shares.iter().map(|&logit| f64::from(logit).exp()).collect();
            records.symbols.extend_from_slice(&listed);
            records
                .codes
                .extend(shares.iter().copied().map(code::encode));
            records
                .tail
                .push(code::encode(1.0 - shares.iter().sum::<f64>()));
        }
        let Columns {
            symbols,
            codes,
            tail,
        } = records;
        let aligned = Aligned {
            records: Records::from_columns(k, symbols, codes, Vec::new(), tail)?,
            compared: rows.iter().flatten().count(),
            logits,
        };
        self.items.insert(item, aligned);
        Ok(())
    }

    /// Rows of an item that are compared; 0 if it is not there.
    #[must_use]
    pub fn compared(&self, item: u64) -> usize {
        self.items.get(&item).map_or(0, |item| item.compared)
    }
}

#[derive(Default)]
struct Columns {
    symbols: Vec<u32>,
    codes: Vec<u8>,
    tail: Vec<u8>,
}

impl<'a> Teacher<'a> {
    fn of(&self, item: u64) -> Option<&'a Aligned> {
        let speaks = self.owned.is_none_or(|owned| owned.contains(&item));
        self.logits.items.get(&item).filter(|_| speaks)
    }
}

impl Distiller {
    /// The `symbols` largest log-probabilities of a teacher for the `wanted` items of a plan, at the rows of this pivot.
    ///
    /// # Errors
    /// An item that the plan does not have, a target that the teacher cannot tokenise, numbers that are not finite, or a
    /// monitor that says stop.
    pub fn align(
        &self,
        teacher: &LoadedModel,
        plan: &Plan,
        items: &[reference::Item],
        wanted: &[u64],
        symbols: usize,
        monitor: &mut dyn Monitor,
    ) -> Result<AlignedLogits, WorkError> {
        let tokenised = wanted
            .par_iter()
            .map(|&index| {
                let item = item_at(items, index)?;
                teacher.whole_item(&item.context, &item.target)
            })
            .collect::<Result<Vec<_>, WorkError>>()?;
        let ours: BTreeMap<u64, &[u32]> = plan
            .indices
            .iter()
            .zip(plan.tokens.iter())
            .map(|(&index, item)| (index, &*item.target))
            .collect();
        let mut aligned = AlignedLogits::new(symbols.min(teacher.vocab.end_ranks().end as usize));
        for run in teacher.runs(&tokenised) {
            let batch = teacher.batch(&tokenised[run.clone()]);
            let pass = teacher.model.score(&batch.packed, &batch.rows)?;
            let top = teacher
                .model
                .score_with(&teacher.vocab, |head| head.top(&pass.hidden, symbols))??;
            for (place, packed) in run.clone().zip(&batch.items) {
                let index = wanted[place];
                let ours = ours.get(&index).ok_or_else(|| {
                    WorkError::Targets(format!("item {index} is not in the plan"))
                })?;
                let theirs = starts(teacher, &tokenised[place].target);
                let rows: Vec<Option<usize>> = starts(&self.student, ours)
                    .into_iter()
                    .map(|byte| theirs.binary_search(&byte).ok())
                    .collect();
                let logits = packed.logits.clone().flat_map(|row| {
                    let mass = top.log_mass[row];
                    let logits = &top.logits[row * top.k..(row + 1) * top.k];
                    logits.iter().map(move |&logit| less(logit, mass))
                });
                aligned.insert(index, logits.collect(), &rows)?;
            }
            monitor.advance(run.end as u64, tokenised.len() as u64, None)?;
        }
        Ok(aligned)
    }
}

/// Bytes at which the tokens of a target begin, and the end's.
fn starts(model: &LoadedModel, target: &[u32]) -> Vec<usize> {
    let mut starts = vec![0];
    let mut at = 0;
    for rank in model.ranks(target) {
        at += model.vocab.token_bytes(rank).len();
        starts.push(at);
    }
    starts
}

#[expect(clippy::cast_possible_truncation, reason = "logits are f32")]
fn less(logit: f32, log_mass: f64) -> f32 {
    (f64::from(logit) - log_mass) as f32
}

/// Weight of each teacher's terms in a batch: their mean over the rows that it is compared at.
pub(super) fn weights(step: &Step<'_>, objective: Objective<'_>) -> Vec<f32> {
    let Objective::Sorted {
        teachers,
        cross_entropy,
        ..
    } = objective
    else {
        return Vec::new();
    };
    let compared = |teacher: &Teacher<'_>| {
        let items = step.batch.items.iter();
        let items = items.filter_map(|packed| teacher.of(step.plan.indices[packed.item]));
        items.map(|item| item.compared).sum::<usize>()
    };
    teachers
        .iter()
        .map(|teacher| (1.0 - cross_entropy) / compared(teacher).max(1) as f32)
        .collect()
}

/// Terms of all teachers that speak of an item.
pub(super) fn terms<'t>(
    item: u64,
    teachers: &'t [Teacher<'t>],
    loss: SortedLoss,
    weights: &[f32],
) -> Vec<Term<'t>> {
    let of = |(teacher, &weight): (&'t Teacher<'t>, &f32)| {
        let target = teacher.of(item)?.records.view();
        Some(match loss {
            SortedLoss::Probability => Term::Sorted { target, weight },
            SortedLoss::Standardised { temperature } | SortedLoss::Graph { temperature, .. } => {
                Term::Standardised {
                    target,
                    weight,
                    temperature,
                }
            }
        })
    };
    teachers.iter().zip(weights).filter_map(of).collect()
}

/// Graphs of all teachers, each with its number of logits: a mean over the items that it speaks of.
pub(super) fn graphs<'t>(
    step: &Step<'_>,
    objective: Objective<'t>,
) -> Vec<(usize, Vec<GraphItem<'t>>)> {
    let Objective::Sorted {
        teachers,
        loss: SortedLoss::Graph { weight, .. },
        cross_entropy,
    } = objective
    else {
        return Vec::new();
    };
    teachers
        .iter()
        .map(|teacher| {
            let items = step.batch.items.iter();
            let spoken: Vec<_> = items
                .filter_map(|packed| {
                    let item = teacher.of(step.plan.indices[packed.item])?;
                    Some((packed.logits.clone(), &*item.logits))
                })
                .collect();
            let weight = weight * (1.0 - cross_entropy) / spoken.len().max(1) as f32;
            let items = spoken.into_iter().map(|(rows, teacher)| GraphItem {
                rows,
                teacher,
                weight,
            });
            (teacher.logits.symbols, items.collect())
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::super::tests::{PART, distiller};
    use super::*;
    use crate::worker::model::ModelConfig;
    use crate::worker::testing::{LINES, model, reference};
    use crate::worker::tokenizer::train_bpe;

    fn gradient(distiller: &Distiller, plan: &Plan, objective: Objective<'_>) -> (f64, Vec<f32>) {
        let reference = reference();
        let step = Step {
            plan,
            items: reference.items(),
            batch: &plan.batches().unwrap().next_batch().unwrap(),
        };
        let (loss, gradients) = distiller.gradients(&step, objective).unwrap();
        let mut all = Vec::new();
        gradients
            .each(&distiller.student.model, |_, gradient| {
                all.extend_from_slice(gradient);
            })
            .unwrap();
        (loss, all)
    }

    const LOSSES: [SortedLoss; 3] = [
        SortedLoss::Probability,
        SortedLoss::Standardised { temperature: 1.0 },
        SortedLoss::Graph {
            temperature: 1.0,
            weight: 0.5,
        },
    ];

    #[test]
    fn every_sorted_loss_of_a_teacher_with_another_tokenizer_falls() {
        let reference = reference();
        let items = reference.items();
        let tokenizer =
            std::sync::Arc::new(train_bpe(LINES.iter().copied().cycle().take(80), 340).unwrap());
        let config = ModelConfig::llama(tokenizer.size(), 32, 2, 2, 48);
        let teacher = LoadedModel::random(tokenizer, config, 5).unwrap();
        for loss in LOSSES {
            let mut distiller = distiller(12);
            let plan = distiller.plan(items, &PART, 0).unwrap();
            let logits = distiller
                .align(&teacher, &plan, items, &PART, 6, &mut ())
                .unwrap();
            // Both tokenizers begin the target and end it; between, some tokens begin together and some do not.
            let rows: usize = plan.tokens.iter().map(|item| item.target.len() + 1).sum();
            let compared: usize = PART.iter().map(|&item| logits.compared(item)).sum();
            assert!(
                2 * PART.len() <= compared && compared < rows,
                "{compared} of {rows}"
            );
            let teachers = [Teacher {
                logits: &logits,
                owned: None,
            }];
            let objective = Objective::Sorted {
                teachers: &teachers,
                loss,
                cross_entropy: 0.0,
            };
            let first = distiller.run(&plan, items, objective, &mut ()).unwrap();
            let plan = distiller.plan(items, &PART, 1).unwrap();
            let second = distiller.run(&plan, items, objective, &mut ()).unwrap();
            assert!(second < 0.9 * first, "{loss:?}: {first} to {second}");
        }
    }

    #[test]
    fn two_teachers_add_up_in_any_order_and_one_without_items_leaves_cross_entropy() {
        let reference = reference();
        let items = reference.items();
        let mut distiller = distiller(2);
        let plan = distiller.plan(items, &PART, 0).unwrap();
        // Fresh B is zero, which would hide the gradient of A.
        distiller
            .run(&plan, items, Objective::CrossEntropy, &mut ())
            .unwrap();
        let align = |seed| {
            let teacher = model(seed);
            let aligned = distiller.align(&teacher, &plan, items, &PART, 6, &mut ());
            aligned.unwrap()
        };
        let (a, b) = (align(2), align(3));
        let none = BTreeSet::new();
        let half = BTreeSet::from([0, 1, 7]);
        let teacher = |logits, owned| Teacher { logits, owned };
        for loss in LOSSES {
            let of = |teachers: &[Teacher<'_>], cross_entropy| {
                let objective = Objective::Sorted {
                    teachers,
                    loss,
                    cross_entropy,
                };
                gradient(&distiller, &plan, objective)
            };
            let (one, two) = (teacher(&a, None), teacher(&b, Some(&half)));
            let alone = of(&[one], 0.0);
            let both = of(&[one, two], 0.0);
            let plain = gradient(&distiller, &plan, Objective::CrossEntropy);
            let scale = plain.1.iter().fold(0.0_f32, |most, g| most.max(g.abs()));
            assert!((both.0 - of(&[two, one], 0.0).0).abs() < 1e-9);
            let silent = of(&[teacher(&a, Some(&none))], 0.3);
            assert!((silent.0 - plain.0).abs() < 1e-9, "{loss:?}");
            for (got, expected) in silent.1.iter().zip(&plain.1) {
                assert!((got - expected).abs() <= 1e-6 * scale, "{loss:?}");
            }
            assert!(both.0 > alone.0, "{loss:?}: {both:?}");
            assert_ne!(both.1, alone.1);
            // The share of the labels.
            let mixed = of(&[one], 0.25);
            let expected = 0.75 * alone.0 + 0.25 * plain.0;
            assert!(
                (mixed.0 - expected).abs() < 1e-5,
                "{loss:?}: {} and {expected}",
                mixed.0
            );
        }
    }

    #[test]
    fn logits_that_are_no_matrix_or_not_finite_are_refused() {
        let mut logits = AlignedLogits::new(2);
        for (values, rows) in [
            (vec![-1.0], vec![]),
            (vec![-1.0, f32::NAN], vec![]),
            (vec![-1.0, -2.0], vec![Some(1)]),
        ] {
            assert!(logits.insert(0, values, &rows).is_err());
        }
        assert!(AlignedLogits::new(0).insert(0, vec![], &[]).is_err());
        logits
            .insert(0, vec![-1.0, -2.0], &[Some(0), None])
            .unwrap();
        assert_eq!((logits.compared(0), logits.compared(1)), (1, 0));
    }
}
