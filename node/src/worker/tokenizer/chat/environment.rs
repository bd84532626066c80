//! The Jinja environment that templates are written for.

use std::fmt;

use consilium_protocol::time::UnixMillis;
use fancy_regex::Regex;
use jiff::Timestamp;
use jiff::fmt::strtime;
use jiff::tz::TimeZone;
use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Kwargs, Value};
use minijinja::{Environment, Error, ErrorKind, State};
use minijinja_contrib::pycompat::unknown_method_callback;
use serde::Serialize as _;
use serde_json::ser::{Formatter, Serializer};

use super::Rendered;

/// The variable that holds what marks the assistant's parts.
pub(super) const MARK: &str = "__consilium_mark";

/// The function that a generation block becomes a call of.
const GENERATION: &str = "__consilium_generation";

/// The words of a template that refuses a conversation.
#[derive(Debug)]
struct Raised(String);

impl fmt::Display for Raised {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Raised {}

/// What transformers gives templates (`_compile_jinja_template` in `utils/chat_template_utils.py`).
pub(super) fn new(now: UnixMillis, fuel: u64) -> Environment<'static> {
    let mut environment = Environment::new();
    let syntax = SyntaxConfig::builder()
        .trim_blocks(true)
        .lstrip_blocks(true)
        .build();
    // Only delimiters can be refused, and these are the usual ones.
    environment.set_syntax(syntax.unwrap_or_default());
    environment.set_fuel(Some(fuel));
    environment.set_unknown_method_callback(unknown_method_callback);
    environment.add_function("raise_exception", raise_exception);
    environment.add_function("strftime_now", move |format: String| strftime(now, &format));
    environment.add_function(GENERATION, generation);
    environment.add_filter("tojson", tojson);
    environment
}

/// Writes generation blocks as blocks that minijinja has, and says whether there are any.
pub(super) fn with_calls(source: &str) -> (String, bool) {
    let replace = |source: &str, word: &str, call: &str| {
        let tag = format!(r"\{{%([-+]?)\s*{word}\s*([-+]?)%\}}");
        match Regex::new(&tag) {
            Ok(tag) => tag
                .replace_all(source, format!("{{%$1 {call} $2%}}"))
                .into_owned(),
            Err(_) => source.to_owned(),
        }
    };
    let opened = replace(source, "generation", &format!("call {GENERATION}()"));
    let is_marked = opened != source;
    (replace(&opened, "endgeneration", "endcall"), is_marked)
}

/// Takes the marks out of a text.
pub(super) fn unmarked(text: &str, mark: &str) -> Rendered {
    let mut rendered = Rendered::default();
    let mut pieces = text.split(mark);
    rendered.text.push_str(pieces.next().unwrap_or_default());
    for piece in pieces {
        let at = rendered.text.len();
        if let Some(piece) = piece.strip_prefix(OPEN) {
            rendered.assistant.push(at..at);
            rendered.text.push_str(piece);
        } else {
            if let Some(range) = rendered.assistant.last_mut() {
                range.end = at;
            }
            let piece = piece.strip_prefix(CLOSE).unwrap_or(piece);
            rendered.text.push_str(piece);
        }
    }
    rendered.assistant.retain(|range| !range.is_empty());
    rendered
}

/// What follows a mark at the beginning and at the end of a part.
const OPEN: char = '[';
const CLOSE: char = ']';

#[expect(
    clippy::needless_pass_by_value,
    reason = "as minijinja calls functions"
)]
fn generation(state: &mut State<'_, '_>, kwargs: Kwargs) -> Result<String, Error> {
    let caller: Value = kwargs.get("caller")?;
    let body = caller.call(state, &[])?;
    let mark = state.lookup(MARK).unwrap_or_default();
    Ok(format!("{mark}{OPEN}{body}{mark}{CLOSE}"))
}

fn raise_exception(reason: String) -> Result<String, Error> {
    let error = Error::new(ErrorKind::InvalidOperation, reason.clone());
    Err(error.with_source(Raised(reason)))
}

/// The words of `raise_exception`, if that is what an error is about.
pub(super) fn raised(error: &Error) -> Option<String> {
    let mut cause = std::error::Error::source(error);
    while let Some(error) = cause {
        if let Some(raised) = error.downcast_ref::<Raised>() {
            return Some(raised.0.clone());
        }
        cause = error.source();
    }
    None
}

fn strftime(now: UnixMillis, format: &str) -> Result<String, Error> {
    let failed = |error: &dyn fmt::Display| {
        Error::new(
            ErrorKind::InvalidOperation,
            format!("strftime_now: {error}"),
        )
    };
    let millis = i64::try_from(now.0).map_err(|error| failed(&error))?;
    let now = Timestamp::from_millisecond(millis).map_err(|error| failed(&error))?;
    strtime::format(format, &now.to_zoned(TimeZone::UTC)).map_err(|error| failed(&error))
}

#[expect(clippy::needless_pass_by_value, reason = "as minijinja calls filters")]
/// `json.dumps(value, ensure_ascii=False, indent=indent)`, without the escapes that HTML asks for.
fn tojson(value: &Value, kwargs: Kwargs) -> Result<Value, Error> {
    let indent: Option<usize> = kwargs.get("indent")?;
    let _: Option<bool> = kwargs.get("ensure_ascii")?;
    kwargs.assert_all_used()?;
    let mut bytes = Vec::new();
    let format = Python {
        indent: indent.map(|indent| indent.min(16)),
        depth: 0,
        is_empty: true,
    };
    value
        .serialize(&mut Serializer::with_formatter(&mut bytes, format))
        .map_err(|error| Error::new(ErrorKind::BadSerialization, error.to_string()))?;
    let text = String::from_utf8(bytes)
        .map_err(|error| Error::new(ErrorKind::BadSerialization, error.to_string()))?;
    Ok(Value::from_safe_string(text))
}

/// The spaces of Python's json module.
struct Python {
    indent: Option<usize>,
    depth: usize,
    is_empty: bool,
}

impl Python {
    fn open<W: std::io::Write + ?Sized>(
        &mut self,
        writer: &mut W,
        bracket: u8,
    ) -> std::io::Result<()> {
        self.depth += 1;
        self.is_empty = true;
        writer.write_all(&[bracket])
    }

    fn next<W: std::io::Write + ?Sized>(
        &mut self,
        writer: &mut W,
        first: bool,
    ) -> std::io::Result<()> {
        self.is_empty = false;
        match (self.indent, first) {
            (None, true) => Ok(()),
            (None, false) => writer.write_all(b", "),
            (Some(_), _) => {
                writer.write_all(if first { b"" } else { b"," })?;
                self.line(writer)
            }
        }
    }

    fn close<W: std::io::Write + ?Sized>(
        &mut self,
        writer: &mut W,
        bracket: u8,
    ) -> std::io::Result<()> {
        self.depth = self.depth.saturating_sub(1);
        if self.indent.is_some() && !self.is_empty {
            self.line(writer)?;
        }
        self.is_empty = false;
        writer.write_all(&[bracket])
    }

    fn line<W: std::io::Write + ?Sized>(&self, writer: &mut W) -> std::io::Result<()> {
        let spaces = self.indent.unwrap_or(0) * self.depth;
        write!(writer, "\n{:spaces$}", "")
    }
}

impl Formatter for Python {
    fn begin_array<W: std::io::Write + ?Sized>(&mut self, writer: &mut W) -> std::io::Result<()> {
        self.open(writer, b'[')
    }

    fn begin_array_value<W: std::io::Write + ?Sized>(
        &mut self,
        writer: &mut W,
        first: bool,
    ) -> std::io::Result<()> {
        self.next(writer, first)
    }

    fn end_array<W: std::io::Write + ?Sized>(&mut self, writer: &mut W) -> std::io::Result<()> {
        self.close(writer, b']')
    }

    fn begin_object<W: std::io::Write + ?Sized>(&mut self, writer: &mut W) -> std::io::Result<()> {
        self.open(writer, b'{')
    }

    fn begin_object_key<W: std::io::Write + ?Sized>(
        &mut self,
        writer: &mut W,
        first: bool,
    ) -> std::io::Result<()> {
        self.next(writer, first)
    }

    fn begin_object_value<W: std::io::Write + ?Sized>(
        &mut self,
        writer: &mut W,
    ) -> std::io::Result<()> {
        writer.write_all(b": ")
    }

    fn end_object<W: std::io::Write + ?Sized>(&mut self, writer: &mut W) -> std::io::Result<()> {
        self.close(writer, b'}')
    }
}
