//! One logits row as exponentials, and sums over its contiguous ranges.

use std::ops::Range;

use crate::cpu::exp::{exponentials, max_finite, sum};
use crate::vocab::Vocab;

/// Below this share of the row's largest value a range is exponentiated again against its own
/// maximum: what is left of `f32` underneath would no longer resolve its members.
const SCARCE: f64 = 1e-20;

/// Buffers that rows of one thread share.
#[derive(Debug, Default)]
pub(super) struct Scratch {
    exp: Vec<f32>,
    local: Vec<f32>,
}

/// Exponentials of one row relative to its largest logit, with the masses of its root classes.
#[derive(Debug)]
pub(super) struct Row<'a> {
    logits: &'a [f32],
    exp: &'a [f32],
    local: &'a mut Vec<f32>,
    max: f32,
    /// Sum over all byte and end tokens.
    pub(super) total: f64,
    /// Mass of the tokens that start with each byte, out of `total`.
    pub(super) first: [f64; 256],
    /// Mass of the end tokens, out of `total`.
    pub(super) end: f64,
}

/// Exponentials of a range, relative to a common shift.
#[derive(Clone, Copy, Debug)]
pub(super) struct Part<'a> {
    exp: &'a [f32],
    start: usize,
    shift: f32,
}

impl<'a> Row<'a> {
    /// Exponentiates `logits[..live]` once and sums by first byte.
    ///
    /// # Errors
    /// The first column that is not finite.
    pub(super) fn new(
        vocab: &Vocab,
        logits: &'a [f32],
        scratch: &'a mut Scratch,
    ) -> Result<Self, usize> {
        let logits = &logits[..vocab.live()];
        let max = max_finite(logits)?;
        scratch.exp.resize(logits.len(), 0.0);
        exponentials(logits, max, &mut scratch.exp);
        let exp = &scratch.exp[..];
        let mut first = [0.0; 256];
        let mut total = 0.0;
        for child in vocab.trie().children(vocab.trie().root()) {
            let mass = sum(&exp[child.all()]);
            first[usize::from(child.byte)] = mass;
            total += mass;
        }
        let end = sum(&exp[vocab.ends()]);
        total += end;
        Ok(Self {
            logits,
            exp,
            local: &mut scratch.local,
            max,
            total,
            first,
            end,
        })
    }

    /// Exponentials of all live columns, relative to the largest.
    pub(super) fn exp(&self) -> &[f32] {
        self.exp
    }

    /// Natural logarithm of the sum of exponentials of all live columns.
    pub(super) fn log_total(&self) -> f64 {
        f64::from(self.max) + self.total.ln()
    }

    /// Exponentials of a range in a scale in which its sum is representable, and that sum.
    pub(super) fn part(&mut self, range: Range<usize>) -> (Part<'_>, f64) {
        let total = sum(&self.exp[range.clone()]);
        if total < SCARCE {
            return Part::of_logits(self.logits, range, self.local);
        }
        let start = range.start;
        (
            Part {
                exp: &self.exp[range],
                start,
                shift: self.max,
            },
            total,
        )
    }

    /// `ln sum exp` over a range.
    pub(super) fn log_mass(&mut self, range: Range<usize>) -> f64 {
        let (part, total) = self.part(range);
        f64::from(part.shift) + total.ln()
    }
}

impl<'a> Part<'a> {
    /// Exponentiates a range of logits, all finite, against its own largest; the sum is at least
    /// one, or zero over none.
    pub(super) fn of_logits(
        logits: &[f32],
        range: Range<usize>,
        local: &'a mut Vec<f32>,
    ) -> (Self, f64) {
        let start = range.start;
        let logits = &logits[range];
        let shift = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        local.resize(logits.len(), 0.0);
        exponentials(logits, shift, local);
        let total = sum(local);
        (
            Part {
                exp: local,
                start,
                shift,
            },
            total,
        )
    }

    /// Sum over a range of ranks inside this part.
    pub(super) fn mass(&self, range: Range<usize>) -> f64 {
        sum(self.of(range))
    }

    /// Exponentials of a range of ranks inside this part.
    pub(super) fn of(&self, range: Range<usize>) -> &'a [f32] {
        &self.exp[range.start - self.start..range.end - self.start]
    }

    /// Logit that has exponential one here.
    pub(super) fn shift(&self) -> f64 {
        f64::from(self.shift)
    }
}
