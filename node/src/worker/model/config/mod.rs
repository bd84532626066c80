//! `config.json` of a Hugging Face model folder. Families differ by what their configuration says, not by code.

mod families;
mod fields;
mod rope;
#[cfg(test)]
mod tests;

use std::path::Path;

use serde_json::{Map, Value, json};

pub use families::Family;
pub(crate) use families::Modules;
pub use fields::ConfigError;
pub(crate) use fields::{Fields, read_object};
pub use rope::{Rope, RopeScaling};

/// Layers whose positions see only their near past, themselves included.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SlidingWindow {
    /// Positions seen, at least 1.
    pub positions: usize,
    /// Whether each layer is so limited; as many as the model has layers.
    pub layers: Vec<bool>,
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
    /// Limit of what positions see, if any.
    pub sliding: Option<SlidingWindow>,
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
            rope: Rope::new(10_000.0),
            sliding: None,
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

    /// Positions that layer `layer` sees, the own one included; `None` if all earlier ones.
    pub(crate) fn window(&self, layer: usize) -> Option<usize> {
        let sliding = self.sliding.as_ref()?;
        sliding
            .layers
            .get(layer)
            .is_some_and(|&limited| limited)
            .then_some(sliding.positions)
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
        let family = Family::parse(&fields)?;
        fields.must_be_absent("quantization_config", "use the unquantised weights")?;
        fields.must_not_be_true("mlp_bias")?;
        fields.must_not_be_true("lm_head_bias")?;
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
        let kv_heads = match fields.optional_count("num_key_value_heads", 1 << 12)? {
            Some(kv_heads) => kv_heads,
            None if family.may_omit_kv_heads() => heads,
            None => return Err(fields.refuse("num_key_value_heads", "missing")),
        };
        let head_dim = fields.optional_count("head_dim", 1 << 12)?;
        let head_dim = head_dim.unwrap_or(hidden_size / heads);
        let layers = fields.count("num_hidden_layers", 1 << 12)?;
        let max_positions = fields.count("max_position_embeddings", 1 << 26)?;
        let attention_bias =
            family.takes_attention_bias() && fields.flag("attention_bias")?.unwrap_or(false);
        let config = Self {
            family,
            vocab_size: fields.count("vocab_size", 1 << 24)?,
            hidden_size,
            intermediate_size: fields.count("intermediate_size", 1 << 22)?,
            layers,
            heads,
            kv_heads,
            head_dim,
            max_positions,
            rms_norm_eps: fields.real("rms_norm_eps", 0.0, 0.1)?,
            rope: rope::parse(&fields, family, head_dim, max_positions)?,
            sliding: family.sliding(&fields, layers)?,
            tied: fields.flag("tie_word_embeddings")?.unwrap_or(false),
            qkv_bias: family == Family::Qwen2 || attention_bias,
            output_bias: attention_bias,
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
        let rotated = self.rope.rotated(self.head_dim);
        if rotated == 0 || rotated > self.head_dim || !rotated.is_multiple_of(2) {
            return Err((
                "partial_rotary_factor",
                format!("turns {rotated} of {} values of a head", self.head_dim),
            ));
        }
        if let Some(sliding) = &self.sliding
            && (sliding.positions == 0 || sliding.layers.len() != self.layers)
        {
            return Err((
                "sliding_window",
                "must be positive and known for each layer".into(),
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
        let mut object = json!({
            "architectures": [self.family.architecture()],
            "model_type": self.family.model_type(),
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
            // Phi's default lies outside of a small vocabulary.
            "pad_token_id": null,
        });
        self.rope.write(&mut object);
        self.family
            .write_sliding(self.sliding.as_ref(), &mut object);
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
