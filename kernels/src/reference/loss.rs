//! Trie loss and cross-entropy, node by node over the whole vocabulary.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;

use crate::backend::NotFinite;
use crate::element::Element;
use crate::loss::{ItemLoss, LossJob, NO_LABEL, Place, Tail, Term, first_byte, probability};
use crate::records::RecordView;
use crate::reference::{log_mass, sorted, wide};
use crate::vocab::Vocab;

/// Class of a token at a node.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Class {
    Byte(u8),
    /// The node is the token.
    Stop,
    End,
    Ghost,
    /// Carries mass at the node, is never a target.
    Removed,
}

/// Losses of some rows of a job, whose logits become gradients.
pub(crate) fn rows<T: Element>(
    job: &LossJob<'_>,
    rows: Range<usize>,
    logits: &mut [T],
) -> Result<Vec<f64>, NotFinite> {
    let width = job.vocab.len();
    rows.zip(logits.chunks_exact_mut(width))
        .map(|(index, logits)| {
            let row = wide(job.vocab, logits, 0)
                .map_err(|NotFinite { column, .. }| NotFinite { row: index, column })?;
            let (item, place) = job.place(index);
            let (loss, grad) = row_loss(job.vocab, item, place, &row);
            logits.fill(T::default());
            for (logit, value) in logits.iter_mut().zip(grad) {
                #[expect(clippy::cast_possible_truncation, reason = "gradients are at most f32")]
                let value = value as f32;
                *logit = T::from_f32(value);
            }
            Ok(loss)
        })
        .collect()
}

/// Loss and gradient of one row of an item.
pub(crate) fn row_loss(
    vocab: &Vocab,
    item: &ItemLoss<'_>,
    place: Place,
    row: &[f64],
) -> (f64, Vec<f64>) {
    let mut grad = vec![0.0; row.len()];
    let mut loss = 0.0;
    for term in item.terms {
        loss += match *term {
            Term::Trie { target, weight } => {
                let trie = TrieTerm {
                    vocab,
                    tokens: item.tokens,
                    target,
                    weight: f64::from(weight),
                };
                trie_row(&trie, place, row, &mut grad)
            }
            Term::Labels { labels, weight } => {
                label_row(vocab, labels[place.index], weight, row, &mut grad)
            }
            Term::Tokens {
                target,
                weight,
                tail,
            } => {
                let class_of = |rank: usize| {
                    let bytes = token_bytes(vocab, rank).to_vec();
                    let is_listed = target
                        .listed(place.index)
                        .any(|(id, _)| spelled(vocab, id).is_some_and(|listed| listed == bytes));
                    Some(if is_listed {
                        TokenClass::Listed(bytes)
                    } else {
                        TokenClass::Ghost
                    })
                };
                let mut shares = BTreeMap::new();
                for (id, code) in target.listed(place.index) {
                    if let Some(bytes) = spelled(vocab, id) {
                        *shares
                            .entry(TokenClass::Listed(bytes.to_vec()))
                            .or_default() += probability(code);
                    }
                }
                if tail == Tail::Ghost {
                    shares.insert(TokenClass::Ghost, probability(target.tail()[place.index]));
                }
                node(f64::from(weight), class_of, shares, row, &mut grad)
            }
            Term::Sorted { target, .. } | Term::Standardised { target, .. }
                if place.index >= target.positions() =>
            {
                0.0
            }
            Term::Sorted { target, weight } => {
                sorted::probabilities(target, place.index, weight.into(), row, &mut grad)
            }
            Term::Standardised {
                target,
                weight,
                temperature,
            } => {
                let (weight, temperature) = (weight.into(), temperature.into());
                sorted::standardised(target, place.index, weight, temperature, row, &mut grad)
            }
        };
    }
    (loss, grad)
}

/// Class of a token in a token-space target: what it spells, nothing for an end.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum TokenClass {
    Listed(Vec<u8>),
    Ghost,
}

/// Bytes of a token id; `None` for ignored ones.
fn spelled(vocab: &Vocab, id: u32) -> Option<&[u8]> {
    let rank = vocab.rank_of_id()[id as usize];
    ((rank as usize) < vocab.live()).then(|| vocab.token_bytes(rank))
}

fn label_row(vocab: &Vocab, label: u32, weight: f32, row: &[f64], grad: &mut [f64]) -> f64 {
    let Some(class) = (label != NO_LABEL).then(|| vocab.class(label)).flatten() else {
        return 0.0;
    };
    let weight = f64::from(weight);
    let total = log_mass(row, |_| true);
    let mass = log_mass(row, |rank| class.contains(&rank));
    for (rank, logit) in row.iter().enumerate() {
        grad[rank] += weight * (logit - total).exp();
        if class.contains(&rank) {
            grad[rank] -= weight * (logit - mass).exp();
        }
    }
    weight * (total - mass)
}

/// A trie term with what it needs of its item.
struct TrieTerm<'a> {
    vocab: &'a Vocab,
    tokens: &'a [u32],
    target: RecordView<'a>,
    weight: f64,
}

fn trie_row(job: &TrieTerm<'_>, place: Place, row: &[f64], grad: &mut [f64]) -> f64 {
    let Place { index, offset } = place;
    let mut loss = root(job, index, offset, row, grad);
    if let Some(&token) = job.tokens.get(index) {
        let bytes = job.vocab.token_bytes(token);
        for taken in 1..=bytes.len() {
            let next = if taken < bytes.len() {
                None
            } else {
                Some(first_byte(job.vocab, job.tokens, index + 1))
            };
            loss += deeper(job, &bytes[..taken], offset + taken, next, row, grad);
        }
    }
    loss
}

fn root(job: &TrieTerm<'_>, index: usize, position: usize, row: &[f64], grad: &mut [f64]) -> f64 {
    let observed = first_byte(job.vocab, job.tokens, index);
    let listed: BTreeMap<u8, u8> = job.target.listed(position).collect();
    let continued: BTreeSet<u8> = match index.checked_sub(1) {
        Some(previous) => {
            let prefix = job.vocab.token_bytes(job.tokens[previous]);
            (0..job.vocab.byte_tokens())
                .map(|rank| job.vocab.token_bytes(rank))
                .filter(|bytes| bytes.starts_with(prefix))
                .filter_map(|bytes| bytes.get(prefix.len()).copied())
                .filter(|&byte| Some(byte) != observed)
                .collect()
        }
        None => BTreeSet::new(),
    };
    let class_of = |rank: usize| match token_bytes(job.vocab, rank).first() {
        None => Some(Class::End),
        Some(byte) if continued.contains(byte) => Some(Class::Removed),
        Some(&byte) if listed.contains_key(&byte) => Some(Class::Byte(byte)),
        Some(_) => Some(Class::Ghost),
    };
    let mut target = BTreeMap::from([
        (Class::End, probability(job.target.end()[position])),
        (Class::Ghost, probability(job.target.tail()[position])),
    ]);
    for (&byte, &code) in &listed {
        target.insert(Class::Byte(byte), probability(code));
    }
    node(job.weight, class_of, target, row, grad)
}

/// `next` is what followed the token where it stops here: a byte, or the end of the record.
fn deeper(
    job: &TrieTerm<'_>,
    prefix: &[u8],
    position: usize,
    next: Option<Option<u8>>,
    row: &[f64],
    grad: &mut [f64],
) -> f64 {
    let class_of = |rank: usize| {
        let bytes = token_bytes(job.vocab, rank);
        if !bytes.starts_with(prefix) {
            return None;
        }
        Some(
            bytes
                .get(prefix.len())
                .map_or(Class::Stop, |&byte| Class::Byte(byte)),
        )
    };
    let children: BTreeSet<Class> = (0..row.len())
        .filter_map(class_of)
        .filter(|&class| class != Class::Stop)
        .collect();
    if next.is_some() && children.is_empty() {
        return 0.0;
    }
    let mut target = BTreeMap::new();
    *target.entry(Class::Stop).or_default() += probability(job.target.end()[position]);
    for (byte, code) in job.target.listed(position) {
        let is_child = children.contains(&Class::Byte(byte)) && next != Some(Some(byte));
        let class = if is_child {
            Class::Byte(byte)
        } else {
            Class::Stop
        };
        *target.entry(class).or_default() += probability(code);
    }
    node(job.weight, class_of, target, row, grad)
}

/// `-sum_c target_c ln(mass_c / M)` and its gradient over the tokens that have a class.
fn node<C: Ord>(
    weight: f64,
    class_of: impl Fn(usize) -> Option<C>,
    mut target: BTreeMap<C, f64>,
    row: &[f64],
    grad: &mut [f64],
) -> f64 {
    let present: BTreeSet<C> = (0..row.len()).filter_map(&class_of).collect();
    target.retain(|class, share| present.contains(class) && *share > 0.0);
    let sum: f64 = target.values().sum();
    if target.is_empty() {
        return 0.0;
    }
    let total = log_mass(row, |rank| class_of(rank).is_some());
    let mut loss = 0.0;
    for (rank, logit) in row.iter().enumerate() {
        if class_of(rank).is_some() {
            grad[rank] += weight * (logit - total).exp();
        }
    }
    for (class, share) in &target {
        let mass = log_mass(row, |rank| class_of(rank).as_ref() == Some(class));
        loss += weight * share / sum * (total - mass);
        for (rank, logit) in row.iter().enumerate() {
            if class_of(rank).as_ref() == Some(class) {
                grad[rank] -= weight * share / sum * (logit - mass).exp();
            }
        }
    }
    loss
}

fn token_bytes(vocab: &Vocab, rank: usize) -> &[u8] {
    u32::try_from(rank).map_or(&[], |rank| vocab.token_bytes(rank))
}
