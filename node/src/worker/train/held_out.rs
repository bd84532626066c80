//! The loss on held-out items, without gradients.

use consilium_kernels::Vocab;
use consilium_kernels::loss::{ItemLoss, Term};

use super::TrainError;
use super::language_model::ranks;
use crate::worker::data::{Batch, Items};
use crate::worker::model::Model;

/// Row tokens of one pass; beyond this a pass gains nothing.
const TOKENS: usize = 2048;

/// Mean loss of a label over all items, in nats; the same items and weights give the same number.
///
/// # Errors
/// Items cannot be read, or the model gives no finite numbers.
pub fn mean_loss(
    model: &Model,
    vocab: &Vocab,
    items: &Items,
    end_of_record: u32,
) -> Result<f64, TrainError> {
    let (mut sum, mut labels) = (0.0, 0);
    let mut batch = Batch::default();
    for index in 0..items.len() {
        let item = items.get(index)?;
        let tokens = batch.packed.tokens.len();
        if tokens > 0 && tokens + item.row_tokens() > TOKENS {
            sum += loss(model, vocab, &batch)?;
            batch = Batch::default();
        }
        batch.push(index, &item, end_of_record);
        labels += item.labels();
    }
    if !batch.rows.is_empty() {
        sum += loss(model, vocab, &batch)?;
    }
    Ok(sum / labels.max(1) as f64)
}

fn loss(model: &Model, vocab: &Vocab, batch: &Batch) -> Result<f64, TrainError> {
    let labels = ranks(model, batch);
    let pass = model.score(&batch.packed, &batch.rows)?;
    let terms = [Term::Labels {
        labels: &labels,
        weight: 1.0,
    }];
    let rows = ItemLoss {
        tokens: &[],
        terms: &terms,
    };
    let mut unused = vec![0.0; pass.hidden.len()];
    let loss = model.score_with(vocab, |head| {
        head.loss(&pass.hidden, &[rows], &mut unused, None)
    })?;
    Ok(loss?)
}
