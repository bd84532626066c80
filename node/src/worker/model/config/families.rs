//! What sets one family of decoders apart from another.

use serde_json::{Value, json};

use super::SlidingWindow;
use super::fields::{ConfigError, Fields};

/// Longest window that is read; a longer one limits nothing that fits into memory.
const LONGEST_WINDOW: usize = 1 << 26;

/// Window of a Mistral whose file has no such field; null means none.
const MISTRAL_WINDOW: usize = 4096;

/// Architecture of a decoder.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Family {
    /// Llama 2 and 3.
    Llama,
    /// Mistral: may see a sliding window only.
    Mistral,
    /// Qwen 2 and 2.5: biases on q, k, v.
    Qwen2,
    /// Qwen 3: queries and keys of each head are normalised.
    Qwen3,
    /// Phi 3, 3.5 and 4: one matrix for q, k, v and one for gate, up; may turn only a part of each head.
    Phi3,
}

/// Every family with its `model_type` and class in transformers.
const FAMILIES: [(Family, &str, &str); 5] = [
    (Family::Llama, "llama", "LlamaForCausalLM"),
    (Family::Mistral, "mistral", "MistralForCausalLM"),
    (Family::Qwen2, "qwen2", "Qwen2ForCausalLM"),
    (Family::Qwen3, "qwen3", "Qwen3ForCausalLM"),
    (Family::Phi3, "phi3", "Phi3ForCausalLM"),
];

/// Linear layers of a block's two projections, by their input.
pub(crate) type Modules = [&'static [&'static str]; 2];

impl Family {
    pub(super) fn parse(fields: &Fields<'_>) -> Result<Self, ConfigError> {
        let name = fields.text("model_type")?;
        let found = FAMILIES
            .iter()
            .find(|(_, model_type, _)| *model_type == name);
        found.map(|(family, _, _)| *family).ok_or_else(|| {
            let known = FAMILIES.map(|(_, model_type, _)| model_type).join(", ");
            fields.refuse(
                "model_type",
                format!("`{name}` is not supported, only {known}"),
            )
        })
    }

    fn entry(self) -> (&'static str, &'static str) {
        FAMILIES
            .iter()
            .find(|(family, _, _)| *family == self)
            .map_or(("", ""), |&(_, model_type, class)| (model_type, class))
    }

    /// `model_type` in `config.json`.
    pub fn model_type(self) -> &'static str {
        self.entry().0
    }

    /// Name of the class in transformers.
    pub fn architecture(self) -> &'static str {
        self.entry().1
    }

    /// Names of the attention's linear layers, grouped by input.
    pub(crate) fn attention_modules(self) -> Modules {
        match self {
            Self::Phi3 => [&["qkv_proj"], &["o_proj"]],
            _ => [&["q_proj", "k_proj", "v_proj"], &["o_proj"]],
        }
    }

    /// Names of the feed-forward block's linear layers, grouped by input.
    pub(crate) fn feed_forward_modules(self) -> Modules {
        match self {
            Self::Phi3 => [&["gate_up_proj"], &["down_proj"]],
            _ => [&["gate_proj", "up_proj"], &["down_proj"]],
        }
    }

    /// Names of all linear layers.
    pub(crate) fn modules(self) -> impl Iterator<Item = &'static str> {
        let groups = [self.attention_modules(), self.feed_forward_modules()];
        groups.into_iter().flatten().flatten().copied()
    }

    /// Whether each head's queries and keys are normalised before they are turned.
    pub(crate) fn normalises_heads(self) -> bool {
        self == Self::Qwen3
    }

    pub(super) fn takes_attention_bias(self) -> bool {
        matches!(self, Self::Llama | Self::Qwen3)
    }

    /// Other families have a default that is not the number of heads.
    pub(super) fn may_omit_kv_heads(self) -> bool {
        matches!(self, Self::Llama | Self::Phi3)
    }

    pub(super) fn turns_a_part(self) -> bool {
        self == Self::Phi3
    }

    /// Mistral and Phi limit every layer; Qwen the layers named in `layer_types`, else those from
    /// `max_window_layers` on, and only with `use_sliding_window`.
    pub(super) fn sliding(
        self,
        fields: &Fields<'_>,
        layers: usize,
    ) -> Result<Option<SlidingWindow>, ConfigError> {
        let mut window = fields.optional_count("sliding_window", LONGEST_WINDOW)?;
        let limited = match self {
            Self::Llama => return Ok(None),
            Self::Mistral if !fields.object.contains_key("sliding_window") => {
                window = Some(MISTRAL_WINDOW);
                vec![true; layers]
            }
            Self::Mistral | Self::Phi3 => vec![true; layers],
            Self::Qwen2 | Self::Qwen3 => {
                if !fields.flag("use_sliding_window")?.unwrap_or(false) {
                    return Ok(None);
                }
                if window.is_none() {
                    return Err(fields.refuse("sliding_window", "missing"));
                }
                limited_layers(fields, layers)?
            }
        };
        Ok(window
            .filter(|_| limited.contains(&true))
            .map(|positions| SlidingWindow {
                positions,
                layers: limited,
            }))
    }

    pub(super) fn write_sliding(self, sliding: Option<&SlidingWindow>, object: &mut Value) {
        match self {
            Self::Llama => {}
            Self::Mistral | Self::Phi3 => {
                object["sliding_window"] = json!(sliding.map(|sliding| sliding.positions));
            }
            Self::Qwen2 | Self::Qwen3 => {
                object["use_sliding_window"] = json!(sliding.is_some());
                if let Some(sliding) = sliding {
                    let kind = |&limited: &bool| {
                        let kinds = ["full_attention", "sliding_attention"];
                        kinds[usize::from(limited)]
                    };
                    object["sliding_window"] = json!(sliding.positions);
                    object["layer_types"] = sliding.layers.iter().map(kind).collect();
                }
            }
        }
    }
}

fn limited_layers(fields: &Fields<'_>, layers: usize) -> Result<Vec<bool>, ConfigError> {
    let Some(types) = fields.present("layer_types") else {
        let first = match fields.present("max_window_layers") {
            // A model may have none of its layers limited, or all.
            Some(Value::Number(number)) if number.as_u64() == Some(0) => 0,
            _ => fields.count("max_window_layers", 1 << 12)?,
        };
        return Ok((0..layers).map(|layer| layer >= first).collect());
    };
    let kinds = types.as_array().map(Vec::as_slice).unwrap_or_default();
    if kinds.len() != layers {
        let reason = format!("has {} entries for {layers} layers", kinds.len());
        return Err(fields.refuse("layer_types", reason));
    }
    let limited = |kind: &Value| match kind.as_str() {
        Some("full_attention") => Ok(false),
        Some("sliding_attention") => Ok(true),
        _ => Err(fields.refuse(
            "layer_types",
            format!("{kind} is not supported, only full_attention and sliding_attention"),
        )),
    };
    kinds.iter().map(limited).collect()
}
