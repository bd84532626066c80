//! Width of a model's residual stream, which bounds how many symbols a record may hold.

use serde_json::Value;

/// Names that model families give it in `config.json`.
pub(crate) const NAMES: [&str; 3] = ["hidden_size", "n_embd", "d_model"];

/// The width in a parsed `config.json`; composite models keep it in `text_config`.
pub(crate) fn of(config: &Value) -> Option<u64> {
    number(config, &NAMES)
}

/// The first of these fields that is a whole number, of the file or of its `text_config`.
pub(crate) fn number(config: &Value, names: &[&str]) -> Option<u64> {
    let objects = [config, &config["text_config"]];
    objects
        .into_iter()
        .find_map(|object| names.iter().find_map(|&name| object[name].as_u64()))
}
