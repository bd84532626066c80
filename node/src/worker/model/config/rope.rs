//! Settings of the rotary position embedding.

use serde_json::{Value, json};

use super::Family;
use super::fields::{ConfigError, Fields};

/// Largest number that is read.
const MOST: f64 = 1e12;

/// Longest text that Phi 3 was first trained on, where no field says so.
const PHI_ORIGINAL: usize = 4096;

/// Rotary position embedding.
#[derive(Debug, Clone, PartialEq)]
pub struct Rope {
    /// Base of the frequencies.
    pub theta: f64,
    /// Share of each head's values that are turned, the first ones; above 0, at most 1.
    pub partial: f64,
    /// Stretching of the frequencies, if any.
    pub scaling: Option<RopeScaling>,
}

/// Known ways to stretch rotary frequencies to longer texts.
#[derive(Debug, Clone, PartialEq)]
pub enum RopeScaling {
    /// All frequencies divided by `factor`.
    Linear {
        /// Divisor.
        factor: f64,
    },
    /// Llama 3.1: low frequencies divided, high ones kept, smooth between.
    Llama3 {
        /// Divisor of low frequencies.
        factor: f64,
        /// `low_freq_factor`.
        low: f64,
        /// `high_freq_factor`.
        high: f64,
        /// `original_max_position_embeddings`.
        original: f64,
    },
    /// LongRoPE (Ding et al. 2024): each frequency divided by a factor of its own, from one list for texts of up
    /// to `original` tokens and from another for longer ones.
    Long {
        /// Divisors in texts of up to `original` tokens, one for each frequency.
        short: Vec<f64>,
        /// Divisors in longer texts.
        long: Vec<f64>,
        /// `original_max_position_embeddings`.
        original: usize,
        /// Factor of turned queries and keys.
        attention: f64,
    },
}

impl Rope {
    /// Plain frequencies over whole heads.
    pub fn new(theta: f64) -> Self {
        Self {
            theta,
            partial: 1.0,
            scaling: None,
        }
    }

    /// Values of a head that are turned, as transformers rounds them.
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "between 0 and the head's size"
    )]
    pub(crate) fn rotated(&self, head_dim: usize) -> usize {
        (head_dim as f64 * self.partial) as usize
    }

    pub(super) fn write(&self, object: &mut Value) {
        if self.partial < 1.0 {
            object["partial_rotary_factor"] = json!(self.partial);
        }
        let Some(scaling) = &self.scaling else { return };
        object["rope_scaling"] = match scaling {
            RopeScaling::Linear { factor } => json!({"rope_type": "linear", "factor": factor}),
            RopeScaling::Llama3 {
                factor,
                low,
                high,
                original,
            } => json!({
                "rope_type": "llama3",
                "factor": factor,
                "low_freq_factor": low,
                "high_freq_factor": high,
                "original_max_position_embeddings": original,
            }),
            RopeScaling::Long {
                short,
                long,
                original,
                attention,
            } => {
                object["original_max_position_embeddings"] = json!(original);
                json!({
                    "rope_type": "longrope",
                    "short_factor": short,
                    "long_factor": long,
                    "attention_factor": attention,
                })
            }
        };
    }
}

/// `rope_parameters` of transformers 5, else `rope_theta` and `rope_scaling`.
pub(super) fn parse(
    fields: &Fields<'_>,
    family: Family,
    head_dim: usize,
    max_positions: usize,
) -> Result<Rope, ConfigError> {
    let name = match fields.present("rope_parameters") {
        Some(_) => "rope_parameters",
        None => "rope_scaling",
    };
    let parameters = Parameters {
        fields,
        name,
        values: fields.present(name),
    };
    let either = |field: &str| parameters.get(field).or_else(|| fields.present(field));
    let theta = match either("rope_theta") {
        Some(value) => fields.checked_real("rope_theta", value, 1.0, MOST)?,
        None => 10_000.0,
    };
    let partial = match either("partial_rotary_factor") {
        Some(value) => fields.checked_real("partial_rotary_factor", value, 0.0, 1.0)?,
        None => 1.0,
    };
    if partial < 1.0 && !family.turns_a_part() {
        return Err(fields.refuse("partial_rotary_factor", "not supported in this family"));
    }
    let mut rope = Rope {
        theta,
        partial,
        scaling: None,
    };
    let kind = parameters
        .get("rope_type")
        .or_else(|| parameters.get("type"));
    let kind = kind.and_then(Value::as_str).unwrap_or("default");
    rope.scaling = match kind {
        "default" => None,
        "linear" => Some(RopeScaling::Linear {
            factor: parameters.number("factor")?,
        }),
        "llama3" => Some(RopeScaling::Llama3 {
            factor: parameters.number("factor")?,
            low: parameters.number("low_freq_factor")?,
            high: parameters.number("high_freq_factor")?,
            original: parameters.number("original_max_position_embeddings")?,
        }),
        // Phi wrote LongRoPE under these names at first.
        "longrope" | "su" | "yarn" if family == Family::Phi3 => {
            let count = rope.rotated(head_dim) / 2;
            Some(parameters.long(count, max_positions)?)
        }
        other => {
            return Err(fields.refuse(
                &format!("{name}.rope_type"),
                format!(
                    "`{other}` is not supported; use default, linear, llama3, or longrope in a Phi"
                ),
            ));
        }
    };
    Ok(rope)
}

/// The object of rotary settings.
struct Parameters<'a> {
    fields: &'a Fields<'a>,
    name: &'static str,
    values: Option<&'a Value>,
}

impl Parameters<'_> {
    fn get(&self, field: &str) -> Option<&Value> {
        self.values?.get(field).filter(|value| !value.is_null())
    }

    fn number(&self, field: &str) -> Result<f64, ConfigError> {
        let value = self.get(field).unwrap_or(&Value::Null);
        self.fields
            .checked_real(&format!("{}.{field}", self.name), value, 0.0, MOST)
    }

    fn list(&self, field: &str, count: usize) -> Result<Vec<f64>, ConfigError> {
        let name = format!("{}.{field}", self.name);
        let values = self.get(field).and_then(Value::as_array);
        match values {
            Some(values) if values.len() == count => values
                .iter()
                .map(|value| self.fields.checked_real(&name, value, 0.0, MOST))
                .collect(),
            _ => Err(self.fields.refuse(
                &name,
                format!("expected {count} numbers, one for each pair of turned values"),
            )),
        }
    }

    /// The attention factor follows from how much longer texts have become, unless it is given.
    fn long(&self, count: usize, max_positions: usize) -> Result<RopeScaling, ConfigError> {
        let field = "original_max_position_embeddings";
        let original = match self.fields.optional_count(field, 1 << 26)? {
            Some(original) => original,
            None if self.get(field).is_some() => {
                let value = self.get(field).and_then(Value::as_u64);
                let count = value.and_then(|value| usize::try_from(value).ok());
                count.filter(|count| *count > 0).ok_or_else(|| {
                    let name = format!("{}.{field}", self.name);
                    self.fields.refuse(&name, "is not a positive whole number")
                })?
            }
            None => PHI_ORIGINAL,
        };
        let factor = match self.get("factor") {
            Some(_) => self.number("factor")?,
            None => max_positions as f64 / original as f64,
        };
        let attention = match self.get("attention_factor") {
            Some(_) => self.number("attention_factor")?,
            None if factor <= 1.0 || original < 2 => 1.0,
            None => (1.0 + factor.ln() / (original as f64).ln()).sqrt(),
        };
        Ok(RopeScaling::Long {
            short: self.list("short_factor", count)?,
            long: self.list("long_factor", count)?,
            original,
            attention,
        })
    }
}
