//! What a command answers: lines for people, one JSON object for programs.

#![expect(
    clippy::print_stdout,
    clippy::print_stderr,
    reason = "the answer goes to the terminal"
)]

use std::error::Error as _;

use serde_json::{Value, json};

use crate::error::CertsError;

/// Exit status of a question whose answer is no.
const NO: u8 = 1;

/// The answer of one command.
pub(crate) struct Reply {
    code: &'static str,
    message: String,
    hint: Option<String>,
    data: Vec<(&'static str, Value)>,
    status: u8,
}

impl Reply {
    /// It worked.
    pub(crate) fn done(message: impl Into<String>) -> Self {
        Self {
            code: "OK",
            message: message.into(),
            hint: None,
            data: Vec::new(),
            status: 0,
        }
    }

    /// It worked, and the answer is no.
    pub(crate) fn no(code: &'static str, message: String) -> Self {
        Self {
            code,
            message,
            hint: None,
            data: Vec::new(),
            status: NO,
        }
    }

    /// It did not work.
    pub(crate) fn failed(error: &CertsError) -> Self {
        let (code, status) = (error.code(), error.exit_status());
        Self {
            code,
            message: full_text(error),
            hint: None,
            data: Vec::new(),
            status,
        }
    }

    /// Adds a named result.
    pub(crate) fn with(mut self, name: &'static str, value: impl Into<Value>) -> Self {
        self.data.push((name, value.into()));
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
        eprintln!("{prefix}{}", self.message);
        if let Some(hint) = &self.hint {
            eprintln!("{hint}");
        }
        for (name, value) in &self.data {
            let text = match value {
                Value::String(text) => text.clone(),
                Value::Array(values) => values
                    .iter()
                    .map(|value| {
                        value
                            .as_str()
                            .map_or_else(|| value.to_string(), str::to_owned)
                    })
                    .collect::<Vec<_>>()
                    .join(", "),
                other => other.to_string(),
            };
            println!("{name}: {text}");
        }
    }

    fn print_json(&self) {
        let status = match self.status {
            0 => "ok",
            NO => "no",
            _ => "error",
        };
        let data: serde_json::Map<String, Value> = self
            .data
            .iter()
            .map(|(name, value)| ((*name).to_owned(), value.clone()))
            .collect();
        println!(
            "{}",
            json!({
                "schema": "consilium-certs/1",
                "status": status,
                "code": self.code,
                "message": self.message,
                "hint": self.hint,
                "docs": null,
                "data": data,
            })
        );
    }
}

/// The error with its causes.
fn full_text(error: &CertsError) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text.push_str(": ");
        text.push_str(&error.to_string());
        cause = error.source();
    }
    text
}
