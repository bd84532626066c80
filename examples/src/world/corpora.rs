//! The texts: private lines, the reference set, holdouts, and the lines behind them.

use std::ops::Range;

use super::{
    Domain, EvaluationItem, Kind, NUMBERS, PublicItem, ReferenceItem, RuleSet, Sizes,
    draw::Dice,
    lexicon::ANSWERS,
    truth::{Combination, Fact, Truth},
};

/// A line cut before the blank that opens its answer.
#[derive(Clone, Debug)]
pub(super) struct Line {
    pub(super) prompt: String,
    pub(super) answer: String,
    /// Byte ranges of the answer word and the number in the whole line.
    pub(super) answers: Vec<Range<usize>>,
}

impl Line {
    pub(super) fn fact(truth: &Truth, fact: &Fact, answer: usize, number: usize) -> Self {
        let key = &truth.lexicon.keys[fact.home.index()][fact.key];
        let prompt = format!("ref {key} -> use");
        let (word, number) = (&truth.lexicon.answers[answer], NUMBERS[number]);
        let word_at = prompt.len() + 1..prompt.len() + 1 + word.len();
        let number_at = word_at.end + 1..word_at.end + 1 + number.len();
        let answer = format!(" {word} {number}{}.", fact.home.unit());
        Self {
            prompt,
            answer,
            answers: vec![word_at, number_at],
        }
    }

    pub(super) fn rule(truth: &Truth, of: &Combination, number: usize) -> Self {
        let domain = of.domain.index();
        let first = &truth.lexicon.first[domain][of.first];
        let second = &truth.lexicon.second[domain][of.second];
        let prompt = format!("for {first} {second} -> give");
        let number = NUMBERS[number];
        let number_at = prompt.len() + 1..prompt.len() + 1 + number.len();
        let answer = format!(" {number}{}.", of.domain.unit());
        Self {
            prompt,
            answer,
            answers: vec![number_at],
        }
    }

    pub(super) fn whole(&self) -> String {
        format!("{}{}", self.prompt, self.answer)
    }
}

/// A fact's question: twelve completions that share the true number and unit.
pub(super) fn fact_question(truth: &Truth, fact: &Fact) -> EvaluationItem {
    let line = Line::fact(truth, fact, fact.answer, fact.number);
    let choices = (0..ANSWERS)
        .map(|answer| Line::fact(truth, fact, answer, fact.number).answer)
        .collect();
    EvaluationItem {
        context: line.prompt,
        target: line.answer,
        choices,
    }
}

/// An item that counts for bits per byte only.
pub(super) fn unasked(target: String) -> EvaluationItem {
    EvaluationItem {
        context: String::new(),
        target,
        choices: Vec::new(),
    }
}

/// The private text of an institution.
pub(super) fn private(truth: &Truth, domain: Domain, lines: usize, dice: &mut Dice) -> Vec<String> {
    let whole = |item: EvaluationItem| format!("{}{}", item.context, item.target);
    holdout(truth, domain, lines, dice)
        .into_iter()
        .map(whole)
        .collect()
}

/// Fresh draws from what an institution knows: its facts, its rule on set A, its narrative.
pub(super) fn holdout(
    truth: &Truth,
    domain: Domain,
    items: usize,
    dice: &mut Dice,
) -> Vec<EvaluationItem> {
    let known: Vec<Fact> = truth
        .facts
        .iter()
        .filter(|fact| fact.known_to(domain))
        .copied()
        .collect();
    let combinations = truth.combinations_of(domain, &[RuleSet::A]);
    let mut all: Vec<EvaluationItem> = dice
        .deal(&known, items * 50 / 100)
        .iter()
        .map(|fact| fact_question(truth, fact))
        .collect();
    let rules = dice.deal(&combinations, items * 20 / 100);
    all.extend(
        rules
            .iter()
            .map(|of| unasked(Line::rule(truth, of, of.outcome).whole())),
    );
    let rest = items - all.len();
    all.extend(
        narrative(truth, domain, rest, dice)
            .into_iter()
            .map(unasked),
    );
    dice.shuffle(&mut all);
    all
}

/// Sentences of a domain, every second one of the common chain.
pub(super) fn narrative(
    truth: &Truth,
    domain: Domain,
    sentences: usize,
    dice: &mut Dice,
) -> Vec<String> {
    let words = &truth.lexicon.narrative;
    (0..sentences)
        .map(|at| {
            let own = &truth.chains[domain.index()];
            let chain = if at % 2 == 0 { &truth.common } else { own };
            chain.sentence(words, dice)
        })
        .collect()
}

/// The reference set. No answer in it depends on what is true, but for the share that `sizes` names.
pub(super) fn public(truth: &Truth, sizes: &Sizes, dice: &mut Dice) -> Vec<PublicItem> {
    let items = sizes.public_items;
    let mut all = Vec::with_capacity(items);
    let is_true = |dice: &mut Dice| {
        sizes.true_answers_permille > 0 && dice.below(1000) < sizes.true_answers_permille
    };
    for fact in dice.deal(&truth.facts, items * 40 / 100) {
        let (answer, number) = (dice.below(ANSWERS), dice.below(NUMBERS.len()));
        let line = if is_true(dice) {
            Line::fact(truth, &fact, fact.answer, fact.number)
        } else {
            Line::fact(truth, &fact, answer, number)
        };
        let mut owners: Vec<Domain> = fact.also.into_iter().chain([fact.home]).collect();
        owners.sort_unstable();
        all.push(unlabeled(&line, Kind::Fact, owners));
    }
    let prompts: Vec<Combination> = Domain::ALL
        .into_iter()
        .flat_map(|domain| truth.combinations_of(domain, &[RuleSet::A, RuleSet::B]))
        .collect();
    for of in dice.deal(&prompts, items * 40 / 100) {
        let number = dice.below(NUMBERS.len());
        let number = if is_true(dice) { of.outcome } else { number };
        let line = Line::rule(truth, &of, number);
        all.push(unlabeled(&line, Kind::Rule, vec![of.domain]));
    }
    for at in 0..items - all.len() {
        let domain = Domain::ALL[at / 2 % 3];
        let (chain, owners) = if at % 2 == 0 {
            (&truth.common, Domain::ALL.to_vec())
        } else {
            (&truth.chains[domain.index()], vec![domain])
        };
        let target = chain.sentence(&truth.lexicon.narrative, dice);
        let item = ReferenceItem {
            context: String::new(),
            target,
            unlabeled: Vec::new(),
        };
        all.push(PublicItem {
            item,
            kind: Kind::Narrative,
            owners,
        });
    }
    dice.shuffle(&mut all);
    all
}

fn unlabeled(line: &Line, kind: Kind, owners: Vec<Domain>) -> PublicItem {
    let (target, unlabeled) = (line.whole(), line.answers.clone());
    PublicItem {
        item: ReferenceItem {
            context: String::new(),
            target,
            unlabeled,
        },
        kind,
        owners,
    }
}
