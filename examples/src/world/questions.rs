//! The test sets: lines for bits per byte, questions with candidates.

use super::{
    Domain, EvaluationItem, FactQuestion, NUMBERS, RuleQuestion, RuleSet, Sizes, Tests,
    corpora::{Line, fact_question, narrative, unasked},
    draw::Dice,
    truth::{Combination, Fact, Truth},
};

pub(super) fn tests(truth: &Truth, sizes: &Sizes, dice: &mut Dice) -> Tests {
    let lines = Domain::ALL.map(|domain| lines(truth, domain, sizes.test_lines, dice));
    let facts = truth
        .facts
        .iter()
        .map(|fact| FactQuestion {
            item: fact_question(truth, fact),
            home: fact.home,
            also: fact.also,
        })
        .collect();
    let mut rules = Vec::new();
    for domain in Domain::ALL {
        for set in RuleSet::ALL {
            rules.extend(rule_questions(
                truth,
                domain,
                set,
                sizes.rule_questions,
                dice,
            ));
        }
    }
    Tests {
        lines,
        facts,
        rules,
    }
}

fn lines(truth: &Truth, domain: Domain, count: usize, dice: &mut Dice) -> Vec<EvaluationItem> {
    let home: Vec<Fact> = truth
        .facts
        .iter()
        .filter(|fact| fact.home == domain)
        .copied()
        .collect();
    let mut all: Vec<String> = dice
        .deal(&home, count * 50 / 100)
        .iter()
        .map(|fact| Line::fact(truth, fact, fact.answer, fact.number).whole())
        .collect();
    let combinations = truth.combinations_of(domain, &RuleSet::ALL);
    let rules = dice.deal(&combinations, count * 20 / 100);
    all.extend(
        rules
            .iter()
            .map(|of| Line::rule(truth, of, of.outcome).whole()),
    );
    all.extend(narrative(truth, domain, count - all.len(), dice));
    dice.shuffle(&mut all);
    all.into_iter().map(unasked).collect()
}

/// The same number of questions for every outcome: sums of classes are not uniform, and a constant guess of
/// the middle one would otherwise score a third.
fn rule_questions(
    truth: &Truth,
    domain: Domain,
    set: RuleSet,
    per_outcome: usize,
    dice: &mut Dice,
) -> Vec<RuleQuestion> {
    let of_set = truth.combinations_of(domain, &[set]);
    let mut questions = Vec::with_capacity(per_outcome * NUMBERS.len());
    for outcome in 0..NUMBERS.len() {
        let cell: Vec<Combination> = of_set
            .iter()
            .filter(|of| of.outcome == outcome)
            .copied()
            .collect();
        for of in dice.deal(&cell, per_outcome.min(cell.len())) {
            let line = Line::rule(truth, &of, outcome);
            let choices = (0..NUMBERS.len())
                .map(|number| Line::rule(truth, &of, number).answer)
                .collect();
            let item = EvaluationItem {
                context: line.prompt,
                target: line.answer,
                choices,
            };
            questions.push(RuleQuestion { item, domain, set });
        }
    }
    questions
}
