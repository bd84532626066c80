//! Records, token bits and branches, a row per task.
//!
//! What a row says by itself is found in parallel; the first byte of a token, which also takes what
//! the row before leaves running, in a second step. So neither threads nor the borders of a batch
//! that comes in several parts change a result.

use std::ops::Range;

use rayon::prelude::*;

use crate::backend::NotFinite;
use crate::cpu::encode::encode;
use crate::cpu::leaves::Leaves;
use crate::cpu::masses::{Dense, Masses, Split, likeliest};
use crate::cpu::simd::Level;
use crate::element::Element;
use crate::error::ScoreError;
use crate::records::Records;
use crate::score::{Branch, Means, RecordsJob, ScoreJob};
use crate::trie::Node;
use crate::vocab::Vocab;

/// Rows that one task takes at least: below this, handing a row over costs more than a small row.
const ROWS: usize = 8;

/// Branches of some rows of a job: row of the job, and the branch.
pub(crate) fn branches<T: Element>(
    level: Level,
    job: &ScoreJob<'_>,
    rows: Range<usize>,
    logits: &[T],
    threshold: f32,
) -> Result<Vec<(usize, Branch)>, NotFinite> {
    let found = each_row(job, rows, logits, |masses: &mut Masses, index, row| {
        let bytes = job.bytes(index);
        let interior = &bytes[..bytes.len().saturating_sub(1)];
        masses.read(level, job.vocab, interior, row)?;
        let mut found = Vec::new();
        for (taken, node) in (1..).zip(nodes(job.vocab, interior)) {
            if node.stops().is_empty() {
                continue;
            }
            let split = masses.split(level, job.vocab, row, taken);
            if split.stopped() > f64::from(threshold) {
                let branch = Branch {
                    position: narrow(job.place(index).1),
                    taken: narrow(taken),
                    rank: likeliest(row, node.start..node.stop),
                };
                found.push((index, branch));
            }
        }
        Ok(found)
    })?;
    Ok(found.into_iter().flatten().collect())
}

/// Bits of the observed class of each row.
pub(crate) fn token_bits<T: Element>(
    level: Level,
    job: &ScoreJob<'_>,
    rows: Range<usize>,
    logits: &[T],
) -> Result<Vec<f64>, NotFinite> {
    let vocab = job.vocab;
    each_row(job, rows, logits, |leaves: &mut Leaves, index, row| {
        let observed = job.token(index).and_then(|rank| vocab.class(rank));
        let class = observed.unwrap_or_else(|| vocab.ends());
        let class = narrow(class.start)..narrow(class.end);
        leaves.cut(vocab.end_ranks().end, [&class]);
        leaves.sum(level, row)?;
        let all = leaves.log_mass(level, row, leaves.span(&(0..vocab.end_ranks().end)));
        let class = leaves.log_mass(level, row, leaves.span(&class));
        Ok((all - class) / std::f64::consts::LN_2)
    })
}

/// Next-byte distributions at the root of each branch row.
pub(crate) fn roots<T: Element>(
    level: Level,
    vocab: &Vocab,
    first: usize,
    logits: &[T],
) -> Result<Vec<Dense>, NotFinite> {
    let rows = logits
        .par_chunks_exact(vocab.len())
        .enumerate()
        .with_min_len(ROWS);
    let roots: Vec<Result<Dense, NotFinite>> = rows
        .map_init(Masses::default, |masses, (row, logits)| {
            let row = first + row;
            masses
                .read(level, vocab, &[], &logits[..vocab.live()])
                .map_err(|column| NotFinite { row, column })?;
            let mut root = [0.0; 257];
            masses.root(vocab, &mut root);
            Ok(root)
        })
        .collect();
    roots.into_iter().collect()
}

/// What the row before leaves to the byte after its token.
#[derive(Clone, Debug)]
pub(crate) struct Boundary {
    /// Share of its node that stops.
    stopped: f64,
    /// Share of its node that runs on, by byte.
    running: Vec<(u8, f64)>,
}

/// What one row says by itself.
struct RowScore {
    root: Dense,
    interior: Records,
    short: Vec<f64>,
    after: Boundary,
}

/// Appends the positions of some rows of a job to `out` and their shares to `means`; `before` is
/// what the rows before left, and becomes what these leave.
pub(crate) fn records<T: Element>(
    level: Level,
    job: &RecordsJob<'_>,
    rows: Range<usize>,
    logits: &[T],
    roots: &[Dense],
    before: &mut Option<Boundary>,
    means: &mut [Means],
    out: &mut Records,
) -> Result<(), ScoreError> {
    let scored = each_row(
        &job.score,
        rows.clone(),
        logits,
        |worker: &mut Worker, index, row| worker.row(level, job, index, row, roots),
    )?;
    let firsts: Vec<(Records, Option<f64>)> = scored
        .par_iter()
        .enumerate()
        .with_min_len(ROWS)
        .map_init(Vec::new, |candidates, (index, row)| {
            let before = index
                .checked_sub(1)
                .map_or(before.as_ref(), |index| Some(&scored[index].after));
            let inside = job.score.place(rows.start + index).1 > 0;
            let mut mass = row.root;
            let observed = job.score.bytes(rows.start + index).first().copied();
            let long = before
                .filter(|_| inside)
                .and_then(|before| couple(&mut mass, before, observed));
            let mut first = Records::empty(job.shape.k);
            encode(&mut mass, 0.0, &job.shape, candidates, &mut first);
            (first, long)
        })
        .collect();
    for ((index, row), (first, long)) in rows.zip(&scored).zip(&firsts) {
        out.append(first.view())?;
        out.append(row.interior.view())?;
        means[job.score.place(index).0].observe(&row.short, *long);
    }
    *before = scored
        .into_iter()
        .next_back()
        .map(|row| row.after)
        .or_else(|| before.take());
    Ok(())
}

/// Runs `work` on the live columns of every row, in order.
fn each_row<T: Element, W: Default, R: Send>(
    job: &ScoreJob<'_>,
    rows: Range<usize>,
    logits: &[T],
    work: impl Fn(&mut W, usize, &[T]) -> Result<R, usize> + Sync,
) -> Result<Vec<R>, NotFinite> {
    let done: Vec<Result<R, NotFinite>> = logits
        .par_chunks_exact(job.vocab.len())
        .zip(rows)
        .with_min_len(ROWS)
        .map_init(W::default, |worker, (logits, row)| {
            work(worker, row, &logits[..job.vocab.live()])
                .map_err(|column| NotFinite { row, column })
        })
        .collect();
    done.into_iter().collect()
}

/// Buffers of one thread.
#[derive(Default)]
struct Worker {
    masses: Masses,
    candidates: Vec<(f64, u8)>,
}

impl Worker {
    fn row<T: Element>(
        &mut self,
        level: Level,
        job: &RecordsJob<'_>,
        index: usize,
        row: &[T],
        roots: &[Dense],
    ) -> Result<RowScore, usize> {
        let vocab = job.score.vocab;
        let bytes = job.score.bytes(index);
        self.masses.read(level, vocab, bytes, row)?;
        let mut score = RowScore {
            root: [0.0; 257],
            interior: Records::empty(job.shape.k),
            short: Vec::with_capacity(bytes.len()),
            after: Boundary {
                stopped: 1.0,
                running: Vec::new(),
            },
        };
        self.masses.root(vocab, &mut score.root);
        let mut branches = job.branches(index);
        for (taken, node) in (1..).zip(nodes(vocab, bytes)) {
            let children = vocab.trie().children(node);
            let split = self.masses.split(level, vocab, row, taken);
            if taken == bytes.len() {
                if !children.is_empty() {
                    score.after = boundary(children, &split);
                }
                break;
            }
            let stopped_root = branches
                .next_if(|(_, branch)| branch.taken as usize == taken)
                .map(|(root, _)| &roots[root]);
            let mut mass = [0.0; 257];
            let observed = usize::from(bytes[taken]);
            score.short.push(interior(
                children,
                &split,
                stopped_root,
                observed,
                &mut mass,
            ));
            encode(
                &mut mass,
                0.0,
                &job.shape,
                &mut self.candidates,
                &mut score.interior,
            );
        }
        Ok(score)
    }
}

/// Nodes below the root along some bytes.
fn nodes<'a>(vocab: &'a Vocab, bytes: &'a [u8]) -> impl Iterator<Item = &'a Node> {
    let trie = vocab.trie();
    bytes.iter().scan(trie.root(), move |node, &byte| {
        *node = trie.child(node, byte)?;
        Some(*node)
    })
}

/// How the node of a token splits into stopping and running on.
fn boundary(children: &[Node], split: &Split<'_>) -> Boundary {
    let total = split.total();
    let running = children.iter().zip(split.children);
    Boundary {
        stopped: split.stopped(),
        running: running
            .map(|(child, mass)| (child.byte, mass / total))
            .collect(),
    }
}

/// Turns a root into the coupled boundary; returns the share of the observed byte that ran on.
fn couple(mass: &mut Dense, before: &Boundary, observed: Option<u8>) -> Option<f64> {
    for mass in mass.iter_mut() {
        *mass *= before.stopped;
    }
    for &(byte, running) in &before.running {
        mass[usize::from(byte)] += running;
    }
    let observed = observed?;
    let running = before.running.iter().find(|&&(byte, _)| byte == observed);
    Some(share(
        running.map_or(0.0, |&(_, running)| running),
        mass[usize::from(observed)],
    ))
}

/// Next-byte distribution inside a token; returns the share missed as
/// [`crate::score::Missed::short`] defines it.
fn interior(
    children: &[Node],
    split: &Split<'_>,
    stopped_root: Option<&Dense>,
    observed: usize,
    mass: &mut Dense,
) -> f64 {
    let total = split.total();
    let stopped = split.stopped();
    let Some(root) = stopped_root else {
        for (child, longer) in children.iter().zip(split.children) {
            mass[usize::from(child.byte)] = longer / split.longer;
        }
        return stopped;
    };
    for (child, longer) in children.iter().zip(split.children) {
        mass[usize::from(child.byte)] = longer / total;
    }
    let kept = mass[observed];
    let dropped = stopped * root[observed];
    for (mass, root) in mass.iter_mut().zip(root) {
        *mass += stopped * root;
    }
    share(dropped, dropped + kept)
}

fn share(part: f64, whole: f64) -> f64 {
    if whole > 0.0 { part / whole } else { 0.0 }
}

fn narrow(value: usize) -> u32 {
    u32::try_from(value).expect("a target has fewer than 2^32 bytes")
}
