//! Items packed for one pass of a model.

use std::ops::Range;

use super::model::Packed;
use super::source::Sequence;

/// Values that the logits of one batch may take when nothing but logits is wanted: 256 MiB.
const LOGITS: usize = 64 << 20;
/// Tokens of one batch at most; beyond this a pass gains nothing.
const TOKENS: usize = 2048;

/// Items in one packed batch, with the rows that predict their targets.
#[derive(Debug, Default)]
pub(crate) struct Batch {
    pub(crate) packed: Packed,
    /// Rows whose logits are wanted, ascending.
    pub(crate) rows: Vec<u32>,
    pub(crate) sequences: Vec<Sequence>,
}

impl Batch {
    /// Appends an item.
    pub(crate) fn push(&mut self, sequence: Sequence) {
        let segment = self.packed.push(sequence.ids.iter().copied());
        let first = segment.start + sequence.first - 1;
        self.rows.extend(rows(first..segment.start + segment.len));
        self.sequences.push(sequence);
    }

    /// Each item with its rows of `values`, `[rows, width]`.
    pub(crate) fn split<'a>(
        &'a self,
        values: &'a [f32],
        width: usize,
    ) -> Vec<(&'a Sequence, &'a [f32])> {
        let mut rest = values;
        let mut items = Vec::with_capacity(self.sequences.len());
        for sequence in &self.sequences {
            let (own, others) = rest.split_at(sequence.predicted() * width);
            rest = others;
            items.push((sequence, own));
        }
        items
    }

    /// As [`split`](Self::split), to be written.
    pub(crate) fn split_mut<'a>(&self, values: &'a mut [f32], width: usize) -> Vec<&'a mut [f32]> {
        let mut rest = values;
        let mut items = Vec::with_capacity(self.sequences.len());
        for sequence in &self.sequences {
            let (own, others) = rest.split_at_mut(sequence.predicted() * width);
            rest = others;
            items.push(own);
        }
        items
    }
}

/// Cuts items into runs for one pass each, by sizes alone, so that the same items give the same batches.
pub(crate) fn runs(lengths: &[usize], vocabulary: usize) -> Vec<Range<usize>> {
    let limit = TOKENS.min(LOGITS / vocabulary.max(1)).max(1);
    let mut runs = Vec::new();
    let (mut start, mut tokens) = (0, 0);
    for (index, &length) in lengths.iter().enumerate() {
        if index > start && tokens + length > limit {
            runs.push(start..index);
            (start, tokens) = (index, 0);
        }
        tokens += length;
    }
    if start < lengths.len() {
        runs.push(start..lengths.len());
    }
    runs
}

fn rows(range: Range<usize>) -> impl Iterator<Item = u32> {
    // A batch has at most as many rows as token ids fit into memory; the model checks rows against its batch.
    range.map(|row| u32::try_from(row).unwrap_or(u32::MAX))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_are_those_that_predict_the_target_and_its_end() {
        let mut batch = Batch::default();
        let sequence = |ids: &[u32], first: usize| Sequence {
            ids: ids.to_vec(),
            first,
            ranks: ids[first..].to_vec(),
        };
        batch.push(sequence(&[0, 5, 6], 1));
        batch.push(sequence(&[0, 1, 2, 7], 3));
        assert_eq!(batch.rows, [0, 1, 2, 5, 6]);
        let values: Vec<f32> = (0_u8..10).map(f32::from).collect();
        let items = batch.split(&values, 2);
        assert_eq!(items[0].1, &values[..6]);
        assert_eq!(items[1].1, &values[6..]);
    }

    #[test]
    fn runs_cover_all_items_and_only_a_long_item_exceeds_the_limit() {
        assert_eq!(runs(&[], 400), []);
        assert_eq!(runs(&[1000, 1000, 1000, 5000, 1], 400), [0..2, 2..3, 3..4, 4..5]);
        assert_eq!(runs(&[3, 3, 3], 64 << 20), [0..1, 1..2, 2..3]);
    }
}
