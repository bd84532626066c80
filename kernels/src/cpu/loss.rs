//! Losses in place, a row per task.

use std::ops::Range;

use rayon::prelude::*;

use crate::backend::NotFinite;
use crate::cpu::leaves::Leaves;
use crate::cpu::short::Short;
use crate::cpu::simd::Level;
use crate::cpu::top::Top;
use crate::element::Element;
use crate::loss::{Group, Groups, LossJob};

/// Rows that one task takes at least: below this, handing a row over costs more than a small row.
const ROWS: usize = 8;

/// Losses of some rows of a job, whose logits become gradients.
pub(crate) fn rows<T: Element>(
    level: Level,
    job: &LossJob<'_>,
    rows: Range<usize>,
    logits: &mut [T],
) -> Result<Vec<f64>, NotFinite> {
    let losses: Vec<Result<f64, NotFinite>> = logits
        .par_chunks_exact_mut(job.vocab.len())
        .zip(rows)
        .with_min_len(ROWS)
        .map_init(Worker::default, |worker, (logits, row)| {
            worker
                .row(level, job, row, logits)
                .map_err(|column| NotFinite { row, column })
        })
        .collect();
    losses.into_iter().collect()
}

/// Buffers of one thread.
#[derive(Debug, Default)]
pub(super) struct Worker {
    pub(super) groups: Groups,
    pub(super) leaves: Leaves,
    /// Largest columns of the row, and what standardised terms add to their gradient.
    pub(super) top: Top,
    pub(super) added: Vec<f64>,
    /// Those columns, as the leaves count columns.
    pub(super) places: Vec<Range<u32>>,
    pub(super) short: Short,
}

impl Worker {
    fn row<T: Element>(
        &mut self,
        level: Level,
        job: &LossJob<'_>,
        row: usize,
        logits: &mut [T],
    ) -> Result<f64, usize> {
        let (item, place) = job.place(row);
        self.groups.set(job.vocab, item, place);
        let (live, ignored) = logits.split_at_mut(job.vocab.live());
        let count = self.groups.sorted.iter().map(|term| term.target.len());
        self.top.find(level, live, count.max().unwrap_or(0));
        self.places.clone_from(&self.top.columns);
        let loss = match self.run_short(level, live)? {
            Some(loss) => loss,
            None => self.run(level, live)?,
        };
        ignored.fill(T::default());
        Ok(loss)
    }

    /// Loss of the groups that were set, whose row becomes the gradient.
    fn run<T: Element>(&mut self, level: Level, live: &mut [T]) -> Result<f64, usize> {
        self.cut(u32::try_from(live.len()).expect("ranks are u32"));
        self.leaves.sum(level, live)?;
        let loss = self.losses(level, live) + self.sorted(level, live, live);
        self.leaves.write(level, live);
        self.add(live);
        Ok(loss)
    }

    /// Cuts the columns before `end` for the groups that were set.
    pub(super) fn cut(&mut self, end: u32) {
        let supports = self.groups.list.iter().map(|group| &group.support);
        let classes = self.groups.classes.iter().map(|class| &class.ranks);
        let ranges = supports.chain(classes).chain(&self.top.columns);
        self.leaves.cut(end, ranges);
    }

    /// Loss of all groups, whose coefficients are added to the leaves; `row` is empty where those were
    /// summed block by block.
    pub(super) fn losses<T: Element>(&mut self, level: Level, row: &[T]) -> f64 {
        (0..self.groups.list.len())
            .map(|index| self.group(level, index, row))
            .sum()
    }

    fn group<T: Element>(&mut self, level: Level, index: usize, row: &[T]) -> f64 {
        let Self { groups, leaves, .. } = self;
        let Group {
            support,
            classes,
            ghost,
            weight,
        } = groups.list[index].clone();
        let all = leaves.span(&support);
        let log_total = leaves.log_mass(level, row, all.clone());
        leaves.add(all.clone(), weight, log_total);
        let classes = &groups.classes[classes];
        let mut loss = 0.0;
        for class in classes.iter().filter(|class| class.share > 0.0) {
            let span = leaves.span(&class.ranks);
            let log_mass = leaves.log_mass(level, row, span.clone());
            leaves.add(span, -weight * class.share, log_mass);
            loss += class.share * (log_total - log_mass);
        }
        if ghost > 0.0 {
            let gaps = gaps(leaves, &all, classes.iter().map(|class| &class.ranks));
            let log_mass = leaves.log_mass_of(level, row, &gaps);
            for gap in gaps {
                leaves.add(gap, -weight * ghost, log_mass);
            }
            loss += ghost * (log_total - log_mass);
        }
        weight * loss
    }
}

/// Leaves of a span that no class holds.
pub(super) fn gaps<'a>(
    leaves: &Leaves,
    all: &Range<usize>,
    classes: impl IntoIterator<Item = &'a Range<u32>>,
) -> Vec<Range<usize>> {
    let mut start = all.start;
    let mut gaps = Vec::new();
    for class in classes {
        let span = leaves.span(class);
        gaps.push(start..span.start);
        start = span.end;
    }
    gaps.push(start..all.end);
    gaps.retain(|gap| !gap.is_empty());
    gaps
}
