//! Arms in which sources teach token by token, through alignments of their tokenizers with the pivot's.
//!
//! Both choose one source per item by its cross-entropy per token of its own, as published; the fewer and longer a source's
//! tokens, the higher that is for the same bits. The whole item is scored and its declared answers are labels, because
//! neither method knows of answers that mean nothing.

use std::cell::Cell;

use anyhow::{Context, Result};
use consilium_examples::lab::clock::say;
use consilium_examples::tokens::{Shares, Spellings, normalised, partners, projected, renamed};
use consilium_kernels::loss::Tail;
use consilium_node::worker::LoadedModel;
use consilium_node::worker::data::{Batch, Item};
use consilium_node::worker::train::distill::{Objective, TokenTargets};
use consilium_protocol::reference;

use crate::bench::Bench;

/// Largest logits of a position that FuseLLM keeps.
const LARGEST: usize = 10;
/// Tokens of a row that X-Token keeps: its 8192 of a batch would be more than these vocabularies have.
const KEPT: usize = 64;
/// Tokens of one pass.
const TOKENS: usize = 2048;

/// `FuseLLM` with `MinCE` and `MinED` (arXiv 2401.10491): 0.9 of cross-entropy on the text, 0.1 on the distributions of the best of
/// all sources, of which the pivot is one. As in the published code the row after a token learns from the source's row after
/// that token's partner; where it has none, what is there counts as certain.
pub(crate) fn fusellm(bench: &Bench) -> Result<LoadedModel> {
    let sources = bench.sources.iter().chain([&bench.pivot]);
    let models = sources
        .map(|folder| Ok(LoadedModel::load(folder)?))
        .collect::<Result<Vec<_>>>()?;
    // Rows without a partner before them, and all.
    let counts = Cell::new([0_usize; 2]);
    let of = |own: &Side<'_>, source: &Side<'_>| -> Rows<'_> {
        let nearest = own.names.nearest(&source.names);
        let names = [own.names.clone(), source.names.clone()];
        let counts = &counts;
        Box::new(move |ours, scored| {
            let before = after_partners(&names, &nearest, ours, &scored.ranks);
            let [alone, all] = counts.get();
            let lonely = before.iter().filter(|row| row.is_none()).count();
            counts.set([alone + lonely, all + before.len()]);
            let rows = before.into_iter().zip(ours);
            rows.map(|(row, &rank)| match row {
                Some(row) => renamed(scored.row(row), &nearest, LARGEST),
                None => vec![(rank, 1.0)],
            })
            .collect()
        })
    };
    let model = taught(bench, &models, of, (LARGEST, 0.9))?;
    let [alone, all] = counts.get();
    say(&format!(
        "           FuseLLM: {:.1} % of rows follow a token without a partner and learn what is there",
        100.0 * alone as f64 / all.max(1) as f64
    ));
    Ok(model)
}

/// For each row of the pivot the source's row after the partner of the token before it; the first after the start of both.
fn after_partners(
    [own, source]: &[Spellings; 2],
    nearest: &[u32],
    ours: &[u32],
    theirs: &[u32],
) -> Vec<Option<usize>> {
    let left: Vec<&[u8]> = ours.iter().map(|&rank| own.token(rank)).collect();
    let right: Vec<&[u8]> = theirs.iter().map(|&rank| source.token(rank)).collect();
    let found = partners(&left, &right, |i, j| {
        left[i] == right[j] || nearest[theirs[j] as usize] == ours[i]
    });
    let after = found.into_iter().map(|partner| Some(partner? + 1));
    std::iter::once(Some(0))
        .chain(after)
        .take(ours.len())
        .collect()
}

/// X-Token's `P-KL` with the best teacher per item (arXiv 2605.21699): the teacher's mass by the projection W of its tokens, where
/// one of its tokens and one of the pivot's begin at the same byte, and 0.1 of cross-entropy on the text.
///
/// The paper takes the student's mass to the teacher's tokens by the same matrix; here the teacher's comes to the pivot's.
pub(crate) fn xtoken(bench: &Bench) -> Result<LoadedModel> {
    let models = bench
        .sources
        .iter()
        .map(|folder| Ok(LoadedModel::load(folder)?))
        .collect::<Result<Vec<_>>>()?;
    let of = |own: &Side<'_>, source: &Side<'_>| -> Rows<'_> {
        let projection = own.names.projection(&source.names);
        let (own_names, source_names) = (own.names.clone(), source.names.clone());
        Box::new(move |ours, scored| {
            let theirs = starts(&source_names, &scored.ranks);
            starts(&own_names, ours)
                .into_iter()
                .map(|byte| match theirs.binary_search(&byte) {
                    Ok(place) => normalised(projected(scored.row(place), &projection)),
                    Err(_) => Shares::new(),
                })
                .collect()
        })
    };
    taught(bench, &models, of, (KEPT, 0.1))
}

/// A model and its tokens.
struct Side<'a> {
    model: &'a LoadedModel,
    names: Spellings,
}

/// One item as a source predicts it.
struct Scored {
    /// Ranks that are there, the end's the last.
    ranks: Vec<u32>,
    /// Probabilities `[ranks, tokens]`, the end of a record the last.
    mass: Vec<f64>,
    tokens: usize,
}

/// What the pivot's rows learn of an item: its ranks there, and the source's prediction.
type Rows<'a> = Box<dyn Fn(&[u32], &Scored) -> Vec<Shares> + 'a>;

impl<'a> Side<'a> {
    fn new(model: &'a LoadedModel) -> Self {
        let names = Spellings::of(&model.vocab);
        Self { model, names }
    }

    fn item(&self, item: &reference::Item) -> Result<Item> {
        Ok(self.model.whole_item(&item.context, &item.target)?)
    }

    /// Ranks of a target and its end.
    fn ranks(&self, item: &Item) -> Vec<u32> {
        let mut ranks = self.model.ranks(&item.target);
        ranks.push(self.names.end());
        ranks
    }

    /// Gives `take` the predictions of every wanted item.
    fn score(
        &self,
        items: &[reference::Item],
        wanted: &[u64],
        mut take: impl FnMut(u64, &Scored) -> Result<()>,
    ) -> Result<()> {
        let mut batch = (Batch::default(), Vec::new(), 0);
        for (at, &index) in wanted.iter().enumerate() {
            let item = self.item(at_index(items, index)?)?;
            batch
                .0
                .push(batch.1.len(), &item, self.model.tokenizer.start_of_record());
            batch.2 += item.row_tokens();
            batch.1.push((index, self.ranks(&item)));
            if batch.2 >= TOKENS || at + 1 == wanted.len() {
                let (packed, known, _) = std::mem::take(&mut batch);
                self.pass(&packed, known, &mut take)?;
            }
        }
        Ok(())
    }

    fn pass(
        &self,
        batch: &Batch,
        known: Vec<(u64, Vec<u32>)>,
        take: &mut impl FnMut(u64, &Scored) -> Result<()>,
    ) -> Result<()> {
        let pass = self.model.model.score(&batch.packed, &batch.rows)?;
        let logits = self.model.model.logits(&pass.hidden)?;
        let width = self.model.vocab.len();
        for (packed, (index, ranks)) in batch.items.iter().zip(known) {
            let rows = packed.logits.start * width..packed.logits.end * width;
            let rows = logits.get(rows).context("rows of an item")?;
            let mass = rows.chunks_exact(width).flat_map(|row| self.softmax(row));
            let scored = Scored {
                ranks,
                mass: mass.collect(),
                tokens: self.names.end() as usize + 1,
            };
            take(index, &scored)?;
        }
        Ok(())
    }

    /// Probabilities of the tokens that spell bytes, and of the end.
    fn softmax(&self, logits: &[f32]) -> Vec<f64> {
        let live = &logits[..self.model.vocab.end_ranks().end as usize];
        let most = live.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let mut mass: Vec<f64> = live.iter().map(|&x| f64::from(x - most).exp()).collect();
        let total: f64 = mass.iter().sum();
        let end: f64 = mass.drain(self.names.end() as usize..).sum();
        mass.push(end);
        mass.iter_mut().for_each(|mass| *mass /= total);
        mass
    }
}

impl Scored {
    fn row(&self, place: usize) -> &[f64] {
        &self.mass[place * self.tokens..(place + 1) * self.tokens]
    }

    /// Nats per token of what is there.
    fn cross_entropy(&self) -> f64 {
        let places = self.ranks.iter().enumerate();
        let nats = places.map(|(place, &rank)| -self.row(place)[rank as usize].ln());
        nats.sum::<f64>() / self.ranks.len().max(1) as f64
    }
}

/// The pivot after distillation from the best of `models` per item, through what `rows` makes of its predictions; at most so
/// many tokens a row, and this weight of cross-entropy.
fn taught<'a>(
    bench: &Bench,
    models: &[LoadedModel],
    rows: impl Fn(&Side<'_>, &Side<'_>) -> Rows<'a>,
    (symbols, cross_entropy): (usize, f32),
) -> Result<LoadedModel> {
    let items = bench.reference.items();
    let (mut distiller, plan) = bench.trainer().begin(items, true)?;
    let pivot = LoadedModel::load(&bench.pivot)?;
    let own = Side::new(&pivot);
    let sides: Vec<Side<'_>> = models.iter().map(Side::new).collect();
    let mut targets = TokenTargets::new(symbols);
    let chosen = best(&sides, items, &plan.visited()?)?;
    let counts: Vec<String> = chosen.iter().map(|items| items.len().to_string()).collect();
    say(&format!(
        "           best by nats per token, items of each source: {}",
        counts.join(", ")
    ));
    for (side, wanted) in sides.iter().zip(chosen) {
        let rows = rows(&own, side);
        side.score(items, &wanted, |index, scored| {
            let ours = own.ranks(&own.item(at_index(items, index)?)?);
            let ids = |(rank, share): (u32, f64)| (pivot.vocab.id_of_rank()[rank as usize], share);
            let learned = rows(&ours, scored).into_iter();
            let learned = learned.map(|row| row.into_iter().map(ids).collect());
            Ok(targets.insert(index, learned.collect())?)
        })?;
    }
    let objective = Objective::Tokens {
        targets: &targets,
        tail: Tail::Dropped,
        cross_entropy,
    };
    distiller.run(&plan, items, objective, &mut ())?;
    Ok(distiller.into_student())
}

/// For each side the items that it predicts best, by cross-entropy per token; the first on a tie.
fn best(sides: &[Side<'_>], items: &[reference::Item], wanted: &[u64]) -> Result<Vec<Vec<u64>>> {
    let mut costs = vec![Vec::with_capacity(sides.len()); wanted.len()];
    for side in sides {
        let mut of_item = costs.iter_mut();
        side.score(items, wanted, |_, scored| {
            of_item
                .next()
                .context("an item too many")?
                .push(scored.cross_entropy());
            Ok(())
        })?;
    }
    let mut chosen = vec![Vec::new(); sides.len()];
    for (&index, costs) in wanted.iter().zip(&costs) {
        let best = costs.iter().enumerate().min_by(|a, b| a.1.total_cmp(b.1));
        if let Some(chosen) = best.and_then(|(side, _)| chosen.get_mut(side)) {
            chosen.push(index);
        }
    }
    Ok(chosen)
}

/// Bytes at which tokens begin.
fn starts(names: &Spellings, ranks: &[u32]) -> Vec<usize> {
    let lengths = ranks.iter().map(|&rank| names.token(rank).len());
    lengths
        .scan(0, |at, length| Some(std::mem::replace(at, *at + length)))
        .collect()
}

fn at_index(items: &[reference::Item], index: u64) -> Result<&reference::Item> {
    let item = usize::try_from(index).ok().and_then(|at| items.get(at));
    item.with_context(|| format!("no item {index}"))
}
