//! What the rows of one batch learn.

use std::ops::Range;

use consilium_kernels::loss::{ItemLoss, NO_LABEL, Term};
use consilium_protocol::reference;

use super::{Objective, Plan, sorted, tokens};
use crate::worker::data::Batch;
use crate::worker::error::WorkError;
use crate::worker::source::LoadedModel;

/// One batch and where its items come from.
pub(super) struct Step<'a> {
    pub(super) plan: &'a Plan,
    pub(super) items: &'a [reference::Item],
    pub(super) batch: &'a Batch,
}

impl Step<'_> {
    /// Ranks to predict at the batch's rows; [`NO_LABEL`] where a token touches a byte that is no label.
    pub(super) fn labels(&self, student: &LoadedModel, all: bool) -> Result<Vec<u32>, WorkError> {
        let mut labels = Vec::with_capacity(self.batch.rows.len());
        for packed in &self.batch.items {
            let unlabeled = &item_at(self.items, self.plan.indices[packed.item])?.unlabeled;
            let ranks = student.ranks(&self.plan.tokens[packed.item].target);
            let mut start = 0;
            for rank in ranks {
                let bytes = start..start + student.vocab.token_bytes(rank).len();
                start = bytes.end;
                let is_label = all || !unlabeled.iter().any(|span| overlap(span, &bytes));
                labels.push(if is_label { rank } else { NO_LABEL });
            }
            labels.push(student.vocab.end_ranks().start);
        }
        Ok(labels)
    }

    /// What the rows of each item learn: their `labels`, and what the objective has beside these.
    pub(super) fn goals<'t>(
        &self,
        student: &LoadedModel,
        labels: &'t [u32],
        objective: Objective<'t>,
    ) -> Result<Vec<Goal<'t>>, WorkError> {
        let labelled = labels.iter().filter(|&&label| label != NO_LABEL).count();
        let plain = objective.cross_entropy();
        let by_row = (1.0 - plain) / self.batch.rows.len().max(1) as f32;
        let sorted = sorted::weights(self, objective);
        let by_taught = tokens::weight(self, objective);
        self.batch
            .items
            .iter()
            .map(|packed| {
                let index = self.plan.indices[packed.item];
                let mut terms = match objective {
                    Objective::CrossEntropy => Vec::new(),
                    Objective::OwnedTrie { owned, .. } if !owned.contains(&index) => Vec::new(),
                    Objective::Trie { targets, .. } | Objective::OwnedTrie { targets, .. } => {
                        let target = targets
                            .of(index)
                            .ok_or_else(|| WorkError::Targets(format!("none for item {index}")))?;
                        let weight = by_row;
                        vec![Term::Trie { target, weight }]
                    }
                    Objective::Sorted { teachers, loss, .. } => {
                        sorted::terms(index, teachers, loss, &sorted)
                    }
                    Objective::Tokens { targets, tail, .. } => {
                        targets.term(index, by_taught, tail).into_iter().collect()
                    }
                };
                let share = if terms.is_empty() { 1.0 } else { plain };
                terms.push(Term::Labels {
                    labels: &labels[packed.logits.clone()],
                    weight: share / labelled.max(1) as f32,
                });
                let tokens = student.ranks(&self.plan.tokens[packed.item].target);
                Ok(Goal { tokens, terms })
            })
            .collect()
    }
}

/// What one item's rows learn.
pub(super) struct Goal<'t> {
    tokens: Vec<u32>,
    terms: Vec<Term<'t>>,
}

impl Goal<'_> {
    pub(super) fn loss(&self) -> ItemLoss<'_> {
        ItemLoss {
            tokens: &self.tokens,
            terms: &self.terms,
        }
    }
}

pub(super) fn item_at(
    items: &[reference::Item],
    index: u64,
) -> Result<&reference::Item, WorkError> {
    usize::try_from(index)
        .ok()
        .and_then(|index| items.get(index))
        .ok_or(WorkError::Items {
            first: index,
            last: index.saturating_add(1),
            items: items.len(),
        })
}

fn overlap(a: &Range<usize>, b: &Range<usize>) -> bool {
    a.start < b.end && b.start < a.end
}
