use std::path::Path;

use super::*;
use crate::worker::testing::{LINES, model, tokenizer};
use crate::worker::tokenizer::ChatTemplate;
use crate::worker::tokenizer::chat::Message;

/// Private text that must never be repeated.
const MARKER: &str = "Xanthippe";

fn fixtures() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/data")
}

/// All rows of some files, up to `bad` bad ones skipped.
fn rows(paths: &[PathBuf], bad: u64) -> Result<(Vec<Row>, u64), DataError> {
    let mut rows = Vec::new();
    let mut bad = BadRows::up_to(bad);
    Source::open(paths)?.read(&mut bad, |_, placed| {
        rows.push(placed.row);
        Ok::<_, DataError>(true)
    })?;
    Ok((rows, bad.count()))
}

fn of_file(name: &str, content: &[u8], bad: u64) -> Result<(Vec<Row>, u64), DataError> {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join(name);
    std::fs::write(&path, content).unwrap();
    rows(&[path], bad)
}

fn message(role: &str, content: &str) -> Message {
    Message {
        role: role.into(),
        content: content.into(),
    }
}

fn pair(prompt: &str, completion: &str) -> Row {
    Row::Pair {
        prompt: prompt.into(),
        completion: completion.into(),
    }
}

#[test]
fn every_shape_of_json_lines_is_read_and_other_fields_are_passed_over() {
    let chat = Row::Chat {
        prompt: vec![],
        completion: vec![message("user", "a"), message("assistant", "b")],
    };
    let answered = Row::Chat {
        prompt: vec![message("user", "a")],
        completion: vec![message("assistant", "bc")],
    };
    for (line, row) in [
        (
            r#"{"id":[1,{"x":null}],"text":"a\n"}"#,
            Row::Text("a\n".into()),
        ),
        (
            r#"{"prompt":"a","completion":"b","ok":true}"#,
            pair("a", "b"),
        ),
        (r#"{"completion":"b"}"#, pair("", "b")),
        (
            r#"{"context":"a","target":"b","unlabeled":[[0,1]]}"#,
            pair("a", "b"),
        ),
        (
            r#"{"prompt":"p","messages":[{"role":"user","content":"a"},{"content":"b","role":"assistant","name":1}]}"#,
            chat,
        ),
        (
            r#"{"prompt":[{"role":"user","content":"a"}],
               "completion":[{"role":"assistant","content":[{"type":"text","text":"b"},{"type":"text","text":"c"}]}]}"#,
            answered,
        ),
    ] {
        let line = line.replace('\n', " ").replace("\\ n", "\\n");
        let twice = format!("\u{feff}{line}\r\n\n{line}");
        assert_eq!(
            of_file("x.jsonl", twice.as_bytes(), 0).unwrap(),
            (vec![row.clone(), row], 0),
            "{line}"
        );
    }
    let (text, _) = of_file("x.txt", b"a\r\n\n{b c\n", 0).unwrap();
    assert_eq!(text, [Row::Text("a".into()), Row::Text("{b c".into())]);
}

#[test]
fn a_bad_line_is_named_by_file_line_and_column_and_never_quoted() {
    let mark = |text: &str| text.replace("SECRET", MARKER);
    for (bad, column, reason) in [
        (r#"{"text":"SECRET""#, 19, "cut off"),
        (r#"{"text":"SECRET" "x":1}"#, 21, "not JSON"),
        (r#"["SECRET"]"#, 1, "jq -c"),
        (r#""SECRET""#, 11, "not a JSON object"),
        (
            r#"{"text":"SECRET","text":"SECRET"}"#,
            26,
            "distinct fields",
        ),
        (r#"{"text":3,"SECRET":1}"#, 1, "field `text` is not text"),
        (r#"{"text":["SECRET"]}"#, 1, "field `text` is a list"),
        (r#"{"body":"SECRET"}"#, 1, "field `text` is missing"),
        (r#"{"text":""}"#, 1, "nothing to predict"),
    ] {
        let content = format!("{{\"text\":\"ok\"}}\n{}\n{{\"text\":\"ok\"}}\n", mark(bad));
        let error = of_file("x.jsonl", content.as_bytes(), 0)
            .unwrap_err()
            .to_string();
        assert!(
            error.contains(&format!("x.jsonl:2:{column}: ")),
            "{bad}: {error}"
        );
        assert!(
            error.contains(reason) && error.contains("--max-bad-rows"),
            "{error}"
        );
        assert!(!error.contains(MARKER), "{error}");
        let (good, skipped) = of_file("x.jsonl", content.as_bytes(), 1).unwrap();
        assert_eq!((good.len(), skipped), (2, 1), "{bad}");
    }
    for (bad, reason) in [
        (r#"{"body":"SECRET"}"#, "no field `text`, `messages`"),
        (r#"{"messages":[]}"#, "empty list"),
        (r#"{"messages":"SECRET"}"#, "no list of messages"),
        (
            r#"{"messages":[{"from":"human","value":"SECRET"}]}"#,
            "ShareGPT",
        ),
        (
            r#"{"messages":[{"role":"user"}]}"#,
            "message 0: expected `role` and `content`",
        ),
        (
            r#"{"messages":[{"role":"SECRET!","content":"a"}]}"#,
            "`role` must be a word",
        ),
        (
            r#"{"messages":[{"role":"user","content":[{"image":1}]}]}"#,
            "is no text",
        ),
        (
            r#"{"messages":[{"role":"user","content":"a","tool_calls":[1]}]}"#,
            "tool calls",
        ),
        (
            r#"{"prompt":[{"role":"user","content":"a"}],"completion":"b"}"#,
            "no list of messages",
        ),
    ] {
        let error = of_file("x.jsonl", mark(bad).as_bytes(), 0)
            .unwrap_err()
            .to_string();
        assert!(
            error.contains(reason) && !error.contains(MARKER),
            "{bad}: {error}"
        );
    }
    let folder = tempfile::tempdir().unwrap();
    for name in ["huge.jsonl", "huge.txt"] {
        let path = folder.path().join(name);
        std::fs::File::create(&path)
            .unwrap()
            .set_len(1 << 30)
            .unwrap();
        let error = rows(&[path], 0).unwrap_err().to_string();
        let reason = "1:16777217: the line has 1073741824 bytes";
        assert!(error.contains(&format!("{name}:{reason}")), "{error}");
    }
    let error = of_file("x.txt", b"fine\nab\xff\n", 0)
        .unwrap_err()
        .to_string();
    assert!(error.contains("x.txt:2:3: not UTF-8"), "{error}");
    let error = of_file("x.jsonl", b"{\"text\":\"a\"}\n{\"text\":\"b\xff\"}\n", 0)
        .unwrap_err()
        .to_string();
    assert!(error.contains("x.jsonl:2:11: not UTF-8"), "{error}");
    for name in ["x.jsonl", "x.txt", "x.parquet"] {
        let error = of_file(name, b"", 9).unwrap_err().to_string();
        assert!(error.contains(name), "{error}");
    }
    let error = rows(&["/no/such/file.jsonl".into()], 0)
        .unwrap_err()
        .to_string();
    assert!(error.contains("/no/such/file.jsonl"), "{error}");
}

#[test]
fn the_limit_of_bad_rows_holds_over_all_files() {
    let folder = tempfile::tempdir().unwrap();
    std::fs::create_dir(folder.path().join("deep")).unwrap();
    for (name, content) in [
        ("b.jsonl", "{\"text\":\"two\"}\nbad\n"),
        ("a.txt", "one"),
        ("deep/c.ndjson", "bad\n{\"text\":\"three\"}"),
        (".hidden.jsonl", "bad"),
        ("README.md", "no data"),
    ] {
        std::fs::write(folder.path().join(name), content).unwrap();
    }
    let all = [folder.path().to_owned()];
    let texts = ["one", "two", "three"].map(|text| Row::Text(text.into()));
    assert_eq!(rows(&all, 2).unwrap(), (texts.to_vec(), 2));
    let error = rows(&all, 1).unwrap_err().to_string();
    assert!(
        error.contains("deep/c.ndjson:1:1") && error.contains("1 bad records"),
        "{error}"
    );
    let empty = tempfile::tempdir().unwrap();
    let error = rows(&[empty.path().to_owned()], 0).unwrap_err();
    assert!(matches!(error, DataError::NoFiles { .. }), "{error}");
}

#[test]
fn parquet_as_pyarrow_writes_it_is_read() {
    let read = |name: &str| rows(&[fixtures().join(name)], 0).unwrap().0;
    let texts = read("text.parquet");
    assert_eq!(texts.len(), 600);
    assert_eq!(texts[500], Row::Text("note 500 takes 0 units".into()));
    let chats = read("messages.parquet");
    assert_eq!(chats.len(), 600);
    let turns = [
        message("user", "question 411"),
        message("assistant", "answer 27 é"),
    ];
    let mut completion = vec![message("system", "be brief")];
    completion.extend(turns.clone());
    completion.extend(turns);
    let prompt = vec![];
    assert_eq!(chats[411], Row::Chat { prompt, completion });
    let pairs = read("pairs.parquet");
    assert_eq!(
        pairs[599],
        Row::Chat {
            prompt: vec![message("user", "question 599")],
            completion: vec![message("assistant", "answer 599")],
        }
    );
}

#[test]
fn bad_rows_and_columns_of_parquet_are_named() {
    let at = |name: &str| [fixtures().join(name)];
    let error = rows(&at("bad_rows.parquet"), 1).unwrap_err().to_string();
    assert!(
        error.contains("bad_rows.parquet:row 6: nothing to predict"),
        "{error}"
    );
    assert_eq!(rows(&at("bad_rows.parquet"), 2).unwrap().0.len(), 7);
    for (name, reason) in [
        ("numbers", "column `text` is INT64"),
        (
            "nested_numbers",
            "column `messages.list.element.content` is INT64",
        ),
        ("no_roles", "column `messages` has not the parts of"),
    ] {
        let name = format!("{name}.parquet");
        let error = rows(&at(&name), 9).unwrap_err().to_string();
        assert!(error.contains(&format!("{name}: {reason}")), "{error}");
    }
}

/// Damage anywhere in a file gives an error or other rows, never a panic or text in a message.
#[test]
fn damaged_parquet_never_panics() {
    for name in ["text.parquet", "messages.parquet", "pairs.parquet"] {
        let whole = std::fs::read(fixtures().join(name)).unwrap();
        for part in 0..40 {
            let cut = &whole[..whole.len() * part / 40];
            let error = of_file(name, cut, u64::MAX).unwrap_err().to_string();
            assert!(error.contains(name), "{error}");
        }
        for seed in 0..300_usize {
            let mut bytes = whole.clone();
            let at = 4 + seed * 7919 % (bytes.len() - 4);
            bytes[at] ^= 1 << (seed % 8);
            if let Err(error) = of_file(name, &bytes, u64::MAX) {
                let error = error.to_string();
                assert!(
                    !error.contains("question") && !error.contains("note "),
                    "{error}"
                );
            }
        }
    }
}

#[test]
fn only_the_assistants_turns_and_completions_are_learned() {
    let source = model(3);
    let text = |ids: &[u32]| -> String {
        let vocab = &source.vocab;
        let bytes = source
            .ranks(ids)
            .into_iter()
            .flat_map(|rank| vocab.token_bytes(rank).to_vec());
        String::from_utf8(bytes.collect()).unwrap()
    };
    let learned = |item: &Item| -> String {
        text(&item.learned().map(|at| item.target[at]).collect::<Vec<_>>())
    };
    let encoder = |loss| Encoder::new(&source.tokenizer, &source.vocab, &PlainChat, loss);
    let turns = |of: &[(&str, &str)]| of.iter().map(|(role, text)| message(role, text)).collect();
    let talk: Vec<Message> = turns(&[
        ("user", "ref kavo"),
        ("assistant", "use dolin."),
        ("user", "pale moss"),
        ("assistant", "give 40ml."),
    ]);
    let chat = |prompt: &[Message], completion: &[Message]| Row::Chat {
        prompt: prompt.to_vec(),
        completion: completion.to_vec(),
    };
    let completion = encoder(Loss::Completion);
    let item = completion.item(&chat(&[], &talk)).unwrap();
    assert_eq!(text(&item.context), "user:\nref kavo\n\nassistant:\n");
    assert_eq!(learned(&item), "use dolin.\n\ngive 40ml.");
    assert!(!item.open && item.given.len() == 1, "{item:?}");
    let item = completion.item(&chat(&talk[..3], &talk[3..])).unwrap();
    assert_eq!(
        (learned(&item).as_str(), item.given.len()),
        ("give 40ml.", 0)
    );
    let item = completion.item(&pair("ref kavo", " -> use")).unwrap();
    assert_eq!(
        (text(&item.context).as_str(), learned(&item).as_str()),
        ("ref kavo", " -> use")
    );
    let all = encoder(Loss::All);
    assert_eq!(
        learned(&all.item(&pair("ref kavo", " -> use")).unwrap()),
        "ref kavo -> use"
    );
    assert!(learned(&all.item(&chat(&[], &talk)).unwrap()).starts_with("user:\nref kavo\n\n"));
    let error = completion.item(&chat(&[], &talk[..1])).unwrap_err();
    assert!(error.contains("no turn of the assistant"), "{error}");

    let template = |source: &str| {
        let now = consilium_protocol::UnixMillis(0);
        ChatTemplate::new("x".into(), source.into(), [].into(), now).unwrap()
    };
    let own = template(
        "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}\
         {% if add_generation_prompt %}[assistant] {% endif %}",
    );
    let own = Encoder::new(&source.tokenizer, &source.vocab, &own, Loss::Completion);
    let item = own.item(&chat(&[], &talk)).unwrap();
    assert_eq!(text(&item.context), "[user] ref kavo\n[assistant] ");
    assert_eq!(learned(&item), "use dolin.\ngive 40ml.\n");
    let quoting = template("{{ raise_exception(messages[0].content) }}");
    let quoting = Encoder::new(&source.tokenizer, &source.vocab, &quoting, Loss::All);
    let error = quoting.item(&chat(&[], &talk)).unwrap_err();
    assert!(
        error.contains("chat template") && !error.contains("kavo"),
        "{error}"
    );
}

#[test]
fn preparing_counts_divides_and_repeats_itself() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("x.txt");
    let long = LINES.concat();
    let mut lines: Vec<&str> = LINES.iter().copied().cycle().take(400).collect();
    lines.push(&long);
    std::fs::write(&path, lines.join("\n")).unwrap();
    let (tokenizer, source) = (tokenizer(), model(1));
    let encoder = Encoder::new(&tokenizer, &source.vocab, &PlainChat, Loss::Completion);
    let prepared = |held_out: f64, seed: u64| {
        let how = Preparation {
            length: 40,
            long: LongItems::Split,
            held_out,
            seed,
            max_bad_rows: 0,
            at_most: None,
        };
        let source = Source::open(std::slice::from_ref(&path)).unwrap();
        prepare(&source, &encoder, &how, folder.path(), |_| {
            Ok::<_, DataError>(())
        })
        .unwrap()
    };
    let whole = prepared(0.0, 1);
    let counts = whole.counts;
    assert_eq!(
        (counts.records, counts.held_out, counts.broken),
        (401, 0, 1)
    );
    assert!(counts.items > 401 && counts.items < 410, "{counts:?}");
    let parted = prepared(0.1, 1);
    assert!(
        (20..70).contains(&parted.counts.held_out),
        "{:?}",
        parted.counts
    );
    assert_eq!(parted.digest(), prepared(0.1, 1).digest());
    assert_ne!(parted.digest(), prepared(0.1, 2).digest());
    assert_ne!(parted.digest(), whole.digest());
}
