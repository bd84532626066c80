//! Conversations as text: the model's own chat template, or a plain form where it has none.

use std::fmt;
use std::ops::Range;

use super::shape::Message;

/// A conversation as text.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Rendered {
    /// The text.
    pub text: String,
    /// Bytes of it that the assistant says, ascending and apart.
    pub assistant: Vec<Range<usize>>,
}

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
