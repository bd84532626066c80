//! Terms of rows, as they cross to the device.

use std::ops::Range;

use crate::cuda::device::count;
use crate::cuda::raw::{
    self, Class, LossRow, NONE, Slot, TERM_GROUP, TERM_LABEL, TERM_SORTED, TERM_STANDARDISED,
    TERM_TRIE,
};
use crate::cuda::tries::{Path, ResidentTrie};
use crate::error::{CudaError, LossError};
use crate::loss::{
    self, Group, Groups, ItemLoss, Measure, NO_LABEL, Place, Sorted, Term, first_byte,
};
use crate::records::RecordView;
use crate::vocab::Vocab;

/// Terms of the rows of one launch.
#[derive(Default)]
pub(super) struct Terms {
    pub(super) rows: Vec<LossRow>,
    pub(super) terms: Vec<raw::Term>,
    /// Of trie targets.
    pub(super) columns: Vec<u8>,
    /// Of every row, its listed columns and room for its largest.
    pub(super) slots: Vec<Slot>,
    pub(super) classes: Vec<Class>,
    /// Of a group's classes and its ghost; of a sorted target and its rest, or the temperature.
    pub(super) shares: Vec<f64>,
    /// Most slots that a trie term has along one row's token.
    pub(super) most_listed: u32,
    /// Most of a row's largest columns that a term asks for.
    pub(super) most_top: u32,
}

/// One row of an item.
#[derive(Clone, Copy, Debug)]
pub(super) struct RowOf<'a> {
    item: ItemLoss<'a>,
    place: Place,
}

/// All rows of checked items.
pub(super) fn rows_of<'a>(
    vocab: &'a Vocab,
    items: &'a [ItemLoss<'a>],
) -> Result<Vec<RowOf<'a>>, LossError> {
    let job = loss::LossJob::new(vocab, items)?;
    let rows = (0..job.rows()).map(|row| {
        let (item, place) = job.place(row);
        RowOf { item: *item, place }
    });
    Ok(rows.collect())
}

impl RowOf<'_> {
    /// The observed token along which a row with a trie term is cut; `None` at the end of the record.
    fn token(&self, index: usize) -> Option<u32> {
        self.item.tokens.get(index).copied()
    }

    fn has_trie(&self) -> bool {
        let is_trie = |term: &Term<'_>| matches!(term, Term::Trie { .. });
        self.item.terms.iter().any(is_trie)
    }

    fn label(&self, labels: &[u32]) -> u32 {
        labels.get(self.place.index).copied().unwrap_or(NO_LABEL)
    }

    /// Segment of a term's label where the row is cut along its token.
    fn segment(&self, vocab: &Vocab, path: &Path, term: &Term<'_>) -> Option<u32> {
        let Term::Labels { labels, .. } = term else {
            return None;
        };
        let label = self.label(labels);
        if !self.has_trie() || label == NO_LABEL {
            return None;
        }
        if vocab.end_ranks().contains(&label) {
            return Some(path.end());
        }
        let token = self.token(self.place.index)?;
        (vocab.token_bytes(token) == vocab.token_bytes(label)).then_some(path.stop)
    }
}

impl Terms {
    pub(super) fn of_rows<'t>(
        vocab: &Vocab,
        trie: &'t ResidentTrie,
        rows: &[RowOf<'_>],
    ) -> Result<(Vec<&'t Path>, Self), CudaError> {
        let mut all = Self::default();
        let mut groups = Groups::default();
        let mut paths = Vec::with_capacity(rows.len());
        for row in rows {
            let path = if row.has_trie() {
                trie.path(row.token(row.place.index))
            } else {
                trie.whole()
            };
            let first_term = count(all.terms.len())?;
            let first_slot = count(all.slots.len())?;
            all.by_segments(vocab, path, row)?;
            groups.set_some(vocab, &row.item, row.place, |term| {
                !matches!(term, Term::Trie { .. }) && row.segment(vocab, path, term).is_none()
            });
            let (listed, top) = all.by_columns(vocab, &groups)?;
            all.rows.push(LossRow {
                first_term,
                terms: count(all.terms.len())? - first_term,
                first_slot,
                listed,
                top,
                ..neighbours(vocab, trie, row)
            });
            paths.push(path);
        }
        Ok((paths, all))
    }

    /// Adds the terms of a row whose classes are its segments.
    fn by_segments(
        &mut self,
        vocab: &Vocab,
        path: &Path,
        row: &RowOf<'_>,
    ) -> Result<(), CudaError> {
        for term in row.item.terms {
            match term {
                Term::Trie { target, weight } => {
                    let token = row.token(row.place.index);
                    let bytes = token.map_or(0, |rank| vocab.token_bytes(rank).len());
                    let positions = row.place.offset..row.place.offset + bytes + 1;
                    self.trie(target, positions, *weight)?;
                }
                Term::Labels { weight, .. } => {
                    if let Some(segment) = row.segment(vocab, path, term) {
                        self.terms.push(raw::Term {
                            kind: TERM_LABEL,
                            weight: *weight,
                            segment,
                            ..raw::Term::default()
                        });
                    }
                }
                Term::Tokens { .. } | Term::Sorted { .. } | Term::Standardised { .. } => {}
            }
        }
        Ok(())
    }

    /// Adds a trie term with its columns at `positions`, which the target has.
    fn trie(
        &mut self,
        target: &RecordView<'_>,
        positions: Range<usize>,
        weight: f32,
    ) -> Result<(), CudaError> {
        let slots = positions.start * target.k()..positions.end * target.k();
        let mut copy = |column: &[u8]| {
            let start = count(self.columns.len());
            self.columns.extend_from_slice(column);
            start
        };
        let term = raw::Term {
            kind: TERM_TRIE,
            weight,
            slots: count(target.k())?,
            symbols: copy(&target.symbols()[slots.clone()])?,
            codes: copy(&target.codes()[slots])?,
            end: copy(&target.end()[positions.clone()])?,
            tail: copy(&target.tail()[positions])?,
            ..raw::Term::default()
        };
        self.most_listed = self.most_listed.max(term.codes - term.symbols);
        self.terms.push(term);
        Ok(())
    }

    /// Adds the terms of a row that ask for single columns; returns how many columns these list, and how many of the
    /// row's largest they ask for.
    fn by_columns(&mut self, vocab: &Vocab, groups: &Groups) -> Result<(u32, u32), CudaError> {
        let ranks = groups.classes.iter().flat_map(|class| class.ranks.clone());
        let mut columns: Vec<u32> = ranks.collect();
        columns.sort_unstable();
        columns.dedup();
        for group in &groups.list {
            self.group(groups, group, &columns)?;
        }
        let mut top = 0;
        for sorted in &groups.sorted {
            self.sorted(sorted)?;
            top = top.max(sorted.target.len().min(vocab.live()));
        }
        let slots = columns.iter().map(|&column| Slot {
            column,
            ..Slot::default()
        });
        self.slots.extend(slots);
        self.slots.resize(self.slots.len() + top, Slot::default());
        let top = count(top)?;
        self.most_top = self.most_top.max(top);
        Ok((count(columns.len())?, top))
    }

    /// Adds a group whose classes are all among `columns`.
    fn group(&mut self, groups: &Groups, group: &Group, columns: &[u32]) -> Result<(), CudaError> {
        let classes = &groups.classes[group.classes.clone()];
        self.terms.push(raw::Term {
            kind: TERM_GROUP,
            weight: narrow(group.weight),
            slots: count(classes.len())?,
            shares: count(self.shares.len())?,
            classes: count(self.classes.len())?,
            ..raw::Term::default()
        });
        let slot = |rank| count(columns.partition_point(|&column| column < rank));
        for class in classes {
            self.classes.push(Class {
                from: slot(class.ranks.start)?,
                to: slot(class.ranks.end)?,
            });
        }
        let shares = classes.iter().map(|class| class.share);
        self.shares.extend(shares.chain([group.ghost]));
        Ok(())
    }

    fn sorted(&mut self, sorted: &Sorted) -> Result<(), CudaError> {
        let (kind, last) = match sorted.measure {
            Measure::Probability { rest } => (TERM_SORTED, rest),
            Measure::Standardised { temperature } => (TERM_STANDARDISED, temperature),
        };
        self.terms.push(raw::Term {
            kind,
            weight: narrow(sorted.weight),
            slots: count(sorted.target.len())?,
            shares: count(self.shares.len())?,
            ..raw::Term::default()
        });
        self.shares
            .extend(sorted.target.iter().copied().chain([last]));
        Ok(())
    }
}

/// What a trie target needs to know of the tokens around a row's.
fn neighbours(vocab: &Vocab, trie: &ResidentTrie, row: &RowOf<'_>) -> LossRow {
    let none = LossRow {
        previous: NONE,
        first: 256,
        next: 256,
        ..LossRow::default()
    };
    if !row.has_trie() {
        return none;
    }
    let (tokens, index) = (row.item.tokens, row.place.index);
    let first = |index| first_byte(vocab, tokens, index).map_or(256, u32::from);
    let previous = index.checked_sub(1).and_then(|index| row.token(index));
    LossRow {
        previous: previous.map_or(NONE, |rank| trie.path(Some(rank)).node),
        first: first(index),
        next: first(index + 1),
        ..none
    }
}

#[expect(clippy::cast_possible_truncation, reason = "it was f32")]
fn narrow(weight: f64) -> f32 {
    weight as f32
}
