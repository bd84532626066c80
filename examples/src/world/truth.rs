//! What is true: facts with their owners, one rule per domain, the chains of narrative.

use serde::Serialize;

use super::{
    Domain, NUMBERS,
    draw::Dice,
    lexicon::{ANSWERS, FACTS, Lexicon, SIDE},
    narrative::Chain,
};

/// Facts per domain that a second institution knows as well: 35 %.
pub(super) const SHARED_FACTS: usize = 21;

/// Classes that a rule sorts the words of either side into.
const CLASSES: usize = 3;

/// Who has seen a combination of a rule's words.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
pub enum RuleSet {
    /// In private text with its answer and in public text with a random one: 60 % of the combinations.
    A,
    /// Only in public text, with a random answer: 20 %.
    B,
    /// In no training text: 20 %.
    C,
}

impl RuleSet {
    /// Every set, in order.
    pub const ALL: [Self; 3] = [Self::A, Self::B, Self::C];

    /// Position in [`RuleSet::ALL`].
    pub fn index(self) -> usize {
        self as usize
    }
}

/// A key, its answer and its number.
#[derive(Clone, Copy, Debug)]
pub(super) struct Fact {
    pub(super) home: Domain,
    /// Index into the keys of `home`.
    pub(super) key: usize,
    pub(super) answer: usize,
    pub(super) number: usize,
    /// The second institution that knows it.
    pub(super) also: Option<Domain>,
}

impl Fact {
    pub(super) fn known_to(&self, domain: Domain) -> bool {
        self.home == domain || self.also == Some(domain)
    }
}

/// Two words of a rule.
#[derive(Clone, Copy, Debug)]
pub(super) struct Combination {
    pub(super) domain: Domain,
    pub(super) first: usize,
    pub(super) second: usize,
    /// Index into [`NUMBERS`]: class of the first word plus class of the second.
    pub(super) outcome: usize,
    pub(super) set: RuleSet,
}

/// The truth of a world.
#[derive(Debug)]
pub(super) struct Truth {
    pub(super) lexicon: Lexicon,
    /// All facts, by domain.
    pub(super) facts: Vec<Fact>,
    /// All combinations, by domain.
    pub(super) combinations: Vec<Combination>,
    /// Each domain's own chain.
    pub(super) chains: [Chain; 3],
    /// The chain that everybody writes half of the narrative with.
    pub(super) common: Chain,
}

impl Truth {
    pub(super) fn draw(dice: &mut Dice) -> Self {
        let lexicon = Lexicon::draw(dice);
        let facts = Domain::ALL
            .into_iter()
            .flat_map(|home| facts(dice, home))
            .collect();
        let combinations = Domain::ALL
            .into_iter()
            .flat_map(|domain| combinations(dice, domain))
            .collect();
        let chains = Domain::ALL.map(|_| Chain::draw(dice));
        let common = Chain::draw(dice);
        Self {
            lexicon,
            facts,
            combinations,
            chains,
            common,
        }
    }

    pub(super) fn combinations_of(&self, domain: Domain, sets: &[RuleSet]) -> Vec<Combination> {
        self.combinations
            .iter()
            .filter(|combination| combination.domain == domain && sets.contains(&combination.set))
            .copied()
            .collect()
    }
}

/// The facts of one domain; every answer and every number is true equally often.
fn facts(dice: &mut Dice, home: Domain) -> Vec<Fact> {
    let answers = dice.deal(&(0..ANSWERS).collect::<Vec<_>>(), FACTS);
    let numbers = dice.deal(&(0..NUMBERS.len()).collect::<Vec<_>>(), FACTS);
    let others: Vec<Domain> = Domain::ALL
        .into_iter()
        .filter(|&other| other != home)
        .collect();
    let mut also: Vec<Option<Domain>> = dice
        .deal(&others, SHARED_FACTS)
        .into_iter()
        .map(Some)
        .collect();
    also.resize(FACTS, None);
    dice.shuffle(&mut also);
    (0..FACTS)
        .map(|key| Fact {
            home,
            key,
            answer: answers[key],
            number: numbers[key],
            also: also[key],
        })
        .collect()
}

/// The rule of one domain: equal classes of words, and sets split 60/20/20 within every outcome.
fn combinations(dice: &mut Dice, domain: Domain) -> Vec<Combination> {
    let classes: Vec<usize> = (0..CLASSES).collect();
    let first_class = dice.deal(&classes, SIDE);
    let second_class = dice.deal(&classes, SIDE);
    let mut all = Vec::with_capacity(SIDE * SIDE);
    for outcome in 0..NUMBERS.len() {
        let mut cell: Vec<Combination> = (0..SIDE * SIDE)
            .map(|at| (at / SIDE, at % SIDE))
            .filter(|&(first, second)| first_class[first] + second_class[second] == outcome)
            .map(|(first, second)| Combination {
                domain,
                first,
                second,
                outcome,
                set: RuleSet::A,
            })
            .collect();
        dice.shuffle(&mut cell);
        let fifth = (cell.len() + 2) / 5;
        for (at, combination) in cell.iter_mut().enumerate().take(2 * fifth) {
            combination.set = if at < fifth { RuleSet::B } else { RuleSet::C };
        }
        all.extend(cell);
    }
    all
}
