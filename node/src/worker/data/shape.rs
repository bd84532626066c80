//! The shapes of training data that TRL reads, and how a record's fields become one of them
//! (<https://huggingface.co/docs/trl/dataset_formats>).
//!
//! | shape | fields | what is learned by default |
//! |---|---|---|
//! | text | `text` | all of it |
//! | pair | `prompt` and `completion`, both text or both lists of messages | the completion |
//! | messages | `messages`, a list of `role` and `content` | the assistant's turns |
//!
//! `context` and `target`, as in a reference set, are a pair too. Other fields are not looked at. The first record of a
//! file decides the shape of all its records. Reasons never quote a record: its text is private.

use std::fmt;

use crate::worker::tokenizer::chat::Message;

/// Fields that mean something.
pub(super) const FIELDS: [&str; 6] = [
    "text",
    "prompt",
    "completion",
    "messages",
    "context",
    "target",
];

/// Longest name of a role, in bytes.
const ROLE: usize = 32;

/// One record as its file has it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Row {
    /// Text without a context.
    Text(String),
    /// Given text, and text to predict.
    Pair {
        /// Given, may be empty.
        prompt: String,
        /// To predict, not empty.
        completion: String,
    },
    /// A conversation.
    Chat {
        /// Turns that are given; empty where the whole conversation was one field.
        prompt: Vec<Message>,
        /// Turns whose assistant parts are learned, at least one.
        completion: Vec<Message>,
    },
}

impl Row {
    /// Bytes of text.
    pub fn bytes(&self) -> usize {
        let of = |messages: &[Message]| -> usize {
            let bytes = |message: &Message| message.role.len() + message.content.len();
            messages.iter().map(bytes).sum()
        };
        match self {
            Self::Text(text) => text.len(),
            Self::Pair { prompt, completion } => prompt.len() + completion.len(),
            Self::Chat { prompt, completion } => of(prompt) + of(completion),
        }
    }
}

/// Which fields the records of a file have.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Shape {
    /// `text`.
    Text,
    /// `prompt` and `completion`.
    Pair,
    /// `messages`.
    Messages,
    /// `context` and `target`.
    Target,
}

impl Shape {
    /// The shape that some fields allow; messages come first, since data sets keep the plain text beside them.
    pub(super) fn of(present: impl Fn(&str) -> bool) -> Result<Self, String> {
        if present("messages") {
            Ok(Self::Messages)
        } else if present("completion") {
            Ok(Self::Pair)
        } else if present("text") {
            Ok(Self::Text)
        } else if present("target") {
            Ok(Self::Target)
        } else {
            Err(
                "no field `text`, `messages`, `prompt` with `completion`, or `context` with `target`; \
                 rename the one that holds the text"
                    .into(),
            )
        }
    }
}

impl fmt::Display for Shape {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Text => "`text`",
            Self::Pair => "`prompt` and `completion`",
            Self::Messages => "`messages`",
            Self::Target => "`context` and `target`",
        })
    }
}

/// What stands in one field of a record.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub(super) enum Field {
    /// Nothing, or null.
    #[default]
    Absent,
    Text(String),
    Turns(Vec<Turn>),
    /// A number, an object.
    Other,
}

/// One message before its check.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub(super) struct Turn {
    pub(super) role: Option<String>,
    pub(super) content: Option<String>,
    /// What it has that this version cannot render.
    pub(super) unusable: Option<&'static str>,
}

/// The fields of one record, in the order of [`FIELDS`].
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub(super) struct Fields(pub(super) [Field; FIELDS.len()]);

impl Fields {
    /// The shape of a file whose first record this is.
    pub(super) fn shape(&self) -> Result<Shape, String> {
        Shape::of(|name| {
            let at = FIELDS.iter().position(|field| *field == name);
            at.and_then(|at| self.0.get(at))
                .is_some_and(|field| *field != Field::Absent)
        })
    }

    /// The record, if it has the shape and something to learn.
    pub(super) fn row(self, shape: Shape) -> Result<Row, String> {
        let Self([text, prompt, completion, messages, context, target]) = self;
        match shape {
            Shape::Text => Ok(Row::Text(not_empty("text", needed("text", text)?)?)),
            Shape::Target => Ok(Row::Pair {
                prompt: optional("context", context)?,
                completion: not_empty("target", needed("target", target)?)?,
            }),
            Shape::Messages => Ok(Row::Chat {
                prompt: Vec::new(),
                completion: turns("messages", messages)?,
            }),
            Shape::Pair => pair(prompt, completion),
        }
    }
}

fn pair(prompt: Field, completion: Field) -> Result<Row, String> {
    match (prompt, completion) {
        (prompt @ Field::Turns(_), completion) => Ok(Row::Chat {
            prompt: turns("prompt", prompt)?,
            completion: turns("completion", completion)?,
        }),
        (Field::Absent, completion @ Field::Turns(_)) => Ok(Row::Chat {
            prompt: Vec::new(),
            completion: turns("completion", completion)?,
        }),
        (prompt, completion) => Ok(Row::Pair {
            prompt: optional("prompt", prompt)?,
            completion: not_empty("completion", needed("completion", completion)?)?,
        }),
    }
}

fn needed(name: &str, field: Field) -> Result<String, String> {
    match field {
        Field::Text(text) => Ok(text),
        Field::Absent => Err(format!(
            "field `{name}` is missing, which the file's first record has"
        )),
        Field::Turns(_) => Err(format!("field `{name}` is a list, expected text")),
        Field::Other => Err(format!("field `{name}` is not text")),
    }
}

fn optional(name: &str, field: Field) -> Result<String, String> {
    match field {
        Field::Absent => Ok(String::new()),
        field => needed(name, field),
    }
}

fn not_empty(name: &str, text: String) -> Result<String, String> {
    if text.is_empty() {
        return Err(format!("nothing to predict: `{name}` is empty"));
    }
    Ok(text)
}

fn turns(name: &str, field: Field) -> Result<Vec<Message>, String> {
    let turns = match field {
        Field::Turns(turns) if turns.is_empty() => {
            return Err(format!("field `{name}` is an empty list"));
        }
        Field::Turns(turns) => turns,
        Field::Absent => {
            return Err(format!(
                "field `{name}` is missing, which the file's first record has"
            ));
        }
        Field::Text(_) | Field::Other => {
            return Err(format!("field `{name}` is no list of messages"));
        }
    };
    (0..)
        .zip(turns)
        .map(|(at, turn)| message(name, at, turn))
        .collect()
}

fn message(name: &str, at: usize, turn: Turn) -> Result<Message, String> {
    let refuse = |problem: &str| Err(format!("field `{name}`, message {at}: {problem}"));
    if let Some(problem) = turn.unusable {
        return refuse(problem);
    }
    let (Some(role), Some(content)) = (turn.role, turn.content) else {
        return refuse("expected `role` and `content`, both text");
    };
    let plain = |byte: u8| byte.is_ascii_lowercase() || byte == b'_';
    if role.is_empty() || role.len() > ROLE || !role.bytes().all(plain) {
        return refuse("`role` must be a word such as system, user or assistant");
    }
    Ok(Message { role, content })
}
