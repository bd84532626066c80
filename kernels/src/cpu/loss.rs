//! Trie loss and cross-entropy, a row per task.

use std::ops::Range;

use rayon::prelude::*;

use crate::backend::NotFinite;
use crate::cpu::row::{Row, Scratch};
use crate::loss::{NO_LABEL, TrieJob, probability};
use crate::trie::Node;
use crate::vocab::Vocab;

/// Rows that one task takes at least: below this, handing a row over costs more than a small row.
const ROWS: usize = 8;

/// Classes below this mass, in a row whose largest exponential is one, take the slow and exact way.
const SCARCE: f64 = 1e-20;

pub(crate) fn trie_loss(
    job: &TrieJob<'_>,
    logits: &[f32],
    grad: &mut [f32],
) -> Result<f64, NotFinite> {
    let mut offsets = Vec::with_capacity(job.tokens.len() + 1);
    let mut offset = 0;
    for &rank in job.tokens {
        offsets.push(offset);
        offset += job.vocab.token_bytes(rank).len();
    }
    offsets.push(offset);
    each_row(job.vocab, logits, grad, |index, mut row, grad| {
        TrieRow {
            job,
            row: &mut row,
            grad,
            index,
            offset: offsets[index],
        }
        .loss()
    })
}

pub(crate) fn cross_entropy(
    vocab: &Vocab,
    labels: &[u32],
    logits: &[f32],
    weight: f32,
    grad: &mut [f32],
) -> Result<f64, NotFinite> {
    let weight = f64::from(weight);
    each_row(vocab, logits, grad, |index, mut row, grad| {
        let label = labels[index];
        let Some(class) = (label != NO_LABEL).then(|| vocab.class(label)).flatten() else {
            return 0.0;
        };
        add_scaled(grad, row.exp(), weight / row.total);
        let log_total = row.log_total();
        weight * (log_total - subtract_class(&mut row, [class].into_iter(), weight, grad))
    })
}

/// Runs `work` on every row and sums what it returns in the order of rows.
fn each_row(
    vocab: &Vocab,
    logits: &[f32],
    grad: &mut [f32],
    work: impl Fn(usize, Row<'_>, &mut [f32]) -> f64 + Sync,
) -> Result<f64, NotFinite> {
    let losses: Vec<Result<f64, NotFinite>> = logits
        .par_chunks_exact(vocab.len())
        .zip(grad.par_chunks_exact_mut(vocab.len()))
        .enumerate()
        .with_min_len(ROWS)
        .map_init(Scratch::default, |scratch, (index, (logits, grad))| {
            let row = Row::new(vocab, logits, scratch)
                .map_err(|column| NotFinite { row: index, column })?;
            Ok(work(index, row, &mut grad[..vocab.live()]))
        })
        .collect();
    losses.into_iter().sum()
}

/// One row of the trie loss: the root and the nodes along the observed token.
struct TrieRow<'a, 'r> {
    job: &'a TrieJob<'a>,
    row: &'a mut Row<'r>,
    grad: &'a mut [f32],
    index: usize,
    /// Byte at which the row's token starts.
    offset: usize,
}

impl TrieRow<'_, '_> {
    fn loss(mut self) -> f64 {
        let job = self.job;
        let trie = job.vocab.trie();
        let mut loss = self.root();
        let Some(&token) = job.tokens.get(self.index) else {
            return loss;
        };
        let bytes = job.vocab.token_bytes(token);
        let mut node = trie.root();
        for (taken, &byte) in (1..).zip(bytes) {
            let Some(child) = trie.child(node, byte) else {
                break;
            };
            node = child;
            let position = self.offset + taken;
            if taken < bytes.len() {
                loss += self.node(node, position, None);
            } else if node.has_children() {
                loss += self.node(node, position, job.first_byte(self.index + 1));
            }
        }
        loss
    }

    fn root(&mut self) -> f64 {
        let job = self.job;
        let trie = job.vocab.trie();
        let children = trie.children(trie.root());
        let target = RootTarget::new(job, self.index, self.offset);

        let mut ghost_mass = 0.0;
        let mut has_ghost = false;
        let mut targets = target.end;
        for child in children {
            let byte = usize::from(child.byte);
            targets += target.share[byte];
            if target.ghost[byte] {
                has_ghost = true;
                ghost_mass += self.row.first[byte];
            }
        }
        let tail = if has_ghost { target.tail } else { 0.0 };
        targets += tail;
        if targets <= 0.0 {
            return 0.0;
        }

        let weight = job.weight;
        let flat = weight / self.row.total;
        let log_total = self.row.log_total();
        let ghost_pull = if ghost_mass >= SCARCE {
            tail / targets / ghost_mass
        } else {
            0.0
        };
        let mut loss = 0.0;
        for child in children {
            let byte = usize::from(child.byte);
            let share = target.share[byte] / targets;
            let mass = self.row.first[byte];
            let pull = if target.ghost[byte] {
                ghost_pull
            } else if mass >= SCARCE {
                share / mass
            } else {
                0.0
            };
            let range = child.all();
            add_scaled(
                &mut self.grad[range.clone()],
                &self.row.exp()[range.clone()],
                flat - weight * pull,
            );
            if share > 0.0 && mass >= SCARCE {
                loss -= share * (mass / self.row.total).ln();
            } else if share > 0.0 {
                loss += share * (log_total - self.subtract([range].into_iter(), share));
            }
        }
        let ends = job.vocab.ends();
        add_scaled(
            &mut self.grad[ends.clone()],
            &self.row.exp()[ends.clone()],
            flat,
        );
        if target.end > 0.0 {
            let share = target.end / targets;
            loss += share * (log_total - self.subtract([ends].into_iter(), share));
        }
        if tail > 0.0 && ghost_mass >= SCARCE {
            loss -= tail / targets * (ghost_mass / self.row.total).ln();
        } else if tail > 0.0 {
            let share = tail / targets;
            let ghosts = children
                .iter()
                .filter(|child| target.ghost[usize::from(child.byte)]);
            loss += share * (log_total - self.subtract(ghosts.map(Node::all), share));
        }
        weight * loss
    }

    /// A node below the root; `next` is the byte that followed where the observed token stops here.
    fn node(&mut self, node: &Node, position: usize, next: Option<u8>) -> f64 {
        let trie = self.job.vocab.trie();
        let target = self.job.target;
        let child_of = |byte| trie.child(node, byte).filter(|_| Some(byte) != next);
        let is_token = !node.stops().is_empty();

        let mut stop = probability(target.end()[position]);
        let mut targets = 0.0;
        for (byte, code) in target.listed(position) {
            match child_of(byte) {
                Some(_) => targets += probability(code),
                None => stop += probability(code),
            }
        }
        let stop = if is_token { stop } else { 0.0 };
        targets += stop;
        if targets <= 0.0 {
            return 0.0;
        }

        let weight = self.job.weight;
        let (part, mass) = self.row.part(node.all());
        add_scaled(
            &mut self.grad[node.all()],
            part.of(node.all()),
            weight / mass,
        );
        let log_total = part.shift() + mass.ln();
        let mut loss = 0.0;
        for (byte, code) in target.listed(position) {
            let share = probability(code) / targets;
            if let Some(child) = child_of(byte).filter(|_| share > 0.0) {
                loss += share * (log_total - self.subtract([child.all()].into_iter(), share));
            }
        }
        if stop > 0.0 {
            let share = stop / targets;
            loss += share * (log_total - self.subtract([node.stops()].into_iter(), share));
        }
        weight * loss
    }

    fn subtract(&mut self, class: impl Iterator<Item = Range<usize>> + Clone, share: f64) -> f64 {
        subtract_class(self.row, class, self.job.weight * share, self.grad)
    }
}

/// What the root's classes are asked to be, before normalising.
struct RootTarget {
    /// Target of each listed byte that the root fix leaves.
    share: [f64; 256],
    /// Bytes that share the tail.
    ghost: [bool; 256],
    end: f64,
    tail: f64,
}

impl RootTarget {
    fn new(job: &TrieJob<'_>, index: usize, position: usize) -> Self {
        let mut target = Self {
            share: [0.0; 256],
            ghost: [true; 256],
            end: probability(job.target.end()[position]),
            tail: probability(job.target.tail()[position]),
        };
        for (byte, code) in job.target.listed(position) {
            target.share[usize::from(byte)] = probability(code);
            target.ghost[usize::from(byte)] = false;
        }
        let previous = index.checked_sub(1).and_then(|previous| {
            job.vocab
                .trie()
                .find(job.vocab.token_bytes(job.tokens[previous]))
        });
        if let Some(previous) = previous {
            let observed = job.first_byte(index);
            for child in job.vocab.trie().children(previous) {
                if Some(child.byte) != observed {
                    target.share[usize::from(child.byte)] = 0.0;
                    target.ghost[usize::from(child.byte)] = false;
                }
            }
        }
        target
    }
}

/// `grad -= pull * softmax` inside a class of one or more ranges; returns the logarithm of the
/// class's mass.
fn subtract_class(
    row: &mut Row<'_>,
    class: impl Iterator<Item = Range<usize>> + Clone,
    pull: f64,
    grad: &mut [f32],
) -> f64 {
    let logs = class.clone().map(|range| row.log_mass(range));
    let log_mass = logs.reduce(log_add).unwrap_or(f64::NEG_INFINITY);
    for range in class {
        let (part, _) = row.part(range.clone());
        let scale = (part.shift() - log_mass).exp();
        add_scaled(&mut grad[range.clone()], part.of(range), -pull * scale);
    }
    log_mass
}

fn log_add(a: f64, b: f64) -> f64 {
    let (low, high) = if a < b { (a, b) } else { (b, a) };
    high + (low - high).exp().ln_1p()
}

fn add_scaled(grad: &mut [f32], exp: &[f32], scale: f64) {
    #[expect(clippy::cast_possible_truncation, reason = "gradients are f32")]
    let scale = scale as f32;
    for (grad, &exp) in grad.iter_mut().zip(exp) {
        *grad += exp * scale;
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::backend::Backend;
    use crate::reference;
    use crate::testing::{Case, cases};

    /// Relative to the weight: gradients are sums of a few `f32` shares.
    const GRADIENT_TOLERANCE: f64 = 4e-6;

    fn check_close(fast: (f64, &[f32]), exact: (f64, &[f32]), weight: f32) {
        assert!(
            (fast.0 - exact.0).abs() <= 2e-6 * exact.0.abs() + 1e-5,
            "loss {} against {}",
            fast.0,
            exact.0
        );
        for (index, (&fast, &exact)) in fast.1.iter().zip(exact.1).enumerate() {
            let error = (f64::from(fast) - f64::from(exact)).abs();
            let allowed = GRADIENT_TOLERANCE * f64::from(weight.abs());
            assert!(error <= allowed, "gradient {index}: {fast} against {exact}");
        }
    }

    fn check_rows_sum_to_zero(case: &Case, grad: &[f32]) {
        for (row, grad) in grad.chunks(case.vocab.len()).enumerate() {
            let sum: f64 = grad.iter().map(|&value| f64::from(value)).sum();
            assert!(sum.abs() < 2e-5, "gradient of row {row} sums to {sum:e}");
            let ignored = &grad[case.vocab.live()..];
            assert!(
                ignored.iter().all(|&value| value == 0.0),
                "ignored tokens have a gradient"
            );
        }
    }

    proptest! {
        #[test]
        fn trie_loss_agrees_with_the_reference(mut case in cases(), k in 1_usize..6) {
            let logits = case.logits();
            let target = case.target(k);
            let weight = 0.9;
            let run = |backend: Backend| {
                let mut grad = vec![0.0; logits.len()];
                let loss = backend
                    .trie_loss(&case.vocab, &case.tokens, target.view(), &logits, weight, &mut grad)
                    .unwrap();
                (loss, grad)
            };
            let (fast, exact) = (run(Backend::Cpu), run(Backend::Reference));
            check_close((fast.0, &fast.1), (exact.0, &exact.1), weight);
            check_rows_sum_to_zero(&case, &fast.1);
        }

        #[test]
        fn one_hot_targets_give_the_cross_entropy(mut case in cases()) {
            let logits = case.logits();
            let mut labels = case.tokens.clone();
            labels.push(case.vocab.end_ranks().start);
            let mut grads = [vec![0.0; logits.len()], vec![0.0; logits.len()]];
            let target = case.one_hot();
            for backend in [Backend::Cpu, Backend::Reference] {
                grads.iter_mut().for_each(|grad| grad.fill(0.0));
                let trie = backend
                    .trie_loss(&case.vocab, &case.tokens, target.view(), &logits, 1.0, &mut grads[0])
                    .unwrap();
                let plain = backend
                    .cross_entropy(&case.vocab, &labels, &logits, 1.0, &mut grads[1])
                    .unwrap();
                check_close((trie, &grads[0]), (plain, &grads[1]), 1.0);
            }
        }

        #[test]
        fn cross_entropy_agrees_with_the_reference(mut case in cases()) {
            let logits = case.logits();
            let mut labels = case.tokens.clone();
            labels.push(case.vocab.end_ranks().end - 1);
            if let Some(first) = labels.first_mut().filter(|_| case.random.below(2) == 0) {
                *first = NO_LABEL;
            }
            let run = |backend: Backend| {
                let mut grad = vec![0.0; logits.len()];
                let loss = backend
                    .cross_entropy(&case.vocab, &labels, &logits, 0.5, &mut grad)
                    .unwrap();
                (loss, grad)
            };
            let (fast, exact) = (run(Backend::Cpu), run(Backend::Reference));
            check_close((fast.0, &fast.1), (exact.0, &exact.1), 0.5);
            check_rows_sum_to_zero(&case, &fast.1);
        }

        #[test]
        fn the_reference_gradient_is_the_derivative(mut case in cases(), k in 1_usize..6) {
            case.scale = case.scale.min(3.0);
            case.tokens.truncate(4);
            let target = case.target(k);
            let job = TrieJob::new(&case.vocab, &case.tokens, target.view(), 0.7).unwrap();
            let mut offset = 0;
            for index in 0..=case.tokens.len() {
                let logits = case.random.logits(case.vocab.live(), case.scale);
                let mut row: Vec<f64> = logits.into_iter().map(f64::from).collect();
                let (_, grad) = reference::loss::trie_row(&job, index, offset, &row);
                for rank in 0..row.len() {
                    let step = 1e-5;
                    let at = row[rank];
                    row[rank] = at + step;
                    let (above, _) = reference::loss::trie_row(&job, index, offset, &row);
                    row[rank] = at - step;
                    let (under, _) = reference::loss::trie_row(&job, index, offset, &row);
                    row[rank] = at;
                    let slope = (above - under) / (2.0 * step);
                    prop_assert!((slope - grad[rank]).abs() < 1e-8, "{} against {}", slope, grad[rank]);
                }
                offset += case.tokens.get(index).map_or(0, |&t| case.vocab.token_bytes(t).len());
            }
        }
    }
}
