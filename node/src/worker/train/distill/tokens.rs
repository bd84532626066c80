//! Distributions over the pivot's own tokens, row by row.

use std::collections::{BTreeMap, BTreeSet};

use consilium_kernels::loss::{Tail, Term};
use consilium_kernels::{RecordView, Records, code};
use consilium_protocol::reference;

use super::{Objective, Plan, Step, item_at};
use crate::worker::error::WorkError;
use crate::worker::source::LoadedModel;
use crate::worker::tokens::check_item;
use crate::worker::train::targets::Targets;

/// What some items are to learn, token by token.
#[derive(Debug)]
pub struct TokenTargets {
    symbols: usize,
    items: BTreeMap<u64, ItemTargets>,
}

#[derive(Debug)]
struct ItemTargets {
    /// One position per row of the pivot; those that learn nothing list one token without mass, which has no loss.
    records: Records<u32>,
    /// Rows that learn something.
    taught: usize,
}

impl TokenTargets {
    /// No items yet; at most `symbols` (K) tokens a row.
    #[must_use]
    pub const fn new(symbols: usize) -> Self {
        Self {
            symbols,
            items: BTreeMap::new(),
        }
    }

    /// Takes an item: ids of tokens and their probabilities for each of the pivot's rows, the end's the last. The K likeliest
    /// tokens of a row are listed, the smaller id on a tie, and what they leave of one is the tail. A row without tokens
    /// learns nothing.
    ///
    /// # Errors
    /// A number that is no probability, a token twice, or no tokens a row.
    pub fn insert(&mut self, item: u64, rows: Vec<Vec<(u32, f64)>>) -> Result<(), WorkError> {
        let k = self.symbols;
        let taught = rows.iter().filter(|row| !row.is_empty()).count();
        let (mut symbols, mut codes, mut tail) = (Vec::new(), Vec::new(), Vec::new());
        for mut row in rows {
            if row.iter().any(|(_, share)| !(0.0..=1.0).contains(share)) {
                let problem = format!("item {item}: a number is no probability");
                return Err(WorkError::Targets(problem));
            }
            row.sort_unstable_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
            row.truncate(k);
            let listed: f64 = row.iter().map(|(_, share)| share).sum();
            tail.push(if row.is_empty() {
                code::FLOOR
            } else {
                code::encode(1.0 - listed)
            });
            row.sort_unstable_by_key(|&(id, _)| id);
            // Unused slots repeat the last token.
            let last = row.last().map_or(0, |&(id, _)| id);
            let unused = k.saturating_sub(row.len());
            symbols.extend(row.iter().map(|&(id, _)| id));
            symbols.extend(std::iter::repeat_n(last, unused));
            codes.extend(row.iter().map(|&(_, share)| code::encode(share)));
            codes.extend(std::iter::repeat_n(code::FLOOR, unused));
        }
        let records = Records::from_columns(k, symbols, codes, Vec::new(), tail)?;
        self.items.insert(item, ItemTargets { records, taught });
        Ok(())
    }

    /// Takes an item's record: a position for each of the pivot's `rows`, or for all but the end's, which then learns
    /// nothing.
    fn insert_record(
        &mut self,
        item: u64,
        record: RecordView<'_, u32>,
        rows: usize,
    ) -> Result<(), WorkError> {
        let taught = record.positions();
        let end = rows.checked_sub(taught).filter(|rest| *rest <= 1);
        let end = end.ok_or_else(|| {
            WorkError::Targets(format!("item {item}: {taught} positions for {rows} rows"))
        })?;
        let slots = end * record.k();
        let symbols = [record.symbols(), &vec![0; slots]].concat();
        let codes = [record.codes(), &vec![code::FLOOR; slots]].concat();
        let tail = [record.tail(), &vec![code::FLOOR; end]].concat();
        let records = Records::from_columns(record.k(), symbols, codes, Vec::new(), tail)?;
        self.items.insert(item, ItemTargets { records, taught });
        Ok(())
    }

    /// Rows of an item that learn something; 0 if it is not there.
    #[must_use]
    pub fn taught(&self, item: u64) -> usize {
        self.items.get(&item).map_or(0, |item| item.taught)
    }

    /// The term of an item, if it is there.
    pub(super) fn term(&self, item: u64, weight: f32, tail: Tail) -> Option<Term<'_>> {
        let target = self.items.get(&item)?.records.view();
        Some(Term::Tokens {
            target,
            weight,
            tail,
        })
    }
}

impl Plan {
    /// What the items of a plan learn from records in token space: all that have a record, or those that are `owned` too.
    ///
    /// # Errors
    /// An item whose `tokens` are not those of the pivot, or a record of another length.
    pub(crate) fn token_targets(
        &self,
        pivot: &LoadedModel,
        items: &[reference::Item],
        records: &Targets<u32>,
        owned: Option<&BTreeSet<u64>>,
    ) -> Result<TokenTargets, WorkError> {
        let mut targets = TokenTargets::new(records.slots());
        for (&index, tokens) in self.indices.iter().zip(self.tokens.iter()) {
            let is_owned = owned.is_none_or(|owned| owned.contains(&index));
            let Some(record) = records.of(index).filter(|_| is_owned) else {
                continue;
            };
            check_item(&pivot.vocab, index, item_at(items, index)?, &tokens.target)?;
            targets.insert_record(index, record, tokens.target.len() + 1)?;
        }
        Ok(targets)
    }
}

/// Weight of every term of a batch: their mean over the rows that learn something.
pub(super) fn weight(step: &Step<'_>, objective: Objective<'_>) -> f32 {
    let Objective::Tokens {
        targets,
        cross_entropy,
        ..
    } = objective
    else {
        return 0.0;
    };
    let items = step.batch.items.iter();
    let taught: usize = items
        .map(|packed| targets.taught(step.plan.indices[packed.item]))
        .sum();
    (1.0 - cross_entropy) / taught.max(1) as f32
}

#[cfg(test)]
mod tests {
    use super::super::tests::{PART, distiller};
    use super::super::{Distiller, Plan};
    use super::*;
    use crate::worker::score::{score_shard, score_token_shard};
    use crate::worker::testing::{model, reference, token_reference, token_space};
    use consilium_kernels::RecordShape;
    use consilium_protocol::reference::ReferenceSet;

    /// Loss of the first batch.
    fn loss(distiller: &Distiller, plan: &Plan, objective: Objective<'_>) -> f64 {
        let reference = reference();
        let batch = &plan.batches().unwrap().next_batch().unwrap();
        let step = Step {
            plan,
            items: reference.items(),
            batch,
        };
        distiller.gradients(&step, objective).unwrap().0
    }

    /// Certainty of the tokens that are there, of the items in `of`.
    fn certain(distiller: &Distiller, plan: &Plan, of: &[u64]) -> TokenTargets {
        let mut targets = TokenTargets::new(3);
        let end = distiller.student.vocab.end_ranks().start as usize;
        let end = distiller.student.vocab.id_of_rank()[end];
        for (index, item) in plan.indices.iter().zip(plan.tokens.iter()) {
            if of.contains(index) {
                let ids = item.target.iter().copied().chain([end]);
                let rows = ids.map(|id| vec![(id, 1.0)]).collect();
                targets.insert(*index, rows).unwrap();
            }
        }
        targets
    }

    #[test]
    fn certain_tokens_are_labels_and_items_without_targets_have_labels_alone() {
        let reference = reference();
        let mut settings = distiller(3).settings().clone();
        settings.label_unlabeled = true;
        let distiller = Distiller::new(model(1), settings).unwrap();
        let plan = distiller.plan(reference.items(), &PART, 0).unwrap();
        let plain = loss(&distiller, &plan, Objective::CrossEntropy);
        let of = |targets: &TokenTargets, cross_entropy| {
            let tail = Tail::Dropped;
            let objective = Objective::Tokens {
                targets,
                tail,
                cross_entropy,
            };
            loss(&distiller, &plan, objective)
        };
        let all = certain(&distiller, &plan, &PART);
        for cross_entropy in [0.0, 0.3] {
            assert!((of(&all, cross_entropy) - plain).abs() < 1e-5);
        }
        let none = TokenTargets::new(3);
        assert!((of(&none, 0.3) - plain).abs() < 1e-9);
        assert_eq!((none.taught(0), all.taught(9)), (0, 0));
    }

    #[test]
    fn rows_without_tokens_learn_nothing_and_the_likeliest_are_kept() {
        let mut targets = TokenTargets::new(2);
        let row = vec![(9, 0.25), (4, 0.125), (7, 0.5), (3, 0.125)];
        targets
            .insert(5, vec![row, vec![], vec![(6, 1.0)]])
            .unwrap();
        assert_eq!(targets.taught(5), 2);
        let Some(Term::Tokens { target, .. }) = targets.term(5, 1.0, Tail::Ghost) else {
            panic!("no term")
        };
        assert_eq!(target.symbols(), [7, 9, 0, 0, 6, 6]);
        assert_eq!(target.codes(), [16, 32, 255, 255, 0, 255]);
        assert_eq!(target.tail(), [32, 255, 255]);
        for bad in [
            vec![(1, 1.5)],
            vec![(1, f64::NAN)],
            vec![(1, 0.5), (1, 0.5)],
        ] {
            assert!(targets.insert(5, vec![bad]).is_err());
        }
        assert!(TokenTargets::new(0).insert(5, vec![]).is_err());
    }

    fn gathered(teacher: &LoadedModel, reference: &ReferenceSet, wanted: &[u64]) -> Targets<u32> {
        let (space, shape) = (token_space(teacher), SHAPE);
        Targets::gather_tokens(reference, wanted, space, 8, |_| {
            let scored = score_token_shard(teacher, reference, 0..8, space, &shape, &mut ())?;
            Ok(scored.shard.to_bytes()?)
        })
        .unwrap()
    }

    const SHAPE: RecordShape = RecordShape {
        k: 8,
        fill_permille: 995,
    };

    #[test]
    fn records_of_a_shared_tokenizer_are_learned_where_they_are_owned() {
        let teacher = model(2);
        for end in [true, false] {
            let reference = token_reference(&teacher, end);
            let items = reference.items();
            let mut distiller = distiller(12);
            let plan = distiller.plan(items, &PART, 0).unwrap();
            let records = gathered(&teacher, &reference, &PART_IN_ORDER);
            let of = |owned: Option<&BTreeSet<u64>>| {
                plan.token_targets(&distiller.student, items, &records, owned)
                    .unwrap()
            };
            let all = of(None);
            let rows = |index: u64| items[usize::try_from(index).unwrap()].tokens.len();
            assert!(PART.iter().all(|&index| all.taught(index) == rows(index)));
            let some = of(Some(&BTreeSet::from([5, 3])));
            assert_eq!(
                (some.taught(5), some.taught(3), some.taught(1)),
                (rows(5), 0, 0)
            );
            let objective = Objective::Tokens {
                targets: &all,
                tail: Tail::Ghost,
                cross_entropy: 0.1,
            };
            let first = distiller.run(&plan, items, objective, &mut ()).unwrap();
            let plan = distiller.plan(items, &PART, 1).unwrap();
            let second = distiller.run(&plan, items, objective, &mut ()).unwrap();
            assert!(second < first, "{first} to {second}");
        }
    }

    #[test]
    fn records_of_other_tokens_or_of_bytes_are_refused() {
        let teacher = model(2);
        let (plain, reference) = (reference(), token_reference(&teacher, true));
        let items = reference.items();
        let distiller = distiller(1);
        let plan = distiller.plan(items, &PART, 0).unwrap();
        let records = gathered(&teacher, &reference, &PART_IN_ORDER);
        let other = plan.token_targets(&distiller.student, plain.items(), &records, None);
        assert!(other.unwrap_err().to_string().contains("has none"));
        let space = token_space(&teacher);
        let of_bytes = Targets::gather_tokens(&reference, &PART_IN_ORDER, space, 8, |_| {
            let scored = score_shard(&teacher, &reference, 0..8, &SHAPE, &mut ())?;
            Ok(scored.shard.to_bytes()?)
        });
        assert!(
            of_bytes
                .unwrap_err()
                .to_string()
                .contains("expected Tokens")
        );
        let of_tokens = Targets::gather(&reference, &PART_IN_ORDER, 8, |_| {
            let scored = score_token_shard(&teacher, &reference, 0..8, space, &SHAPE, &mut ())?;
            Ok(scored.shard.to_bytes()?)
        });
        assert!(
            of_tokens
                .unwrap_err()
                .to_string()
                .contains("expected Bytes")
        );
    }

    const PART_IN_ORDER: [u64; 6] = [0, 1, 2, 4, 5, 7];

    #[test]
    fn the_loss_falls() {
        let reference = reference();
        let mut distiller = distiller(12);
        let targets = {
            let plan = distiller.plan(reference.items(), &PART, 0).unwrap();
            certain(&distiller, &plan, &PART[..3])
        };
        let objective = Objective::Tokens {
            targets: &targets,
            tail: Tail::Ghost,
            cross_entropy: 0.1,
        };
        let mut round = |inner| {
            let plan = distiller.plan(reference.items(), &PART, inner).unwrap();
            distiller
                .run(&plan, reference.items(), objective, &mut ())
                .unwrap()
        };
        let (first, second) = (round(0), round(1));
        assert!(second < 0.9 * first, "{first} to {second}");
    }
}
