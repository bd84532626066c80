//! Conversations as text: the model's own chat template, or a plain form where it has none.

use std::fmt;

use crate::worker::tokenizer::ChatTemplate;
use crate::worker::tokenizer::chat::{ChatError, Message, Rendered};

/// Turns messages into the text that a model was, or will be, trained on.
pub trait ChatFormat: fmt::Debug + Send + Sync {
    /// The text of `messages`; with `add_generation_prompt` it ends where the assistant's answer begins.
    ///
    /// # Errors
    /// The messages cannot be rendered. The reason never quotes them.
    fn render(&self, messages: &[Message], add_generation_prompt: bool)
    -> Result<Rendered, String>;

    /// Whether the text holds the names of special tokens, which are to become those tokens.
    fn has_special_tokens(&self) -> bool;
}

impl ChatFormat for ChatTemplate {
    fn render(
        &self,
        messages: &[Message],
        add_generation_prompt: bool,
    ) -> Result<Rendered, String> {
        let rendered = Self::render(self, messages, add_generation_prompt);
        rendered.map_err(|error| match error {
            ChatError::Unmarked { .. } => error.to_string(),
            // What a template says may be made of the messages.
            _ => "the model's chat template refuses this conversation, or fails on it".to_owned(),
        })
    }

    fn has_special_tokens(&self) -> bool {
        true
    }
}

/// The form for models without a template: the role and a colon on a line of their own, the content, a blank line.
///
/// ```text
/// user:
/// What is 2 + 2?
///
/// assistant:
/// 4
/// ```
///
/// The assistant's part is its content and the blank line after it; the last turn of a conversation has no blank line,
/// so that the end of the record follows.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct PlainChat;

impl ChatFormat for PlainChat {
    fn render(
        &self,
        messages: &[Message],
        add_generation_prompt: bool,
    ) -> Result<Rendered, String> {
        let mut rendered = Rendered::default();
        let text = &mut rendered.text;
        for (at, message) in (1..).zip(messages) {
            text.push_str(&message.role);
            text.push_str(":\n");
            let start = text.len();
            text.push_str(&message.content);
            if at < messages.len() || add_generation_prompt {
                text.push_str("\n\n");
            }
            if message.role == ASSISTANT {
                rendered.assistant.push(start..text.len());
            }
        }
        if add_generation_prompt {
            text.push_str(ASSISTANT);
            text.push_str(":\n");
        }
        Ok(rendered)
    }

    fn has_special_tokens(&self) -> bool {
        false
    }
}

/// The role whose turns are learned.
pub(super) const ASSISTANT: &str = "assistant";
