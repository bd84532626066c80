//! Sentences of sparse Markov chains.

use super::{draw::Dice, lexicon::NARRATIVE};

/// Chances of a word's successors, in fifteenths: 1.64 bits a word.
const CHANCES: [usize; 4] = [8, 4, 2, 1];

/// For each word of the lexicon's narrative, the words that may follow, most likely first.
#[derive(Debug)]
pub(super) struct Chain(Vec<[usize; CHANCES.len()]>);

impl Chain {
    pub(super) fn draw(dice: &mut Dice) -> Self {
        let words: Vec<usize> = (0..NARRATIVE).collect();
        Self(
            (0..NARRATIVE)
                .map(|_| {
                    let next = dice.deal(&words, CHANCES.len());
                    [next[0], next[1], next[2], next[3]]
                })
                .collect(),
        )
    }

    /// Six to ten words and a full stop.
    pub(super) fn sentence(&self, words: &[String], dice: &mut Dice) -> String {
        let mut at = dice.below(NARRATIVE);
        let mut sentence = words[at].clone();
        for _ in 1..6 + dice.below(5) {
            at = self.0[at][successor(dice.below(CHANCES.iter().sum()))];
            sentence.push(' ');
            sentence.push_str(&words[at]);
        }
        sentence.push('.');
        sentence
    }
}

/// Which successor a draw among the fifteenths means.
fn successor(mut draw: usize) -> usize {
    for (at, &chance) in CHANCES.iter().enumerate() {
        if draw < chance {
            return at;
        }
        draw -= chance;
    }
    CHANCES.len() - 1
}
