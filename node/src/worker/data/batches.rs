//! Batches of whole items packed into rows, in an order that a seed decides.

use std::ops::Range;
use std::sync::Arc;

use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha12Rng;
use serde::{Deserialize, Serialize};

use super::{DataError, Item};
use crate::worker::model::{Packed, Segment};

/// Endless batches over a set of items, reshuffled every epoch.
#[derive(Debug)]
pub struct Batches {
    items: Arc<[Item]>,
    end_of_record: u32,
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
    /// Tokens; every item starts with an end-of-record token.
    pub packed: Packed,
    /// Rows whose logits predict a target token or the end of a target, ascending.
    pub rows: Vec<u32>,
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
    /// Its logits among those of the batch's `rows`: one per target token, and one for the end.
    pub logits: Range<usize>,
}

impl Batch {
    /// Appends an item.
    pub fn push(&mut self, index: usize, item: &Item, end_of_record: u32) {
        let tokens = item.context.iter().chain(&item.target).copied();
        let segment = self
            .packed
            .push(std::iter::once(end_of_record).chain(tokens));
        let first = self.rows.len();
        let rows = segment.start + item.context.len()..segment.start + segment.len;
        self.rows
            .extend(rows.filter_map(|row| u32::try_from(row).ok()));
        self.items.push(PackedItem {
            item: index,
            segment,
            logits: first..self.rows.len(),
        });
    }
}

impl Batches {
    /// Batches of at most `rows` rows of `length` tokens. Every item must fit a row.
    pub fn new(
        items: Arc<[Item]>,
        end_of_record: u32,
        rows: usize,
        length: usize,
        seed: u64,
    ) -> Result<Self, DataError> {
        if items.is_empty() || rows == 0 {
            return Err(DataError::Empty);
        }
        let long = items
            .iter()
            .enumerate()
            .find(|(_, item)| item.row_tokens() > length);
        if let Some((index, item)) = long {
            return Err(DataError::TooLong {
                index,
                tokens: item.row_tokens(),
                length,
            });
        }
        let mut batches = Self {
            items,
            end_of_record,
            rows,
            length,
            seed,
            cursor: Cursor::default(),
            order: vec![],
        };
        batches.seek(Cursor::default());
        Ok(batches)
    }

    /// The items.
    pub fn items(&self) -> &[Item] {
        &self.items
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

    /// Takes items in order, each into the first row that has room, until one has none.
    pub fn next_batch(&mut self) -> Batch {
        let mut free = vec![self.length; self.rows];
        let mut batch = Batch::default();
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
            let item = &self.items[next as usize];
            let Some(room) = free.iter_mut().find(|room| **room >= item.row_tokens()) else {
                return batch;
            };
            *room -= item.row_tokens();
            batch.push(next as usize, item, self.end_of_record);
            self.cursor.used += 1;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn items() -> Arc<[Item]> {
        (0..50u32)
            .map(|i| Item {
                context: vec![i; i as usize % 3],
                target: vec![i; 1 + i as usize % 7],
            })
            .collect()
    }

    #[test]
    fn every_item_comes_once_an_epoch_and_rows_are_never_overfull() {
        let mut batches = Batches::new(items(), 99, 2, 12, 5).unwrap();
        let mut seen = vec![0; 50];
        while batches.cursor().epoch < 1 {
            let batch = batches.next_batch();
            assert!(batch.packed.tokens.len() <= 24);
            for packed in &batch.items {
                let item = &batches.items()[packed.item];
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
    fn a_cursor_continues_exactly() {
        let mut batches = Batches::new(items(), 99, 2, 12, 5).unwrap();
        for _ in 0..20 {
            batches.next_batch();
        }
        let mut other = Batches::new(items(), 99, 2, 12, 5).unwrap();
        other.seek(batches.cursor());
        for _ in 0..20 {
            assert_eq!(batches.next_batch().packed, other.next_batch().packed);
        }
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
