//! Batches of whole items packed into rows, in an order that a seed decides.

use std::ops::Range;

use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha12Rng;
use serde::{Deserialize, Serialize};

use super::{DataError, Item, Items};
use crate::worker::model::{Packed, Segment};

/// Endless batches over a set of items, reshuffled every epoch.
#[derive(Debug, Clone)]
pub struct Batches {
    items: Items,
    start: u32,
    rows: usize,
    length: usize,
    seed: u64,
    cursor: Cursor,
    order: Vec<u32>,
}

/// Place in the order of items: enough to continue exactly.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Cursor {
    /// Times that all items were used.
    pub epoch: u64,
    /// Items used in this epoch.
    pub used: u64,
}

/// Items packed for one forward pass.
#[derive(Debug, Clone, Default)]
pub struct Batch {
    /// Tokens; every item begins with the token that starts records.
    pub packed: Packed,
    /// Rows whose logits predict a learned token of a target or the end of a target, ascending.
    pub rows: Vec<u32>,
    /// Ids of the tokens that they predict; none for the end of the record.
    pub labels: Vec<Option<u32>>,
    /// Where each item lies.
    pub items: Vec<PackedItem>,
}

/// One item of a batch.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PackedItem {
    /// Index among the items of [`Batches`].
    pub item: usize,
    /// Its rows.
    pub segment: Segment,
    /// Its logits among those of the batch's `rows`: one per learned target token, and one for the end unless it is open.
    pub logits: Range<usize>,
}

impl Batch {
    /// Appends an item behind the token that starts records.
    pub fn push(&mut self, index: usize, item: &Item, start: u32) {
        let tokens = item.context.iter().chain(&item.target).copied();
        let segment = self.packed.push(std::iter::once(start).chain(tokens));
        let first = self.rows.len();
        let before = segment.start + item.context.len();
        let mut predict = |at: usize, label: Option<u32>| {
            if let Ok(row) = u32::try_from(before + at) {
                self.rows.push(row);
                self.labels.push(label);
            }
        };
        for at in item.learned() {
            predict(at, Some(item.target[at]));
        }
        if !item.open {
            predict(item.target.len(), None);
        }
        self.items.push(PackedItem {
            item: index,
            segment,
            logits: first..self.rows.len(),
        });
    }
}

impl Batches {
    /// Batches of at most `rows` rows of `length` tokens. Every item, with the token `start` before it, must fit a row.
    ///
    /// # Errors
    /// No items or rows, or an item that does not fit.
    pub fn new(
        items: impl Into<Items>,
        start: u32,
        rows: usize,
        length: usize,
        seed: u64,
    ) -> Result<Self, DataError> {
        let items = items.into();
        if items.is_empty() || rows == 0 {
            return Err(DataError::Empty);
        }
        if let Some((index, tokens)) = items.longer_than(length) {
            return Err(DataError::TooLong {
                index,
                tokens,
                length,
            });
        }
        let mut batches = Self {
            items,
            start,
            rows,
            length,
            seed,
            cursor: Cursor::default(),
            order: vec![],
        };
        batches.seek(Cursor::default());
        Ok(batches)
    }

    /// Where the next batch starts.
    pub fn cursor(&self) -> Cursor {
        self.cursor
    }

    /// Continues from a place that [`cursor`](Self::cursor) gave.
    pub fn seek(&mut self, cursor: Cursor) {
        self.cursor = cursor;
        let mut rng = ChaCha12Rng::seed_from_u64(self.seed);
        rng.set_stream(cursor.epoch);
        self.order = (0u32..).take(self.items.len()).collect();
        for last in (1..self.order.len()).rev() {
            self.order.swap(last, rng.random_range(0..=last));
        }
    }

    /// The items that follow, each in the first row that has room, until one has none.
    ///
    /// # Errors
    /// Items on disk cannot be read.
    pub fn next_batch(&mut self) -> Result<Batch, DataError> {
        let mut batch = Batch::default();
        let (items, start) = (self.items.clone(), self.start);
        self.take(
            |index| items.row_tokens(index),
            |index| {
                batch.push(index, &items.get(index)?, start);
                Ok(())
            },
        )?;
        Ok(batch)
    }

    /// Steps of `accumulate` batches, from here on, until the items were used `epochs` times; at least one. The last step
    /// may go on into the next epoch.
    ///
    /// # Errors
    /// Items on disk cannot be read.
    pub fn steps(mut self, epochs: f64, accumulate: usize) -> Result<u64, DataError> {
        let items = self.items.clone();
        let lengths = (0..items.len())
            .map(|index| items.row_tokens(index))
            .collect::<Result<Vec<_>, _>>()?;
        let goal = epochs * items.len() as f64;
        let used = |at: Cursor| at.epoch as f64 * items.len() as f64 + at.used as f64;
        let before = used(self.cursor);
        let mut batches = 0_u64;
        while used(self.cursor) - before < goal {
            self.take(|index| Ok(lengths[index]), |_| Ok(()))?;
            batches += 1;
        }
        Ok(batches.div_ceil(accumulate.max(1) as u64).max(1))
    }

    /// Hands out the items of one batch, each in the first row that has room, until one has none.
    fn take(
        &mut self,
        row_tokens: impl Fn(usize) -> Result<usize, DataError>,
        mut taken: impl FnMut(usize) -> Result<(), DataError>,
    ) -> Result<(), DataError> {
        let mut free = vec![self.length; self.rows];
        loop {
            let next = usize::try_from(self.cursor.used)
                .ok()
                .and_then(|used| self.order.get(used));
            let Some(&next) = next else {
                self.seek(Cursor {
                    epoch: self.cursor.epoch + 1,
                    used: 0,
                });
                continue;
            };
            let tokens = row_tokens(next as usize)?;
            let Some(room) = free.iter_mut().find(|room| **room >= tokens) else {
                return Ok(());
            };
            *room -= tokens;
            taken(next as usize)?;
            self.cursor.used += 1;
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;

    fn items() -> Arc<[Item]> {
        (0..50u32)
            .map(|i| Item::new(vec![i; i as usize % 3], vec![i; 1 + i as usize % 7]))
            .collect()
    }

    #[test]
    fn every_item_comes_once_an_epoch_and_rows_are_never_overfull() {
        let mut batches = Batches::new(items(), 99, 2, 12, 5).unwrap();
        let mut seen = vec![0; 50];
        while batches.cursor().epoch < 1 {
            let batch = batches.next_batch().unwrap();
            assert!(batch.packed.tokens.len() <= 24);
            for packed in &batch.items {
                let item = &items()[packed.item];
                assert_eq!(packed.logits.len(), item.target.len() + 1);
                let first = batch.rows[packed.logits.start] as usize;
                assert_eq!(first, packed.segment.start + item.context.len());
                assert_eq!(batch.packed.tokens[packed.segment.start], 99);
                seen[packed.item] += 1;
            }
        }
        assert!(
            seen.iter().all(|&count| count == 1 || count == 2),
            "{seen:?}"
        );
        assert_eq!(seen.iter().filter(|&&count| count >= 1).count(), 50);
    }

    #[test]
    fn the_steps_of_some_epochs_end_with_the_step_that_uses_the_last_item() {
        for (epochs, accumulate) in [(1.0, 1), (2.5, 1), (3.0, 4), (0.001, 1)] {
            let mut batches = Batches::new(items(), 99, 2, 12, 5).unwrap();
            let steps = batches.clone().steps(epochs, accumulate).unwrap();
            let mut used = 0;
            for step in 0..steps {
                assert!(
                    (used as f64) < epochs * 50.0,
                    "step {step} of {steps} has nothing left to do"
                );
                for _ in 0..accumulate {
                    used += batches.next_batch().unwrap().items.len();
                }
            }
            assert!(
                used as f64 >= epochs * 50.0,
                "{used} items in {steps} steps"
            );
        }
    }

    #[test]
    fn a_cursor_continues_exactly() {
        let mut batches = Batches::new(items(), 99, 2, 12, 5).unwrap();
        for _ in 0..20 {
            batches.next_batch().unwrap();
        }
        let mut other = Batches::new(items(), 99, 2, 12, 5).unwrap();
        other.seek(batches.cursor());
        for _ in 0..20 {
            let (one, other) = (batches.next_batch().unwrap(), other.next_batch().unwrap());
            assert_eq!(one.packed, other.packed);
        }
    }

    #[test]
    fn only_learned_tokens_and_the_end_of_a_whole_record_are_predicted() {
        let mut batch = Batch::default();
        let dialogue = Item {
            given: std::iter::once(1..3).collect(),
            ..Item::new(vec![1, 2], vec![3, 4, 5, 6])
        };
        batch.push(0, &dialogue, 99);
        let piece = Item {
            open: true,
            ..Item::new(vec![], vec![7, 8])
        };
        batch.push(1, &piece, 99);
        assert_eq!(batch.packed.tokens, [99, 1, 2, 3, 4, 5, 6, 99, 7, 8]);
        assert_eq!(batch.rows, [2, 5, 6, 7, 8]);
        assert_eq!(batch.labels, [Some(3), Some(6), None, Some(7), Some(8)]);
        assert_eq!(batch.items[1].logits, 3..5);
    }

    #[test]
    fn an_item_longer_than_a_row_is_named() {
        let error = Batches::new(items(), 99, 2, 8, 5).unwrap_err();
        assert!(
            matches!(
                error,
                DataError::TooLong {
                    index: 5,
                    tokens: 9,
                    length: 8
                }
            ),
            "{error}"
        );
    }
}
