//! Records of a source in token space: the likeliest of its own next tokens, one pass for each batch of items.
//!
//! A token is a symbol, so nothing stops inside of one and nothing is missed. Tokens that spell nothing and end no record
//! have no mass, as in byte space.

use std::ops::Range;

use consilium_kernels::fusion::{Evidence, ObservedToken};
use consilium_kernels::head::TopLogits;
use consilium_kernels::{RecordError, RecordShape, RecordView, Records, Vocab, code};
use consilium_protocol::manifest::SymbolSpace;
use consilium_protocol::reference::{self, ReferenceSet};
use rayon::prelude::*;

use super::build::{ShardBuilder, items_in};
use super::shard::{ScoreStats, Scored};
use crate::worker::error::WorkError;
use crate::worker::monitor::Monitor;
use crate::worker::source::LoadedModel;
use crate::worker::tokens::{check_item, check_tokenizer};

/// Scores `items` of the reference set in a token space: one position for each of their `tokens`.
///
/// # Errors
/// A source of another tokenizer, an item whose `tokens` are not that tokenizer's, and as
/// [`score_shard`](super::score_shard).
pub fn score_token_shard(
    source: &LoadedModel,
    reference: &ReferenceSet,
    items: Range<u64>,
    space: SymbolSpace,
    shape: &RecordShape,
    monitor: &mut dyn Monitor,
) -> Result<Scored, WorkError> {
    check_tokenizer(&source.tokenizer, "the source", space)?;
    let mut shard = ShardBuilder::new(reference.digest(), items.clone(), space, shape)?;
    let chosen: Vec<_> = items.clone().zip(items_in(reference, &items)?).collect();
    let mut stats = ScoreStats::default();
    score_token_items(source, &chosen, shape, monitor, |place, record| {
        let (_, item) = chosen[place];
        shard.append_tokens(record);
        stats.tokens += record.positions();
        stats.positions += item.positions();
        stats.bits += bits(item, record, space)?;
        Ok(Some(stats.bits_per_byte()))
    })?;
    let shard = shard.finish();
    Ok(Scored { shard, stats })
}

/// Scores any items, given with their numbers, and gives `take` the record of each, by its place among `items`, in order.
/// What `take` returns is shown.
///
/// # Errors
/// As [`score_token_shard`], but for the tokenizer; or what `take` gives.
pub(crate) fn score_token_items(
    source: &LoadedModel,
    items: &[(u64, &reference::Item)],
    shape: &RecordShape,
    monitor: &mut dyn Monitor,
    mut take: impl FnMut(usize, RecordView<'_, u32>) -> Result<Option<f64>, WorkError>,
) -> Result<(), WorkError> {
    shape.check::<u32>()?;
    let tokenised = items
        .par_iter()
        .map(|&(number, item)| {
            let tokens = source.whole_item(&item.context, &item.target)?;
            check_item(&source.vocab, number, item, &tokens.target)?;
            Ok(tokens)
        })
        .collect::<Result<Vec<_>, WorkError>>()?;
    for run in source.runs(&tokenised) {
        let batch = source.batch(&tokenised[run.clone()]);
        let pass = source.model.score(&batch.packed, &batch.rows)?;
        let top = source
            .model
            .score_with(&source.vocab, |head| head.top(&pass.hidden, shape.k))??;
        let mut shown = None;
        for (place, packed) in run.clone().zip(&batch.items) {
            // A set may leave the end of a record out.
            let rows = packed.logits.clone().take(items[place].1.tokens.len());
            let record = listed(&source.vocab, &top, rows, shape)?;
            shown = take(place, record.view())?;
        }
        monitor.advance(run.end as u64, tokenised.len() as u64, shown)?;
    }
    Ok(())
}

/// Bits of an item's tokens, by its record.
pub(crate) fn bits(
    item: &reference::Item,
    record: RecordView<'_, u32>,
    space: SymbolSpace,
) -> Result<f64, WorkError> {
    let evidence = evidence(item, &[record], &[], space)?;
    Ok(evidence
        .totals()
        .first()
        .map_or(0.0, |bits| bits.sixteenths as f64 / 16.0))
}

/// What records say of an item's tokens; those that touch an unlabeled range are no label.
pub(crate) fn evidence(
    item: &reference::Item,
    records: &[RecordView<'_, u32>],
    unlabeled: &[Range<usize>],
    space: SymbolSpace,
) -> Result<Evidence, WorkError> {
    let size = match space {
        SymbolSpace::Tokens { size, .. } => size,
        SymbolSpace::Bytes => 0,
    };
    let tokens = item.tokens.iter();
    let tokens: Vec<_> = tokens
        .map(|&(id, bytes)| ObservedToken { id, bytes })
        .collect();
    Evidence::of_tokens(records, &tokens, unlabeled, size)
        .map_err(|error| WorkError::Targets(error.to_string()))
}

/// The likeliest tokens of some rows.
fn listed(
    vocab: &Vocab,
    top: &TopLogits,
    rows: impl Iterator<Item = usize>,
    shape: &RecordShape,
) -> Result<Records<u32>, RecordError> {
    let mut columns = TokenColumns::new(shape);
    for row in rows {
        let slots = row * top.k..(row + 1) * top.k;
        let tokens = top.ranks[slots.clone()].iter().zip(&top.logits[slots]);
        columns.push(tokens.map(|(&rank, &logit)| {
            let share = (f64::from(logit) - top.log_mass[row]).exp();
            (vocab.id_of_rank()[rank as usize], share)
        }));
    }
    columns.finish()
}

/// Columns of a record that grows by rows.
#[derive(Debug)]
pub(crate) struct TokenColumns {
    shape: RecordShape,
    symbols: Vec<u32>,
    codes: Vec<u8>,
    tail: Vec<u8>,
}

impl TokenColumns {
    /// No rows yet.
    pub(crate) const fn new(shape: &RecordShape) -> Self {
        Self {
            shape: *shape,
            symbols: Vec::new(),
            codes: Vec::new(),
            tail: Vec::new(),
        }
    }

    /// Takes tokens with their probabilities, at least one, the likeliest first: as many as the shape's share of the mass
    /// needs, at most K. What they leave of one is the tail.
    pub(crate) fn push(&mut self, likeliest: impl IntoIterator<Item = (u32, f64)>) {
        let fill = f64::from(self.shape.fill_permille) / 1000.0;
        let (mut listed, mut filled) = (Vec::with_capacity(self.shape.k), 0.0);
        for (id, share) in likeliest.into_iter().take(self.shape.k) {
            if !listed.is_empty() && filled >= fill {
                break;
            }
            filled += share;
            listed.push((id, share));
        }
        listed.sort_unstable_by_key(|&(id, _)| id);
        // Unused slots repeat the last token.
        let last = listed.last().map_or(0, |&(id, _)| id);
        let unused = self.shape.k - listed.len();
        self.symbols.extend(listed.iter().map(|&(id, _)| id));
        self.symbols.extend(std::iter::repeat_n(last, unused));
        self.codes
            .extend(listed.iter().map(|&(_, share)| code::encode(share)));
        self.codes.extend(std::iter::repeat_n(code::FLOOR, unused));
        self.tail.push(code::encode(1.0 - filled));
    }

    /// The record.
    ///
    /// # Errors
    /// A token twice in one row.
    pub(crate) fn finish(self) -> Result<Records<u32>, RecordError> {
        let Self {
            shape,
            symbols,
            codes,
            tail,
        } = self;
        Records::from_columns(shape.k, symbols, codes, Vec::new(), tail)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use consilium_protocol::shard::{Shard, Symbols};

    use super::*;
    use crate::worker::model::{ModelConfig, Packed};
    use crate::worker::testing::{
        LINES, log_softmax, model, reference, token_reference, token_space,
    };
    use crate::worker::tokenizer::train_bpe;

    const SHAPE: RecordShape = RecordShape {
        k: 16,
        fill_permille: 995,
    };

    fn score(source: &LoadedModel, reference: &ReferenceSet) -> Result<Scored, WorkError> {
        let space = token_space(source);
        score_token_shard(source, reference, 0..8, space, &SHAPE, &mut ())
    }

    fn view(shard: &Shard) -> RecordView<'_, u32> {
        let Symbols::Tokens(symbols) = &shard.symbols else {
            panic!("tokens")
        };
        RecordView::new(SHAPE.k, symbols, &shard.codes, &[], &shard.tail).unwrap()
    }

    /// Probabilities of all tokens at every position of an item, by id, from a pass of its own.
    fn softmax(source: &LoadedModel, item: &reference::Item) -> Vec<Vec<(u32, f64)>> {
        let tokens = source.whole_item(&item.context, &item.target).unwrap();
        let start = source.tokenizer.start_of_record();
        let ids = [&[start], tokens.context.as_slice(), &tokens.target].concat();
        let mut packed = Packed::default();
        packed.push(ids.iter().copied());
        let rows: Vec<u32> = (0..).take(ids.len()).collect();
        let pass = source.model.score(&packed, &rows).unwrap();
        let logits = source.model.logits(&pass.hidden).unwrap();
        let live = source.vocab.end_ranks().end as usize;
        let rows = logits.chunks_exact(source.vocab.len());
        rows.skip(tokens.context.len())
            .map(|row| {
                let shares = log_softmax(row, live).into_iter().map(f64::exp);
                source
                    .vocab
                    .id_of_rank()
                    .iter()
                    .copied()
                    .zip(shares)
                    .collect()
            })
            .collect()
    }

    /// Checks a listed position against all probabilities, likeliest first.
    fn check(ids: &[u32], codes: &[u8], tail: u8, shares: &[(u32, f64)], fill: f64) {
        let sum = |count: usize| shares[..count].iter().map(|(_, share)| share).sum::<f64>();
        // Not more than the fill needs or slots there are.
        assert!(ids.len() == SHAPE.k || sum(ids.len()) > fill - 1e-3);
        assert!(ids.len() == 1 || sum(ids.len() - 1) < fill + 1e-3);
        let least = shares[ids.len() - 1].1;
        for (id, &code) in ids.iter().zip(codes) {
            let share = shares.iter().find(|(other, _)| other == id).unwrap().1;
            assert!(share > least - 1e-4, "{id} is not among the likeliest");
            let expected = code::encode(share);
            assert!(code.abs_diff(expected) <= 1, "{id}: {code} for {share}");
        }
        let (rest, tail) = (1.0 - sum(ids.len()), code::decode(tail));
        assert!((tail - rest).abs() < 0.045 * rest + 1e-3, "{tail}, {rest}");
    }

    #[test]
    fn a_token_record_is_the_softmax_of_the_logits() {
        let source = model(3);
        let (reference, space) = (token_reference(&source, true), token_space(&source));
        for fill_permille in [150, 995] {
            let shape = RecordShape {
                fill_permille,
                ..SHAPE
            };
            let scored = score_token_shard(&source, &reference, 0..8, space, &shape, &mut ());
            let Scored { shard, stats } = scored.unwrap();
            let shard = Shard::parse(&shard.to_bytes().unwrap()).unwrap();
            assert_eq!(shard.header.space, space);
            let mut unused = shard.end.iter().chain(&shard.missed);
            assert!(unused.all(|&code| code == 255));
            let all = view(&shard);
            all.check_mass().unwrap();
            let mut listed = 0;
            for (index, item) in reference.items().iter().enumerate() {
                let positions = shard.item(index).unwrap();
                assert_eq!(positions.len(), item.tokens.len());
                for (position, mut shares) in positions.zip(softmax(&source, item)) {
                    shares.sort_by(|a, b| b.1.total_cmp(&a.1));
                    let slots = position * SHAPE.k..(position + 1) * SHAPE.k;
                    let mut ids = all.symbols()[slots.clone()].to_vec();
                    ids.dedup();
                    let (codes, tail) = (&all.codes()[slots], all.tail()[position]);
                    check(&ids, codes, tail, &shares, f64::from(fill_permille) / 1e3);
                    listed += ids.len();
                }
            }
            let most = SHAPE.k * all.positions();
            assert_eq!(
                listed < most / 2,
                fill_permille == 150,
                "{listed} of {most}"
            );
            assert_eq!((stats.branches, stats.tokens), (0, all.positions()));
            assert!(stats.bits_per_byte() > 0.0);
        }
    }

    #[test]
    fn a_set_may_leave_the_end_of_records_out() {
        let source = model(3);
        let with = score(&source, &token_reference(&source, true))
            .unwrap()
            .shard;
        let without = score(&source, &token_reference(&source, false))
            .unwrap()
            .shard;
        assert_eq!(without.positions() + 8, with.positions());
        let (with_end, first) = (with.item(0).unwrap(), without.item(0).unwrap());
        assert_eq!(
            with.codes[..SHAPE.k * (with_end.len() - 1)],
            without.codes[..SHAPE.k * first.len()]
        );
    }

    #[test]
    fn a_foreign_tokenizer_and_foreign_tokens_are_refused_by_name() {
        let source = model(3);
        let good = token_reference(&source, true);
        let refused = |space, reference: &ReferenceSet| {
            let scored = score_token_shard(&source, reference, 0..8, space, &SHAPE, &mut ());
            scored.unwrap_err().to_string()
        };
        // Another file.
        let tokenizer = train_bpe(LINES.iter().copied().cycle().take(80), 340).unwrap();
        let config = ModelConfig::llama(tokenizer.size(), 32, 2, 2, 48);
        let foreign = LoadedModel::random(Arc::new(tokenizer), config, 1).unwrap();
        let text = refused(token_space(&foreign), &good);
        assert!(
            text.starts_with("symbol_space: tokenizer.json of the source"),
            "{text}"
        );
        // The same file, counted wrongly.
        let SymbolSpace::Tokens { tokenizer, size } = token_space(&source) else {
            panic!("tokens")
        };
        let size = size + 1;
        let text = refused(SymbolSpace::Tokens { tokenizer, size }, &good);
        assert!(
            text.contains(&format!("open the round with size {}", size - 1)),
            "{text}"
        );
        // A set of another tokenizer, one without tokens, one with an end that is none.
        let space = token_space(&source);
        let text = refused(space, &token_reference(&foreign, true));
        assert!(
            text.contains("tokens: of item") && text.contains("the round's tokenizer gives"),
            "{text}"
        );
        assert!(refused(space, &reference()).contains("of the reference set: has none"));
        let mut ends = String::new();
        for item in good.items() {
            let mut tokens = item.tokens.clone();
            tokens.last_mut().unwrap().0 = 7;
            let tokens = serde_json::to_string(&tokens).unwrap();
            ends += &format!("{{\"target\":\"{}\",\"tokens\":{tokens}}}\n", item.target);
        }
        let text = refused(space, &ReferenceSet::parse(ends.as_bytes()).unwrap());
        assert!(
            text.contains("[id, 0] of a token that ends records"),
            "{text}"
        );
    }
}
