//! Masses of all nodes along one observed token, from one pass over a logits row.
//!
//! The nodes root, `t[..1]`, ... t are nested ranges of ranks, so their stops and children, each
//! node's child on the path replaced by that node's own, tile the row: every logit is read and
//! exponentiated once.

use std::ops::Range;

use crate::cpu::simd::{Level, largest, sum_exp};
use crate::element::Element;
use crate::trie::Node;
use crate::vocab::Vocab;

/// Below this mass, relative to its shift, a node is summed again against its own largest logit:
/// what is left of `f32` underneath would no longer resolve its members.
const SCARCE: f64 = 1e-20;

/// Columns that say where the logits of a row are: any value near its largest will do as the shift.
const SAMPLE: usize = 256;

/// Index of the end of the record in a distribution.
pub(crate) const END: usize = 256;

/// Masses of all bytes and the end.
pub(crate) type Dense = [f64; 257];

/// Nodes along a token with their masses; reused from row to row.
#[derive(Debug, Default)]
pub(super) struct Masses {
    steps: Vec<Step>,
    /// Start of each tile, and the end of the last.
    bounds: Vec<u32>,
    tiles: Vec<f64>,
    /// Bounds and masses of one node summed by itself, and what [`Self::split`] returns.
    own_bounds: Vec<u32>,
    own: Vec<f64>,
}

/// A node on the path.
#[derive(Clone, Copy, Debug)]
struct Step {
    node: Node,
    /// Child on the path; as many as there are children at the last node.
    path: usize,
    /// Tile of the node's stops; those of the children before the path follow.
    before: usize,
    /// Tile of the first child past the path.
    after: usize,
    /// Mass of the whole node.
    total: f64,
}

/// How the mass of a node splits.
#[derive(Clone, Copy, Debug)]
pub(super) struct Split<'a> {
    /// What spells exactly the node.
    pub(super) stop: f64,
    /// What goes on, by child.
    pub(super) children: &'a [f64],
    /// Sum of the children.
    pub(super) longer: f64,
}

impl Split<'_> {
    pub(super) fn total(&self) -> f64 {
        self.stop + self.longer
    }

    /// Share of the node that stops.
    pub(super) fn stopped(&self) -> f64 {
        let total = self.total();
        if total.is_finite() {
            self.stop / total
        } else {
            1.0
        }
    }
}

impl Masses {
    /// Reads a row of live columns along the bytes of a token; no bytes give the root alone.
    ///
    /// # Errors
    /// The first column that is not finite.
    pub(super) fn read<T: Element>(
        &mut self,
        level: Level,
        vocab: &Vocab,
        bytes: &[u8],
        row: &[T],
    ) -> Result<(), usize> {
        self.tile(vocab, bytes);
        self.tiles.clear();
        self.tiles.resize(self.bounds.len() - 1, 0.0);
        let shift = largest(level, &row[..row.len().min(SAMPLE)]);
        if !sum_exp(level, row, &self.bounds, shift, &mut self.tiles) {
            let is_bad = |value: &T| !value.to_f32().is_finite();
            return Err(row.iter().position(is_bad).unwrap_or(0));
        }
        if !self.tiles.iter().sum::<f64>().is_finite() {
            let shift = largest(level, row);
            sum_exp(level, row, &self.bounds, shift, &mut self.tiles);
        }
        let mut below = 0.0;
        for step in self.steps.iter_mut().rev() {
            let past = vocab
                .trie()
                .children(&step.node)
                .len()
                .saturating_sub(step.path + 1);
            let before = &self.tiles[step.before..=step.before + step.path];
            let after = &self.tiles[step.after..step.after + past];
            step.total = before.iter().sum::<f64>() + below + after.iter().sum::<f64>();
            below = step.total;
        }
        Ok(())
    }

    fn tile(&mut self, vocab: &Vocab, bytes: &[u8]) {
        let trie = vocab.trie();
        self.steps.clear();
        self.bounds.clear();
        self.bounds.push(0);
        let mut node = trie.root();
        for taken in 0..=bytes.len() {
            let children = trie.children(node);
            let next = bytes.get(taken).and_then(|&byte| {
                children
                    .binary_search_by_key(&byte, |child| child.byte)
                    .ok()
            });
            let path = next.unwrap_or(children.len());
            self.steps.push(Step {
                node: *node,
                path,
                before: self.bounds.len() - 1,
                after: 0,
                total: 0.0,
            });
            self.bounds.push(node.stop);
            self.bounds
                .extend(children[..path].iter().map(|child| child.end));
            match next {
                Some(next) => node = &children[next],
                None => break,
            }
        }
        for step in self.steps.iter_mut().rev() {
            step.after = self.bounds.len() - 1;
            let children = trie.children(&step.node);
            let past = children.get(step.path + 1..).unwrap_or(&[]);
            self.bounds.extend(past.iter().map(|child| child.end));
        }
        self.bounds.push(vocab.end_ranks().end);
    }

    /// Next-byte distribution at the root.
    pub(super) fn root(&self, vocab: &Vocab, mass: &mut Dense) {
        let end = self.tiles[self.tiles.len() - 1];
        let total = self.steps[0].total + end;
        *mass = [0.0; 257];
        mass[END] = end / total;
        for (index, child) in vocab
            .trie()
            .children(vocab.trie().root())
            .iter()
            .enumerate()
        {
            mass[usize::from(child.byte)] = self.child(0, index) / total;
        }
    }

    /// Masses of the node after `taken` bytes, in a scale in which those that go on are
    /// representable, or those that stop where none goes on.
    pub(super) fn split<T: Element>(
        &mut self,
        level: Level,
        vocab: &Vocab,
        row: &[T],
        taken: usize,
    ) -> Split<'_> {
        let step = self.steps[taken];
        let children = vocab.trie().children(&step.node);
        let mut own = std::mem::take(&mut self.own);
        own.clear();
        own.push(self.tiles[step.before]);
        own.extend((0..children.len()).map(|index| self.child(taken, index)));
        if own[1..].iter().sum::<f64>() < SCARCE && !children.is_empty() {
            self.sum_alone(level, row, &step.node, children, &mut own);
        }
        self.own = own;
        Split {
            stop: self.own[0],
            children: &self.own[1..],
            longer: self.own[1..].iter().sum(),
        }
    }

    /// Sums stops and children of one node against the largest logit among the children; a stop
    /// that is beyond `f32` in that scale is infinite.
    fn sum_alone<T: Element>(
        &mut self,
        level: Level,
        row: &[T],
        node: &Node,
        children: &[Node],
        out: &mut [f64],
    ) {
        let shift = largest(level, &row[node.longer()]);
        self.own_bounds.clear();
        self.own_bounds.extend([node.start, node.stop]);
        self.own_bounds
            .extend(children.iter().map(|child| child.end));
        sum_exp(level, row, &self.own_bounds[1..], shift, &mut out[1..]);
        let stops = &row[node.stops()];
        let shifted = stops
            .iter()
            .map(|logit| (f64::from(logit.to_f32()) - f64::from(shift)).exp());
        out[0] = shifted.sum();
    }

    fn child(&self, taken: usize, index: usize) -> f64 {
        let step = &self.steps[taken];
        match index.cmp(&step.path) {
            std::cmp::Ordering::Less => self.tiles[step.before + 1 + index],
            std::cmp::Ordering::Equal => self.steps[taken + 1].total,
            std::cmp::Ordering::Greater => self.tiles[step.after + index - step.path - 1],
        }
    }
}

/// Ranks of the likeliest among some columns, the first on a tie.
pub(super) fn likeliest<T: Element>(row: &[T], ranks: Range<u32>) -> u32 {
    ranks.clone().fold(ranks.start, |best, rank| {
        if row[rank as usize].to_f32() > row[best as usize].to_f32() {
            rank
        } else {
            best
        }
    })
}
