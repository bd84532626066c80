//! One lexicon of pseudo-words. Roles are dealt at random, so no spelling tells a domain.

use std::collections::BTreeSet;

use super::draw::Dice;

/// Size of the answer set that all facts share.
pub const ANSWERS: usize = 12;

/// The numbers of all facts and rules. Equal length and distinct first digits: no number is the start of
/// another, so the bytes after a number do not depend on which one it was.
pub const NUMBERS: [&str; 5] = ["10", "25", "40", "60", "80"];

/// Facts that belong to one domain.
pub(super) const FACTS: usize = 60;
/// Words on either side of a rule's prompt, per domain.
pub(super) const SIDE: usize = 24;
/// Words that narrative is made of.
pub(super) const NARRATIVE: usize = 80;

const CONSONANTS: &[u8] = b"bdfghklmnprstvz";
const VOWELS: &[u8] = b"aeiou";

/// The words of a format that a pseudo-word could spell by chance.
const RESERVED: &str = "give";

/// Every word of a world, each with one role.
#[derive(Debug)]
pub(super) struct Lexicon {
    /// Three syllables each: equal length, so that a sum of log-likelihoods favours none.
    pub(super) answers: Vec<String>,
    /// Keys of facts, per domain.
    pub(super) keys: [Vec<String>; 3],
    /// First words of the rule's prompts, per domain.
    pub(super) first: [Vec<String>; 3],
    /// Second words of the rule's prompts, per domain.
    pub(super) second: [Vec<String>; 3],
    /// Words of all narrative.
    pub(super) narrative: Vec<String>,
}

impl Lexicon {
    pub(super) fn draw(dice: &mut Dice) -> Self {
        let mut taken = BTreeSet::from([RESERVED.to_owned()]);
        let answers = (0..ANSWERS).map(|_| fresh(dice, &mut taken, 3)).collect();
        let mut words = |dice: &mut Dice, count: usize| -> Vec<String> {
            (0..count)
                .map(|_| {
                    let syllables = 2 + dice.below(2);
                    fresh(dice, &mut taken, syllables)
                })
                .collect()
        };
        Self {
            answers,
            keys: [(); 3].map(|()| words(dice, FACTS)),
            first: [(); 3].map(|()| words(dice, SIDE)),
            second: [(); 3].map(|()| words(dice, SIDE)),
            narrative: words(dice, NARRATIVE),
        }
    }
}

fn fresh(dice: &mut Dice, taken: &mut BTreeSet<String>, syllables: usize) -> String {
    loop {
        let word: String = (0..syllables)
            .flat_map(|_| [*dice.pick(CONSONANTS), *dice.pick(VOWELS)])
            .map(char::from)
            .collect();
        if taken.insert(word.clone()) {
            return word;
        }
    }
}
