//! Every model answers the same questions.

use crate::report::Scores;
use crate::world::{EvaluationItem, World};
use anyhow::Result;
use consilium_node::worker::evaluate::{bits_per_byte, rank_choices};

use consilium_node::worker::source::LoadedModel;

/// Puts all test sets to a model.
///
/// # Errors
/// A model that cannot read the questions or gives no finite numbers.
pub fn measure(model: &LoadedModel, world: &World) -> Result<Scores> {
    let mut bits = [0.0; 3];
    for (bits, lines) in bits.iter_mut().zip(&world.tests.lines) {
        let texts = lines
            .iter()
            .map(|item| (item.context.as_str(), item.target.as_str()));
        *bits = bits_per_byte(model, texts, &mut ())?;
    }
    let mut scores = Scores {
        bits,
        ..Scores::default()
    };
    let facts: Vec<_> = world
        .tests
        .facts
        .iter()
        .map(|question| &question.item)
        .collect();
    for (question, right) in world.tests.facts.iter().zip(answers(model, &facts)?) {
        if question.also.is_some() {
            scores.two_owners.count(right);
        } else {
            scores.one_owner.count(right);
        }
    }
    let rules: Vec<_> = world
        .tests
        .rules
        .iter()
        .map(|question| &question.item)
        .collect();
    for (question, right) in world.tests.rules.iter().zip(answers(model, &rules)?) {
        if let Some(tally) = scores.rules.get_mut(question.set.index()) {
            tally.count(right);
        }
    }
    Ok(scores)
}

/// Whether the true choice ranks strictly before all others, per item.
fn answers(model: &LoadedModel, items: &[&EvaluationItem]) -> Result<Vec<bool>> {
    let questions = items
        .iter()
        .map(|item| (item.context.as_str(), item.choices.as_slice()));
    let ranked = rank_choices(model, questions, &mut ())?;
    Ok(items
        .iter()
        .zip(ranked)
        .map(|(item, likelihoods)| {
            let best = |right: bool| {
                item.choices
                    .iter()
                    .zip(&likelihoods)
                    .filter(|(choice, _)| (**choice == item.target) == right)
                    .map(|(_, likelihood)| *likelihood)
                    .fold(f64::NEG_INFINITY, f64::max)
            };
            best(true) > best(false)
        })
        .collect())
}
