//! Records of some items through the server, in two rounds of prompts.
//!
//! The first round gives the likeliest tokens along the observed ones. They tell which stops inside of a token are likely
//! enough for a prompt of their own, which ends with the shorter token; the second round asks for these. Every prompt has
//! one more token at its end, because a server predicts the tokens of a prompt and not the one after.

use consilium_kernels::score::{Branch, Missed};
use consilium_kernels::{ListedRow, RecordShape, Records, listed};
use consilium_protocol::reference;

use super::answer::Prompt;
use super::error::ScorerError;
use super::probe::listed_row;
use super::server::{Server, Stop};
use super::source::Source;
use crate::worker::data::Item;
use crate::worker::score::{STOP_SHARE, TokenColumns};
use crate::worker::tokens::check_item;

/// Records of consecutive items and what they took.
#[derive(Debug)]
pub(super) struct ScoredItems {
    pub(super) records: Records,
    pub(super) missed: Vec<Missed>,
    /// Stops that got a prompt of their own.
    pub(super) branches: usize,
    /// Tokens predicted, ends included.
    pub(super) tokens: usize,
    /// Bits of the observed tokens and ends.
    pub(super) bits: f64,
}

/// An item on its way.
struct Asked {
    tokens: Item,
    ranks: Vec<u32>,
    rows: Vec<ListedRow>,
    branches: Vec<Branch>,
}

/// How prompts are made.
#[derive(Debug, Clone, Copy)]
pub(super) struct Asking {
    /// Likeliest tokens per position.
    pub(super) top: u32,
    /// Longest prompt in tokens.
    pub(super) max_tokens: u32,
}

/// Scores items.
///
/// # Errors
/// Text that cannot be tokenised, the server, or `stop`.
pub(super) fn score_items(
    source: &Source,
    server: &Server,
    items: &[reference::Item],
    asking: Asking,
    shape: &RecordShape,
    stop: Stop<'_>,
) -> Result<ScoredItems, ScorerError> {
    let mut asked = along_targets(source, server, items, asking, stop)?;
    for item in &mut asked {
        item.branches = listed::branches(&source.vocab, &item.ranks, &item.rows, STOP_SHARE)?;
    }
    let after = after_stops(source, server, &asked, asking.top, stop)?;
    let mut after = after.as_slice();
    let mut scored = ScoredItems {
        records: Records::new(shape.k)?,
        missed: Vec::with_capacity(items.len()),
        branches: after.len(),
        tokens: 0,
        bits: 0.0,
    };
    for item in &asked {
        let (own, rest) = after.split_at(item.branches.len());
        after = rest;
        let (vocab, ranks) = (&source.vocab, &item.ranks);
        let missed = listed::records(
            vocab,
            ranks,
            &item.rows,
            &item.branches,
            own,
            shape,
            &mut scored.records,
        )?;
        scored.missed.push(missed);
        scored.tokens += item.rows.len();
        scored.bits += listed::token_bits(vocab, ranks, &item.rows)?;
    }
    Ok(scored)
}

/// Records in token space of consecutive items, of which `first` is the number of the first.
#[derive(Debug)]
pub(super) struct ScoredTokens {
    pub(super) records: Vec<Records<u32>>,
    /// Tokens predicted, ends included.
    pub(super) tokens: usize,
}

/// Scores items in token space, in one round of prompts. What the server does not list is the tail.
///
/// # Errors
/// As [`score_items`], or an item whose `tokens` are not those of the source.
pub(super) fn score_token_items(
    source: &Source,
    server: &Server,
    (first, items): (u64, &[reference::Item]),
    asking: Asking,
    shape: &RecordShape,
    stop: Stop<'_>,
) -> Result<ScoredTokens, ScorerError> {
    let asked = along_targets(source, server, items, asking, stop)?;
    let (mut records, mut tokens) = (Vec::with_capacity(items.len()), 0);
    for ((number, item), asked) in (first..).zip(items).zip(&asked) {
        check_item(&source.vocab, number, item, &asked.tokens.target)?;
        let mut columns = TokenColumns::new(shape);
        for row in asked.rows.iter().take(item.tokens.len()) {
            columns.push(likeliest(source, row));
        }
        let record = columns.finish()?;
        tokens += record.positions();
        records.push(record);
    }
    Ok(ScoredTokens { records, tokens })
}

/// Listed tokens by id, the likeliest first, the smaller id on a tie.
fn likeliest(source: &Source, row: &ListedRow) -> Vec<(u32, f64)> {
    // Servers compute with few bits: a sum may be a little above one.
    let sum = row.tokens().map(|(_, share)| share).sum::<f64>().max(1.0);
    let ids = source.vocab.id_of_rank();
    let shares = row.tokens();
    let mut listed: Vec<_> = shares
        .map(|(rank, share)| (ids[rank as usize], share / sum))
        .collect();
    listed.sort_unstable_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
    listed
}

fn along_targets(
    source: &Source,
    server: &Server,
    items: &[reference::Item],
    asking: Asking,
    stop: Stop<'_>,
) -> Result<Vec<Asked>, ScorerError> {
    let (start, end) = (source.start(), source.end());
    // One place is for the token at the end.
    let limit = usize::try_from(asking.max_tokens).unwrap_or(usize::MAX) - 1;
    let tokens = items
        .iter()
        .map(|item| source.item(&item.context, &item.target, limit))
        .collect::<Result<Vec<_>, _>>()?;
    let prompts: Vec<Prompt> = tokens
        .iter()
        .map(|item| Prompt {
            ids: [&[start], &*item.context, &*item.target, &[end]].concat(),
            from: 1 + item.context.len(),
        })
        .collect();
    let answers = server.ask_all(&prompts, asking.top, stop)?;
    let asked = tokens.into_iter().zip(&prompts).zip(&answers).enumerate();
    asked
        .map(|(index, ((tokens, prompt), rows))| {
            let rows = (prompt.from..).zip(rows).map(|(token, pairs)| {
                listed_row(server, source, (index, token), pairs, asking.top)
            });
            Ok(Asked {
                ranks: source.ranks(&tokens.target),
                tokens,
                rows: rows.collect::<Result<_, _>>()?,
                branches: Vec::new(),
            })
        })
        .collect()
}

/// One row for each branch of each item, in order.
fn after_stops(
    source: &Source,
    server: &Server,
    asked: &[Asked],
    top: u32,
    stop: Stop<'_>,
) -> Result<Vec<ListedRow>, ScorerError> {
    let (start, end) = (source.start(), source.end());
    let mut prompts = Vec::new();
    for item in asked {
        for branch in &item.branches {
            let before = item.tokens.target.get(..branch.position as usize);
            let token = source.vocab.id_of_rank()[branch.rank as usize];
            let before = before.unwrap_or_default();
            let ids = [&[start], &*item.tokens.context, before, &[token, end]].concat();
            let from = ids.len() - 1;
            prompts.push(Prompt { ids, from });
        }
    }
    let answers = server.ask_all(&prompts, top, stop)?;
    let rows = answers.iter().flatten().zip(&prompts).enumerate();
    rows.map(|(index, (pairs, prompt))| {
        listed_row(server, source, (index, prompt.from), pairs, top)
    })
    .collect()
}
