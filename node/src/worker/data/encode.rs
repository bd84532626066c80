//! Records as items of tokens: what is given and what is learned.

use std::ops::Range;

use consilium_kernels::Vocab;

use super::chat::{ASSISTANT, ChatFormat};
use super::shape::Row;
use super::{Item, Loss};
use crate::worker::tokenizer::Tokenizer;
use crate::worker::tokenizer::chat::Message;

/// What turns records into items.
#[derive(Debug)]
pub struct Encoder<'a> {
    tokenizer: &'a Tokenizer,
    vocab: &'a Vocab,
    chat: &'a dyn ChatFormat,
    loss: Loss,
    /// Names and ids of special tokens, where the chat format uses them.
    special: Vec<(String, u32)>,
}

impl<'a> Encoder<'a> {
    /// For one model; `loss` says what is learned of a pair or a conversation.
    pub fn new(
        tokenizer: &'a Tokenizer,
        vocab: &'a Vocab,
        chat: &'a dyn ChatFormat,
        loss: Loss,
    ) -> Self {
        let special = if chat.has_special_tokens() {
            tokenizer.special_tokens()
        } else {
            Vec::new()
        };
        Self {
            tokenizer,
            vocab,
            chat,
            loss,
            special,
        }
    }

    /// One record as an item of any length.
    ///
    /// # Errors
    /// The text cannot be tokenised or rendered, or nothing of it is to be learned. The reason never quotes it.
    pub fn item(&self, row: &Row) -> Result<Item, String> {
        match row {
            Row::Text(text) => Ok(Item::new(Vec::new(), self.encode(text)?)),
            Row::Pair { prompt, completion } => {
                let (mut prompt, completion) = (self.encode(prompt)?, self.encode(completion)?);
                Ok(match self.loss {
                    Loss::Completion => Item::new(prompt, completion),
                    Loss::All => {
                        prompt.extend(completion);
                        Item::new(Vec::new(), prompt)
                    }
                })
            }
            Row::Chat { prompt, completion } => self.chat(prompt, completion),
        }
    }

    fn chat(&self, prompt: &[Message], completion: &[Message]) -> Result<Item, String> {
        let all = [prompt, completion].concat();
        let rendered = self.chat.render(&all, false)?;
        let text = rendered.text.as_str();
        let first = if prompt.is_empty() {
            0
        } else {
            // What the model sees before it answers must be how the whole begins.
            let answer = completion
                .first()
                .is_some_and(|turn| turn.role == ASSISTANT);
            let given = self.chat.render(prompt, answer)?;
            if !text.starts_with(&given.text) {
                return Err(
                    "the chat template does not render the prompt as the beginning of prompt and completion; \
                     use `messages`"
                        .into(),
                );
            }
            given.text.len()
        };
        let learned: Vec<Range<usize>> = match self.loss {
            Loss::All => std::iter::once(0..text.len()).collect(),
            Loss::Completion => rendered
                .assistant
                .iter()
                .map(|range| range.start.max(first)..range.end)
                .filter(|range| !range.is_empty())
                .collect(),
        };
        if learned.is_empty() {
            return Err("no turn of the assistant: nothing to learn".into());
        }
        self.spans(text, &learned)
    }

    /// Encodes the parts of a text apart, so that what is learned begins and ends with tokens of its own.
    fn spans(&self, text: &str, learned: &[Range<usize>]) -> Result<Item, String> {
        let (mut tokens, mut mask) = (Vec::new(), Vec::new());
        let mut at = 0;
        for range in learned {
            for (part, is_learned) in [(at..range.start, false), (range.clone(), true)] {
                let part = text
                    .get(part)
                    .ok_or("the assistant's parts of the rendered text overlap")?;
                let ids = self.encode_rendered(part)?;
                let live = |id: &u32| self.has_mass(*id);
                mask.extend(ids.iter().map(|id| is_learned && live(id)));
                tokens.extend(ids);
            }
            at = range.end;
        }
        // The template writes the token that starts records, and so does whoever packs them.
        if tokens.first() == Some(&self.tokenizer.start_of_record())
            && self.chat.has_special_tokens()
        {
            tokens.remove(0);
            mask.remove(0);
        }
        // What follows the last learned part is not needed, except to know whether the record ends there.
        let rest = text.get(at..).unwrap_or_default();
        let ends = self.ends();
        let has_end =
            (tokens.iter().zip(&mask)).any(|(id, &learned)| learned && self.is(*id, &ends));
        let is_whole = rest.trim().is_empty() && !has_end;
        Item::of_learned(tokens, &mask, is_whole).ok_or_else(|| {
            "nothing to learn: the assistant's turns are empty, or special tokens alone".to_owned()
        })
    }

    fn encode(&self, text: &str) -> Result<Vec<u32>, String> {
        self.tokenizer
            .encode(text)
            .map_err(|error| error.to_string())
    }

    /// As [`encode`](Self::encode), with the names of special tokens read as these.
    fn encode_rendered(&self, text: &str) -> Result<Vec<u32>, String> {
        let mut found: Vec<(Range<usize>, u32)> = Vec::new();
        for (name, id) in &self.special {
            let at = |(start, _)| (start..start + name.len(), *id);
            found.extend(text.match_indices(name.as_str()).map(at));
        }
        // The longest of those that begin in one place; one that begins inside of another is text.
        found.sort_by_key(|(range, _)| (range.start, std::cmp::Reverse(range.end)));
        let (mut ids, mut at) = (Vec::new(), 0);
        for (range, id) in found {
            if range.start >= at {
                ids.extend(self.encode(text.get(at..range.start).unwrap_or_default())?);
                ids.push(id);
                at = range.end;
            }
        }
        ids.extend(self.encode(text.get(at..).unwrap_or_default())?);
        Ok(ids)
    }

    fn rank(&self, id: u32) -> Option<u32> {
        self.vocab.rank_of_id().get(id as usize).copied()
    }

    /// Padding and control tokens have no place in the softmax.
    fn has_mass(&self, id: u32) -> bool {
        let live = self.vocab.end_ranks().end;
        self.rank(id).is_some_and(|rank| rank < live)
    }

    fn ends(&self) -> Range<u32> {
        self.vocab.end_ranks()
    }

    fn is(&self, id: u32, ranks: &Range<u32>) -> bool {
        self.rank(id).is_some_and(|rank| ranks.contains(&rank))
    }
}
