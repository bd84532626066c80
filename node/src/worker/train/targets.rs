//! Fused records of the items that an inner round visits.

use std::collections::BTreeMap;
use std::ops::Range;

use consilium_kernels::{RecordView, Records, Symbol, code};
use consilium_protocol::Digest;
use consilium_protocol::manifest::SymbolSpace;
use consilium_protocol::reference::{Item, ReferenceSet};
use consilium_protocol::shard::{Shard, Symbols};

use crate::worker::error::WorkError;

/// Records of some items. Memory grows with these, not with the reference set.
#[derive(Debug)]
pub struct Targets<S = u8> {
    records: Records<S>,
    places: BTreeMap<u64, Range<usize>>,
}

impl Targets {
    /// Takes the records of `wanted` (ascending) out of the shards, which are loaded one at a time: shard i, from
    /// `load(i)`, covers the items `i * shard_items..`.
    ///
    /// # Errors
    /// A shard of other items or another reference set, records that do not fit their item, or `load` fails.
    pub fn gather(
        reference: &ReferenceSet,
        wanted: &[u64],
        shard_items: u32,
        load: impl FnMut(u32) -> Result<Vec<u8>, WorkError>,
    ) -> Result<Self, WorkError> {
        gather(reference, wanted, SymbolSpace::Bytes, shard_items, load)
    }

    /// The same records without their tail: what is listed is then the whole target.
    ///
    /// # Errors
    /// Never for records that were gathered.
    pub fn without_tail(self) -> Result<Self, WorkError> {
        let view = self.records.view();
        let tail = vec![code::FLOOR; view.positions()];
        let (symbols, codes, end) = (view.symbols(), view.codes(), view.end());
        let (symbols, codes, end) = (symbols.to_vec(), codes.to_vec(), end.to_vec());
        let records = Records::from_columns(view.k(), symbols, codes, end, tail)?;
        Ok(Self { records, ..self })
    }
}

impl Targets<u32> {
    /// As [`Targets::gather`], of shards in a token space: one position for each of an item's `tokens`.
    ///
    /// # Errors
    /// As [`Targets::gather`], or a shard of another space.
    pub fn gather_tokens(
        reference: &ReferenceSet,
        wanted: &[u64],
        space: SymbolSpace,
        shard_items: u32,
        load: impl FnMut(u32) -> Result<Vec<u8>, WorkError>,
    ) -> Result<Self, WorkError> {
        gather(reference, wanted, space, shard_items, load)
    }
}

impl<S: Symbol> Targets<S> {
    /// The records of one item; none if it was not wanted.
    #[must_use]
    pub fn of(&self, item: u64) -> Option<RecordView<'_, S>> {
        let place = self.places.get(&item)?;
        self.records.view().slice(place.clone())
    }

    /// Symbol slots of one position.
    #[must_use]
    pub fn slots(&self) -> usize {
        self.records.k()
    }
}

/// Symbols as a shard has them.
trait Column: Symbol {
    /// Those of a shard, if they are of this kind.
    fn column(symbols: &Symbols) -> Option<&[Self]>;
    /// Positions of an item.
    fn positions(item: &Item) -> usize;
}

impl Column for u8 {
    fn column(symbols: &Symbols) -> Option<&[Self]> {
        match symbols {
            Symbols::Bytes(bytes) => Some(bytes),
            Symbols::Tokens(_) => None,
        }
    }

    fn positions(item: &Item) -> usize {
        item.positions()
    }
}

impl Column for u32 {
    fn column(symbols: &Symbols) -> Option<&[Self]> {
        match symbols {
            Symbols::Tokens(tokens) => Some(tokens),
            Symbols::Bytes(_) => None,
        }
    }

    fn positions(item: &Item) -> usize {
        item.tokens.len()
    }
}

fn gather<S: Column>(
    reference: &ReferenceSet,
    wanted: &[u64],
    space: SymbolSpace,
    shard_items: u32,
    mut load: impl FnMut(u32) -> Result<Vec<u8>, WorkError>,
) -> Result<Targets<S>, WorkError> {
    let size = u64::from(shard_items.max(1));
    let mut columns = Columns::<S>::default();
    let mut places = BTreeMap::new();
    for of_shard in wanted.chunk_by(|a, b| a / size == b / size) {
        let Some(&first) = of_shard.first() else {
            continue;
        };
        let index = u32::try_from(first / size)
            .map_err(|_| refuse(format!("item {first} has no shard")))?;
        let shard = Shard::parse(&load(index)?)?;
        check(
            &shard,
            index,
            (reference.digest(), space),
            first / size * size,
        )?;
        for &item in of_shard {
            let positions = item_in::<S>(&shard, item, reference)?;
            places.insert(item, columns.append(&shard, positions)?);
        }
    }
    let Columns {
        k,
        symbols,
        codes,
        end,
        tail,
    } = columns;
    let records = Records::from_columns(k.max(1), symbols, codes, end, tail)?;
    Ok(Targets { records, places })
}

#[derive(Default)]
struct Columns<S> {
    k: usize,
    symbols: Vec<S>,
    codes: Vec<u8>,
    end: Vec<u8>,
    tail: Vec<u8>,
}

impl<S: Column> Columns<S> {
    fn append(&mut self, shard: &Shard, from: Range<usize>) -> Result<Range<usize>, WorkError> {
        let k = usize::from(shard.header.symbols);
        if self.k == 0 {
            self.k = k;
        }
        let symbols = S::column(&shard.symbols)
            .ok_or_else(|| refuse("records of another symbol space".to_owned()))?;
        if self.k != k {
            return Err(refuse(format!("{k} slots after shards of {}", self.k)));
        }
        let slots = from.start * k..from.end * k;
        let place = self.tail.len()..self.tail.len() + from.len();
        self.symbols.extend_from_slice(&symbols[slots.clone()]);
        self.codes.extend_from_slice(&shard.codes[slots]);
        if S::HAS_END {
            self.end.extend_from_slice(&shard.end[from.clone()]);
        }
        self.tail.extend_from_slice(&shard.tail[from]);
        Ok(place)
    }
}

fn check(
    shard: &Shard,
    index: u32,
    (reference, space): (Digest, SymbolSpace),
    first: u64,
) -> Result<(), WorkError> {
    let header = &shard.header;
    if header.reference != reference {
        let other = header.reference;
        return Err(refuse(format!(
            "shard {index} is for reference set {other}"
        )));
    }
    if header.space != space {
        let other = header.space;
        return Err(refuse(format!(
            "shard {index} is in {other:?}, expected {space:?}"
        )));
    }
    if header.first != first {
        let got = header.first;
        return Err(refuse(format!(
            "shard {index} starts with item {got}, expected {first}"
        )));
    }
    Ok(())
}

fn item_in<S: Column>(
    shard: &Shard,
    item: u64,
    reference: &ReferenceSet,
) -> Result<Range<usize>, WorkError> {
    let index = |number: u64| usize::try_from(number).ok();
    let positions = index(item - shard.header.first).and_then(|index| shard.item(index));
    let expected = index(item)
        .and_then(|index| reference.items().get(index))
        .map(S::positions);
    match (positions, expected) {
        (Some(positions), Some(expected)) if positions.len() == expected => Ok(positions),
        (got, expected) => Err(refuse(format!(
            "item {item} has {:?} positions, expected {expected:?}",
            got.map(|range| range.len())
        ))),
    }
}

fn refuse(problem: String) -> WorkError {
    WorkError::Targets(problem)
}

#[cfg(test)]
mod tests {
    use consilium_protocol::shard::Header;

    use super::*;

    const ITEMS: u64 = 7;
    const SHARD_ITEMS: u32 = 3;

    fn reference() -> ReferenceSet {
        let lines: String = (0..7)
            .map(|i| format!("{{\"target\":\"{}\"}}\n", "x".repeat(i + 1)))
            .collect();
        ReferenceSet::parse(lines.as_bytes()).unwrap()
    }

    /// Item i has i + 2 positions, whose tail codes are i.
    fn shard(index: u32, reference: Digest) -> Shard {
        let first = u64::from(index * SHARD_ITEMS);
        let items = first..ITEMS.min(first + u64::from(SHARD_ITEMS));
        let mut offsets = vec![0];
        let mut tail = Vec::new();
        for item in items.clone() {
            tail.extend(vec![
                u8::try_from(item).unwrap();
                usize::try_from(item).unwrap() + 2
            ]);
            offsets.push(tail.len() as u64);
        }
        let n = tail.len();
        Shard {
            header: Header::new(reference, items, SymbolSpace::Bytes, 2),
            symbols: Symbols::Bytes([b'a', b'x'].repeat(n)),
            codes: vec![9; 2 * n],
            end: vec![255; n],
            tail,
            missed: vec![255; 2 * (offsets.len() - 1)],
            offsets,
        }
    }

    #[test]
    fn each_wanted_item_gets_its_own_records_and_no_other_shard_is_read() {
        let reference = reference();
        let mut read = Vec::new();
        let targets = Targets::gather(&reference, &[0, 2, 6], SHARD_ITEMS, |index| {
            read.push(index);
            Ok(shard(index, reference.digest()).to_bytes()?)
        })
        .unwrap();
        assert_eq!(read, [0, 2]);
        for item in [0_u8, 2, 6] {
            let records = targets.of(item.into()).unwrap();
            assert_eq!(records.tail(), vec![item; usize::from(item) + 2]);
        }
        assert!(targets.of(1).is_none());
        let listed = targets.without_tail().unwrap();
        assert_eq!(listed.of(2).unwrap().tail(), [255; 4]);
        assert_eq!(listed.of(2).unwrap().codes(), [9; 8]);
    }

    #[test]
    fn shards_of_another_set_or_place_or_length_are_refused() {
        let reference = reference();
        let gather = |bytes: Vec<u8>| {
            Targets::gather(&reference, &[4], SHARD_ITEMS, |_| Ok(bytes.clone())).is_ok()
        };
        assert!(gather(shard(1, reference.digest()).to_bytes().unwrap()));
        assert!(!gather(shard(1, Digest::of(b"other")).to_bytes().unwrap()));
        assert!(!gather(shard(0, reference.digest()).to_bytes().unwrap()));
        let mut moved = shard(1, reference.digest());
        moved.offsets[1] -= 1;
        moved.offsets[2] -= 2;
        assert!(!gather(moved.to_bytes().unwrap()));
        assert!(!gather(b"no shard".to_vec()));
    }
}
