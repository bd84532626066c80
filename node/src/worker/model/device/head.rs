//! The output head and its loss, some rows at a time: the logits of a batch never exist at once.
//!
//! Cross-entropy of labels is computed on the device. Other losses go by way of `consilium_kernels` on the host: their logits are
//! copied there, and their gradients back.

use candle_core::{DType, Device, Tensor};
use candle_nn::ops::softmax_last_dim;
use consilium_kernels::loss::{ItemLoss, NO_LABEL, Term, loss_in_place};
use consilium_kernels::{LossError, Vocab};

use super::pass::ids;
use crate::worker::model::ModelError;

/// Logits that exist at a time, unless a single row or item has more.
pub(crate) const LOGITS: usize = 1 << 26;

/// A label of one row: a class of neighbouring ranks, and the factor of its loss.
#[derive(Debug, Clone, Copy)]
struct Label {
    first: u32,
    count: usize,
    weight: f32,
}

/// Rows that are computed together.
enum Chunk<'i> {
    Labels(Vec<Label>),
    Items(&'i [ItemLoss<'i>], usize),
}

/// Loss, gradient with respect to `normed` `[rows, width]` in its type, and where it is wanted that of the table
/// `[vocabulary, width]`, f32.
pub(super) fn loss<E: From<ModelError> + From<LossError>>(
    table: &Tensor,
    normed: &Tensor,
    vocab: &Vocab,
    items: &[ItemLoss<'_>],
    trains_table: bool,
) -> Result<(f64, Tensor, Option<Tensor>), E> {
    let most = (LOGITS / vocab.len().max(1)).max(1);
    let chunks = chunks(vocab, items, most);
    let rows: usize = chunks.iter().map(Chunk::rows).sum();
    let expected = normed.dim(0).map_err(ModelError::from)?;
    if rows != expected {
        let reason = format!("{rows} rows have a loss, {expected} were computed");
        return Err(ModelError::BadBatch { reason }.into());
    }
    let (mut sum, mut first) = (0.0, 0);
    let (mut parts, mut dtable) = (Vec::new(), None);
    // Cross-entropy is over tokens that text or the end of a record may have: these come first.
    let live = tensor(table.narrow(0, 0, vocab.end_ranks().end as usize))?;
    let ignored = vocab.len() - vocab.end_ranks().end as usize;
    for chunk in &chunks {
        let hidden = tensor(normed.narrow(0, first, chunk.rows()))?;
        first += chunk.rows();
        let table = match chunk {
            Chunk::Labels(_) => &live,
            Chunk::Items(..) => table,
        };
        let logits = tensor(table.t().and_then(|table| hidden.matmul(&table)))?;
        let logits = tensor(logits.to_dtype(DType::F32))?;
        let (value, dlogits) = match chunk {
            Chunk::Labels(labels) => tensor(of_labels(&logits, labels))?,
            Chunk::Items(items, _) => on_host::<E>(&logits, vocab, items)?,
        };
        sum += value;
        let dlogits = tensor(dlogits.to_dtype(normed.dtype()))?;
        parts.push(tensor(dlogits.matmul(table))?);
        if trains_table {
            let of_chunk = tensor(dlogits.t().and_then(|dlogits| dlogits.matmul(&hidden)))?;
            let of_chunk = match chunk {
                Chunk::Labels(_) => of_chunk.pad_with_zeros(0, 0, ignored),
                Chunk::Items(..) => Ok(of_chunk),
            };
            let of_chunk = tensor(of_chunk.and_then(|of_chunk| of_chunk.to_dtype(DType::F32)))?;
            dtable = Some(match dtable {
                None => of_chunk,
                Some(sum) => tensor(sum + of_chunk)?,
            });
        }
    }
    Ok((sum, tensor(Tensor::cat(&parts, 0))?, dtable))
}

fn tensor<T>(result: candle_core::Result<T>) -> Result<T, ModelError> {
    result.map_err(ModelError::from)
}

impl Chunk<'_> {
    fn rows(&self) -> usize {
        match self {
            Self::Labels(labels) => labels.len(),
            Self::Items(_, rows) => *rows,
        }
    }
}

/// Rows in order, at most `most` together unless one item of another loss has more.
fn chunks<'i>(vocab: &Vocab, items: &'i [ItemLoss<'i>], most: usize) -> Vec<Chunk<'i>> {
    let mut chunks = Vec::new();
    let mut labels: Vec<Label> = Vec::new();
    let mut others: Option<(usize, usize)> = None;
    for (index, item) in items.iter().enumerate() {
        match plain_labels(vocab, item) {
            Some(own) => {
                flush_items(items, &mut others, index, &mut chunks);
                labels.extend(own);
            }
            None => {
                flush_labels(&mut labels, most, &mut chunks);
                let rows = item.rows();
                if others.is_some_and(|(_, before)| before + rows > most) {
                    flush_items(items, &mut others, index, &mut chunks);
                }
                let (start, before) = others.unwrap_or((index, 0));
                others = Some((start, before + rows));
            }
        }
    }
    flush_labels(&mut labels, most, &mut chunks);
    flush_items(items, &mut others, items.len(), &mut chunks);
    chunks
}

fn flush_labels(labels: &mut Vec<Label>, most: usize, chunks: &mut Vec<Chunk<'_>>) {
    chunks.extend(labels.chunks(most).map(|rows| Chunk::Labels(rows.to_vec())));
    labels.clear();
}

fn flush_items<'i>(
    items: &'i [ItemLoss<'i>],
    others: &mut Option<(usize, usize)>,
    end: usize,
    chunks: &mut Vec<Chunk<'i>>,
) {
    if let Some((start, rows)) = others.take() {
        chunks.push(Chunk::Items(&items[start..end], rows));
    }
}

/// The labels of an item that has nothing else to learn; none where a label is unusable, which the host then says.
fn plain_labels(vocab: &Vocab, item: &ItemLoss<'_>) -> Option<Vec<Label>> {
    let &[Term::Labels { labels, weight }] = item.terms else {
        return None;
    };
    let label = |&label: &u32| {
        if label == NO_LABEL {
            let (first, count, weight) = (0, 1, 0.0);
            return Some(Label {
                first,
                count,
                weight,
            });
        }
        let class = vocab.class(label)?;
        Some(Label {
            first: u32::try_from(class.start).ok()?,
            count: class.len(),
            weight,
        })
    };
    if !weight.is_finite() {
        return None;
    }
    labels.iter().map(label).collect()
}

/// Cross-entropy of a label's class, `-w ln p(class)`, and its gradient `w (p - p [in class] / p(class))`.
fn of_labels(logits: &Tensor, labels: &[Label]) -> candle_core::Result<(f64, Tensor)> {
    let (rows, tokens) = logits.dims2()?;
    let device = logits.device();
    let column = |values: Vec<f32>| Tensor::from_vec(values, (rows, 1), device);
    let weights = column(labels.iter().map(|label| label.weight).collect())?;
    let p = softmax_last_dim(logits)?;
    let gradient = p.broadcast_mul(&weights)?;
    // ln p of the most likely token is exact, and every other logit is a difference from its.
    let top = p.max_keepdim(1)?.log()?;
    let peak = logits.max_keepdim(1)?;

    // Classes of one token.
    let is_single = |label: &&Label| label.count == 1;
    let single: Vec<f32> = labels
        .iter()
        .map(|label| if is_single(&label) { label.weight } else { 0.0 })
        .collect();
    let single = column(single)?;
    let index: Vec<u32> = labels.iter().map(|label| label.first).collect();
    let index = Tensor::from_vec(index, (rows, 1), device)?;
    let log_p = ((logits.gather(&index, 1)? - &peak)? + &top)?;
    let mut sum = (log_p * &single)?.sum_all()?;
    gradient.scatter_add_set(&index, &single.neg()?, 1)?;

    let mut gradient = gradient;
    let mut classes: Vec<(u32, usize)> = labels
        .iter()
        .filter(|label| label.count > 1)
        .map(|label| (label.first, label.count))
        .collect();
    classes.sort_unstable();
    classes.dedup();
    for (first, count) in classes {
        let is_of = |label: &Label| (label.first, label.count) == (first, count);
        let chosen = (0u32..).zip(labels).filter(|(_, label)| is_of(label));
        let chosen: Vec<u32> = chosen.map(|(row, _)| row).collect();
        let chosen = ids(&chosen, device)?;
        let of = |values: &Tensor| values.index_select(&chosen, 0);
        let first = first as usize;
        let differences = of(logits)?
            .narrow(1, first, count)?
            .broadcast_sub(&of(&peak)?)?;
        let most = differences.max_keepdim(1)?;
        let mass = differences.broadcast_sub(&most)?.exp()?;
        let total = mass.sum_keepdim(1)?;
        let log_p = ((total.log()? + most)? + of(&top)?)?;
        let weights = of(&weights)?;
        sum = (sum + (log_p * &weights)?.sum_all()?)?;
        let shares = mass.broadcast_div(&total)?.broadcast_mul(&weights.neg()?)?;
        let shares = shares.pad_with_zeros(1, first, tokens - first - count)?;
        gradient = gradient.index_add(&chosen, &shares, 0)?;
    }
    Ok((-f64::from(sum.to_scalar::<f32>()?), gradient))
}

/// Any loss, and its gradient in the place of the logits.
fn on_host<E: From<ModelError> + From<LossError>>(
    logits: &Tensor,
    vocab: &Vocab,
    items: &[ItemLoss<'_>],
) -> Result<(f64, Tensor), E> {
    let shape = logits.dims2().map_err(ModelError::from)?;
    let values = logits
        .to_device(&Device::Cpu)
        .and_then(|logits| logits.flatten_all());
    let mut values = values
        .and_then(|values| values.to_vec1::<f32>())
        .map_err(ModelError::from)?;
    let loss = loss_in_place(vocab, items, &mut values)?;
    let gradient = Tensor::from_vec(values, shape, logits.device());
    Ok((loss, gradient.map_err(ModelError::from)?))
}
