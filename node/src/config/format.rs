//! Names of storage formats, as settings and options have them.

use consilium_kernels::quant::Format;
use serde::{Deserialize as _, Deserializer, Serializer};

/// What may stand for a format.
pub(crate) const EXPECTED: &str = "\"f32\", \"bf16\", \"int8\" or \"nf4\"";

/// The format of a name.
pub(crate) fn parse(name: &str) -> Result<Format, String> {
    Format::named(name).ok_or_else(|| format!("{name:?}, expected {EXPECTED}"))
}

pub(crate) fn serialize<S: Serializer>(format: &Format, to: S) -> Result<S::Ok, S::Error> {
    to.serialize_str(format.name())
}

pub(crate) fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<Format, D::Error> {
    parse(&String::deserialize(from)?).map_err(serde::de::Error::custom)
}
