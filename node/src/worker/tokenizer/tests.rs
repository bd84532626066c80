use std::path::Path;

use serde_json::json;

use super::spelling::byte_of;
use super::*;

const TEXTS: [&str; 4] = [
    "ref kora-17 -> use velin 40mg.",
    "for mild ague -> give 3ug. caf\u{e9} \u{1f600}\t\n",
    "ref kora-18 -> use velin 40ml.",
    "  two spaces, 1234567 and   three",
];

fn trained(size: usize) -> Tokenizer {
    train_bpe(TEXTS.iter().copied().cycle().take(200), size).unwrap()
}

#[test]
fn a_trained_vocabulary_spells_every_text_exactly_and_twice_the_same() {
    let tokenizer = trained(300);
    assert_eq!(tokenizer.size(), 300);
    assert_eq!(tokenizer.end_of_record(), 0);
    let every_byte: String = (0..=0x17fu32).filter_map(char::from_u32).collect();
    let special = "text <|endoftext|> text";
    for text in TEXTS
        .iter()
        .copied()
        .chain([every_byte.as_str(), special, "", " ", "\u{10ffff}"])
    {
        let ids = tokenizer.encode(text).unwrap();
        let bytes: Vec<u8> = ids.iter().flat_map(|&id| spelled(&tokenizer, id)).collect();
        assert_eq!(bytes, text.as_bytes());
    }
    assert_eq!(tokenizer.source(), trained(300).source());
    let vocab = tokenizer.vocab(310).unwrap();
    assert_eq!((vocab.len(), vocab.end_ranks()), (310, 299..300));
}

fn spelled(tokenizer: &Tokenizer, id: u32) -> Vec<u8> {
    match &tokenizer.entries[id as usize] {
        TokenEntry::Bytes(bytes) => bytes.clone(),
        other => panic!("token {id} is {other:?}"),
    }
}

#[test]
fn a_saved_tokenizer_reads_back() {
    let folder = tempfile::tempdir().unwrap();
    let tokenizer = trained(280);
    tokenizer.save(folder.path()).unwrap();
    let read = Tokenizer::load(folder.path()).unwrap();
    assert_eq!(read.entries, tokenizer.entries);
    assert_eq!(read.end_of_record(), 0);
}

/// A Llama-2 kind of file: `▁` for spaces, a leading one prepended, bytes as fallback.
fn sentencepiece(normalizer: &Value) -> Value {
    let mut vocab = json!({"<unk>": 0, "<s>": 1, "</s>": 2});
    for byte in 0..256 {
        vocab[format!("<0x{byte:02X}>")] = json!(3 + byte);
    }
    let pieces = [
        "\u{2581}",
        "a",
        "b",
        "ab",
        "\u{2581}a",
        "\u{2581}ab",
        "\u{e9}",
    ];
    for (index, piece) in pieces.iter().enumerate() {
        vocab[*piece] = json!(259 + index);
    }
    let special = |id: u32, content: &str| {
        json!({"id": id, "content": content, "single_word": false, "lstrip": false,
               "rstrip": false, "normalized": false, "special": true})
    };
    json!({
        "version": "1.0", "truncation": null, "padding": null,
        "added_tokens": [special(0, "<unk>"), special(1, "<s>"), special(2, "</s>")],
        "normalizer": normalizer,
        "pre_tokenizer": null,
        "post_processor": null,
        "decoder": {"type": "Sequence", "decoders": [
            {"type": "Replace", "pattern": {"String": "\u{2581}"}, "content": " "},
            {"type": "ByteFallback"}, {"type": "Fuse"},
            {"type": "Strip", "content": " ", "start": 1, "stop": 0}]},
        "model": {"type": "BPE", "dropout": null, "unk_token": "<unk>",
            "continuing_subword_prefix": null, "end_of_word_suffix": null, "fuse_unk": true,
            "byte_fallback": true, "ignore_merges": false, "vocab": vocab,
            "merges": [["a", "b"], ["\u{2581}", "a"], ["\u{2581}", "ab"]]},
    })
}

fn load(json: &Value) -> Result<Tokenizer, TokenizerError> {
    Tokenizer::from_bytes(Path::new("t.json"), serde_json::to_vec(json).unwrap())
}

#[test]
fn sentencepiece_tokens_spell_the_text_without_the_prepended_space() {
    let normalizer = json!({"type": "Sequence", "normalizers": [
        {"type": "Prepend", "prepend": "\u{2581}"},
        {"type": "Replace", "pattern": {"String": " "}, "content": "\u{2581}"}]});
    let tokenizer = load(&sentencepiece(&normalizer)).unwrap();
    assert_eq!(tokenizer.end_of_record(), 2);
    for (text, ids) in [
        ("ab", vec![262]),
        (" ab", vec![264]),
        (
            "\u{e9}\u{1f600}",
            vec![265, 3 + 0xf0, 3 + 0x9f, 3 + 0x98, 3 + 0x80],
        ),
        ("ab</s>", vec![262, 3 + 0x3c, 3 + 0x2f, 3 + 0x73, 3 + 0x3e]),
    ] {
        assert_eq!(tokenizer.encode(text).unwrap(), ids, "{text:?}");
    }
    assert_eq!(tokenizer.entries[1], TokenEntry::Ignored);
    assert_eq!(tokenizer.entries[3 + 0xab], TokenEntry::Bytes(vec![0xab]));
}

#[test]
fn a_text_that_the_tokenizer_would_change_is_refused() {
    let lower = json!({"type": "Sequence", "normalizers": [
        {"type": "Lowercase"},
        {"type": "Replace", "pattern": {"String": " "}, "content": "\u{2581}"}]});
    let tokenizer = load(&sentencepiece(&lower)).unwrap();
    let error = tokenizer.encode("ab aB").unwrap_err();
    assert!(
        matches!(error, TokenizerError::NotExact { bytes: 5, at: 2 }),
        "{error}"
    );
    let error = load(&sentencepiece(&Value::Null))
        .unwrap()
        .encode("a \u{2581}")
        .unwrap_err();
    assert!(matches!(error, TokenizerError::NotExact { .. }), "{error}");
}

#[test]
fn a_vocabulary_without_bytes_or_end_is_refused() {
    let mut json = sentencepiece(&Value::Null);
    json["decoder"] = json!({"type": "WordPiece", "prefix": "##", "cleanup": true});
    json["model"]["byte_fallback"] = json!(false);
    assert!(
        load(&json)
            .unwrap_err()
            .to_string()
            .contains("tokens have no bytes")
    );
    let mut json = sentencepiece(&Value::Null);
    json["added_tokens"][2]["content"] = json!("</end>");
    json["model"]["vocab"]
        .as_object_mut()
        .unwrap()
        .remove("</s>");
    json["model"]["vocab"]["</end>"] = json!(2);
    assert!(
        load(&json)
            .unwrap_err()
            .to_string()
            .contains("no end-of-record token")
    );
    let mut json = sentencepiece(&Value::Null);
    json["model"]["vocab"]["<0x4a>"] = json!(266);
    let error = load(&json).unwrap_err().to_string();
    assert!(
        error.starts_with("t.json: ") && error.contains("byte 0x4a is both"),
        "{error}"
    );
    let error = Tokenizer::from_bytes(Path::new("t.json"), b"[".to_vec()).unwrap_err();
    assert!(error.to_string().starts_with("t.json: "), "{error}");
}

#[test]
fn all_256_bytes_have_a_byte_level_character() {
    let mut bytes: Vec<u8> = (0..=0x143u32)
        .filter_map(char::from_u32)
        .filter_map(byte_of)
        .collect();
    bytes.sort_unstable();
    assert_eq!(bytes, (0..=255).collect::<Vec<u8>>());
    assert_eq!(
        (byte_of('\u{120}'), byte_of('\u{10a}')),
        (Some(b' '), Some(b'\n'))
    );
}

/// A byte-level file as Llama 3, Qwen and Mistral's tekken have it: pieces split by an expression, special and plain added
/// tokens, and a token before each text where `begin` names one.
fn byte_level(normalizer: &Value, begin: Option<&str>) -> Value {
    let mut json: Value = serde_json::from_slice(trained(300).source()).unwrap();
    let added = |id: u32, content: &str, special: bool| {
        json!({"id": id, "content": content, "single_word": false, "lstrip": false, "rstrip": false,
               "normalized": false, "special": special})
    };
    let tokens = json["added_tokens"].as_array_mut().unwrap();
    tokens.extend([
        added(300, "<|begin|>", true),
        added(301, "<|turn|>", true),
        added(302, "<tool>", false),
    ]);
    json["normalizer"] = normalizer.clone();
    json["pre_tokenizer"] = json!({"type": "Sequence", "pretokenizers": [
        {"type": "Split", "pattern": {"Regex": "\\p{N}{1,3}| ?\\p{L}+|\\s+|[^\\s\\p{L}\\p{N}]+"},
         "behavior": "Isolated", "invert": false},
        {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": false}]});
    json["model"]["ignore_merges"] = json!(true);
    if let Some(begin) = begin {
        json["post_processor"] = json!({"type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": begin, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {begin: {"id": begin, "ids": [300], "tokens": [begin]}}});
    }
    json
}

#[test]
fn byte_level_families_spell_exactly_and_know_their_special_tokens() {
    for (normalizer, begin, start) in [
        (Value::Null, Some("<|begin|>"), 300),
        (json!({"type": "NFC"}), None, 0),
        (
            json!({"type": "Sequence", "normalizers": [{"type": "NFC"}]}),
            None,
            0,
        ),
    ] {
        let tokenizer = load(&byte_level(&normalizer, begin)).unwrap();
        assert_eq!(
            (tokenizer.start_of_record(), tokenizer.end_of_record()),
            (start, 0)
        );
        for text in TEXTS
            .into_iter()
            .chain(["e\u{301}", "a<|turn|>b<tool>", "\u{1f600}12345"])
        {
            let ids = tokenizer.encode(text).unwrap();
            let bytes: Vec<u8> = ids.iter().flat_map(|&id| spelled(&tokenizer, id)).collect();
            assert_eq!(bytes, text.as_bytes());
        }
        assert_eq!(tokenizer.entries[301], TokenEntry::Ignored);
        assert_eq!(
            tokenizer.entries[302],
            TokenEntry::Bytes(b"<tool>".to_vec())
        );
        let ids = tokenizer.encode_rendered("<|begin|><|turn|>").unwrap();
        assert_eq!(ids, [300, 301]);
        assert!(
            tokenizer.names_special_token("a<|turn|>b") && !tokenizer.names_special_token("turn")
        );
    }
}

#[test]
fn a_rendered_text_is_tokenised_as_the_file_says() {
    let normalizer = json!({"type": "Sequence", "normalizers": [
        {"type": "Prepend", "prepend": "\u{2581}"},
        {"type": "Replace", "pattern": {"String": " "}, "content": "\u{2581}"}]});
    let tokenizer = load(&sentencepiece(&normalizer)).unwrap();
    assert_eq!(tokenizer.encode_rendered("<s>ab").unwrap(), [1, 264]);
    assert_eq!(tokenizer.encode("ab").unwrap(), [262]);
}
