//! Byte-level BPE vocabularies from a site's own text.

use std::path::Path;

use serde_json::json;
use tokenizers::models::bpe::{BPE, BpeTrainer};
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::{
    AddedToken, DecoderWrapper, NormalizerWrapper, PostProcessorWrapper, TokenizerBuilder,
};

use super::{Tokenizer, TokenizerError};
use crate::worker::files::write_atomic;

/// The special token of trained vocabularies, id 0.
const END_OF_RECORD: &str = "<|endoftext|>";

/// Smallest vocabulary: the special token and every byte.
const SMALLEST: usize = 257;

/// Trains a vocabulary of at most `size` tokens on `texts`: `<|endoftext|>`, all 256 bytes, then merges.
/// The same texts give the same file.
pub fn train_bpe<'a>(
    texts: impl Iterator<Item = &'a str> + Send,
    size: usize,
) -> Result<Tokenizer, TokenizerError> {
    let failed = |reason: String| TokenizerError::Train { reason };
    if size < SMALLEST {
        return Err(failed(format!(
            "{size} tokens asked, every byte needs one: at least {SMALLEST}"
        )));
    }
    let mut trainer = BpeTrainer::builder()
        .vocab_size(size)
        .min_frequency(2)
        .show_progress(false)
        .special_tokens(vec![AddedToken::from(END_OF_RECORD, true)])
        .initial_alphabet(ByteLevel::alphabet().into_iter().collect())
        .build();
    let mut tokenizer = TokenizerBuilder::<
        BPE,
        NormalizerWrapper,
        ByteLevel,
        PostProcessorWrapper,
        DecoderWrapper,
    >::new()
    .with_model(BPE::default())
    .with_pre_tokenizer(Some(ByteLevel::new(false, false, true)))
    .with_decoder(Some(DecoderWrapper::ByteLevel(ByteLevel::new(
        false, false, true,
    ))))
    .build()
    .map_err(|error| failed(error.to_string()))?;
    tokenizer
        .train(&mut trainer, texts)
        .map_err(|error| failed(error.to_string()))?;
    let json = tokenizer
        .to_string(true)
        .map_err(|error| failed(error.to_string()))?;
    Tokenizer::from_bytes(Path::new("trained tokenizer"), json.into_bytes())
}

impl Tokenizer {
    /// Writes `tokenizer.json` as it was read, and a `tokenizer_config.json` for transformers.
    pub fn save(&self, folder: &Path) -> Result<(), TokenizerError> {
        let end = self
            .inner
            .id_to_token(self.end_of_record)
            .unwrap_or_default();
        let config = json!({
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": end,
            "eos_token": end,
            "clean_up_tokenization_spaces": false,
        });
        let config = format!("{config:#}\n");
        let write = |name: &str, bytes: &[u8]| {
            let path = folder.join(name);
            write_atomic(&path, [bytes]).map_err(|source| TokenizerError::Write { path, source })
        };
        std::fs::create_dir_all(folder).map_err(|source| TokenizerError::Write {
            path: folder.into(),
            source,
        })?;
        write("tokenizer.json", &self.source)?;
        write("tokenizer_config.json", config.as_bytes())
    }
}
