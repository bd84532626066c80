//! How tokens of a vocabulary write bytes.

use serde_json::Value;

/// How a vocabulary writes bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Spelling {
    /// GPT-2: one printable character per byte.
    ByteLevel,
    /// SentencePiece: text with `▁` for the space, `<0xAB>` for single bytes.
    ByteFallback,
}

/// The decoder says how tokens turn into bytes.
pub(super) fn spelling(json: &Value) -> Option<Spelling> {
    let mut kinds = vec![&json["decoder"]["type"]];
    if let Some(parts) = json["decoder"]["decoders"].as_array() {
        kinds.extend(parts.iter().map(|part| &part["type"]));
    }
    let has = |kind: &str| kinds.iter().any(|found| found.as_str() == Some(kind));
    if has("ByteLevel") {
        Some(Spelling::ByteLevel)
    } else if has("ByteFallback") || json["model"]["byte_fallback"] == Value::Bool(true) {
        Some(Spelling::ByteFallback)
    } else {
        None
    }
}

/// Takes away what puts a space before a text or composes its characters (NFC, as Qwen has it): tokens must spell the
/// text and nothing else. Composed text, which nearly all is, gets the same tokens either way.
pub(super) fn as_written(json: &mut Value) {
    fn parts<'a>(json: &'a mut Value, field: &str, list: &str) -> Vec<&'a mut Value> {
        match json.get_mut(field) {
            Some(part) if part.get(list).is_some_and(Value::is_array) => part[list]
                .as_array_mut()
                .map(|parts| parts.iter_mut().collect())
                .unwrap_or_default(),
            Some(part) => vec![part],
            None => Vec::new(),
        }
    }
    let sequence = json.pointer_mut("/normalizer/normalizers");
    if let Some(parts) = sequence.and_then(Value::as_array_mut) {
        parts.retain(|part| part["type"] != "NFC");
    }
    if json["normalizer"]["type"] == "NFC" {
        json["normalizer"] = Value::Null;
    }
    for part in parts(json, "normalizer", "normalizers") {
        if part["type"] == "Prepend" {
            part["prepend"] = Value::String(String::new());
        }
    }
    for part in parts(json, "pre_tokenizer", "pretokenizers") {
        match part["type"].as_str() {
            Some("Metaspace") => {
                part["prepend_scheme"] = Value::String("never".into());
                if let Some(object) = part.as_object_mut() {
                    object.remove("add_prefix_space");
                }
            }
            Some("ByteLevel") => part["add_prefix_space"] = Value::Bool(false),
            _ => {}
        }
    }
}

pub(super) fn bytes_of(spelling: Spelling, token: &str) -> Option<Vec<u8>> {
    match spelling {
        Spelling::ByteLevel => token.chars().map(byte_of).collect(),
        Spelling::ByteFallback => {
            let hex = token
                .strip_prefix("<0x")
                .and_then(|rest| rest.strip_suffix('>'));
            match hex
                .filter(|hex| hex.len() == 2)
                .and_then(|hex| u8::from_str_radix(hex, 16).ok())
            {
                Some(byte) => Some(vec![byte]),
                None => Some(token.replace('\u{2581}', " ").into_bytes()),
            }
        }
    }
}

/// The byte that GPT-2's `bytes_to_unicode` writes as `character`: printable Latin-1 stands for itself,
/// the other 68 bytes are the characters from 256 on, in order.
pub(super) fn byte_of(character: char) -> Option<u8> {
    let is_printable = |byte: u8| matches!(byte, 33..=126 | 161..=172 | 174..=255);
    match u32::from(character) {
        code @ 0..=255 => u8::try_from(code).ok().filter(|&byte| is_printable(byte)),
        code => (0..=255u8)
            .filter(|&byte| !is_printable(byte))
            .nth(code as usize - 256),
    }
}
