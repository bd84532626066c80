//! Trie loss and cross-entropy, node by node over the whole vocabulary.

use std::collections::{BTreeMap, BTreeSet};

use crate::backend::NotFinite;
use crate::loss::{NO_LABEL, TrieJob, probability};
use crate::reference::{log_mass, wide};
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

pub(crate) fn trie_loss(
    job: &TrieJob<'_>,
    logits: &[f32],
    grad: &mut [f32],
) -> Result<f64, NotFinite> {
    let mut loss = 0.0;
    let mut offset = 0;
    for index in 0..=job.tokens.len() {
        let row = wide(job.vocab, logits, index)?;
        let (row_loss, row_grad) = trie_row(job, index, offset, &row);
        loss += row_loss;
        add(&mut grad[index * job.vocab.len()..], &row_grad);
        offset += job
            .tokens
            .get(index)
            .map_or(0, |&token| job.vocab.token_bytes(token).len());
    }
    Ok(loss)
}

pub(crate) fn cross_entropy(
    vocab: &Vocab,
    labels: &[u32],
    logits: &[f32],
    weight: f32,
    grad: &mut [f32],
) -> Result<f64, NotFinite> {
    let weight = f64::from(weight);
    let mut loss = 0.0;
    for (index, &label) in labels.iter().enumerate() {
        let row = wide(vocab, logits, index)?;
        let Some(class) = (label != NO_LABEL).then(|| vocab.class(label)).flatten() else {
            continue;
        };
        let total = log_mass(&row, |_| true);
        let mass = log_mass(&row, |rank| class.contains(&rank));
        loss += weight * (total - mass);
        let row_grad: Vec<f64> = row
            .iter()
            .enumerate()
            .map(|(rank, logit)| {
                let inside = if class.contains(&rank) {
                    (logit - mass).exp()
                } else {
                    0.0
                };
                weight * ((logit - total).exp() - inside)
            })
            .collect();
        add(&mut grad[index * vocab.len()..], &row_grad);
    }
    Ok(loss)
}

/// Loss and gradient of row `index`, whose token starts at byte `offset`.
pub(crate) fn trie_row(
    job: &TrieJob<'_>,
    index: usize,
    offset: usize,
    row: &[f64],
) -> (f64, Vec<f64>) {
    let mut grad = vec![0.0; row.len()];
    let mut loss = root(job, index, offset, row, &mut grad);
    if let Some(&token) = job.tokens.get(index) {
        let bytes = job.vocab.token_bytes(token);
        for taken in 1..=bytes.len() {
            let next = if taken < bytes.len() {
                None
            } else {
                Some(job.first_byte(index + 1))
            };
            loss += deeper(job, &bytes[..taken], offset + taken, next, row, &mut grad);
        }
    }
    (loss, grad)
}

fn root(job: &TrieJob<'_>, index: usize, position: usize, row: &[f64], grad: &mut [f64]) -> f64 {
    let observed = job.first_byte(index);
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
    job: &TrieJob<'_>,
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
fn node(
    weight: f64,
    class_of: impl Fn(usize) -> Option<Class>,
    mut target: BTreeMap<Class, f64>,
    row: &[f64],
    grad: &mut [f64],
) -> f64 {
    let present: BTreeSet<Class> = (0..row.len()).filter_map(&class_of).collect();
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
    for (&class, share) in &target {
        let mass = log_mass(row, |rank| class_of(rank) == Some(class));
        loss += weight * share / sum * (total - mass);
        for (rank, logit) in row.iter().enumerate() {
            if class_of(rank) == Some(class) {
                grad[rank] -= weight * share / sum * (logit - mass).exp();
            }
        }
    }
    loss
}

fn token_bytes(vocab: &Vocab, rank: usize) -> &[u8] {
    u32::try_from(rank).map_or(&[], |rank| vocab.token_bytes(rank))
}

fn add(grad: &mut [f32], row: &[f64]) {
    for (grad, value) in grad.iter_mut().zip(row) {
        #[expect(clippy::cast_possible_truncation, reason = "gradients are f32")]
        {
            *grad += *value as f32;
        }
    }
}
