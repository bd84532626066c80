//! A model with its tokenizer and byte-sorted vocabulary, as one value.

use std::path::Path;

use consilium_kernels::{TokenKind, Vocab};

use super::error::WorkError;
use super::model::{self, Model, ModelConfig};
use super::tokenizer::{TokenBytes, Tokenizer};

/// What scoring, training and evaluation work with. The head's rows are in the order of the vocabulary's ranks.
#[derive(Debug)]
pub struct LoadedModel {
    /// The decoder.
    pub model: Model,
    /// Its tokenizer.
    pub tokenizer: Tokenizer,
    /// Its vocabulary in byte-sorted order.
    pub vocab: Vocab,
}

/// An item in the tokens of a model: end of record, context, target.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Sequence {
    /// Ids that the model reads; the target's last token is the last one.
    pub ids: Vec<u32>,
    /// Ids before the target, at least 1.
    pub first: usize,
    /// Ranks of the target's tokens.
    pub ranks: Vec<u32>,
}

impl Sequence {
    /// Predicted tokens: the target's and the end of the record.
    #[must_use]
    pub fn predicted(&self) -> usize {
        self.ranks.len() + 1
    }
}

impl LoadedModel {
    /// Loads a Hugging Face folder: `config.json`, `tokenizer.json`, `*.safetensors`.
    ///
    /// # Errors
    /// A file is missing or cannot be used, or tokenizer and model do not fit.
    pub fn load(folder: &Path) -> Result<Self, WorkError> {
        let tokenizer = Tokenizer::load(folder)?;
        let config = ModelConfig::load(folder).map_err(model::ModelError::from)?;
        let vocab = vocab_of(&tokenizer, config.vocab_size)?;
        let model = model::load_folder(folder, vocab.id_of_rank().to_vec())?;
        Ok(Self {
            model,
            tokenizer,
            vocab,
        })
    }

    /// A new model of random weights; `config.vocab_size` must hold all tokens of the tokenizer.
    ///
    /// # Errors
    /// The shape is impossible, or the vocabulary too small.
    pub fn random(
        tokenizer: Tokenizer,
        config: ModelConfig,
        seed: u64,
    ) -> Result<Self, WorkError> {
        let vocab = vocab_of(&tokenizer, config.vocab_size)?;
        let model = model::random(config, vocab.id_of_rank().to_vec(), seed)?;
        Ok(Self {
            model,
            tokenizer,
            vocab,
        })
    }

    /// A copy that shares no weights.
    ///
    /// # Errors
    /// The weights cannot be read.
    pub fn duplicate(&self) -> Result<Self, WorkError> {
        Ok(Self {
            model: self.model.duplicate()?,
            tokenizer: self.tokenizer.clone(),
            vocab: self.vocab.clone(),
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
    /// fit beside its target loses its beginning.
    ///
    /// # Errors
    /// The tokenizer does not give the target's bytes back, or the target alone is longer than the model's limit.
    pub fn sequence(&self, context: &str, target: &str) -> Result<Sequence, WorkError> {
        let tokens = self.tokenizer.encode(target)?;
        let ranks = self.ranks(&tokens, target)?;
        let limit = self.model.config().max_positions;
        let room = limit
            .checked_sub(tokens.len() + 1)
            .ok_or(WorkError::TooLong {
                tokens: tokens.len() + 1,
                limit,
            })?;
        let mut ids = vec![self.tokenizer.end_of_record()];
        if !context.is_empty() {
            let context = self.tokenizer.encode(context)?;
            ids.extend(context.iter().skip(context.len().saturating_sub(room)));
        }
        let first = ids.len();
        ids.extend(tokens);
        Ok(Sequence { ids, first, ranks })
    }

    fn ranks(&self, tokens: &[u32], text: &str) -> Result<Vec<u32>, WorkError> {
        let rank = |&id: &u32| self.vocab.rank_of_id().get(id as usize).copied();
        let ranks: Option<Vec<u32>> = tokens.iter().map(rank).collect();
        let ranks = ranks.unwrap_or_default();
        let bytes = ranks.iter().flat_map(|&rank| self.vocab.token_bytes(rank));
        // Empty pieces would be special tokens, which spell nothing.
        let spells = ranks.iter().all(|&rank| rank < self.vocab.byte_tokens());
        if spells && bytes.copied().eq(text.bytes()) {
            Ok(ranks)
        } else {
            Err(WorkError::Unfaithful)
        }
    }
}

fn vocab_of(tokenizer: &Tokenizer, size: usize) -> Result<Vocab, WorkError> {
    let table = tokenizer.token_table();
    if table.len() > size {
        return Err(WorkError::Vocabulary {
            tokens: table.len(),
            size,
        });
    }
    let kinds = table.iter().map(|token| match token {
        TokenBytes::Bytes(bytes) => TokenKind::Bytes(bytes),
        TokenBytes::EndOfRecord => TokenKind::EndOfRecord,
        TokenBytes::Ignored => TokenKind::Ignored,
    });
    let padding = std::iter::repeat_n(TokenKind::Ignored, size - table.len());
    Ok(Vocab::new(kinds.chain(padding))?)
}
