//! `config.json` of a Hugging Face model folder, Llama family and Qwen2.

use std::path::{Path, PathBuf};

use serde_json::{Map, Value, json};

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

/// Architecture, which decides the biases and the name in `config.json`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Family {
    /// `LlamaForCausalLM`.
    Llama,
    /// `Qwen2ForCausalLM`: biases on q, k, v.
    Qwen2,
}

/// Rotary position embedding.
#[derive(Debug, Clone, PartialEq)]
pub struct Rope {
    /// Base of the frequencies.
    pub theta: f64,
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
}

/// Shape of a decoder. All counts are positive and consistent once built.
#[derive(Debug, Clone, PartialEq)]
pub struct ModelConfig {
    /// Architecture.
    pub family: Family,
    /// Rows of the embedding, at least the tokenizer's size.
    pub vocab_size: usize,
    /// Width of the residual stream.
    pub hidden_size: usize,
    /// Width of the feed-forward layers.
    pub intermediate_size: usize,
    /// Layers.
    pub layers: usize,
    /// Query heads.
    pub heads: usize,
    /// Key and value heads; divides `heads`.
    pub kv_heads: usize,
    /// Values per head; even.
    pub head_dim: usize,
    /// Longest sequence.
    pub max_positions: usize,
    /// Added to the mean square under the root.
    pub rms_norm_eps: f64,
    /// Rotary embedding.
    pub rope: Rope,
    /// Whether the head is the embedding.
    pub tied: bool,
    /// Bias on q, k, v.
    pub qkv_bias: bool,
    /// Bias on the attention's output.
    pub output_bias: bool,
    /// Ids of end-of-text tokens, may be empty.
    pub eos: Vec<u32>,
}

impl ModelConfig {
    /// A small Llama with untied head and as many key as query heads.
    pub fn llama(
        vocab_size: usize,
        hidden_size: usize,
        layers: usize,
        heads: usize,
        intermediate_size: usize,
    ) -> Self {
        Self {
            family: Family::Llama,
            vocab_size,
            hidden_size,
            intermediate_size,
            layers,
            heads,
            kv_heads: heads,
            head_dim: hidden_size / heads.max(1),
            max_positions: 2048,
            rms_norm_eps: 1e-6,
            rope: Rope {
                theta: 10_000.0,
                scaling: None,
            },
            tied: false,
            qkv_bias: false,
            output_bias: false,
            eos: Vec::new(),
        }
    }

    /// The norm's epsilon as the blocks use it.
    #[expect(
        clippy::cast_possible_truncation,
        reason = "one value near 1e-6, rounded to f32"
    )]
    pub(crate) fn eps(&self) -> f32 {
        self.rms_norm_eps as f32
    }

    /// Reads and checks `folder/config.json`.
    pub fn load(folder: &Path) -> Result<Self, ConfigError> {
        let path = folder.join("config.json");
        let object = read_object(&path)?;
        Self::parse(&path, &object)
    }

    /// Checks a parsed `config.json`; `path` is for messages.
    pub fn parse(path: &Path, object: &Map<String, Value>) -> Result<Self, ConfigError> {
        let fields = Fields { path, object };
        let family = match fields.text("model_type")? {
            "llama" => Family::Llama,
            "qwen2" => Family::Qwen2,
            other => {
                return Err(fields.refuse(
                    "model_type",
                    format!("`{other}` is not supported; use a `llama` or `qwen2` model"),
                ));
            }
        };
        fields.must_be_absent("quantization_config", "use the unquantised weights")?;
        fields.must_not_be_true("mlp_bias")?;
        fields.must_not_be_true("use_sliding_window")?;
        match object.get("hidden_act").and_then(Value::as_str) {
            None | Some("silu" | "swish") => {}
            Some(other) => {
                return Err(fields.refuse(
                    "hidden_act",
                    format!("`{other}` is not supported, only `silu`"),
                ));
            }
        }
        let heads = fields.count("num_attention_heads", 1 << 12)?;
        let hidden_size = fields.count("hidden_size", 1 << 20)?;
        let kv_heads = fields
            .optional_count("num_key_value_heads", 1 << 12)?
            .unwrap_or(heads);
        let head_dim = fields.optional_count("head_dim", 1 << 12)?;
        let attention_bias = fields.flag("attention_bias")?.unwrap_or(false);
        let config = Self {
            family,
            vocab_size: fields.count("vocab_size", 1 << 24)?,
            hidden_size,
            intermediate_size: fields.count("intermediate_size", 1 << 22)?,
            layers: fields.count("num_hidden_layers", 1 << 12)?,
            heads,
            kv_heads,
            head_dim: head_dim.unwrap_or(hidden_size / heads),
            max_positions: fields.count("max_position_embeddings", 1 << 26)?,
            rms_norm_eps: fields.real("rms_norm_eps", 0.0, 0.1)?,
            rope: fields.rope()?,
            tied: fields.flag("tie_word_embeddings")?.unwrap_or(false),
            qkv_bias: family == Family::Qwen2 || attention_bias,
            output_bias: family == Family::Llama && attention_bias,
            eos: fields.token_ids("eos_token_id")?,
        };
        config
            .check()
            .map_err(|(field, reason)| fields.refuse(field, reason))?;
        Ok(config)
    }

    /// Checks what concerns several fields: the name of the field at fault and what is wrong.
    pub(crate) fn check(&self) -> Result<(), (&'static str, String)> {
        if self.vocab_size < 2 {
            return Err(("vocab_size", "must be at least 2".into()));
        }
        if self.hidden_size == 0 || self.intermediate_size == 0 || self.layers == 0 {
            return Err(("hidden_size", "sizes and layers must be positive".into()));
        }
        if self.heads == 0 || self.kv_heads == 0 || !self.heads.is_multiple_of(self.kv_heads) {
            return Err((
                "num_key_value_heads",
                format!("{} does not divide {} heads", self.kv_heads, self.heads),
            ));
        }
        if self.head_dim == 0 || !self.head_dim.is_multiple_of(2) {
            return Err((
                "head_dim",
                format!("{} is not a positive even number", self.head_dim),
            ));
        }
        if let Some(id) = self.eos.iter().find(|&&id| id as usize >= self.vocab_size) {
            return Err((
                "eos_token_id",
                format!("{id} is not below vocab_size {}", self.vocab_size),
            ));
        }
        Ok(())
    }

    /// The `config.json` that transformers 4 and 5 load.
    pub fn to_json(&self) -> Value {
        let (architecture, model_type) = match self.family {
            Family::Llama => ("LlamaForCausalLM", "llama"),
            Family::Qwen2 => ("Qwen2ForCausalLM", "qwen2"),
        };
        let mut object = json!({
            "architectures": [architecture],
            "model_type": model_type,
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.head_dim,
            "max_position_embeddings": self.max_positions,
            "rms_norm_eps": self.rms_norm_eps,
            "rope_theta": self.rope.theta,
            "hidden_act": "silu",
            "tie_word_embeddings": self.tied,
            "attention_bias": self.output_bias,
            "torch_dtype": "float32",
        });
        if let Some(scaling) = &self.rope.scaling {
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
            };
        }
        match self.eos.as_slice() {
            [] => {}
            [one] => {
                object["bos_token_id"] = json!(one);
                object["eos_token_id"] = json!(one);
            }
            several => object["eos_token_id"] = json!(several),
        }
        object
    }
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

    fn optional_count(&self, field: &str, most: usize) -> Result<Option<usize>, ConfigError> {
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

    fn checked_real(
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

    fn flag(&self, field: &str) -> Result<Option<bool>, ConfigError> {
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

    fn must_be_absent(&self, field: &str, instead: &str) -> Result<(), ConfigError> {
        match self.present(field) {
            Some(_) => Err(self.refuse(field, format!("not supported; {instead}"))),
            None => Ok(()),
        }
    }

    fn token_ids(&self, field: &str) -> Result<Vec<u32>, ConfigError> {
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

    /// `rope_parameters` of transformers 5, else `rope_theta` and `rope_scaling`.
    fn rope(&self) -> Result<Rope, ConfigError> {
        const MOST: f64 = 1e12;
        let (field, parameters) = match self.present("rope_parameters") {
            Some(value) => ("rope_parameters", Some(value)),
            None => ("rope_scaling", self.present("rope_scaling")),
        };
        let theta = parameters
            .and_then(|p| p.get("rope_theta"))
            .or_else(|| self.present("rope_theta"));
        let theta = match theta {
            Some(value) => self.checked_real("rope_theta", value, 1.0, MOST)?,
            None => 10_000.0,
        };
        let Some(parameters) = parameters else {
            return Ok(Rope {
                theta,
                scaling: None,
            });
        };
        let number = |name: &str| {
            let value = parameters.get(name).unwrap_or(&Value::Null);
            self.checked_real(&format!("{field}.{name}"), value, 0.0, MOST)
        };
        let kind = parameters
            .get("rope_type")
            .or_else(|| parameters.get("type"));
        let scaling = match kind.and_then(Value::as_str).unwrap_or("default") {
            "default" => None,
            "linear" => Some(RopeScaling::Linear {
                factor: number("factor")?,
            }),
            "llama3" => Some(RopeScaling::Llama3 {
                factor: number("factor")?,
                low: number("low_freq_factor")?,
                high: number("high_freq_factor")?,
                original: number("original_max_position_embeddings")?,
            }),
            other => {
                return Err(self.refuse(
                    &format!("{field}.rope_type"),
                    format!("`{other}` is not supported; use default, linear or llama3"),
                ));
            }
        };
        Ok(Rope { theta, scaling })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(patch: &Value) -> Result<ModelConfig, ConfigError> {
        let mut object = ModelConfig::llama(400, 128, 3, 4, 344).to_json();
        for (key, value) in patch.as_object().unwrap() {
            object[key] = value.clone();
        }
        ModelConfig::parse(Path::new("m/config.json"), object.as_object().unwrap())
    }

    #[test]
    fn a_written_config_reads_back() {
        let mut config = ModelConfig::llama(400, 128, 3, 4, 344);
        config.eos = vec![256];
        let object = config.to_json();
        let read = ModelConfig::parse(Path::new("c"), object.as_object().unwrap()).unwrap();
        assert_eq!(read, config);
    }

    #[test]
    fn rope_is_read_in_old_and_new_style() {
        assert_eq!(
            parse(&json!({"rope_theta": 5e5})).unwrap().rope,
            Rope {
                theta: 5e5,
                scaling: None
            }
        );
        let new = json!({"rope_parameters": {"rope_theta": 1e6, "rope_type": "default"}});
        assert_eq!(
            parse(&new).unwrap().rope,
            Rope {
                theta: 1e6,
                scaling: None
            }
        );
    }

    #[test]
    fn absurd_values_name_file_and_field() {
        for (patch, field) in [
            (json!({"hidden_size": 0}), "hidden_size"),
            (json!({"hidden_size": "many"}), "hidden_size"),
            (json!({"num_hidden_layers": 1e30}), "num_hidden_layers"),
            (json!({"num_key_value_heads": 3}), "num_key_value_heads"),
            (json!({"head_dim": 31}), "head_dim"),
            (json!({"vocab_size": null}), "vocab_size"),
            (json!({"model_type": "gpt2"}), "model_type"),
            (
                json!({"rope_scaling": {"rope_type": "yarn"}}),
                "rope_scaling.rope_type",
            ),
            (json!({"quantization_config": {}}), "quantization_config"),
            (json!({"rms_norm_eps": -1.0}), "rms_norm_eps"),
            (json!({"eos_token_id": 400}), "eos_token_id"),
        ] {
            let message = parse(&patch).unwrap_err().to_string();
            let named = format!("m/config.json: field `{field}`");
            assert!(
                message.starts_with(&named),
                "{message} should start with {named}"
            );
        }
    }
}
