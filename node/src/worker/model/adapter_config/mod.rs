//! `adapter_config.json` of a PEFT folder: which linear layers carry factors, of which rank and scale.
//!
//! Names match as in PEFT 0.21 (`check_target_module_exists`, `get_pattern_key`): a listed name is a whole module name or
//! its end after a dot, a text is a regular expression over the whole name.

mod places;
mod read;

use serde_json::{Value, json};

use super::LoraConfig;
use super::config::Family;

pub(crate) use places::module_names;

/// Which modules something is about.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Targets {
    /// Every linear layer of the blocks.
    AllLinear,
    /// These modules: whole names, or their ends after a dot.
    Names(Vec<String>),
    /// Modules whose whole name this regular expression matches.
    Pattern(String),
}

/// Which layers carry factors, of which rank and scale, and what else is trained.
#[derive(Debug, Clone, PartialEq)]
pub struct AdapterConfig {
    /// Rank where no pattern says otherwise.
    pub rank: usize,
    /// Where no pattern says otherwise, the scale of a product is `alpha / rank`.
    pub alpha: f64,
    /// The scale is `alpha / sqrt(rank)` instead (Kalajdzievski 2023).
    pub rank_stabilised: bool,
    /// Linear layers with factors.
    pub targets: Targets,
    /// Linear layers without, although they are targets.
    pub excluded: Option<Targets>,
    /// Indices of the blocks with factors; all if absent.
    pub layers: Option<Vec<usize>>,
    /// Ranks of modules whose name ends with a match of the expression.
    pub rank_pattern: Vec<(String, usize)>,
    /// Alphas of such modules.
    pub alpha_pattern: Vec<(String, f64)>,
    /// Whether the embedding is trained whole.
    pub saves_embedding: bool,
    /// Whether the head is trained whole.
    pub saves_head: bool,
}

/// What is wrong with a field, and what would be right.
pub(crate) type Refusal = (&'static str, String);

impl From<LoraConfig> for AdapterConfig {
    fn from(config: LoraConfig) -> Self {
        Self {
            rank: config.rank,
            alpha: config.alpha,
            rank_stabilised: false,
            targets: Targets::AllLinear,
            excluded: None,
            layers: None,
            rank_pattern: Vec::new(),
            alpha_pattern: Vec::new(),
            saves_embedding: config.embeddings_and_head,
            saves_head: config.embeddings_and_head,
        }
    }
}

impl AdapterConfig {
    /// The file's content; `base` is the name or path of the base model that readers should fetch.
    pub fn to_json(&self, family: Family, base: &str) -> Value {
        let list = |targets: &Targets| match targets {
            Targets::AllLinear => family.modules().collect(),
            Targets::Names(names) => json!(names),
            Targets::Pattern(pattern) => json!(pattern),
        };
        let whole = [(self.saves_embedding, EMBEDDING), (self.saves_head, HEAD)];
        let whole: Vec<&str> = whole
            .into_iter()
            .filter_map(|(saves, name)| saves.then_some(name))
            .collect();
        let mut object = json!({
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": base,
            "r": self.rank,
            "lora_alpha": self.alpha,
            "lora_dropout": 0.0,
            "target_modules": list(&self.targets),
            "modules_to_save": if whole.is_empty() { Value::Null } else { json!(whole) },
            "bias": "none",
            "fan_in_fan_out": false,
            "use_rslora": self.rank_stabilised,
            "use_dora": false,
            "init_lora_weights": true,
            "inference_mode": true,
        });
        if let Some(excluded) = &self.excluded {
            object["exclude_modules"] = list(excluded);
        }
        if let Some(layers) = &self.layers {
            object["layers_to_transform"] = json!(layers);
        }
        if !self.rank_pattern.is_empty() {
            object["rank_pattern"] = self.rank_pattern.iter().cloned().collect();
        }
        if !self.alpha_pattern.is_empty() {
            object["alpha_pattern"] = self.alpha_pattern.iter().cloned().collect();
        }
        object
    }
}

/// Names of what is saved whole.
const EMBEDDING: &str = "embed_tokens";
const HEAD: &str = "lm_head";
