//! Reading `adapter_config.json`.

use std::path::Path;

use serde_json::{Value, json};

use super::{AdapterConfig, EMBEDDING, HEAD, Targets};
use crate::worker::model::config::{ConfigError, Fields, read_object};

/// Settings that change what an adapter computes and that this decoder has not.
const REFUSED: [&str; 15] = [
    "use_dora",
    "lora_bias",
    "fan_in_fan_out",
    "use_qalora",
    "ensure_weight_tying",
    "target_parameters",
    "trainable_token_indices",
    "alora_invocation_tokens",
    "layer_replication",
    "arrow_config",
    "monteclora_config",
    "use_bdlora",
    "kasa_config",
    "velora_config",
    "megatron_config",
];

/// Most names or patterns of a list; the largest models have about a thousand linear layers.
const MOST_NAMES: usize = 1 << 13;

/// Ways to begin that leave the base model as it is.
const INITIAL: [&str; 3] = ["gaussian", "eva", "orthogonal"];

impl AdapterConfig {
    /// Reads and checks a file. What this decoder has not is refused, rather than ignored.
    pub fn load(path: &Path) -> Result<Self, ConfigError> {
        let object = read_object(path)?;
        let fields = Fields {
            path,
            object: &object,
        };
        match fields.text("peft_type")? {
            "LORA" => {}
            other => return Err(fields.refuse("peft_type", format!("`{other}`, expected `LORA`"))),
        }
        for field in REFUSED {
            if fields.present(field).is_some_and(|value| !is_off(value)) {
                return Err(fields.refuse(field, "not supported"));
            }
        }
        if fields.present("bias").is_some_and(|bias| bias != "none") {
            return Err(fields.refuse("bias", "only `none` is supported"));
        }
        let initial = fields.present("init_lora_weights").and_then(Value::as_str);
        if let Some(initial) = initial.filter(|name| !INITIAL.contains(name)) {
            let reason = format!(
                "`{initial}` changes the base model's weights; convert the adapter to plain LoRA"
            );
            return Err(fields.refuse("init_lora_weights", reason));
        }
        let layers_pattern = fields.present("layers_pattern");
        let usual =
            |value: &Value| is_off(value) || value == "layers" || value == &json!(["layers"]);
        if layers_pattern.is_some_and(|value| !usual(value)) {
            return Err(fields.refuse("layers_pattern", "only `layers` is supported"));
        }
        let targets = targets(&fields, "target_modules")?
            .ok_or_else(|| fields.refuse("target_modules", "missing"))?;
        let layers = layers(&fields)?;
        if layers.is_some() && matches!(targets, Targets::Pattern(_)) {
            let reason = "not together with an expression in `target_modules`";
            return Err(fields.refuse("layers_to_transform", reason));
        }
        let (saves_embedding, saves_head) = saved(&fields)?;
        Ok(Self {
            rank: fields.count("r", 1 << 16)?,
            alpha: fields.real("lora_alpha", 0.0, 1e6)?,
            rank_stabilised: fields.flag("use_rslora")?.unwrap_or(false),
            targets,
            excluded: targets_or_none(&fields, "exclude_modules")?,
            layers,
            rank_pattern: pattern(&fields, "rank_pattern", |fields, name, value| {
                let rank = value.as_u64().and_then(|rank| usize::try_from(rank).ok());
                rank.filter(|rank| (1..=1 << 16).contains(rank))
                    .ok_or_else(|| fields.refuse(name, format!("{value} is not a rank")))
            })?,
            alpha_pattern: pattern(&fields, "alpha_pattern", |fields, name, value| {
                fields.checked_real(name, value, 0.0, 1e6)
            })?,
            saves_embedding,
            saves_head,
        })
    }
}

/// Values by which PEFT says that something is not used.
fn is_off(value: &Value) -> bool {
    match value {
        Value::Null | Value::Bool(false) => true,
        Value::Array(list) => list.is_empty(),
        Value::Object(object) => object.is_empty(),
        Value::String(text) => text.is_empty(),
        _ => false,
    }
}

fn targets_or_none(fields: &Fields<'_>, field: &str) -> Result<Option<Targets>, ConfigError> {
    match fields.present(field) {
        Some(value) if is_off(value) => Ok(None),
        _ => targets(fields, field),
    }
}

fn targets(fields: &Fields<'_>, field: &str) -> Result<Option<Targets>, ConfigError> {
    let wrong = || fields.refuse(field, "expected a list of names or a regular expression");
    match fields.present(field) {
        None => Ok(None),
        Some(Value::String(text)) if text.eq_ignore_ascii_case("all-linear") => {
            Ok(Some(Targets::AllLinear))
        }
        Some(Value::String(text)) => Ok(Some(Targets::Pattern(text.clone()))),
        Some(Value::Array(list)) => {
            let name = |value: &Value| value.as_str().map(str::to_owned).ok_or_else(wrong);
            let names: Vec<String> = list.iter().map(name).collect::<Result<_, _>>()?;
            if names.is_empty() || names.iter().any(String::is_empty) {
                return Err(wrong());
            }
            if names.len() > MOST_NAMES {
                let reason = format!("{} names, more than {MOST_NAMES}", names.len());
                return Err(fields.refuse(field, reason));
            }
            Ok(Some(Targets::Names(names)))
        }
        Some(_) => Err(wrong()),
    }
}

fn layers(fields: &Fields<'_>) -> Result<Option<Vec<usize>>, ConfigError> {
    let field = "layers_to_transform";
    let index = |value: &Value| {
        let index = value.as_u64().and_then(|index| usize::try_from(index).ok());
        index.ok_or_else(|| fields.refuse(field, format!("{value} is not the index of a layer")))
    };
    match fields.present(field) {
        None => Ok(None),
        Some(Value::Array(list)) if list.is_empty() => Ok(None),
        Some(Value::Array(list)) => list.iter().map(index).collect::<Result<_, _>>().map(Some),
        Some(one) => Ok(Some(vec![index(one)?])),
    }
}

fn saved(fields: &Fields<'_>) -> Result<(bool, bool), ConfigError> {
    let field = "modules_to_save";
    let mut saves = (false, false);
    let list = match fields.present(field) {
        None => return Ok(saves),
        Some(value) => value
            .as_array()
            .ok_or_else(|| fields.refuse(field, "not a list"))?,
    };
    for value in list {
        match value.as_str() {
            Some("embed_tokens" | "model.embed_tokens") => saves.0 = true,
            Some("lm_head") => saves.1 = true,
            _ => {
                let reason = format!("{value} is not supported, only {EMBEDDING} and {HEAD}");
                return Err(fields.refuse(field, reason));
            }
        }
    }
    Ok(saves)
}

fn pattern<T>(
    fields: &Fields<'_>,
    field: &str,
    read: impl Fn(&Fields<'_>, &str, &Value) -> Result<T, ConfigError>,
) -> Result<Vec<(String, T)>, ConfigError> {
    let Some(value) = fields.present(field) else {
        return Ok(Vec::new());
    };
    let object = value
        .as_object()
        .ok_or_else(|| fields.refuse(field, "not an object"))?;
    if object.len() > MOST_NAMES {
        let reason = format!("{} patterns, more than {MOST_NAMES}", object.len());
        return Err(fields.refuse(field, reason));
    }
    object
        .iter()
        .map(|(name, value)| {
            Ok((
                name.clone(),
                read(fields, &format!("{field}.{name}"), value)?,
            ))
        })
        .collect()
}
