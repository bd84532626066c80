//! What records cost on the wire, against dense logits of the same text.

use anyhow::{Context, Result};
use consilium_examples::lab::traffic::{dense, packed};
use consilium_node::worker::LoadedModel;
use consilium_protocol::quic::chunk::Stride;
use serde::{Deserialize, Serialize};

use crate::bench::Bench;

/// Symbols of a record that are looked at.
const SYMBOLS: [u16; 2] = [8, 16];

/// Bytes of all sources' records of the reference set.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Traffic {
    /// Symbols a position.
    pub(crate) symbols: u16,
    /// Bytes of all targets, times the sources.
    pub(crate) reference_bytes: u64,
    /// Bytes of the records, packed as they are sent.
    pub(crate) records_bytes: u64,
    /// Bytes of f16 logits over each source's own vocabulary, at every token that it predicts.
    pub(crate) dense_bytes: u64,
}

impl Traffic {
    /// Records relative to dense logits.
    pub(crate) fn share(&self) -> f64 {
        self.records_bytes as f64 / self.dense_bytes.max(1) as f64
    }

    /// One line for who waits.
    pub(crate) fn line(&self) -> String {
        let by_byte = |bytes: u64| bytes as f64 / self.reference_bytes.max(1) as f64;
        format!(
            "           {} symbols: {:.2} bytes sent a byte of text, dense logits {:.1}, 1/{:.0}",
            self.symbols,
            by_byte(self.records_bytes),
            by_byte(self.dense_bytes),
            1.0 / self.share()
        )
    }
}

impl Bench {
    /// What records of 8 and of 16 symbols cost.
    pub(crate) fn traffic(&self) -> Result<[Traffic; 2]> {
        let items = self.reference.items();
        let text: usize = items.iter().map(|item| item.target.len()).sum();
        let mut dense_bytes = 0;
        for source in &self.sources {
            dense_bytes += dense(&LoadedModel::load(source)?, items)?;
        }
        let mut found = SYMBOLS.map(|symbols| Traffic {
            symbols,
            reference_bytes: (text * self.sources.len()) as u64,
            records_bytes: 0,
            dense_bytes,
        });
        for traffic in &mut found {
            for (who, shard) in self.records(traffic.symbols)? {
                let content = shard
                    .to_bytes()
                    .with_context(|| format!("records of {who}"))?;
                traffic.records_bytes += packed(&content, Stride::BYTES)?;
            }
        }
        Ok(found)
    }
}
