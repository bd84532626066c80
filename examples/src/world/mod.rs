//! Three private corpora, one public reference set and the questions that measure what was learned.
//!
//! The world is built so that an honest gain has only one possible source. Everybody shares one lexicon of
//! pseudo-words, one set of answers, one set of numbers and the same line formats; only the unit at the end of
//! a line tells the domain. Every answer in the public text is drawn at random, unless [`Sizes`] says otherwise, so
//! what is true can reach the pivot through records alone.
//!
//! A world is a pure function of a seed and [`Sizes`]: the same bytes on every machine.

mod corpora;
mod draw;
mod files;
mod lexicon;
mod narrative;
mod questions;
#[cfg(test)]
mod tests;
mod truth;

use std::{fmt, ops::Range};

use serde::Serialize;

pub use files::Files;
pub use lexicon::{ANSWERS, NUMBERS};
pub use truth::RuleSet;

use draw::{Dice, Stream};
use truth::Truth;

/// A field of knowledge, and the institution that lives in it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Domain {
    /// A hospital's clinic; lines end in `mg.`.
    Clinic,
    /// A bank; lines end in `ug.`.
    Bank,
    /// An insurer; lines end in `ml.`.
    Insurer,
}

impl Domain {
    /// Every domain, in the order used by all arrays indexed by domain.
    pub const ALL: [Self; 3] = [Self::Clinic, Self::Bank, Self::Insurer];

    /// Lower-case name, also the institution's name and the stem of its files.
    pub fn name(self) -> &'static str {
        match self {
            Self::Clinic => "clinic",
            Self::Bank => "bank",
            Self::Insurer => "insurer",
        }
    }

    /// The only mark of the domain in a line.
    pub fn unit(self) -> &'static str {
        match self {
            Self::Clinic => "mg",
            Self::Bank => "ug",
            Self::Insurer => "ml",
        }
    }

    /// Position in [`Domain::ALL`].
    pub fn index(self) -> usize {
        match self {
            Self::Clinic => 0,
            Self::Bank => 1,
            Self::Insurer => 2,
        }
    }
}

impl fmt::Display for Domain {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// How many lines of each text to write. What is true does not depend on it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Sizes {
    /// Lines of private text per institution: 50 % facts, 20 % rule, 30 % narrative.
    pub private_lines: usize,
    /// Items of the reference set: 40 % facts, 40 % rule prompts, 20 % narrative.
    pub public_items: usize,
    /// Share of the facts and rule prompts among them whose answer is true, in thousandths; all others are drawn at random.
    pub true_answers_permille: usize,
    /// Items of each institution's private holdout, mixed as its private text.
    pub holdout_items: usize,
    /// Test lines per domain, mixed as private text.
    pub test_lines: usize,
    /// Rule questions per domain, combination set and outcome; 13 at most.
    pub rule_questions: usize,
}

impl Default for Sizes {
    fn default() -> Self {
        Self {
            private_lines: 5_000,
            public_items: 4_500,
            true_answers_permille: 0,
            holdout_items: 200,
            test_lines: 400,
            rule_questions: 10,
        }
    }
}

/// What a line is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Kind {
    /// A key and its answer, to be remembered.
    Fact,
    /// Two words and the number that follows from them.
    Rule,
    /// A sentence of a Markov chain.
    Narrative,
}

/// One item of the reference set, as it stands in `public.jsonl`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct ReferenceItem {
    /// Text before the target; always empty here.
    pub context: String,
    /// The text that sources score and the pivot learns.
    pub target: String,
    /// Byte ranges of `target` whose bytes were drawn at random: the answer word and the number, without the
    /// blanks around them and without the unit.
    #[serde(serialize_with = "as_pairs")]
    pub unlabeled: Vec<Range<usize>>,
}

/// A reference item with what the generator knows about it; the notes never leave the process.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PublicItem {
    /// What is written to the reference set.
    pub item: ReferenceItem,
    /// What the line is about.
    pub kind: Kind,
    /// Whose private text can answer it, ascending: one or two institutions for a fact, one for a rule or a
    /// sentence of a domain's own chain, all for the shared chain.
    pub owners: Vec<Domain>,
}

/// One evaluation item, the shape that the node's evaluator reads.
///
/// A context never ends in a blank: the blank opens the target and every choice, so that a tokenizer that binds
/// blanks to the word after them cuts the joined text in the same place. Choices complete the record, differ in
/// the answer alone and have equal length.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct EvaluationItem {
    /// Text before the target, not scored.
    pub context: String,
    /// What truly follows; one of `choices` where there are any.
    pub target: String,
    /// Candidates to be ranked, in the same order for all items of a kind; empty for bits per byte only.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub choices: Vec<String>,
}

/// What one institution has at home.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Institution {
    /// Its domain.
    pub domain: Domain,
    /// Lines of private text: the facts it knows, the rule on set A, narrative.
    pub private: Vec<String>,
    /// Fresh draws from the same text; facts carry choices.
    pub holdout: Vec<EvaluationItem>,
}

/// A fact asked with the twelve answers as choices.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FactQuestion {
    /// Prompt, truth and choices.
    pub item: EvaluationItem,
    /// The domain that the fact belongs to.
    pub home: Domain,
    /// The second institution that knows it, if any.
    pub also: Option<Domain>,
}

/// A rule prompt asked with the five numbers as choices.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RuleQuestion {
    /// Prompt, truth and choices.
    pub item: EvaluationItem,
    /// The domain whose rule it is.
    pub domain: Domain,
    /// Who has seen the combination.
    pub set: RuleSet,
}

/// What every arm is measured on. No training text is made of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tests {
    /// Lines per domain for bits per byte, in the order of [`Domain::ALL`]: true facts of the domain, the rule
    /// on combinations of all three sets, narrative.
    pub lines: [Vec<EvaluationItem>; 3],
    /// All facts of all domains. Every answer is right equally often: a constant guess scores 1/12.
    pub facts: Vec<FactQuestion>,
    /// Rule questions. Every number is right equally often: a constant guess scores 1/5.
    pub rules: Vec<RuleQuestion>,
}

/// Everything a run of the example needs to be told.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct World {
    /// The seed it was made from.
    pub seed: u64,
    /// The institutions, in the order of [`Domain::ALL`].
    pub institutions: [Institution; 3],
    /// The public reference set, shuffled.
    pub public: Vec<PublicItem>,
    /// The test sets.
    pub tests: Tests,
}

impl World {
    /// Makes the world of a seed. Each text has its own stream of draws, so that resizing one leaves the
    /// others and the truth as they were.
    pub fn generate(seed: u64, sizes: &Sizes) -> Self {
        let truth = Truth::draw(&mut Dice::new(seed, Stream::Truth));
        let institutions = Domain::ALL.map(|domain| {
            let mut dice = Dice::new(seed, Stream::Private(domain));
            let private = corpora::private(&truth, domain, sizes.private_lines, &mut dice);
            let mut dice = Dice::new(seed, Stream::Holdout(domain));
            let holdout = corpora::holdout(&truth, domain, sizes.holdout_items, &mut dice);
            Institution {
                domain,
                private,
                holdout,
            }
        });
        let public = corpora::public(&truth, sizes, &mut Dice::new(seed, Stream::Public));
        let tests = questions::tests(&truth, sizes, &mut Dice::new(seed, Stream::Tests));
        Self {
            seed,
            institutions,
            public,
            tests,
        }
    }
}

fn as_pairs<S: serde::Serializer>(ranges: &[Range<usize>], to: S) -> Result<S::Ok, S::Error> {
    to.collect_seq(ranges.iter().map(|range| [range.start, range.end]))
}
