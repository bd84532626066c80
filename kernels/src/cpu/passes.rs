//! Any losses of one row from logits that pass by twice in blocks of columns: once to be summed, once
//! to become the gradient.

use crate::cpu::loss::Worker;
use crate::cpu::simd::Level;
use crate::loss::LossJob;

/// One row whose blocks pass by.
#[derive(Debug)]
pub(crate) struct PassingTwice {
    worker: Worker,
    bad: Option<usize>,
}

impl PassingTwice {
    pub(crate) fn new(job: &LossJob<'_>, row: usize) -> Self {
        let mut worker = Worker::default();
        let (item, place) = job.place(row);
        worker.groups.set(job.vocab, item, place);
        worker.cut(job.vocab.end_ranks().end);
        Self { worker, bad: None }
    }

    /// First pass: takes the logits of the live columns from `first` on. Blocks come in order.
    pub(crate) fn sum(&mut self, level: Level, first: usize, block: &[f32]) {
        if self.bad.is_none() {
            self.bad = self.worker.leaves.add_block(level, first, block).err();
        }
    }

    /// Loss after the first pass.
    ///
    /// # Errors
    /// The first column that is not finite.
    pub(crate) fn close(&mut self, level: Level) -> Result<f64, usize> {
        match self.bad {
            Some(column) => Err(column),
            None => Ok(self.worker.losses::<f32>(level, &[])),
        }
    }

    /// Second pass: overwrites the same logits by their gradient, in any order.
    pub(crate) fn write(&mut self, level: Level, first: usize, block: &mut [f32]) {
        self.worker.leaves.write_block(level, first, block);
    }
}
