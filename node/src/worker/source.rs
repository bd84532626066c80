//! A model with its tokenizer and byte-sorted vocabulary, as one value.

use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

use consilium_kernels::Vocab;

use super::data::{Batch, Item};
use super::error::WorkError;
use super::model::{self, BaseStorage, Model, ModelConfig, ModelError};
use super::tokenizer::Tokenizer;

/// Tokens of one batch at most; beyond this a pass gains nothing.
const TOKENS: usize = 2048;

/// What scoring, training and evaluation work with. The head's rows are in the order of the vocabulary's ranks.
#[derive(Debug)]
pub struct LoadedModel {
    /// The decoder.
    pub model: Model,
    /// Its tokenizer.
    pub tokenizer: Arc<Tokenizer>,
    /// Its vocabulary in byte-sorted order.
    pub vocab: Arc<Vocab>,
}

impl LoadedModel {
    /// Loads a Hugging Face folder: `config.json`, `tokenizer.json`, `*.safetensors`.
    ///
    /// # Errors
    /// A file is missing or cannot be used, or tokenizer and model do not fit.
    pub fn load(folder: &Path) -> Result<Self, WorkError> {
        Self::load_as(folder, &BaseStorage::default())
    }

    /// [`Self::load`], with weights that will not be trained stored otherwise.
    ///
    /// # Errors
    /// As [`Self::load`].
    pub fn load_as(folder: &Path, storage: &BaseStorage) -> Result<Self, WorkError> {
        let tokenizer = Tokenizer::load(folder)?;
        let config = ModelConfig::load(folder).map_err(ModelError::from)?;
        let vocab = tokenizer.vocab(config.vocab_size)?;
        let model = model::load_folder_as(folder, vocab.id_of_rank().to_vec(), storage)?;
        Ok(Self {
            model,
            tokenizer: Arc::new(tokenizer),
            vocab: Arc::new(vocab),
        })
    }

    /// A new model of random weights. `config.vocab_size` must hold all tokens of the tokenizer.
    ///
    /// # Errors
    /// The shape is impossible, or the vocabulary too small.
    pub fn random(
        tokenizer: Arc<Tokenizer>,
        config: ModelConfig,
        seed: u64,
    ) -> Result<Self, WorkError> {
        let vocab = tokenizer.vocab(config.vocab_size)?;
        let model = model::random(config, vocab.id_of_rank().to_vec(), seed)?;
        Ok(Self {
            model,
            tokenizer,
            vocab: Arc::new(vocab),
        })
    }

    /// A copy that shares no weights.
    ///
    /// # Errors
    /// The weights cannot be read.
    pub fn duplicate(&self) -> Result<Self, WorkError> {
        Ok(Self {
            model: self.model.duplicate()?,
            tokenizer: Arc::clone(&self.tokenizer),
            vocab: Arc::clone(&self.vocab),
        })
    }

    /// Writes a Hugging Face folder; adapters are folded into the weights.
    ///
    /// # Errors
    /// A file cannot be written.
    pub fn save(&self, folder: &Path) -> Result<(), WorkError> {
        model::save_folder(&self.model, folder)?;
        self.tokenizer.save(folder)?;
        Ok(())
    }

    /// Tokenises context and target apart, so that the target starts with a token of its own. A context that does not
    /// fit into `limit` tokens beside its target loses its beginning; none if the target alone does not fit.
    ///
    /// # Errors
    /// The tokenizer does not give the text's bytes back.
    pub fn item(
        &self,
        context: &str,
        target: &str,
        limit: usize,
    ) -> Result<Option<Item>, WorkError> {
        let target = self.tokenizer.encode(target)?;
        let Some(room) = limit.checked_sub(target.len() + 1) else {
            return Ok(None);
        };
        let mut context = self.tokenizer.encode(context)?;
        context.drain(..context.len().saturating_sub(room));
        Ok(Some(Item { context, target }))
    }

    /// As [`item`](Self::item) with the model's own limit.
    ///
    /// # Errors
    /// Also where the target alone is longer than that.
    pub fn whole_item(&self, context: &str, target: &str) -> Result<Item, WorkError> {
        let limit = self.model.config().max_positions;
        self.item(context, target, limit)?
            .ok_or(WorkError::TooLong { limit })
    }

    /// Ranks of token ids that the tokenizer gave.
    #[must_use]
    pub fn ranks(&self, ids: &[u32]) -> Vec<u32> {
        let ranks = self.vocab.rank_of_id();
        ids.iter().map(|&id| ranks[id as usize]).collect()
    }

    /// Items in one packed batch; item i of the batch is `items[i]`.
    pub(crate) fn batch(&self, items: &[Item]) -> Batch {
        let mut batch = Batch::default();
        for (index, item) in items.iter().enumerate() {
            batch.push(index, item, self.tokenizer.end_of_record());
        }
        batch
    }

    /// Cuts items into runs for one pass each, by sizes alone, so that the same items give the same batches.
    pub(crate) fn runs(&self, items: &[Item]) -> Vec<Range<usize>> {
        runs(items.iter().map(Item::row_tokens), TOKENS)
    }
}

fn runs(lengths: impl Iterator<Item = usize>, limit: usize) -> Vec<Range<usize>> {
    let mut runs: Vec<Range<usize>> = Vec::new();
    let mut tokens = 0;
    for (index, length) in lengths.enumerate() {
        match runs.last_mut() {
            Some(run) if tokens + length <= limit => {
                run.end = index + 1;
                tokens += length;
            }
            _ => {
                runs.push(index..index + 1);
                tokens = length;
            }
        }
    }
    runs
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_cover_all_items_and_only_a_long_item_exceeds_the_limit() {
        let runs = |lengths: &[usize]| runs(lengths.iter().copied(), 2048);
        assert!(runs(&[]).is_empty());
        assert_eq!(
            runs(&[1000, 1000, 1000, 5000, 1, 2047, 1]),
            [0..2, 2..3, 3..4, 4..6, 6..7]
        );
    }
}
