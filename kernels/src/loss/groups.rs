//! Terms of one row as softmaxes over contiguous ranks: what every fast path runs.
//!
//! A group is `-weight sum_c share_c ln(mass_c / M)` over a support of contiguous ranks with mass M:
//! its classes are disjoint ranges of the support, and all other ranks together may be one more
//! class, the ghost. Shares of a group sum to one. Every term of [`super`] but the sorted ones is a
//! list of such groups; along an observed token their supports are nested.

use std::ops::Range;

use crate::loss::sorted::Sorted;
use crate::loss::{ItemLoss, NO_LABEL, Tail, Term, probability};
use crate::records::RecordView;
use crate::trie::Node;
use crate::vocab::Vocab;

/// A softmax over a range of ranks with its target.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Group {
    pub(crate) support: Range<u32>,
    /// Its classes in [`Groups::classes`], ascending by rank.
    pub(crate) classes: Range<usize>,
    /// Share of the ranks of the support that are in no class, as one.
    pub(crate) ghost: f64,
    pub(crate) weight: f64,
}

/// A range of ranks that counts as one symbol.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Class {
    pub(crate) ranks: Range<u32>,
    /// Zero where the class is only kept out of the ghost.
    pub(crate) share: f64,
}

/// All groups of one row; reused from row to row.
#[derive(Clone, Debug, Default)]
pub(crate) struct Groups {
    pub(crate) list: Vec<Group>,
    pub(crate) classes: Vec<Class>,
    /// Sorted terms, which are no groups.
    pub(crate) sorted: Vec<Sorted>,
}

/// Where a row stands in its item.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Place {
    /// Index of the row, which is that of the token it predicts.
    pub(crate) index: usize,
    /// Byte at which that token starts; zero without a trie term.
    pub(crate) offset: usize,
}

impl Groups {
    /// Takes the terms of a checked item at one row.
    pub(crate) fn set(&mut self, vocab: &Vocab, item: &ItemLoss<'_>, place: Place) {
        self.set_some(vocab, item, place, |_| true);
    }

    /// As [`Self::set`], of some of the terms.
    pub(crate) fn set_some(
        &mut self,
        vocab: &Vocab,
        item: &ItemLoss<'_>,
        place: Place,
        takes: impl Fn(&Term<'_>) -> bool,
    ) {
        self.list.clear();
        self.classes.clear();
        self.sorted.clear();
        for term in item.terms.iter().filter(|term| takes(term)) {
            match term {
                Term::Trie { target, weight } => {
                    self.trie(vocab, item.tokens, target, *weight, place);
                }
                Term::Labels { labels, weight } => self.label(vocab, labels[place.index], *weight),
                Term::Tokens {
                    target,
                    weight,
                    tail,
                } => self.tokens(vocab, target, place.index, *weight, *tail),
                Term::Sorted { target, .. } | Term::Standardised { target, .. }
                    if place.index >= target.positions() => {}
                Term::Sorted { target, weight } => {
                    let sorted = Sorted::probability(target, place.index, *weight);
                    self.sorted.extend(sorted);
                }
                Term::Standardised {
                    target,
                    weight,
                    temperature,
                } => self.sorted.push(Sorted::standardised(
                    target,
                    place.index,
                    *weight,
                    *temperature,
                    vocab.live(),
                )),
            }
        }
    }

    fn label(&mut self, vocab: &Vocab, label: u32, weight: f32) {
        let Some(class) = (label != NO_LABEL).then(|| vocab.class(label)).flatten() else {
            return;
        };
        let first = self.classes.len();
        self.classes.push(Class {
            ranks: narrow(class),
            share: 1.0,
        });
        self.close(0..vocab.end_ranks().end, first, 0.0, weight);
    }

    fn tokens(
        &mut self,
        vocab: &Vocab,
        target: &RecordView<'_, u32>,
        position: usize,
        weight: f32,
        tail: Tail,
    ) {
        let first = self.classes.len();
        for (id, code) in target.listed(position) {
            let rank = vocab.rank_of_id()[id as usize];
            if let Some(class) = vocab.class(rank) {
                self.classes.push(Class {
                    ranks: narrow(class),
                    share: probability(code),
                });
            }
        }
        self.classes[first..].sort_unstable_by_key(|class| class.ranks.start);
        // Ids that spell the same bytes are one class.
        let mut kept = first;
        for index in first..self.classes.len() {
            if index > first && self.classes[kept].ranks == self.classes[index].ranks {
                self.classes[kept].share += self.classes[index].share;
            } else {
                kept += usize::from(index > first);
                self.classes.swap(kept, index);
            }
        }
        if self.classes.len() > first {
            self.classes.truncate(kept + 1);
        }
        let listed: u32 = self.classes[first..]
            .iter()
            .map(|class| class.ranks.end - class.ranks.start)
            .sum();
        let live = vocab.end_ranks().end;
        let ghost = match tail {
            Tail::Ghost if listed < live => probability(target.tail()[position]),
            Tail::Ghost | Tail::Dropped => 0.0,
        };
        self.close(0..live, first, ghost, weight);
    }

    fn trie(
        &mut self,
        vocab: &Vocab,
        tokens: &[u32],
        target: &RecordView<'_>,
        weight: f32,
        place: Place,
    ) {
        self.root(vocab, tokens, target, weight, place);
        let Some(&token) = tokens.get(place.index) else {
            return;
        };
        let trie = vocab.trie();
        let bytes = vocab.token_bytes(token);
        let mut node = trie.root();
        for (taken, &byte) in (1..).zip(bytes) {
            let Some(child) = trie.child(node, byte) else {
                break;
            };
            node = child;
            let position = place.offset + taken;
            if taken < bytes.len() {
                self.node(vocab, node, target, position, weight, None);
            } else if node.has_children() {
                let next = first_byte(vocab, tokens, place.index + 1);
                self.node(vocab, node, target, position, weight, next);
            }
        }
    }

    fn root(
        &mut self,
        vocab: &Vocab,
        tokens: &[u32],
        target: &RecordView<'_>,
        weight: f32,
        place: Place,
    ) {
        let trie = vocab.trie();
        let observed = first_byte(vocab, tokens, place.index);
        let mut kept_out = [None; 256];
        for (byte, code) in target.listed(place.offset) {
            kept_out[usize::from(byte)] = Some(probability(code));
        }
        // The root fix: what the previous token's own node holds.
        let previous = place
            .index
            .checked_sub(1)
            .and_then(|index| trie.find(vocab.token_bytes(tokens[index])));
        for child in previous.map_or(&[][..], |previous| trie.children(previous)) {
            if Some(child.byte) != observed {
                kept_out[usize::from(child.byte)] = Some(0.0);
            }
        }
        let first = self.classes.len();
        let mut has_ghost = false;
        for child in trie.children(trie.root()) {
            match kept_out[usize::from(child.byte)] {
                Some(share) => self.classes.push(Class {
                    ranks: child.start..child.end,
                    share,
                }),
                None => has_ghost = true,
            }
        }
        self.classes.push(Class {
            ranks: vocab.end_ranks(),
            share: probability(target.end()[place.offset]),
        });
        let tail = probability(target.tail()[place.offset]);
        let ghost = if has_ghost { tail } else { 0.0 };
        self.close(0..vocab.end_ranks().end, first, ghost, weight);
    }

    /// A node below the root; `next` is the byte that followed where the observed token stops here.
    fn node(
        &mut self,
        vocab: &Vocab,
        node: &Node,
        target: &RecordView<'_>,
        position: usize,
        weight: f32,
        next: Option<u8>,
    ) {
        let trie = vocab.trie();
        let first = self.classes.len();
        let is_token = node.stop > node.start;
        if is_token {
            self.classes.push(Class {
                ranks: node.start..node.stop,
                share: 0.0,
            });
        }
        let mut stop = probability(target.end()[position]);
        for (byte, code) in target.listed(position) {
            let share = probability(code);
            match trie.child(node, byte).filter(|_| Some(byte) != next) {
                Some(child) => self.classes.push(Class {
                    ranks: child.start..child.end,
                    share,
                }),
                None => stop += share,
            }
        }
        if is_token {
            self.classes[first].share = stop;
        }
        self.close(node.start..node.end, first, 0.0, weight);
    }

    /// Makes the classes from `first` on a group, with shares that sum to one; nothing where they
    /// have no mass.
    fn close(&mut self, support: Range<u32>, first: usize, ghost: f64, weight: f32) {
        if ghost <= 0.0 {
            // Only a ghost cares what it does not hold.
            let mut kept = first;
            for index in first..self.classes.len() {
                if self.classes[index].share > 0.0 {
                    self.classes.swap(kept, index);
                    kept += 1;
                }
            }
            self.classes.truncate(kept);
        }
        let listed: f64 = self.classes[first..].iter().map(|class| class.share).sum();
        let total = listed + ghost.max(0.0);
        if total <= 0.0 {
            self.classes.truncate(first);
            return;
        }
        for class in &mut self.classes[first..] {
            class.share /= total;
        }
        self.list.push(Group {
            support,
            classes: first..self.classes.len(),
            ghost: ghost.max(0.0) / total,
            weight: f64::from(weight),
        });
    }
}

/// First byte of a token of the target; `None` past the last, where the record ends.
pub(crate) fn first_byte(vocab: &Vocab, tokens: &[u32], index: usize) -> Option<u8> {
    vocab.token_bytes(*tokens.get(index)?).first().copied()
}

fn narrow(ranks: Range<usize>) -> Range<u32> {
    let narrow = |rank| u32::try_from(rank).expect("ranks are u32");
    narrow(ranks.start)..narrow(ranks.end)
}
