//! Robust statistics: all sources' shares of the listed symbols as rows, sorted by columns.

use std::ops::Range;

use super::Shares;
use super::keep::Keeper;
use crate::cpu::multiversion::multiversion;
use crate::cpu::network::sort_columns;
use crate::fusion::Robust;
use crate::records::{ColumnsMut, RecordShape, RecordView, Symbol};

multiversion! {
    pub(super) fn run<S: Symbol>(
        rule: Robust,
        sources: &[RecordView<'_, S>],
        range: Range<usize>,
        shape: &RecordShape,
        out: &mut ColumnsMut<'_, S>,
    ) {
        let mut keeper = Keeper::new(shape);
        let mut symbols: Vec<S> = Vec::new();
        let mut rows: Vec<u32> = Vec::new();
        let mut means: Vec<u64> = Vec::new();
        let dropped = rule.dropped(sources.len());
        for (index, position) in range.enumerate() {
            union(sources, position, &mut symbols);
            // One column per symbol, one for the end, one for what nobody lists.
            let width = symbols.len() + 2;
            rows.clear();
            rows.resize(width * sources.len(), 0);
            for (source, row) in sources.iter().zip(rows.chunks_exact_mut(width)) {
                fill_row(source, position, &symbols, row);
            }
            sort_columns(&mut rows, width);
            let kept = &rows[dropped * width..(sources.len() - dropped) * width];
            let end = statistics(kept, &symbols, &mut means, &mut keeper);
            keeper.write(index, end, out);
        }
    }
}

/// Symbols that any source lists, ascending.
#[inline(always)]
fn union<S: Symbol>(sources: &[RecordView<'_, S>], position: usize, symbols: &mut Vec<S>) {
    symbols.clear();
    if !S::HAS_END {
        symbols.extend(sources.iter().flat_map(|source| source.used(position).0));
        symbols.sort_unstable();
        symbols.dedup();
        return;
    }
    let mut listed = [0_u64; 4];
    for source in sources {
        for symbol in source.used(position).0 {
            let byte = symbol.index() % 256;
            listed[byte / 64] |= 1 << (byte % 64);
        }
    }
    for (word, &listed) in listed.iter().enumerate() {
        let mut rest = listed;
        while rest != 0 {
            symbols.push(S::of(64 * word + rest.trailing_zeros() as usize));
            rest &= rest - 1;
        }
    }
}

/// Shares of one source: of every symbol in `symbols`, of the end, and of one that nobody lists.
#[inline(always)]
fn fill_row<S: Symbol>(
    source: &RecordView<'_, S>,
    position: usize,
    symbols: &[S],
    row: &mut [u32],
) {
    let (listed, codes) = source.used(position);
    let shares = Shares::of_source(source, position, codes);
    let share = |code| u32::try_from(shares.of(code)).unwrap_or(u32::MAX);
    let tail = share(source.tail()[position]);
    let (unlisted, rest) = if S::HAS_END {
        let others = u32::try_from(256 - listed.len().min(256)).unwrap_or(u32::MAX);
        let unlisted = tail.checked_div(others).unwrap_or(0);
        (unlisted, unlisted)
    } else {
        (0, tail)
    };
    row.fill(unlisted);
    let mut column = 0;
    for (&symbol, &code) in listed.iter().zip(codes) {
        while symbols[column] < symbol {
            column += 1;
        }
        row[column] = share(code);
    }
    row[symbols.len()] = source.end().get(position).map_or(0, |&code| share(code));
    row[symbols.len() + 1] = rest;
}

/// Hands over the symbols with the renormalised means of the columns of `rows`; that of the end.
#[inline(always)]
fn statistics<S: Symbol>(
    rows: &[u32],
    symbols: &[S],
    means: &mut Vec<u64>,
    keeper: &mut Keeper<S>,
) -> u64 {
    let width = symbols.len() + 2;
    means.clear();
    means.resize(width, 0);
    for row in rows.chunks_exact(width) {
        for (sum, &value) in means.iter_mut().zip(row) {
            *sum += u64::from(value);
        }
    }
    let count = (rows.len() / width) as u64;
    if count > 1 {
        means.iter_mut().for_each(|sum| *sum /= count);
    }
    let (end, nobody) = (means[width - 2], means[width - 1]);
    let nobody = if S::HAS_END {
        (256 - symbols.len() as u64) * nobody
    } else {
        nobody
    };
    let total = means[..width - 1].iter().sum::<u64>() + nobody;
    let shares = Shares::of_total(total);
    for (&symbol, &mean) in symbols.iter().zip(means.iter()) {
        keeper.push(symbol, shares.wide(mean));
    }
    shares.wide(end)
}
