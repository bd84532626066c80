//! One shard of records: batches of items, two passes each.
//!
//! The first pass gives the logits of the observed tokens. They tell which interior stops are likely enough for a pass
//! of their own, and the second pass runs all of these at once over the keys and values of the first.

use std::ops::Range;

use consilium_kernels::score::{Branch, Missed, branches, records, token_bits};
use consilium_kernels::{RecordShape, Records, code};
use consilium_protocol::manifest::SymbolSpace;
use consilium_protocol::reference::{self, ReferenceSet};
use consilium_protocol::shard::{Header, Shard, Symbols};
use rayon::prelude::*;

use crate::worker::data::Item;
use crate::worker::error::WorkError;
use crate::worker::model::BranchToken;
use crate::worker::monitor::Monitor;
use crate::worker::source::LoadedModel;

/// Share of a node's mass above which a stop inside a token gets a forward pass.
const THRESHOLD: f32 = 1e-3;

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
    shape.check::<u8>()?;
    let slots = u16::try_from(shape.k).map_err(|_| WorkError::Setting {
        field: "symbols",
        problem: format!("{} slots do not fit a shard", shape.k),
    })?;
    let tokenised = items_in(reference, &items)?
        .par_iter()
        .map(|item| source.whole_item(&item.context, &item.target))
        .collect::<Result<Vec<_>, _>>()?;

    let mut shard = Shard {
        header: Header::new(reference.digest(), items, SymbolSpace::Bytes, slots),
        symbols: Symbols::Bytes(Vec::new()),
        codes: Vec::new(),
        end: Vec::new(),
        tail: Vec::new(),
        missed: Vec::new(),
        offsets: vec![0],
    };
    let mut stats = ScoreStats::default();
    for run in source.runs(&tokenised) {
        for item in score_batch(source, &tokenised[run.clone()], shape)? {
            append(&mut shard, &mut stats, &item);
        }
        let total = tokenised.len() as u64;
        monitor.advance(run.end as u64, total, Some(stats.bits_per_byte()))?;
    }
    Ok(Scored { shard, stats })
}

/// One item with its logits and the stops that want a forward pass.
struct Observed<'a> {
    ranks: Vec<u32>,
    logits: &'a [f32],
    stops: Vec<Branch>,
}

struct ScoredItem {
    records: Records,
    missed: Missed,
    tokens: usize,
    branches: usize,
    bits: f64,
}

fn score_batch(
    source: &LoadedModel,
    items: &[Item],
    shape: &RecordShape,
) -> Result<Vec<ScoredItem>, WorkError> {
    let (vocab, width) = (&*source.vocab, source.vocab.len());
    let batch = source.batch(items);
    let pass = source.model.score(&batch.packed, &batch.rows)?;
    let observed: Vec<Observed<'_>> = items
        .par_iter()
        .zip(&batch.items)
        .map(|(item, packed)| {
            let ranks = source.ranks(&item.target);
            let logits = &pass.logits[packed.logits.start * width..packed.logits.end * width];
            let stops = branches(vocab, &ranks, logits, THRESHOLD)?;
            Ok(Observed {
                ranks,
                logits,
                stops,
            })
        })
        .collect::<Result<_, WorkError>>()?;

    let mut tokens = Vec::new();
    for ((index, item), observed) in (0_u32..).zip(items).zip(&observed) {
        // A prefix is shorter than the model's limit, which is far below 2^32.
        let context = u32::try_from(1 + item.context.len()).unwrap_or(u32::MAX);
        tokens.extend(observed.stops.iter().map(|stop| BranchToken {
            item: index,
            prefix: context.saturating_add(stop.position),
            token: vocab.id_of_rank()[stop.rank as usize],
        }));
    }
    let branch_logits = source.model.branch_logits(&pass.kv, &tokens)?;
    let mut rest = branch_logits.as_slice();
    let mut jobs = Vec::with_capacity(items.len());
    for observed in observed {
        let (own, others) = rest.split_at(observed.stops.len() * width);
        rest = others;
        jobs.push((observed, own));
    }
    jobs.par_iter()
        .map(|(observed, branch_logits)| score_item(source, observed, branch_logits, shape))
        .collect()
}

fn score_item(
    source: &LoadedModel,
    observed: &Observed<'_>,
    branch_logits: &[f32],
    shape: &RecordShape,
) -> Result<ScoredItem, WorkError> {
    let Observed {
        ranks,
        logits,
        stops,
    } = observed;
    let vocab = &source.vocab;
    let mut out = Records::new(shape.k)?;
    let missed = records(vocab, ranks, logits, stops, branch_logits, shape, &mut out)?;
    Ok(ScoredItem {
        records: out,
        missed,
        tokens: ranks.len() + 1,
        branches: stops.len(),
        bits: token_bits(vocab, ranks, logits)?,
    })
}

fn append(shard: &mut Shard, stats: &mut ScoreStats, item: &ScoredItem) {
    let view = item.records.view();
    if let Symbols::Bytes(symbols) = &mut shard.symbols {
        symbols.extend_from_slice(view.symbols());
    }
    shard.codes.extend_from_slice(view.codes());
    shard.end.extend_from_slice(view.end());
    shard.tail.extend_from_slice(view.tail());
    for missed in [item.missed.short, item.missed.long] {
        shard.missed.push(code::encode(f64::from(missed)));
    }
    shard.offsets.push(shard.end.len() as u64);
    stats.positions = shard.end.len();
    stats.tokens += item.tokens;
    stats.branches += item.branches;
    stats.bits += item.bits;
}

fn items_in<'a>(
    reference: &'a ReferenceSet,
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
