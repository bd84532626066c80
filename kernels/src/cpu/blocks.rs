//! Losses of listed tokens and labels from logits that pass by in blocks of columns.
//!
//! Where every class is a few columns, all other columns of a row have one coefficient, so that
//! their part of the hidden state's gradient is that coefficient times `sum exp(z - shift) W`, which
//! needs no normaliser to be summed. Each block of weights is then read once for logits and gradient
//! both, and no logits outlive their block. A row becomes a short one: its listed columns, and one
//! that stands for the rest.

use crate::cpu::loss::Worker;
use crate::cpu::simd::{Level, Piece, largest, scale_exp, sum_exp};
use crate::loss::{Groups, LossJob};

/// Rest masses, relative to the shift, outside of which a row is left to the general way.
const REST: std::ops::Range<f64> = 1e-20..1e30;

/// One row whose blocks pass by.
#[derive(Debug)]
pub(crate) struct PassingRow {
    groups: Groups,
    /// Columns of all classes, ascending, and their logits.
    columns: Vec<u32>,
    logits: Vec<f32>,
    shift: f32,
    rest: f64,
    is_finite: bool,
}

/// What the blocks of a row add up to.
#[derive(Debug)]
pub(crate) struct Passed {
    pub(crate) loss: f64,
    /// Gradient of the listed columns.
    pub(crate) listed: Vec<(u32, f32)>,
    /// Coefficient of the exponentials of all others.
    pub(crate) rest: f32,
}

impl PassingRow {
    /// `None` where a class is more than a few columns of the whole row, or the largest logits are
    /// asked for, which are not known before the last block.
    pub(crate) fn new(job: &LossJob<'_>, row: usize) -> Option<Self> {
        let mut groups = Groups::default();
        let (item, place) = job.place(row);
        groups.set(job.vocab, item, place);
        let live = job.vocab.end_ranks().end;
        let is_partial = groups.list.iter().any(|group| group.support != (0..live));
        if is_partial || !groups.sorted.is_empty() {
            return None;
        }
        let count: u32 = groups
            .classes
            .iter()
            .map(|class| class.ranks.end - class.ranks.start)
            .sum();
        if count >= live.min(8192) {
            return None;
        }
        let mut columns: Vec<u32> = groups
            .classes
            .iter()
            .flat_map(|class| class.ranks.clone())
            .collect();
        columns.sort_unstable();
        columns.dedup();
        Some(Self {
            groups,
            logits: Vec::with_capacity(columns.len() + 1),
            columns,
            shift: f32::MIN,
            rest: 0.0,
            is_finite: true,
        })
    }

    /// Takes the logits of the columns from `first` on and leaves the exponentials of those that are
    /// not listed, zeros for the others. Blocks come in order.
    pub(crate) fn pass(&mut self, level: Level, first: usize, block: &mut [f32]) {
        while let Some(&column) = self.columns.get(self.logits.len())
            && let Some(logit) = block.get_mut(column as usize - first)
        {
            self.is_finite &= logit.is_finite();
            self.logits.push(std::mem::replace(logit, f32::MIN));
        }
        if first == 0 {
            self.shift = largest(level, block);
        }
        let end = u32::try_from(block.len()).expect("ranks are u32");
        let mut mass = [0.0];
        self.is_finite &= sum_exp(level, block, &[0, end], self.shift, &mut mass);
        self.rest += mass[0];
        let (shift, factor) = (self.shift, 1.0);
        scale_exp(level, block, &[Piece { end, shift, factor }]);
    }

    /// Loss and gradient after the last block; `None` where the row wants the general way: a logit
    /// is not finite, or the rest is out of the range of floats.
    pub(crate) fn finish(mut self, level: Level) -> Option<Passed> {
        if !self.is_finite || !REST.contains(&self.rest) {
            return None;
        }
        let short = |rank: u32| self.columns.partition_point(|&column| column < rank);
        let narrow = |column: usize| u32::try_from(column).expect("ranks are u32");
        for class in &mut self.groups.classes {
            class.ranks = narrow(short(class.ranks.start))..narrow(short(class.ranks.end));
        }
        let count = self.columns.len();
        for group in &mut self.groups.list {
            group.support = 0..narrow(count + 1);
        }
        #[expect(
            clippy::cast_possible_truncation,
            reason = "a logit like its neighbours"
        )]
        self.logits
            .push((f64::from(self.shift) + self.rest.ln()) as f32);
        let mut worker = Worker {
            groups: self.groups,
            ..Worker::default()
        };
        let loss = worker.run(level, &mut self.logits).ok()?;
        #[expect(clippy::cast_possible_truncation, reason = "gradients are at most f32")]
        let rest = (f64::from(self.logits[count]) / self.rest) as f32;
        let listed = self.columns.into_iter().zip(self.logits).collect();
        Some(Passed { loss, listed, rest })
    }
}
