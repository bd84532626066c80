//! A model with its tokenizer and byte-sorted vocabulary, as one value.

use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

use consilium_kernels::Vocab;
use consilium_protocol::Clock as _;
use consilium_protocol::time::SystemClock;

use super::data::{Batch, Item};
use super::error::WorkError;
use super::model::{self, BaseStorage, Model, ModelConfig};
use super::tokenizer::chat::Message;
use super::tokenizer::{ChatTemplate, Tokenizer};
use crate::config::DeviceChoice;

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
    /// The template that contexts are wrapped in, if they are.
    pub(super) chat: Option<Arc<ChatTemplate>>,
}

/// Stands for a context while its frame is rendered.
const PLACEHOLDER: &str = "\u{e0f2}";

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
        // The weight files' headers first: what `config.json` says is then no larger than they are.
        let opened = model::open_folder(folder)?;
        let tokenizer = Tokenizer::load(folder)?;
        let vocab = tokenizer.vocab(opened.config().vocab_size)?;
        let model = opened.load(vocab.id_of_rank().to_vec(), storage)?;
        Ok(Self {
            model,
            tokenizer: Arc::new(tokenizer),
            vocab: Arc::new(vocab),
            chat: None,
        })
    }

    /// [`Self::load`], to compute where a setting says. Its weights are not to be trained.
    ///
    /// # Errors
    /// As [`Self::load`], or where there is no such device.
    pub fn load_on(folder: &Path, device: DeviceChoice) -> Result<Self, WorkError> {
        let storage = BaseStorage {
            tables: true,
            placement: device.placement()?,
            ..BaseStorage::default()
        };
        Self::load_as(folder, &storage)
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
            chat: None,
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
            chat: self.chat.clone(),
        })
    }

    /// Wraps the context of every item from now on in the chat template of `folder`, as the message of a user that the
    /// target answers. Items without a context stay as they are. The template may ask for the date: two days may give two
    /// texts.
    ///
    /// # Errors
    /// The folder has no template, or one that cannot be used.
    pub fn use_chat_template(&mut self, folder: &Path) -> Result<(), WorkError> {
        self.chat = Some(Arc::new(ChatTemplate::load(folder, SystemClock.now())?));
        Ok(())
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
        fit(
            &self.tokenizer,
            self.chat.as_deref(),
            context,
            target,
            limit,
        )
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
            batch.push(index, item, self.tokenizer.start_of_record());
        }
        batch
    }

    /// Cuts items into runs for one pass each, by sizes alone, so that the same items give the same batches.
    pub(crate) fn runs(&self, items: &[Item]) -> Vec<Range<usize>> {
        runs(items.iter().map(Item::row_tokens), TOKENS)
    }
}

/// Tokenises context and target apart, so that the target starts with a token of its own. The context is wrapped in the
/// chat template, if there is one. A context that does not fit into `limit` tokens beside its target loses its beginning;
/// none if the target alone does not fit.
///
/// # Errors
/// The tokenizer does not give the text's bytes back, or the template fails.
pub(crate) fn fit(
    tokenizer: &Tokenizer,
    chat: Option<&ChatTemplate>,
    context: &str,
    target: &str,
    limit: usize,
) -> Result<Option<Item>, WorkError> {
    let target = tokenizer.encode(target)?;
    let Some(room) = limit.checked_sub(target.len() + 1) else {
        return Ok(None);
    };
    let mut context = match chat {
        Some(chat) if !context.is_empty() => wrapped(tokenizer, chat, context)?,
        _ => tokenizer.encode(context)?,
    };
    context.drain(..context.len().saturating_sub(room));
    Ok(Some(Item::new(context, target)))
}

/// A context as a chat model sees it. Names of special tokens in the context are text, those in the template are tokens.
fn wrapped(
    tokenizer: &Tokenizer,
    chat: &ChatTemplate,
    context: &str,
) -> Result<Vec<u32>, WorkError> {
    let ask = |content: &str| chat.render(&[Message::new("user", content)], true);
    let ids = if tokenizer.names_special_token(context) {
        let frame = ask(PLACEHOLDER)?.text;
        let (before, after) = frame.split_once(PLACEHOLDER).unwrap_or((&frame, ""));
        let mut ids = tokenizer.encode_rendered(before)?;
        ids.extend(tokenizer.encode(context)?);
        ids.extend(tokenizer.encode_rendered(after)?);
        ids
    } else {
        tokenizer.encode_rendered(&ask(context)?.text)?
    };
    // The token that starts records stands before every item.
    let start = [tokenizer.start_of_record()];
    Ok(ids.strip_prefix(&start).unwrap_or(&ids).to_vec())
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
    use crate::worker::tokenizer::TokenEntry;

    fn spelled(source: &LoadedModel, ids: &[u32]) -> String {
        let table = source.tokenizer.token_table(source.model.vocabulary());
        let table = table.unwrap();
        let bytes = ids.iter().flat_map(|&id| match &table[id as usize] {
            TokenEntry::Bytes(bytes) => bytes.clone(),
            other => format!("[{other:?}]").into_bytes(),
        });
        String::from_utf8(bytes.collect()).unwrap()
    }

    #[test]
    fn a_chat_model_sees_contexts_in_its_own_template_and_only_where_that_was_asked_for() {
        let folder = tempfile::tempdir().unwrap();
        let mut source = crate::worker::testing::model(3);
        let context = |source: &LoadedModel, text: &str| {
            let item = source.whole_item(text, "target").unwrap();
            assert_eq!(spelled(source, &item.target), "target");
            spelled(source, &item.context)
        };
        let error = source.use_chat_template(folder.path()).unwrap_err();
        assert!(error.to_string().contains("no chat template"), "{error}");
        assert_eq!(context(&source, "ask"), "ask");
        let template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}<|endoftext|>{% endfor %}\
                        {% if add_generation_prompt %}<answer>{% endif %}";
        std::fs::write(folder.path().join("chat_template.jinja"), template).unwrap();
        source.use_chat_template(folder.path()).unwrap();
        assert_eq!(context(&source, "ask"), "<user>ask[EndOfRecord]<answer>");
        // What a text only names is no token.
        assert_eq!(
            context(&source, "a<|endoftext|>b"),
            "<user>a<|endoftext|>b[EndOfRecord]<answer>"
        );
        assert_eq!(context(&source, ""), "");
        assert_eq!(
            context(&source.duplicate().unwrap(), "c"),
            "<user>c[EndOfRecord]<answer>"
        );
    }

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
