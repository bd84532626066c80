//! Records that are being written.

use super::Symbol;
use crate::code::FLOOR;

/// Positions of [`Records`] that are being written.
pub(crate) struct ColumnsMut<'a, S> {
    pub(crate) k: usize,
    pub(crate) symbols: &'a mut [S],
    pub(crate) codes: &'a mut [u8],
    pub(crate) end: &'a mut [u8],
    pub(crate) tail: &'a mut [u8],
}

impl<'a, S: Symbol> ColumnsMut<'a, S> {
    pub(crate) fn positions(&self) -> usize {
        self.tail.len()
    }

    /// Runs of `positions`, the last one shorter.
    pub(crate) fn runs(self, positions: usize) -> Vec<Self> {
        let mut runs = Vec::with_capacity(self.positions().div_ceil(positions));
        let mut rest = self;
        while rest.positions() > positions {
            let (first, others) = rest.split(positions);
            runs.push(first);
            rest = others;
        }
        runs.push(rest);
        runs
    }

    fn split(self, at: usize) -> (Self, Self) {
        let k = self.k;
        let (symbols, symbols_after) = self.symbols.split_at_mut(at * k);
        let (codes, codes_after) = self.codes.split_at_mut(at * k);
        let (end, end_after) = self.end.split_at_mut(at.min(self.end.len()));
        let (tail, tail_after) = self.tail.split_at_mut(at);
        let first = Self {
            k,
            symbols,
            codes,
            end,
            tail,
        };
        let others = Self {
            k,
            symbols: symbols_after,
            codes: codes_after,
            end: end_after,
            tail: tail_after,
        };
        (first, others)
    }

    /// Writes one position. `listed` is ascending, holds 1 to `k` symbols; `end` is ignored among
    /// tokens.
    #[inline]
    pub(crate) fn write(&mut self, position: usize, listed: &[(S, u8)], end: u8, tail: u8) {
        debug_assert!(
            !listed.is_empty() && listed.len() <= self.k,
            "{} symbols",
            listed.len()
        );
        debug_assert!(
            listed.windows(2).all(|pair| pair[0].0 < pair[1].0),
            "symbols ascend"
        );
        let slots = position * self.k..(position + 1) * self.k;
        let (symbols, codes) = (&mut self.symbols[slots.clone()], &mut self.codes[slots]);
        let last = listed.last().map_or_else(S::default, |&(symbol, _)| symbol);
        symbols[listed.len()..].fill(last);
        codes[listed.len()..].fill(FLOOR);
        for ((symbol, code), &(listed, mass)) in symbols.iter_mut().zip(codes).zip(listed) {
            *symbol = listed;
            *code = mass;
        }
        if S::HAS_END {
            self.end[position] = end;
        }
        self.tail[position] = tail;
    }
}
