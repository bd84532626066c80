//! Any losses of one row from logits that pass by once in blocks of columns, where the head is frozen.
//!
//! The coefficient of a column is a sum over the supports and classes that hold it. These are nested
//! ranges, and the share that a range has in it is known when the range has passed. So
//! `sum exp(z - shift) W` is kept for the ranges that are open: when one ends, its share of the
//! coefficient times its sum goes to the gradient, and the sum itself to the range around it. What is
//! left between the classes of a group with a ghost counts as a range of its own.
//!
//! Blocks in which ranges begin or end, or whose mass is out of range, are put off until all
//! coefficients are known; blocks cut where large trie nodes begin leave few of them.

use std::ops::Range;

use crate::cpu::leaves::Leaves;
use crate::cpu::loss::{Worker, gaps};
use crate::cpu::multiversion::multiversion;
use crate::cpu::simd::{Level, Piece, scale_exp};
use crate::loss::{Group, LossJob};

/// The whole row, and what a ghost has of it, in [`Folding::nest`].
const WHOLE: usize = 0;
const GAP: usize = 1;

/// One row whose blocks pass by.
#[derive(Debug)]
pub(crate) struct Folding {
    worker: Worker,
    bad: Option<usize>,
    nest: Vec<Nested>,
    ghost: Option<Group>,
    /// Sums of ranges that are open.
    open: Vec<(usize, Vec<f32>)>,
    /// Range of the last block, and of those before it whose sum was not folded.
    last: Option<usize>,
    pending: Option<usize>,
}

/// A range; those around it come before it.
#[derive(Debug)]
struct Nested {
    ranks: Range<u32>,
    parent: usize,
}

impl Folding {
    /// `None` where ranges overlap or ghosts have others than the outermost classes.
    pub(crate) fn new(job: &LossJob<'_>, row: usize) -> Option<Self> {
        let mut worker = Worker::default();
        let (item, place) = job.place(row);
        worker.groups.set(job.vocab, item, place);
        let live = job.vocab.end_ranks().end;
        worker.cut(live);
        let groups = &worker.groups;
        let mut ghosts = groups.list.iter().filter(|group| group.ghost > 0.0);
        let ghost = ghosts.next().cloned();
        if ghosts.next().is_some() || ghost.iter().any(|ghost| ghost.support != (0..live)) {
            return None;
        }
        let supports = groups.list.iter().map(|group| &group.support);
        let classes = groups.classes.iter().map(|class| &class.ranks);
        let mut ranges: Vec<Range<u32>> = supports
            .chain(classes)
            .filter(|ranks| !ranks.is_empty() && **ranks != (0..live))
            .cloned()
            .collect();
        ranges.sort_unstable_by_key(|ranks| (ranks.start, std::cmp::Reverse(ranks.end)));
        ranges.dedup();
        let mut nest: Vec<Nested> = [0..live, 0..live]
            .into_iter()
            .map(|ranks| Nested {
                ranks,
                parent: WHOLE,
            })
            .collect();
        let mut ghost_classes = ghost.as_ref().map_or(0, |ghost| {
            let classes = &groups.classes[ghost.classes.clone()];
            classes
                .iter()
                .filter(|class| class.ranks != (0..live))
                .count()
        });
        for ranks in ranges {
            let mut parent = nest.len() - 1;
            while nest[parent].ranks.end <= ranks.start {
                parent = nest[parent].parent;
            }
            if nest[parent].ranks.end < ranks.end {
                return None;
            }
            if parent <= GAP {
                let is_class = ghost.as_ref().is_none_or(|ghost| {
                    let classes = &groups.classes[ghost.classes.clone()];
                    classes.iter().any(|class| class.ranks == ranks)
                });
                ghost_classes = ghost_classes.saturating_sub(usize::from(is_class));
                parent = if is_class { WHOLE } else { GAP };
            }
            nest.push(Nested { ranks, parent });
        }
        (ghost_classes == 0).then_some(Self {
            worker,
            bad: None,
            nest,
            ghost,
            open: Vec::new(),
            last: None,
            pending: None,
        })
    }

    /// Takes the logits of the live columns from `first` on and leaves their exponentials; false where
    /// the block is put off, whose logits stay. Blocks come in order.
    pub(crate) fn pass(&mut self, level: Level, first: usize, block: &mut [f32]) -> bool {
        self.last = None;
        if self.bad.is_some() {
            return true;
        }
        let leaves = &mut self.worker.leaves;
        self.bad = leaves.add_block(level, first, block).err();
        if self.bad.is_some() || block.is_empty() {
            return true;
        }
        let Some(shift) = leaves.plain_shift() else {
            return false;
        };
        let end = u32::try_from(block.len()).expect("ranks are u32");
        scale_exp(
            level,
            block,
            &[Piece {
                end,
                shift,
                factor: 1.0,
            }],
        );
        let holds = |nested: &Nested| {
            nested
                .ranks
                .contains(&u32::try_from(first).unwrap_or(u32::MAX))
        };
        let inner = self.nest.iter().rposition(holds).unwrap_or(WHOLE);
        self.last = Some(if inner == GAP && self.ghost.is_none() {
            WHOLE
        } else {
            inner
        });
        true
    }

    /// Whether the sum so far has to be folded before the last block is added to it.
    pub(crate) fn is_full(&self) -> bool {
        self.last.is_some() && self.pending.is_some() && self.last != self.pending
    }

    /// The last block was added to the sum.
    pub(crate) fn added(&mut self) {
        self.pending = self.last.or(self.pending);
    }

    /// Takes the sum of the exponentials times their weights since it was last taken.
    pub(crate) fn fold(&mut self, level: Level, sum: &[f32], grad: &mut [f32]) {
        let Some(range) = self.pending.take() else {
            return;
        };
        self.close(level, self.nest[range].ranks.start, grad);
        match self.open.iter_mut().find(|(open, _)| *open == range) {
            Some((_, own)) => add(own, 1.0, sum),
            None => self.open.push((range, sum.to_vec())),
        }
    }

    /// The loss after the last block, when nothing is left to fold.
    ///
    /// # Errors
    /// The first column that is not finite.
    pub(crate) fn finish(&mut self, level: Level, grad: &mut [f32]) -> Result<f64, usize> {
        if let Some(column) = self.bad {
            return Err(column);
        }
        self.close(level, u32::MAX, grad);
        Ok(self.worker.losses::<f32>(level, &[]))
    }

    /// Overwrites logits that were put off by their gradient, after the end.
    pub(crate) fn write(&mut self, level: Level, first: usize, block: &mut [f32]) {
        self.worker.leaves.write_block(level, first, block);
    }

    /// Ends the ranges up to a rank, inner ones first.
    fn close(&mut self, level: Level, rank: u32, grad: &mut [f32]) {
        loop {
            let ended = (0..self.open.len())
                .filter(|&index| self.nest[self.open[index].0].ranks.end <= rank)
                .max_by_key(|&index| self.open[index].0);
            let Some(index) = ended else {
                return;
            };
            let (range, sum) = self.open.swap_remove(index);
            #[expect(clippy::cast_possible_truncation, reason = "gradients are at most f32")]
            let share = self.share(level, range) as f32;
            if share != 0.0 {
                add(grad, share, &sum);
            }
            if range == WHOLE {
                continue;
            }
            let parent = self.nest[range].parent;
            match self.open.iter_mut().find(|(open, _)| *open == parent) {
                Some((_, own)) => add(own, 1.0, &sum),
                None => self.open.push((parent, sum)),
            }
        }
    }

    /// What a range that has passed adds to the coefficients of its columns.
    fn share(&mut self, level: Level, range: usize) -> f64 {
        let Worker { groups, leaves, .. } = &mut self.worker;
        let scaled = |leaves: &Leaves, amount: f64, log_mass: f64| {
            amount * (f64::from(leaves.common) - log_mass).exp()
        };
        if range == GAP {
            let Some(ghost) = &self.ghost else {
                return 0.0;
            };
            let all = leaves.span(&ghost.support);
            let gaps = gaps(
                leaves,
                &all,
                groups.classes[ghost.classes.clone()]
                    .iter()
                    .map(|class| &class.ranks),
            );
            let log_mass = leaves.log_mass_of::<f32>(level, &[], &gaps);
            return scaled(leaves, -ghost.weight * ghost.ghost, log_mass);
        }
        let ranks = &self.nest[range].ranks;
        let mut amount = 0.0;
        for group in &groups.list {
            if group.support == *ranks {
                amount += group.weight;
            }
            let classes = groups.classes[group.classes.clone()].iter();
            let here = classes.filter(|class| class.ranks == *ranks);
            amount -= group.weight * here.map(|class| class.share).sum::<f64>();
        }
        let span = leaves.span(ranks);
        let log_mass = leaves.log_mass::<f32>(level, &[], span);
        scaled(leaves, amount, log_mass)
    }
}

multiversion! {
    /// `to += factor from`
    pub(crate) fn add(to: &mut [f32], factor: f32, from: &[f32]) {
        for (to, from) in to.iter_mut().zip(from) {
            *to += factor * from;
        }
    }
}
