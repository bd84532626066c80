//! What a command answers: stdout is the result, stderr is talk; `--json` prints one object.

#![expect(
    clippy::print_stdout,
    clippy::print_stderr,
    reason = "the answer goes to the terminal"
)]

use serde_json::{Value, json};

use crate::error::{NodeError, with_causes};

/// Exit status of a question whose answer is no.
const NO: u8 = 1;

/// The answer of one command.
#[derive(Debug)]
pub(crate) struct Reply {
    code: &'static str,
    message: String,
    hint: Option<String>,
    data: serde_json::Map<String, Value>,
    status: u8,
}

impl Reply {
    pub(crate) fn done(message: impl Into<String>) -> Self {
        Self {
            code: "OK",
            message: message.into(),
            hint: None,
            data: serde_json::Map::new(),
            status: 0,
        }
    }

    /// It worked, and the answer is no.
    pub(crate) fn no(error: &NodeError) -> Self {
        Self {
            status: NO,
            ..Self::failed(error)
        }
    }

    pub(crate) fn failed(error: &NodeError) -> Self {
        Self {
            code: error.code(),
            message: with_causes(error),
            hint: None,
            data: serde_json::Map::new(),
            status: error.exit_status(),
        }
    }

    /// Adds a named result.
    pub(crate) fn with(mut self, name: &str, value: impl Into<Value>) -> Self {
        self.data.insert(name.to_owned(), value.into());
        self
    }

    /// Adds advice on what to do next.
    pub(crate) fn hint(mut self, hint: impl Into<String>) -> Self {
        self.hint = Some(hint.into());
        self
    }

    pub(crate) const fn status(&self) -> u8 {
        self.status
    }

    pub(crate) fn print(&self, json: bool) {
        if json {
            self.print_json();
        } else {
            self.print_lines();
        }
    }

    fn print_lines(&self) {
        let prefix = if self.status == 0 { "" } else { "error: " };
        if !self.message.is_empty() {
            eprintln!("{prefix}{}", self.message);
        }
        if let Some(hint) = &self.hint {
            eprintln!("{hint}");
        }
        for (name, value) in &self.data {
            match value {
                Value::Array(values) => {
                    for value in values {
                        println!("{name}: {}", plain(value));
                    }
                }
                other => println!("{name}: {}", plain(other)),
            }
        }
    }

    fn print_json(&self) {
        let status = match self.status {
            0 => "ok",
            NO => "no",
            _ => "error",
        };
        let object = json!({
            "schema": "consilium-node/1",
            "status": status,
            "code": self.code,
            "message": self.message,
            "hint": self.hint,
            "docs": null,
            "data": self.data,
        });
        println!("{object}");
    }
}

fn plain(value: &Value) -> String {
    value
        .as_str()
        .map_or_else(|| value.to_string(), str::to_owned)
}
