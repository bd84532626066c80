//! Records from JSON lines and plain text. A reason names line and column and never quotes the line.

use std::fmt;
use std::fs::File;
use std::io::BufReader;

use serde::Deserialize;
use serde::de::{self, Deserializer, IgnoredAny, MapAccess, SeqAccess, Visitor};

use super::lines::{LONGEST, Line, next_line};
use super::read::{Place, Refused};
use super::shape::{FIELDS, Field, Fields, Row, Shape, Turn};

/// Bytes that are read at once.
const BUFFER: usize = 256 << 10;

/// Records of one file, one a line. Blank lines are no records.
#[derive(Debug)]
pub(super) struct Lines {
    reader: BufReader<File>,
    is_json: bool,
    shape: Option<Shape>,
    line: Vec<u8>,
    number: u64,
}

impl Lines {
    pub(super) fn new(file: File, is_json: bool) -> Self {
        Self {
            reader: BufReader::with_capacity(BUFFER, file),
            is_json,
            shape: None,
            line: Vec::new(),
            number: 0,
        }
    }

    /// The next record, and where it stands.
    pub(super) fn next_row(&mut self) -> Option<Result<(Place, Row), Refused>> {
        loop {
            let found = next_line(&mut self.reader, &mut self.line);
            self.number += 1;
            let place = |column| Place::Line {
                line: self.number,
                column,
            };
            let bad = |column, reason| Some(Err(Refused::Row(place(column), reason)));
            match found {
                Err(error) => return Some(Err(Refused::File(error))),
                Ok(Line::End) => return None,
                Ok(Line::TooLong(bytes)) => {
                    let reason = format!(
                        "the line has {bytes} bytes, more than {LONGEST}; write one record a line"
                    );
                    return bad(LONGEST + 1, reason);
                }
                Ok(Line::Whole) => {}
            }
            let bytes = match self.line.strip_prefix(b"\xef\xbb\xbf") {
                Some(rest) if self.number == 1 => rest,
                _ => &self.line,
            };
            let text = match std::str::from_utf8(bytes) {
                Ok(text) => text,
                Err(error) => {
                    let reason = "not UTF-8; convert the file, for example with iconv";
                    return bad(error.valid_up_to() + 1, reason.to_owned());
                }
            };
            if text.trim().is_empty() {
                continue;
            }
            let row = if self.is_json {
                json_row(text, &mut self.shape)
            } else {
                Ok(Row::Text(text.to_owned()))
            };
            return match row {
                Ok(row) => Some(Ok((place(1), row))),
                Err((column, reason)) => bad(column, reason),
            };
        }
    }
}

fn json_row(text: &str, shape: &mut Option<Shape>) -> Result<Row, (usize, String)> {
    let fields: Fields = serde_json::from_str(text).map_err(|error| {
        let what = if text.trim_start().starts_with('[') {
            "a JSON array; write one object a line (jq -c '.[]' does it)"
        } else if error.is_eof() {
            "the JSON object is cut off"
        } else if error.is_syntax() {
            "not JSON"
        } else {
            "not a JSON object of distinct fields"
        };
        (error.column().max(1), what.to_owned())
    })?;
    let at_start = |reason| (1, reason);
    let of_file = match *shape {
        Some(shape) => shape,
        None => fields.shape().map_err(at_start)?,
    };
    let row = fields.row(of_file).map_err(at_start)?;
    *shape = Some(of_file);
    Ok(row)
}

impl<'de> Deserialize<'de> for Fields {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Object;
        impl<'de> Visitor<'de> for Object {
            type Value = Fields;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Fields, A::Error> {
                let mut fields = Fields::default();
                while let Some(name) = map.next_key::<std::borrow::Cow<'de, str>>()? {
                    let at = FIELDS.iter().position(|field| *field == name);
                    match at.and_then(|at| fields.0.get_mut(at)) {
                        Some(field) if *field != Field::Absent => {
                            return Err(de::Error::custom("a field comes twice"));
                        }
                        Some(field) => *field = map.next_value()?,
                        None => {
                            map.next_value::<IgnoredAny>()?;
                        }
                    }
                }
                Ok(fields)
            }
        }
        deserializer.deserialize_map(Object)
    }
}

impl<'de> Deserialize<'de> for Field {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(Any(std::marker::PhantomData))
    }
}

impl<'de> Deserialize<'de> for Turn {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(Any(std::marker::PhantomData))
    }
}

impl<'de> Deserialize<'de> for Part {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(Any(std::marker::PhantomData))
    }
}

/// What a JSON value means in some place; what has no meaning there is passed over without being kept.
trait Meaning<'de>: Sized {
    fn null() -> Self;
    fn text(text: &str) -> Self;
    fn other() -> Self;

    fn list<A: SeqAccess<'de>>(mut list: A) -> Result<Self, A::Error> {
        while list.next_element::<IgnoredAny>()?.is_some() {}
        Ok(Self::other())
    }

    fn object<A: MapAccess<'de>>(mut map: A) -> Result<Self, A::Error> {
        while map.next_entry::<IgnoredAny, IgnoredAny>()?.is_some() {}
        Ok(Self::other())
    }
}

struct Any<T>(std::marker::PhantomData<T>);

impl<'de, T: Meaning<'de>> Visitor<'de> for Any<T> {
    type Value = T;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a value")
    }

    fn visit_unit<E>(self) -> Result<T, E> {
        Ok(T::null())
    }

    fn visit_str<E>(self, text: &str) -> Result<T, E> {
        Ok(T::text(text))
    }

    fn visit_bool<E>(self, _: bool) -> Result<T, E> {
        Ok(T::other())
    }

    fn visit_i64<E>(self, _: i64) -> Result<T, E> {
        Ok(T::other())
    }

    fn visit_u64<E>(self, _: u64) -> Result<T, E> {
        Ok(T::other())
    }

    fn visit_f64<E>(self, _: f64) -> Result<T, E> {
        Ok(T::other())
    }

    fn visit_seq<A: SeqAccess<'de>>(self, list: A) -> Result<T, A::Error> {
        T::list(list)
    }

    fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<T, A::Error> {
        T::object(map)
    }
}

impl<'de> Meaning<'de> for Field {
    fn null() -> Self {
        Self::Absent
    }

    fn text(text: &str) -> Self {
        Self::Text(text.to_owned())
    }

    fn other() -> Self {
        Self::Other
    }

    fn list<A: SeqAccess<'de>>(mut list: A) -> Result<Self, A::Error> {
        let mut turns = Vec::new();
        while let Some(turn) = list.next_element()? {
            turns.push(turn);
        }
        Ok(Self::Turns(turns))
    }
}

impl<'de> Meaning<'de> for Turn {
    fn null() -> Self {
        Self::default()
    }

    fn text(_: &str) -> Self {
        Self::default()
    }

    fn other() -> Self {
        Self::default()
    }

    fn object<A: MapAccess<'de>>(mut map: A) -> Result<Self, A::Error> {
        let mut turn = Self::default();
        while let Some(name) = map.next_key::<std::borrow::Cow<'de, str>>()? {
            match &*name {
                "role" => {
                    if let Field::Text(role) = map.next_value()? {
                        turn.role = Some(role);
                    }
                }
                "content" => {
                    let Part { text, unusable } = map.next_value()?;
                    turn.content = text;
                    turn.unusable = turn.unusable.or(unusable);
                }
                "tool_calls" => {
                    if map.next_value::<Field>()? != Field::Absent {
                        turn.unusable = Some("tool calls cannot be rendered");
                    }
                }
                // ShareGPT's names.
                "from" | "value" => {
                    map.next_value::<IgnoredAny>()?;
                    turn.unusable = Some(
                        "`from` and `value` are ShareGPT's names; rename them to `role` and `content`",
                    );
                }
                _ => {
                    map.next_value::<IgnoredAny>()?;
                }
            }
        }
        Ok(turn)
    }
}

/// The content of a message: text, or a list of parts of which the texts are joined.
#[derive(Default)]
struct Part {
    text: Option<String>,
    unusable: Option<&'static str>,
}

impl<'de> Meaning<'de> for Part {
    fn null() -> Self {
        Self::default()
    }

    fn text(text: &str) -> Self {
        Self {
            text: Some(text.to_owned()),
            unusable: None,
        }
    }

    fn other() -> Self {
        Self::default()
    }

    fn list<A: SeqAccess<'de>>(mut list: A) -> Result<Self, A::Error> {
        let mut joined = Self::text("");
        while let Some(Self { text, unusable }) = list.next_element()? {
            joined.unusable = joined.unusable.or(unusable);
            let Some(text) = text else {
                joined.unusable =
                    Some("a part of `content` is no text; images and tools cannot be learned");
                continue;
            };
            if let Some(all) = &mut joined.text {
                all.push_str(&text);
            }
        }
        Ok(joined)
    }

    fn object<A: MapAccess<'de>>(mut map: A) -> Result<Self, A::Error> {
        let mut part = Self::default();
        while let Some(name) = map.next_key::<std::borrow::Cow<'de, str>>()? {
            if name == "text" {
                if let Field::Text(text) = map.next_value()? {
                    part.text = Some(text);
                }
            } else {
                map.next_value::<IgnoredAny>()?;
            }
        }
        Ok(part)
    }
}
