//! Losses of listed tokens and labels from logits that pass by in blocks of columns.
//!
//! Where every class is a few columns, all other columns of a row have one coefficient, so that
//! their part of the hidden state's gradient is that coefficient times `sum exp(z - shift) W`, which
//! needs no normaliser to be summed. Each block of weights is then read once for logits and gradient
//! both, and no logits outlive their block. A row becomes a short one: its listed columns, and one
//! that stands for the rest.

use crate::cpu::loss::Worker;
use crate::cpu::short::named;
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
        let mut columns = Vec::new();
        if !groups.sorted.is_empty() || !named(&groups, &[], live, &mut columns) {
            return None;
        }
        Some(Self {
            groups,
            logits: Vec::with_capacity(columns.len()),
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
    pub(crate) fn finish(self, level: Level) -> Option<Passed> {
        if !self.is_finite || !REST.contains(&self.rest) {
            return None;
        }
        let mut worker = Worker {
            groups: self.groups,
            ..Worker::default()
        };
        let rest = (self.shift, self.rest);
        let (loss, gradients, coefficient) =
            worker.short_losses(level, &self.columns, &self.logits, rest);
        #[expect(clippy::cast_possible_truncation, reason = "gradients are at most f32")]
        let narrow = |value: f64| value as f32;
        let listed = self.columns.into_iter();
        Some(Passed {
            loss,
            listed: listed.zip(gradients.into_iter().map(narrow)).collect(),
            rest: narrow(coefficient),
        })
    }
}
