//! Templates render as Python transformers renders them, and a bad one ends in an error that names it.
//!
//! `tests/interop/make_chat.py` makes the fixture.

use std::collections::BTreeMap;
use std::path::Path;

use consilium_protocol::time::UnixMillis;
use serde_json::Value;

use super::*;

fn fixture() -> Value {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/chat.json");
    serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
}

fn special(value: &Value) -> BTreeMap<String, String> {
    serde_json::from_value(value.clone()).unwrap()
}

fn messages(value: &Value) -> Vec<Message> {
    let turns = value.as_array().unwrap().iter();
    let text = |value: &Value| value.as_str().unwrap().to_owned();
    turns
        .map(|turn| Message::new(text(&turn["role"]), text(&turn["content"])))
        .collect()
}

fn template(source: &str) -> Result<ChatTemplate, ChatError> {
    let special = BTreeMap::from([("eos_token".to_owned(), "</s>".to_owned())]);
    ChatTemplate::new(
        "m/chat_template.jinja".into(),
        source.into(),
        special,
        UnixMillis(0),
    )
}

#[test]
fn conversations_render_as_transformers_renders_them() {
    let fixture = fixture();
    let now = UnixMillis(fixture["now_millis"].as_u64().unwrap());
    let mut marked = 0;
    for entry in fixture["templates"].as_array().unwrap() {
        let name = entry["name"].as_str().unwrap();
        let source = entry["template"].as_str().unwrap().to_owned();
        let template =
            ChatTemplate::new(name.into(), source, special(&fixture["special"]), now).unwrap();
        for case in entry["cases"].as_array().unwrap() {
            let messages = messages(&case["messages"]);
            let add = case["add_generation_prompt"].as_bool().unwrap();
            let what = format!("{name}, {messages:?}, {add}");
            match case["error"].as_str() {
                Some(reason) => {
                    let error = template.render(&messages, add).unwrap_err();
                    let is_refusal = matches!(&error, ChatError::Refused { reason: found, .. } if found == reason);
                    assert!(is_refusal, "{what}: {error}");
                }
                None => {
                    let rendered = template.render(&messages, add).unwrap();
                    assert_eq!(rendered.text, case["text"].as_str().unwrap(), "{what}");
                    let ranges = rendered.assistant.iter();
                    let pairs: Vec<[usize; 2]> = ranges.map(|r| [r.start, r.end]).collect();
                    if let Some(expected) = case.get("assistant") {
                        assert_eq!(serde_json::to_value(&pairs).unwrap(), *expected, "{what}");
                        marked += pairs.len();
                    }
                }
            }
        }
    }
    assert!(marked >= 8, "{marked}");
}

#[test]
fn without_generation_blocks_the_assistant_is_what_its_turn_adds() {
    let talk = [
        Message::new("user", "a"),
        Message::new("assistant", "b"),
        Message::new("user", "c"),
        Message::new("assistant", "d"),
    ];
    for (source, expected) in [
        (
            "{% for m in messages %}<{{ m.role }}>{{ m.content }}<e>{% endfor %}\
             {% if add_generation_prompt %}<assistant>{% endif %}",
            ["b<e>", "d<e>"],
        ),
        (
            "{% for m in messages %}<{{ m.role }}>{{ m.content }}<e>{% endfor %}\
             {% if add_generation_prompt %}<assistant>{% else %}{{ eos_token }}{% endif %}",
            ["b<e>", "d<e></s>"],
        ),
    ] {
        let rendered = template(source).unwrap().render(&talk, false).unwrap();
        let parts = rendered
            .assistant
            .iter()
            .filter_map(|r| rendered.text.get(r.clone()));
        assert_eq!(parts.collect::<Vec<_>>(), expected);
    }
    let forgets = "{{ messages[-1].content }}";
    let error = template(forgets).unwrap().render(&talk, false).unwrap_err();
    assert!(
        matches!(error, ChatError::Unmarked { turn: 1, .. }),
        "{error}"
    );
}

#[test]
fn a_bad_template_names_its_file_and_what_is_wrong() {
    let talk = [
        Message::new("user", "SECRET"),
        Message::new("assistant", "b"),
    ];
    for (source, named) in [
        ("{% for m in messages %}", "line 1: syntax error"),
        ("{{ nothing() }}", "nothing"),
        ("{{ messages[0].content.unknown() }}", "unknown"),
        (
            "{% for a in range(99999) %}{% for b in range(99999) %}x{% endfor %}{% endfor %}",
            "does not end",
        ),
        ("{{ messages[0].content * 99999999 }}", ""),
        ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", ""),
        (
            "{{ raise_exception('no system turn') }}",
            "refuses the conversation: no system turn",
        ),
        ("{{ strftime_now('%!') }}", "strftime_now"),
    ] {
        let error = match template(source) {
            Ok(template) => template.render(&talk, false).unwrap_err(),
            Err(error) => error,
        };
        let error = error.to_string();
        assert!(
            error.starts_with("m/chat_template.jinja: "),
            "{source}: {error}"
        );
        assert!(
            error.contains(named) && !error.contains("SECRET"),
            "{source}: {error}"
        );
    }
}

#[test]
fn a_folder_gives_its_template_and_special_tokens_and_says_if_there_is_none() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    let load = || ChatTemplate::load(folder.path(), UnixMillis(0));
    let error = load().unwrap_err().to_string();
    assert!(error.contains("no chat template"), "{error}");
    let several = r#"{"bos_token": {"content": "<b>"}, "chat_template":
        [{"name": "tool", "template": "no"}, {"name": "default", "template": "{{ bos_token }}d"}]}"#;
    std::fs::write(at("tokenizer_config.json"), several).unwrap();
    assert_eq!(load().unwrap().render(&[], false).unwrap().text, "<b>d");
    std::fs::write(at("chat_template.jinja"), "file {{ bos_token }}").unwrap();
    assert_eq!(load().unwrap().render(&[], false).unwrap().text, "file <b>");
    std::fs::write(at("chat_template.jinja"), [0xff]).unwrap();
    let error = load().unwrap_err().to_string();
    assert!(error.contains("chat_template.jinja"), "{error}");
}
