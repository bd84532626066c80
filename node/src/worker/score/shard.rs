//! One shard of records: batches of items, two passes each.
//!
//! The first pass gives the logits of the observed tokens. They tell which interior stops are likely enough for a pass
//! of their own, and the second pass runs all of these at once over the keys and values of the first.

use std::ops::Range;

use consilium_kernels::score::{ItemTokens, Missed};
use consilium_kernels::{RecordShape, RecordView, Records};
use consilium_protocol::manifest::SymbolSpace;
use consilium_protocol::reference::{self, ReferenceSet};
use consilium_protocol::shard::Shard;
use rayon::prelude::*;

use super::build::{ShardBuilder, items_in};
use crate::worker::data::Item;
use crate::worker::error::WorkError;
use crate::worker::model::BranchToken;
use crate::worker::monitor::Monitor;
use crate::worker::source::LoadedModel;

/// Share of a node's mass above which a stop inside a token gets a forward pass.
pub(crate) const STOP_SHARE: f32 = 1e-3;

/// A scored shard, ready for `to_bytes`.
#[derive(Debug, Clone, PartialEq)]
pub struct Scored {
    /// The records.
    pub shard: Shard,
    /// What they took and what they say.
    pub stats: ScoreStats,
}

/// Totals over the items of a shard.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct ScoreStats {
    /// Positions: bytes of the targets and one end for each.
    pub positions: usize,
    /// Predicted tokens, ends included.
    pub tokens: usize,
    /// Extra forwards, of tokens that stop inside an observed one.
    pub branches: usize,
    /// Bits of the observed tokens and ends.
    pub bits: f64,
}

impl ScoreStats {
    /// Extra forwards per predicted token; 0 without tokens.
    #[must_use]
    pub fn branches_per_token(&self) -> f64 {
        self.branches as f64 / self.tokens.max(1) as f64
    }

    /// Bits per byte of the canonical tokenisation, the end counted as one byte: an upper bound of the true number.
    #[must_use]
    pub fn bits_per_byte(&self) -> f64 {
        self.bits / self.positions.max(1) as f64
    }
}

/// Scores `items` of the reference set. The same model, items and shape give the same bytes on one machine.
///
/// # Errors
/// Items outside of the set, a target that cannot be tokenised, a model that gives no finite numbers, or a monitor that
/// says stop.
pub fn score_shard(
    source: &LoadedModel,
    reference: &ReferenceSet,
    items: Range<u64>,
    shape: &RecordShape,
    monitor: &mut dyn Monitor,
) -> Result<Scored, WorkError> {
    let chosen = items_in(reference, &items)?;
    let tokenised = chosen
        .par_iter()
        .map(|item| source.whole_item(&item.context, &item.target))
        .collect::<Result<Vec<_>, _>>()?;

    let mut shard = ShardBuilder::new(reference.digest(), items, SymbolSpace::Bytes, shape)?;
    let mut stats = ScoreStats::default();
    for run in source.runs(&tokenised) {
        let batch = score_batch(source, &tokenised[run.clone()], shape)?;
        append(&mut shard, &mut stats, &chosen[run.clone()], &batch);
        let total = tokenised.len() as u64;
        monitor.advance(run.end as u64, total, Some(stats.bits_per_byte()))?;
    }
    let shard = shard.finish();
    Ok(Scored { shard, stats })
}

/// Scores any items and gives `take` the records of each, by its place among `items`, in order.
///
/// # Errors
/// As [`score_shard`], or what `take` gives.
pub fn score_items(
    source: &LoadedModel,
    items: &[&reference::Item],
    shape: &RecordShape,
    monitor: &mut dyn Monitor,
    mut take: impl FnMut(usize, RecordView<'_>) -> Result<(), WorkError>,
) -> Result<(), WorkError> {
    shape.check::<u8>()?;
    let tokenised = items
        .par_iter()
        .map(|item| source.whole_item(&item.context, &item.target))
        .collect::<Result<Vec<_>, _>>()?;
    for run in source.runs(&tokenised) {
        let batch = score_batch(source, &tokenised[run.clone()], shape)?;
        let mut first = 0;
        for place in run.clone() {
            let end = first + items[place].positions();
            let records = batch.records.view().slice(first..end).ok_or_else(|| {
                WorkError::Targets(format!("{} positions at {first}", end - first))
            })?;
            take(place, records)?;
            first = end;
        }
        monitor.advance(run.end as u64, tokenised.len() as u64, None)?;
    }
    Ok(())
}

/// Records of a batch of items and what they took.
struct ScoredBatch {
    records: Records,
    missed: Vec<Missed>,
    tokens: usize,
    branches: usize,
    bits: f64,
}

fn score_batch(
    source: &LoadedModel,
    items: &[Item],
    shape: &RecordShape,
) -> Result<ScoredBatch, WorkError> {
    let (model, vocab) = (&source.model, &*source.vocab);
    let batch = source.batch(items);
    let pass = model.score(&batch.packed, &batch.rows)?;
    let ranks: Vec<Vec<u32>> = items
        .iter()
        .map(|item| source.ranks(&item.target))
        .collect();
    let targets: Vec<&[u32]> = ranks.iter().map(Vec::as_slice).collect();
    let stops = model.score_with(vocab, |head| {
        head.branches(&pass.hidden, &targets, STOP_SHARE)
    })??;

    let mut tokens = Vec::new();
    for ((index, item), stops) in (0_u32..).zip(items).zip(&stops) {
        // A prefix is shorter than the model's limit, which is far below 2^32.
        let context = u32::try_from(1 + item.context.len()).unwrap_or(u32::MAX);
        tokens.extend(stops.iter().map(|stop| BranchToken {
            item: index,
            prefix: context.saturating_add(stop.position),
            token: vocab.id_of_rank()[stop.rank as usize],
        }));
    }
    let branch_hidden = model.branch_hidden(&pass.kv, &tokens)?;
    let observed: Vec<ItemTokens<'_>> = targets
        .iter()
        .zip(&stops)
        .map(|(&tokens, branches)| ItemTokens { tokens, branches })
        .collect();
    let mut records = Records::new(shape.k)?;
    let (missed, bits) = model.score_with(vocab, |head| {
        let missed = head.records(&pass.hidden, &branch_hidden, &observed, shape, &mut records)?;
        Ok::<_, WorkError>((missed, head.token_bits(&pass.hidden, &targets)?))
    })??;
    Ok(ScoredBatch {
        records,
        missed,
        tokens: batch.rows.len(),
        branches: tokens.len(),
        bits: bits.iter().sum(),
    })
}

fn append(
    shard: &mut ShardBuilder,
    stats: &mut ScoreStats,
    items: &[reference::Item],
    batch: &ScoredBatch,
) {
    shard.append(items, batch.records.view(), &batch.missed);
    stats.positions = shard.positions();
    stats.tokens += batch.tokens;
    stats.branches += batch.branches;
    stats.bits += batch.bits;
}
