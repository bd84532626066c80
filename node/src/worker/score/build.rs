//! Shards that grow by items or by parts.

use std::ops::Range;

use consilium_kernels::score::Missed;
use consilium_kernels::{RecordShape, RecordView, code};
use consilium_protocol::Digest;
use consilium_protocol::manifest::SymbolSpace;
use consilium_protocol::reference;
use consilium_protocol::shard::{Header, Shard, Symbols};

use crate::worker::error::WorkError;

/// A shard whose items are appended in order.
#[derive(Debug, Clone)]
pub(crate) struct ShardBuilder {
    shard: Shard,
}

impl ShardBuilder {
    /// A shard that is to hold `items`, none of them yet.
    ///
    /// # Errors
    /// A shape that no shard can have.
    pub(crate) fn new(
        reference: Digest,
        items: Range<u64>,
        space: SymbolSpace,
        shape: &RecordShape,
    ) -> Result<Self, WorkError> {
        let symbols = match space {
            SymbolSpace::Bytes => {
                shape.check::<u8>()?;
                Symbols::Bytes(Vec::new())
            }
            SymbolSpace::Tokens { .. } => {
                shape.check::<u32>()?;
                Symbols::Tokens(Vec::new())
            }
        };
        let slots = u16::try_from(shape.k).map_err(|_| WorkError::Setting {
            field: "symbols",
            problem: format!("{} slots do not fit a shard", shape.k),
        })?;
        Ok(Self {
            shard: Shard {
                header: Header::new(reference, items, space, slots),
                symbols,
                codes: Vec::new(),
                end: Vec::new(),
                tail: Vec::new(),
                missed: Vec::new(),
                offsets: vec![0],
            },
        })
    }

    /// Positions so far.
    pub(crate) const fn positions(&self) -> usize {
        self.shard.positions()
    }

    /// Appends the records of `items` in bytes, one `missed` each.
    pub(crate) fn append(
        &mut self,
        items: &[reference::Item],
        records: RecordView<'_>,
        missed: &[Missed],
    ) {
        let mut end = self.positions();
        if let Symbols::Bytes(all) = &mut self.shard.symbols {
            all.extend_from_slice(records.symbols());
        }
        self.columns(records.codes(), records.end(), records.tail());
        for (item, missed) in items.iter().zip(missed) {
            let shares = [missed.short, missed.long].map(f64::from);
            self.shard.missed.extend(shares.map(code::encode));
            end += item.positions();
            self.shard.offsets.push(end as u64);
        }
    }

    /// Appends the record of one item in tokens. Among these the end is a symbol, and nothing is missed.
    pub(crate) fn append_tokens(&mut self, record: RecordView<'_, u32>) {
        if let Symbols::Tokens(all) = &mut self.shard.symbols {
            all.extend_from_slice(record.symbols());
        }
        let end = vec![code::FLOOR; record.positions()];
        self.columns(record.codes(), &end, record.tail());
        self.shard.missed.extend([code::FLOOR; 2]);
        self.shard.offsets.push(self.positions() as u64);
    }

    /// Appends all items of another shard of the same space.
    pub(crate) fn append_part(&mut self, part: &Shard) {
        let before = self.positions() as u64;
        match (&mut self.shard.symbols, &part.symbols) {
            (Symbols::Bytes(all), Symbols::Bytes(symbols)) => all.extend_from_slice(symbols),
            (Symbols::Tokens(all), Symbols::Tokens(symbols)) => all.extend_from_slice(symbols),
            // A shard without symbols for its positions is refused when it is written.
            _ => {}
        }
        self.columns(&part.codes, &part.end, &part.tail);
        self.shard.missed.extend_from_slice(&part.missed);
        let ends = part.offsets.iter().skip(1);
        self.shard.offsets.extend(ends.map(|end| before + end));
    }

    fn columns(&mut self, codes: &[u8], end: &[u8], tail: &[u8]) {
        self.shard.codes.extend_from_slice(codes);
        self.shard.end.extend_from_slice(end);
        self.shard.tail.extend_from_slice(tail);
    }

    /// The shard.
    pub(crate) fn finish(self) -> Shard {
        self.shard
    }
}

/// A range of items of the reference set, not empty.
///
/// # Errors
/// A range that is empty or not inside.
pub(crate) fn items_in<'a>(
    reference: &'a reference::ReferenceSet,
    items: &Range<u64>,
) -> Result<&'a [reference::Item], WorkError> {
    let bounds = usize::try_from(items.start)
        .ok()
        .zip(usize::try_from(items.end).ok());
    bounds
        .and_then(|(first, last)| reference.items().get(first..last))
        .filter(|chosen| !chosen.is_empty())
        .ok_or(WorkError::Items {
            first: items.start,
            last: items.end,
            items: reference.items().len(),
        })
}
