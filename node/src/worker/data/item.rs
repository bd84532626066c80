//! One record, or a piece of one, as tokens.

use std::ops::Range;

/// What is given and what is learned, without the end-of-record tokens around them.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Item {
    /// Given tokens.
    pub context: Vec<u32>,
    /// Tokens to predict; an end-of-record token is predicted after them, unless the item is open.
    pub target: Vec<u32>,
    /// Places in the target that are given and not predicted, ascending, apart and inside: turns of a user between two
    /// of the assistant.
    pub given: Vec<Range<usize>>,
    /// The record goes on after the target, so its end is not predicted.
    pub open: bool,
}

impl Item {
    /// A whole record.
    #[must_use]
    pub fn new(context: Vec<u32>, target: Vec<u32>) -> Self {
        Self {
            context,
            target,
            ..Self::default()
        }
    }

    /// An item of `tokens` of which those under a true `mask` are learned, and the end after them if `ends`. Tokens after
    /// the last learned one are of no use and left out. None if nothing is learned.
    #[must_use]
    pub fn of_learned(mut tokens: Vec<u32>, mask: &[bool], ends: bool) -> Option<Self> {
        let first = mask.iter().position(|&learned| learned)?;
        let last = mask.iter().rposition(|&learned| learned)?;
        tokens.truncate(last + 1);
        let mut target = tokens.split_off(first.min(tokens.len()));
        target.shrink_to_fit();
        let mut given: Vec<Range<usize>> = Vec::new();
        for at in (0..target.len()).filter(|at| !mask[first + at]) {
            match given.last_mut() {
                Some(range) if range.end == at => range.end += 1,
                _ => given.push(at..at + 1),
            }
        }
        Some(Self {
            context: tokens,
            target,
            given,
            open: !ends,
        })
    }

    /// Tokens in a packed row: a leading end-of-record token, context, target.
    #[must_use]
    pub fn row_tokens(&self) -> usize {
        1 + self.context.len() + self.target.len()
    }

    /// Tokens that are predicted, the end included.
    #[must_use]
    pub fn labels(&self) -> usize {
        self.learned().count() + usize::from(!self.open)
    }

    /// Which of context and target, one after the other, are learned.
    pub(super) fn mask(&self) -> Vec<bool> {
        let mut mask = vec![false; self.context.len()];
        mask.resize(self.context.len() + self.target.len(), true);
        for range in &self.given {
            mask[self.context.len()..][range.clone()].fill(false);
        }
        mask
    }

    /// Places in the target that are predicted.
    pub(super) fn learned(&self) -> impl Iterator<Item = usize> + '_ {
        let mut given = self.given.iter().peekable();
        (0..self.target.len()).filter(move |at| {
            while given.next_if(|range| range.end <= *at).is_some() {}
            !given.peek().is_some_and(|range| range.contains(at))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mask_goes_into_an_item_and_comes_back() {
        let mask = [false, true, true, false, true, false, false, true, false];
        let item = Item::of_learned((0..9).collect(), &mask, false).unwrap();
        assert_eq!(item.context, [0]);
        assert_eq!(item.target, [1, 2, 3, 4, 5, 6, 7]);
        assert_eq!(item.given, [2..3, 4..6]);
        assert!(item.open);
        assert_eq!(item.mask(), mask[..8]);
        assert_eq!(item.learned().collect::<Vec<_>>(), [0, 1, 3, 6]);
        assert_eq!(Item::of_learned(vec![1, 2], &[false, false], true), None);
    }
}
