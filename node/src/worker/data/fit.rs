//! Items that are longer than a row.

use serde::{Deserialize, Serialize};

use super::item::Item;

/// What is learned of a pair or a conversation. Plain text is learned whole.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Loss {
    /// The completion, or the assistant's turns.
    #[default]
    Completion,
    /// Everything.
    All,
}

/// What becomes of an item that does not fit a row.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum LongItems {
    /// It becomes several; each sees nothing of those before it.
    #[default]
    Split,
    /// Only its beginning is used.
    Cut,
}

/// What was done to an item.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Fit {
    /// Nothing: it fits.
    Whole,
    /// The beginning of its context was dropped, and the target is whole.
    Shortened,
    /// Tokens to learn went into another item, or were dropped.
    Broken,
}

/// Appends `item` to `out` in pieces of at most `length` row tokens, `length` being at least 2. A context that is too long
/// beside its target loses its beginning. Where the target alone is too long, pieces without anything to learn are left
/// out; only the last piece predicts the end of the record.
pub(super) fn fit(mut item: Item, length: usize, long: LongItems, out: &mut Vec<Item>) -> Fit {
    if item.row_tokens() <= length {
        out.push(item);
        return Fit::Whole;
    }
    let room = length.saturating_sub(1).max(1);
    if let Some(room) = room.checked_sub(item.target.len()) {
        item.context.drain(..item.context.len() - room);
        out.push(item);
        return Fit::Shortened;
    }
    let mask = item.mask();
    let tokens = [item.context, item.target].concat();
    let pieces = tokens.len().div_ceil(room);
    let used = match long {
        LongItems::Split => pieces,
        // The first piece with something to learn.
        LongItems::Cut => mask.iter().position(|&learned| learned).unwrap_or(0) / room + 1,
    };
    for (at, (tokens, mask)) in tokens
        .chunks(room)
        .zip(mask.chunks(room))
        .enumerate()
        .take(used)
    {
        let ends = at + 1 == pieces && !item.open;
        out.extend(Item::of_learned(tokens.to_vec(), mask, ends));
    }
    Fit::Broken
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pieces(item: &Item, length: usize, long: LongItems) -> (Fit, Vec<Item>) {
        let mut out = Vec::new();
        let fit = fit(item.clone(), length, long, &mut out);
        assert!(out.iter().all(|piece| piece.row_tokens() <= length));
        (fit, out)
    }

    #[test]
    fn every_learned_token_is_learned_once_and_no_given_one_becomes_a_target() {
        let item = Item {
            given: std::iter::once(3..7).collect(),
            ..Item::new((0..5).collect(), (5..20).collect())
        };
        let learned = |items: &[Item]| -> Vec<u32> {
            items
                .iter()
                .flat_map(|item| item.learned().map(|at| item.target[at]))
                .collect()
        };
        for length in 2..25 {
            let (fit, split) = pieces(&item, length, LongItems::Split);
            assert_eq!(
                learned(&split),
                learned(std::slice::from_ref(&item)),
                "{length}"
            );
            let open = split.iter().map(|item| item.open);
            assert!(
                open.eq((1..=split.len()).map(|at| at < split.len())),
                "{length}"
            );
            assert_eq!(fit == Fit::Broken, length < 16, "{length}");
        }
        let (_, cut) = pieces(&item, 10, LongItems::Cut);
        assert_eq!(
            cut,
            [Item {
                open: true,
                ..Item::new((0..5).collect(), vec![5, 6, 7])
            }]
        );
        let (fit, shortened) = pieces(&item, 18, LongItems::Cut);
        assert_eq!(
            (fit, shortened[0].context.as_slice()),
            (Fit::Shortened, &[3, 4][..])
        );
        assert!(!shortened[0].open);
    }
}
