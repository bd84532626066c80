//! Records from the likeliest tokens alone, for sources behind a server that lists K per position.
//!
//! The formulas are those of [`crate::score`]. What is new is the mass that a row does not list: it
//! is nobody's. It stays in every denominator and goes to the tail, so that no listed symbol ever
//! gets more than the whole softmax would give it.
//!
//! - At the root the unseen mass is `1 - sum p`.
//! - At a node below it is at most that, and at most the number of unlisted tokens below the node
//!   times the K-th largest probability. This bound `x` joins the node's listed mass: running on by
//!   c is `p(u + c ..) / (p(u ..) + x)`, and the tail takes `x / (p(u ..) + x)`.
//!
//! Where every token is listed, nothing is unseen and the records are those of the softmax itself.
//! Tokens that spell nothing are left out of the softmax where they are listed, as everywhere in
//! this crate; unlisted ones count as unseen.

use std::collections::BTreeMap;

use crate::cpu::{Dense, END, encode};
use crate::error::{ListedError, ScoreError};
use crate::records::{RecordShape, Records};
use crate::score::{Branch, ItemTokens, Means, Missed, RecordsJob, ScoreJob, check_length};
use crate::trie::Node;
use crate::vocab::Vocab;

/// What rounding of `f32` log-probabilities may hide of a sum; as long as a token is unlisted, no
/// less is taken for unseen.
const ROUNDING: f64 = 2e-6;

/// Listed probabilities may exceed one by this much: servers compute with 8 to 24 bits.
const EXCESS: f64 = 1e-2;

/// Smallest log-probability that is told apart from others; servers write impossible ones as -9999.
const LEAST: f32 = -700.0;

/// The likeliest tokens of one softmax row, and the observed one.
#[derive(Clone, Debug, PartialEq)]
pub struct ListedRow {
    /// Ranks of byte and end tokens, ascending.
    ranks: Vec<u32>,
    /// Their probabilities.
    mass: Vec<f64>,
    /// Probability of all tokens that are not listed.
    unseen: f64,
    /// Most that one of them can have.
    each: f64,
}

impl ListedRow {
    /// Takes pairs of token id and natural log-probability: the `top` likeliest tokens, and perhaps
    /// others such as the observed one, in any order. Ids that the vocabulary does not have, such as
    /// padding of the output head, count as ignored tokens.
    ///
    /// # Errors
    /// A value that is no log-probability, a token twice, a sum above one, or fewer than `top`
    /// tokens where that is not all of them.
    pub fn new(vocab: &Vocab, listed: &[(u32, f32)], top: usize) -> Result<Self, ListedError> {
        let mut values = Vec::with_capacity(listed.len());
        let mut live = BTreeMap::new();
        let mut ids: Vec<u32> = listed.iter().map(|&(id, _)| id).collect();
        ids.sort_unstable();
        if let Some(pair) = ids.windows(2).find(|pair| pair[0] == pair[1]) {
            return Err(ListedError::Twice { id: pair[0] });
        }
        for &(id, value) in listed {
            if value.is_nan() || f64::from(value) > EXCESS {
                return Err(ListedError::Value { id, value });
            }
            let mass = f64::from(value.max(LEAST)).exp();
            values.push(mass);
            let rank = vocab.rank_of_id().get(id as usize).copied();
            if let Some(rank) = rank.filter(|&rank| (rank as usize) < vocab.live()) {
                live.insert(rank, mass);
            }
        }
        let sum: f64 = values.iter().sum();
        if sum > 1.0 + EXCESS {
            return Err(ListedError::Sum { sum });
        }
        let (ranks, mass): (Vec<u32>, Vec<f64>) = live.into_iter().unzip();
        let complete = ranks.len() == vocab.live();
        if values.len() < top && !complete {
            let got = values.len();
            return Err(ListedError::Few { got, top });
        }
        values.sort_unstable_by(|a, b| b.total_cmp(a));
        let each = top.checked_sub(1).and_then(|last| values.get(last));
        Ok(Self {
            ranks,
            mass,
            unseen: if complete {
                0.0
            } else {
                (1.0 - sum).max(ROUNDING)
            },
            each: each.copied().unwrap_or(1.0),
        })
    }

    /// Probability of all tokens that are not listed.
    #[must_use]
    pub const fn unseen(&self) -> f64 {
        self.unseen
    }

    /// Ranks of the listed byte and end tokens with their probabilities, ascending.
    pub fn tokens(&self) -> impl Iterator<Item = (u32, f64)> {
        self.range(0, u32::MAX)
    }

    /// Listed tokens with ranks from `start` to before `end`.
    fn range(&self, start: u32, end: u32) -> impl Iterator<Item = (u32, f64)> {
        let at = |rank| self.ranks.partition_point(|&listed| listed < rank);
        let range = at(start)..at(end);
        let masses = self.mass[range.clone()].iter().copied();
        self.ranks[range].iter().copied().zip(masses)
    }

    /// Next-byte masses at the root.
    fn root(&self, vocab: &Vocab) -> Partial {
        let mut mass = [0.0; 257];
        for (rank, listed) in self.range(0, u32::MAX) {
            let first = vocab.token_bytes(rank).first();
            mass[first.map_or(END, |&byte| usize::from(byte))] += listed;
        }
        let total = mass.iter().sum::<f64>() + self.unseen;
        mass.iter_mut().for_each(|mass| *mass /= total);
        Partial {
            mass,
            unseen: self.unseen / total,
        }
    }

    /// How the listed mass at or below a node of `depth` bytes splits.
    fn split(&self, vocab: &Vocab, node: &Node, depth: usize) -> Split {
        let mut split = Split {
            stop: 0.0,
            likeliest: None,
            running: [0.0; 257],
            longer: 0.0,
            unseen: 0.0,
        };
        let mut best = 0.0;
        let mut unlisted = node.end - node.start;
        for (rank, mass) in self.range(node.start, node.end) {
            unlisted -= 1;
            if let Some(&byte) = vocab.token_bytes(rank).get(depth) {
                split.running[usize::from(byte)] += mass;
                split.longer += mass;
                continue;
            }
            split.stop += mass;
            if mass > best {
                best = mass;
                split.likeliest = Some(rank);
            }
        }
        split.unseen = self.unseen.min(f64::from(unlisted) * self.each);
        split
    }
}

/// A next-byte distribution of which some mass is nobody's.
#[derive(Clone, Debug)]
struct Partial {
    mass: Dense,
    unseen: f64,
}

/// Listed mass at a node, in probabilities of the row.
struct Split {
    /// What spells exactly the node.
    stop: f64,
    /// The likeliest token among that, the smaller rank on a tie.
    likeliest: Option<u32>,
    /// What goes on, by byte.
    running: Dense,
    /// Sum of that.
    longer: f64,
    /// Most that unlisted tokens may hold there.
    unseen: f64,
}

impl Split {
    /// Most that the whole node may hold.
    fn total(&self) -> f64 {
        self.stop + self.longer + self.unseen
    }
}

/// Interior stops with more than `threshold` of what is listed of their node's mass: the forwards
/// that [`records`] wants. A stop that is not listed is never found.
///
/// `tokens` are the ranks of the target without the end; row i predicts token i, the last row the
/// end of the record.
///
/// # Errors
/// Where sizes disagree, a rank spells no bytes, or a row lacks its observed token.
pub fn branches(
    vocab: &Vocab,
    tokens: &[u32],
    rows: &[ListedRow],
    threshold: f32,
) -> Result<Vec<Branch>, ScoreError> {
    let job = checked(vocab, tokens, rows)?;
    let mut found = Vec::new();
    for (index, row) in rows.iter().enumerate() {
        let bytes = job.bytes(index);
        for (taken, node) in path(vocab, bytes).take(bytes.len().saturating_sub(1)) {
            let split = row.split(vocab, node, taken);
            if let Some(rank) = split.likeliest
                && split.stop > f64::from(threshold) * (split.stop + split.longer)
            {
                found.push(Branch {
                    position: narrow(index),
                    taken: narrow(taken),
                    rank,
                });
            }
        }
    }
    Ok(found)
}

/// Appends the L + 1 positions of an item to `out`; `branch_rows[b]` is the row after the context,
/// the tokens before `branches[b].position`, and the branch token.
///
/// What this returns counts a node's unseen share as missed, beside what [`Missed`] says.
///
/// # Errors
/// As [`branches`], and where a branch is no interior stop or the shape is not that of `out`; `out`
/// is then unchanged.
pub fn records(
    vocab: &Vocab,
    tokens: &[u32],
    rows: &[ListedRow],
    branches: &[Branch],
    branch_rows: &[ListedRow],
    shape: &RecordShape,
    out: &mut Records,
) -> Result<Missed, ScoreError> {
    let job = checked(vocab, tokens, rows)?;
    let items = [ItemTokens { tokens, branches }];
    let job = RecordsJob::new(job, &items, shape)?;
    check_length("branch rows", branch_rows.len(), branches.len())?;
    out.check_k(shape.k)?;

    let mut means = Means::default();
    let mut candidates = Vec::new();
    let mut before: Option<Split> = None;
    for (index, row) in rows.iter().enumerate() {
        let bytes = job.score.bytes(index);
        let mut first = row.root(vocab);
        let long = before.map(|before| couple(&mut first, &before, bytes.first().copied()));
        means.observe(&[], long.flatten());
        let mut wanted = job.branches(index);
        encode(&mut first.mass, first.unseen, shape, &mut candidates, out);
        before = None;
        for (taken, node) in path(vocab, bytes) {
            let split = row.split(vocab, node, taken);
            let Some(&observed) = bytes.get(taken) else {
                before = Some(split);
                break;
            };
            let stopped = wanted
                .next_if(|(_, branch)| branch.taken as usize == taken)
                .map(|(row, _)| branch_rows[row].root(vocab));
            let (mut next, short) = interior(&split, stopped.as_ref(), usize::from(observed));
            means.observe(&[short], None);
            encode(&mut next.mass, next.unseen, shape, &mut candidates, out);
        }
    }
    Ok(means.missed())
}

/// Bits of the observed tokens and the end, `-sum log2 p`, from what is listed.
///
/// # Errors
/// As [`branches`].
pub fn token_bits(vocab: &Vocab, tokens: &[u32], rows: &[ListedRow]) -> Result<f64, ScoreError> {
    let job = checked(vocab, tokens, rows)?;
    let bits = rows.iter().enumerate().map(|(index, row)| {
        let class = observed(&job, index);
        let mass: f64 = row.range(class.0, class.1).map(|(_, mass)| mass).sum();
        let all: f64 = row.mass.iter().sum::<f64>() + row.unseen;
        (all / mass).log2()
    });
    Ok(bits.sum())
}

/// Checks sizes, ranks, and that each row lists what was observed.
fn checked<'a>(
    vocab: &'a Vocab,
    tokens: &'a [u32],
    rows: &[ListedRow],
) -> Result<ScoreJob<'a>, ScoreError> {
    let job = ScoreJob::new(vocab, &[tokens])?;
    check_length("rows", rows.len(), job.rows())?;
    for (index, row) in rows.iter().enumerate() {
        let (start, end) = observed(&job, index);
        if row.range(start, end).next().is_none() {
            return Err(ScoreError::NotListed { row: index });
        }
    }
    Ok(job)
}

/// Ranks of the class that a row observed.
fn observed(job: &ScoreJob<'_>, row: usize) -> (u32, u32) {
    let class = job.token(row).and_then(|rank| job.vocab.class(rank));
    let class = class.unwrap_or_else(|| job.vocab.ends());
    (narrow(class.start), narrow(class.end))
}

/// Nodes below the root along some bytes, with the number of bytes taken.
fn path<'a>(vocab: &'a Vocab, bytes: &'a [u8]) -> impl Iterator<Item = (usize, &'a Node)> {
    let trie = vocab.trie();
    let nodes = bytes.iter().scan(trie.root(), move |node, &byte| {
        *node = trie.child(node, byte)?;
        Some(*node)
    });
    (1..).zip(nodes)
}

/// Turns a root into the coupled boundary after `before`; returns what the following bytes miss.
fn couple(first: &mut Partial, before: &Split, observed: Option<u8>) -> Option<f64> {
    let total = before.total();
    let stopped = before.stop / total;
    for (mass, running) in first.mass.iter_mut().zip(&before.running) {
        *mass = stopped * *mass + running / total;
    }
    let unseen = before.unseen / total;
    first.unseen = stopped * first.unseen + unseen;
    let observed = usize::from(observed?);
    let ran_on = share(before.running[observed] / total, first.mass[observed]);
    Some((ran_on + unseen).min(1.0))
}

/// Next-byte distribution inside a token, and the share missed.
fn interior(split: &Split, stopped: Option<&Partial>, observed: usize) -> (Partial, f64) {
    let total = split.total();
    let mut mass = split.running;
    let Some(root) = stopped else {
        let kept = split.longer + split.unseen;
        mass.iter_mut().for_each(|mass| *mass /= kept);
        let unseen = split.unseen / kept;
        let missed = (split.stop + split.unseen) / total;
        return (Partial { mass, unseen }, missed);
    };
    let stopped = split.stop / total;
    let dropped = stopped * root.mass[observed];
    let kept = mass[observed] / total;
    for (mass, root) in mass.iter_mut().zip(&root.mass) {
        *mass = *mass / total + stopped * root;
    }
    let unseen = split.unseen / total;
    let missed = share(dropped, dropped + kept) + unseen;
    let unseen = unseen + stopped * root.unseen;
    (Partial { mass, unseen }, missed.min(1.0))
}

fn share(part: f64, whole: f64) -> f64 {
    if whole > 0.0 { part / whole } else { 0.0 }
}

fn narrow(value: usize) -> u32 {
    u32::try_from(value).expect("a target has fewer than 2^32 bytes")
}
