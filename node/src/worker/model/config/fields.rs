//! Access to the fields of a JSON file, with errors that name file and field.

use std::path::{Path, PathBuf};

use serde_json::{Map, Value};

/// Largest file of settings that is read, in bytes.
const LARGEST: u64 = 4 << 20;

/// Why a `config.json` was refused.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file could not be read.
    #[error("{path}: cannot read: {source}")]
    Read {
        /// File.
        path: PathBuf,
        /// Cause.
        source: std::io::Error,
    },
    /// The file is no JSON object.
    #[error("{path}: not a JSON object: {reason}")]
    NotJson {
        /// File.
        path: PathBuf,
        /// What the parser said.
        reason: String,
    },
    /// A field is missing, of the wrong type, or out of range.
    #[error("{path}: field `{field}`: {reason}")]
    Field {
        /// File.
        path: PathBuf,
        /// Field.
        field: String,
        /// What is wrong, and what would be right.
        reason: String,
    },
}

/// Reads a JSON object of at most 4 MiB.
pub(crate) fn read_object(path: &Path) -> Result<Map<String, Value>, ConfigError> {
    let read = |source| ConfigError::Read {
        path: path.into(),
        source,
    };
    let not_json = |reason| ConfigError::NotJson {
        path: path.into(),
        reason,
    };
    let size = std::fs::metadata(path).map_err(read)?.len();
    if size > LARGEST {
        return Err(not_json(format!("{size} bytes, more than {LARGEST}")));
    }
    let bytes = std::fs::read(path).map_err(read)?;
    serde_json::from_slice(&bytes).map_err(|error| not_json(error.to_string()))
}

/// Access to the fields of one file, with errors that name both.
pub(crate) struct Fields<'a> {
    pub(crate) path: &'a Path,
    pub(crate) object: &'a Map<String, Value>,
}

impl<'a> Fields<'a> {
    pub(crate) fn refuse(&self, field: &str, reason: impl Into<String>) -> ConfigError {
        ConfigError::Field {
            path: self.path.into(),
            field: field.into(),
            reason: reason.into(),
        }
    }

    pub(crate) fn present(&self, field: &str) -> Option<&'a Value> {
        self.object.get(field).filter(|value| !value.is_null())
    }

    pub(crate) fn text(&self, field: &str) -> Result<&'a str, ConfigError> {
        let value = self
            .present(field)
            .ok_or_else(|| self.refuse(field, "missing"))?;
        value
            .as_str()
            .ok_or_else(|| self.refuse(field, format!("{value} is not text")))
    }

    pub(crate) fn count(&self, field: &str, most: usize) -> Result<usize, ConfigError> {
        self.optional_count(field, most)?
            .ok_or_else(|| self.refuse(field, "missing"))
    }

    pub(crate) fn optional_count(
        &self,
        field: &str,
        most: usize,
    ) -> Result<Option<usize>, ConfigError> {
        let Some(value) = self.present(field) else {
            return Ok(None);
        };
        match value.as_u64().and_then(|count| usize::try_from(count).ok()) {
            Some(count) if (1..=most).contains(&count) => Ok(Some(count)),
            _ => Err(self.refuse(
                field,
                format!("{value} is not a whole number in 1..={most}"),
            )),
        }
    }

    pub(crate) fn real(&self, field: &str, above: f64, most: f64) -> Result<f64, ConfigError> {
        let value = self
            .present(field)
            .ok_or_else(|| self.refuse(field, "missing"))?;
        self.checked_real(field, value, above, most)
    }

    pub(crate) fn checked_real(
        &self,
        field: &str,
        value: &Value,
        above: f64,
        most: f64,
    ) -> Result<f64, ConfigError> {
        match value.as_f64() {
            Some(real) if real > above && real <= most => Ok(real),
            _ => Err(self.refuse(
                field,
                format!("{value} is not a number above {above} and at most {most}"),
            )),
        }
    }

    pub(crate) fn flag(&self, field: &str) -> Result<Option<bool>, ConfigError> {
        self.present(field)
            .map(|value| {
                value
                    .as_bool()
                    .ok_or_else(|| self.refuse(field, format!("{value} is not true or false")))
            })
            .transpose()
    }

    pub(crate) fn must_not_be_true(&self, field: &str) -> Result<(), ConfigError> {
        match self.flag(field)? {
            Some(true) => Err(self.refuse(field, "true is not supported")),
            _ => Ok(()),
        }
    }

    pub(crate) fn must_be_absent(&self, field: &str, instead: &str) -> Result<(), ConfigError> {
        match self.present(field) {
            Some(_) => Err(self.refuse(field, format!("not supported; {instead}"))),
            None => Ok(()),
        }
    }

    pub(crate) fn token_ids(&self, field: &str) -> Result<Vec<u32>, ConfigError> {
        let id = |value: &Value| {
            value
                .as_u64()
                .and_then(|id| u32::try_from(id).ok())
                .ok_or_else(|| self.refuse(field, format!("{value} is not a token id")))
        };
        match self.present(field) {
            None => Ok(Vec::new()),
            Some(Value::Array(several)) => several.iter().map(id).collect(),
            Some(one) => Ok(vec![id(one)?]),
        }
    }
}
