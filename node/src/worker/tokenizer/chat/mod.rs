//! Chat templates of model folders, rendered as Python transformers renders them.
//!
//! A template is a Jinja program that comes with a model: it sees the messages and nothing else, and it is stopped when it
//! takes too many steps. `{% generation %}` blocks mark what the assistant says, as in transformers' `AssistantTracker`.

mod environment;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::ops::Range;
use std::path::{Path, PathBuf};

use consilium_protocol::time::UnixMillis;
use minijinja::Environment;
use minijinja::value::{Serde, Value as Jinja};
use serde::Serialize;
use serde_json::Value;

use super::{TokenizerError, parse, read};

/// Name under which the environment holds the template.
const NAME: &str = "chat_template";

/// File with a template alone; it comes before the one in `tokenizer_config.json`.
const TEMPLATE_FILE: &str = "chat_template.jinja";

/// Longest template, in bytes.
const LONGEST: usize = 1 << 20;

/// Steps of one rendering, 64 bytes of text counted as one. A long conversation takes some tens of thousands.
const FUEL: u64 = 1_000_000;

/// The role whose messages a model is trained on.
const ASSISTANT: &str = "assistant";

/// Why a template or a conversation was refused. Never quotes a message.
#[derive(Debug, thiserror::Error)]
pub enum ChatError {
    /// The folder has no template.
    #[error(
        "{}: no chat template: neither chat_template.jinja nor `chat_template` in tokenizer_config.json; \
         leave chat templates off for this model",
        folder.display()
    )]
    NoTemplate {
        /// Folder.
        folder: PathBuf,
    },
    /// A file could not be read.
    #[error(transparent)]
    File(#[from] TokenizerError),
    /// The template is no Jinja template.
    #[error("{origin}: line {line}: {reason}")]
    Syntax {
        /// File, and field in it.
        origin: String,
        /// Line, from 1.
        line: usize,
        /// What the parser said.
        reason: String,
    },
    /// The template takes too many steps or writes too much.
    #[error("{origin}: the template does not end within {steps} steps", steps = FUEL)]
    Endless {
        /// File, and field in it.
        origin: String,
    },
    /// The template refused the conversation, by `raise_exception`.
    #[error("{origin}: the template refuses the conversation: {reason}")]
    Refused {
        /// File, and field in it.
        origin: String,
        /// Its words.
        reason: String,
    },
    /// The template failed.
    #[error("{origin}: line {line}: {reason}")]
    Failed {
        /// File, and field in it.
        origin: String,
        /// Line, from 1; 0 where unknown.
        line: usize,
        /// What went wrong.
        reason: String,
    },
    /// What the assistant says cannot be told from the rest.
    #[error(
        "{origin}: turn {turn} of the assistant is not at the end of what the template writes up to it; add \
         {{% generation %}} blocks to the template"
    )]
    Unmarked {
        /// File, and field in it.
        origin: String,
        /// Index of the message.
        turn: usize,
    },
}

/// One turn of a conversation.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Message {
    /// `system`, `user`, `assistant`, or what the template knows.
    pub role: String,
    /// What was said.
    pub content: String,
}

impl Message {
    /// A message of `role`.
    pub fn new(role: impl Into<String>, content: impl Into<String>) -> Self {
        Self {
            role: role.into(),
            content: content.into(),
        }
    }
}

/// A conversation as text.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Rendered {
    /// The text.
    pub text: String,
    /// Bytes of it that the assistant says, ascending and apart.
    pub assistant: Vec<Range<usize>>,
}

/// The chat template of a model folder.
#[derive(Debug)]
pub struct ChatTemplate {
    environment: Environment<'static>,
    origin: String,
    source: String,
    special: BTreeMap<String, String>,
    has_generation: bool,
}

impl ChatTemplate {
    /// Reads the template of a folder and the special tokens that it may name. `now` is what `strftime_now` sees, in UTC.
    ///
    /// # Errors
    /// The folder has no template, or one that cannot be used.
    pub fn load(folder: &Path, now: UnixMillis) -> Result<Self, ChatError> {
        let config_path = folder.join("tokenizer_config.json");
        let config = if config_path.exists() {
            parse(&config_path, &read(&config_path)?)?
        } else {
            Value::Null
        };
        let file = folder.join(TEMPLATE_FILE);
        let (origin, source) = if file.exists() {
            let bytes = read(&file)?;
            let text = String::from_utf8(bytes).map_err(|error| TokenizerError::Invalid {
                path: file.clone(),
                reason: error.to_string(),
            })?;
            (file.display().to_string(), text)
        } else {
            let source = default_template(&config["chat_template"]).ok_or_else(|| {
                ChatError::NoTemplate {
                    folder: folder.into(),
                }
            })?;
            let origin = format!("{}: field `chat_template`", config_path.display());
            (origin, source)
        };
        Self::new(origin, source, special_tokens(&config), now)
    }

    /// Compiles a template; `origin` is for messages, `special` has names such as `bos_token`.
    ///
    /// # Errors
    /// The template is too long or no Jinja template.
    pub fn new(
        origin: String,
        source: String,
        special: BTreeMap<String, String>,
        now: UnixMillis,
    ) -> Result<Self, ChatError> {
        let syntax = |line, reason| ChatError::Syntax {
            origin: origin.clone(),
            line,
            reason,
        };
        if source.len() > LONGEST {
            let reason = format!("{} bytes, more than {LONGEST}", source.len());
            return Err(syntax(0, reason));
        }
        let (translated, has_generation) = environment::with_calls(&source);
        let mut environment = environment::new(now, FUEL);
        let added = environment.add_template_owned(NAME, translated);
        added.map_err(|error| syntax(error.line().unwrap_or(0), reason(&error)))?;
        Ok(Self {
            environment,
            origin,
            source,
            special,
            has_generation,
        })
    }

    /// The text of `messages`; with `add_generation_prompt` it ends where the assistant's answer begins.
    ///
    /// What the assistant says comes from the template's generation blocks, else from how the text grows when one of its
    /// messages is added.
    ///
    /// # Errors
    /// The template refuses the conversation, fails, or does not end.
    pub fn render(
        &self,
        messages: &[Message],
        add_generation_prompt: bool,
    ) -> Result<Rendered, ChatError> {
        if self.has_generation {
            let mark = self.unused_mark(messages);
            let text = self.text(messages, add_generation_prompt, &mark)?;
            return Ok(environment::unmarked(&text, &mark));
        }
        let text = self.text(messages, add_generation_prompt, "")?;
        let mut assistant: Vec<Range<usize>> = Vec::new();
        for (turn, message) in messages.iter().enumerate() {
            if message.role != ASSISTANT {
                continue;
            }
            let unmarked = || ChatError::Unmarked {
                origin: self.origin.clone(),
                turn,
            };
            let before = self.text(&messages[..turn], true, "")?;
            let until = match messages.len() {
                last if turn + 1 == last && !add_generation_prompt => text.clone(),
                _ => self.text(&messages[..=turn], false, "")?,
            };
            // Some templates close a conversation that nobody is to go on with.
            let end = self.special.get("eos_token").map_or("", String::as_str);
            let open = until.strip_suffix(end).unwrap_or(&until);
            let until = if text.starts_with(&until) {
                &until
            } else {
                open
            };
            let is_apart = assistant.last().is_none_or(|last| last.end <= before.len());
            if !until.starts_with(&before) || !text.starts_with(until) || !is_apart {
                return Err(unmarked());
            }
            assistant.push(before.len()..until.len());
        }
        Ok(Rendered { text, assistant })
    }

    fn text(
        &self,
        messages: &[Message],
        add_generation_prompt: bool,
        mark: &str,
    ) -> Result<String, ChatError> {
        let template = self
            .environment
            .get_template(NAME)
            .map_err(|error| self.failed(&error))?;
        let mut variables: BTreeMap<&str, Jinja> = self
            .special
            .iter()
            .map(|(name, token)| (name.as_str(), Jinja::from(token.as_str())))
            .collect();
        variables.extend([
            ("messages", Jinja::from(Serde(messages))),
            ("add_generation_prompt", Jinja::from(add_generation_prompt)),
            ("tools", Jinja::from(())),
            ("documents", Jinja::from(())),
            (environment::MARK, Jinja::from(mark)),
        ]);
        template
            .render(Jinja::from(Serde(variables)))
            .map_err(|error| self.failed(&error))
    }

    fn failed(&self, error: &minijinja::Error) -> ChatError {
        if error.kind() == minijinja::ErrorKind::OutOfFuel {
            return ChatError::Endless {
                origin: self.origin.clone(),
            };
        }
        if let Some(reason) = environment::raised(error) {
            return ChatError::Refused {
                origin: self.origin.clone(),
                reason,
            };
        }
        ChatError::Failed {
            origin: self.origin.clone(),
            line: error.line().unwrap_or(0),
            reason: reason(error),
        }
    }

    /// A text between two private-use characters that no message and no template has.
    fn unused_mark(&self, messages: &[Message]) -> String {
        let contents = messages.iter().flat_map(|m| [&m.role, &m.content]);
        let texts: Vec<&String> = contents
            .chain(self.special.values())
            .chain([&self.source])
            .collect();
        let mut number = 0_u64;
        loop {
            let mark = format!("\u{e0f0}{number}\u{e0f1}");
            if !texts.iter().any(|text| text.contains(&mark)) {
                return mark;
            }
            number += 1;
        }
    }
}

/// The parser's words without the values of variables, which may hold private text.
fn reason(error: &minijinja::Error) -> String {
    let detail = error.detail().unwrap_or_default();
    format!("{}: {detail}", error.kind())
}

/// A template, or the one named `default` of several.
fn default_template(value: &Value) -> Option<String> {
    match value {
        Value::String(source) => Some(source.clone()),
        Value::Array(several) => several
            .iter()
            .find(|entry| entry["name"] == "default")
            .and_then(|entry| entry["template"].as_str())
            .map(str::to_owned),
        _ => None,
    }
}

/// Special tokens by the names that templates use.
fn special_tokens(config: &Value) -> BTreeMap<String, String> {
    const NAMES: [&str; 7] = [
        "bos_token",
        "eos_token",
        "unk_token",
        "sep_token",
        "pad_token",
        "cls_token",
        "mask_token",
    ];
    let token = |name: &str| {
        let value = &config[name];
        let text = value.as_str().or_else(|| value["content"].as_str())?;
        Some((name.to_owned(), text.to_owned()))
    };
    NAMES.into_iter().filter_map(token).collect()
}
