//! A damaged or hostile model folder ends in an error that names the file and the field, before anything of its claimed
//! size is allocated.

#![cfg(test)]

use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;
use std::sync::Arc;

use consilium_node::worker::LoadedModel;
use consilium_node::worker::model::{
    LoraConfig, ModelConfig, NamedTensors, load_adapter, save_adapter, tensors,
};
use consilium_node::worker::tokenizer::train_bpe;
use serde_json::{Value, json};

const WEIGHTS: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";

/// A good folder, with an adapter in `adapter`.
fn write(folder: &Path) {
    let tokenizer = train_bpe(["a small text"].into_iter().cycle().take(50), 260).unwrap();
    let config = ModelConfig::llama(tokenizer.size(), 16, 1, 2, 24);
    let mut model = LoadedModel::random(Arc::new(tokenizer), config, 1).unwrap();
    model.save(folder).unwrap();
    let lora = LoraConfig {
        rank: 2,
        alpha: 4.0,
        embeddings_and_head: false,
    };
    model.model.attach_lora(lora, 1).unwrap();
    save_adapter(&model.model, &folder.join("adapter"), "base").unwrap();
}

fn load(folder: &Path) -> Result<(), String> {
    let mut loaded = LoadedModel::load(folder).map_err(|error| error.to_string())?;
    load_adapter(&mut loaded.model, &folder.join("adapter")).map_err(|error| error.to_string())
}

fn json(file: &Path, change: impl FnOnce(&mut Value)) {
    let mut value = serde_json::from_slice(&fs::read(file).unwrap()).unwrap();
    change(&mut value);
    fs::write(file, value.to_string()).unwrap();
}

fn weights(file: &Path, change: impl FnOnce(&mut NamedTensors)) {
    let mut all = tensors::decode("w", &fs::read(file).unwrap()).unwrap();
    change(&mut all);
    fs::write(file, tensors::encode(&all).unwrap()).unwrap();
}

/// Splits the weights: `model.norm.weight` in one shard, all else in the other.
fn shards(folder: &Path) {
    let mut rest = tensors::decode("w", &fs::read(folder.join(WEIGHTS)).unwrap()).unwrap();
    fs::remove_file(folder.join(WEIGHTS)).unwrap();
    let mut map: serde_json::Map<String, Value> = rest
        .keys()
        .map(|name| (name.clone(), json!("a.safetensors")))
        .collect();
    let norm = "model.norm.weight".to_owned();
    map.insert(norm.clone(), json!("b.safetensors"));
    let one = NamedTensors::from([(norm.clone(), rest.remove(&norm).unwrap())]);
    for (name, part) in [("a.safetensors", &rest), ("b.safetensors", &one)] {
        fs::write(folder.join(name), tensors::encode(part).unwrap()).unwrap();
    }
    fs::write(folder.join(INDEX), json!({"weight_map": map}).to_string()).unwrap();
}

type Case = (&'static str, &'static [&'static str], fn(&Path));

fn set(field: &'static str, value: Value) -> impl FnOnce(&mut Value) {
    move |object| object[field] = value
}

const WEIGHT_FILES: &[Case] = &[
    (
        "truncated",
        &["model.safetensors: not a whole safetensors file"],
        |f| {
            let bytes = fs::read(f.join(WEIGHTS)).unwrap();
            fs::write(f.join(WEIGHTS), &bytes[..bytes.len() - 5]).unwrap();
        },
    ),
    (
        "header longer than the file",
        &["model.safetensors: not a whole"],
        |f| {
            let mut bytes = fs::read(f.join(WEIGHTS)).unwrap();
            bytes[..8].fill(0x7f);
            fs::write(f.join(WEIGHTS), bytes).unwrap();
        },
    ),
    ("empty", &["model.safetensors: cannot read", "empty"], |f| {
        fs::write(f.join(WEIGHTS), b"").unwrap();
    }),
    ("absent", &["model.safetensors: cannot read"], |f| {
        fs::remove_file(f.join(WEIGHTS)).unwrap();
    }),
    ("a tensor less", &["`model.norm.weight` is missing"], |f| {
        weights(&f.join(WEIGHTS), |all| {
            drop(all.remove("model.norm.weight"));
        });
    }),
    (
        "a tensor more",
        &["model.safetensors", "`model.extra` does not belong"],
        |f| {
            weights(&f.join(WEIGHTS), |all| {
                let copy = all["model.norm.weight"].clone();
                all.insert("model.extra".into(), copy);
            });
        },
    ),
    (
        "another shape",
        &["`model.norm.weight` has shape [4, 4], expected [16]"],
        |f| {
            weights(&f.join(WEIGHTS), |all| {
                all.get_mut("model.norm.weight").unwrap().shape = vec![4, 4];
            });
        },
    ),
    (
        "no number",
        &["`model.norm.weight` has values that are not finite"],
        |f| {
            weights(&f.join(WEIGHTS), |all| {
                all.get_mut("model.norm.weight").unwrap().values[3] = f32::NAN;
            });
        },
    ),
    (
        "another type",
        &["`model.norm.weight` is I32, expected F32"],
        |f| {
            let mut bytes = fs::read(f.join(WEIGHTS)).unwrap();
            let name = bytes
                .windows(17)
                .position(|part| part == b"model.norm.weight")
                .unwrap();
            let dtype = bytes[name..]
                .windows(5)
                .position(|part| part == b"\"F32\"")
                .unwrap();
            bytes[name + dtype..][..5].copy_from_slice(b"\"I32\"");
            fs::write(f.join(WEIGHTS), bytes).unwrap();
        },
    ),
    (
        "a shard is absent",
        &[INDEX, "`weight_map`: names `b.safetensors`, which is not"],
        |f| {
            shards(f);
            fs::remove_file(f.join("b.safetensors")).unwrap();
        },
    ),
    (
        "a shard lacks a tensor",
        &[INDEX, "names tensor `model.norm.weight`, which no shard"],
        |f| {
            shards(f);
            fs::copy(f.join("a.safetensors"), f.join("c.safetensors")).unwrap();
            json(&f.join(INDEX), |index| {
                for (_, file) in index["weight_map"].as_object_mut().unwrap() {
                    *file = json!("c.safetensors");
                }
            });
        },
    ),
    (
        "a tensor in two shards",
        &["b.safetensors: tensor", "is in another file"],
        |f| {
            shards(f);
            fs::copy(f.join("a.safetensors"), f.join("b.safetensors")).unwrap();
        },
    ),
    (
        "a shard elsewhere",
        &[INDEX, "`../b` is not a file name in this folder"],
        |f| {
            shards(f);
            json(&f.join(INDEX), |index| {
                index["weight_map"]["model.norm.weight"] = json!("../b");
            });
        },
    ),
    ("an index without files", &[INDEX, "names no file"], |f| {
        shards(f);
        fs::write(f.join(INDEX), r#"{"weight_map": {}}"#).unwrap();
    }),
];

const SETTINGS: &[Case] = &[
    ("a circle of links", &["config.json: cannot read"], |f| {
        fs::remove_file(f.join("config.json")).unwrap();
        symlink("config.json", f.join("config.json")).unwrap();
    }),
    ("not UTF-8", &["config.json: not a JSON object"], |f| {
        fs::write(f.join("config.json"), b"{\"model_type\":\"ll\xffma\"}").unwrap();
    }),
    (
        "nested too deep",
        &["config.json: not a JSON object"],
        |f| {
            let deep = format!(
                "{{\"model_type\":{}1{}}}",
                "[".repeat(4000),
                "]".repeat(4000)
            );
            fs::write(f.join("config.json"), deep).unwrap();
        },
    ),
    ("a list", &["config.json: not a JSON object"], |f| {
        fs::write(f.join("config.json"), "[1]").unwrap();
    }),
    (
        "sixteen million tokens",
        &["`model.embed_tokens.weight` has shape", "[16777216, 16]"],
        |f| {
            json(&f.join("config.json"), set("vocab_size", json!(1 << 24)));
        },
    ),
    (
        "a million wide",
        &["`model.embed_tokens.weight` has shape", "1048576]"],
        |f| {
            json(&f.join("config.json"), set("hidden_size", json!(1 << 20)));
        },
    ),
    (
        "four thousand layers",
        &["`model.layers.1.input_layernorm.weight` is missing"],
        |f| {
            json(
                &f.join("config.json"),
                set("num_hidden_layers", json!(4096)),
            );
        },
    ),
    (
        "endless positions",
        &["config.json: field `max_position_embeddings`"],
        |f| {
            json(
                &f.join("config.json"),
                set("max_position_embeddings", json!(1e30)),
            );
        },
    ),
    (
        "no heads",
        &["config.json: field `num_attention_heads`: 0"],
        |f| {
            json(&f.join("config.json"), set("num_attention_heads", json!(0)));
        },
    ),
    (
        "another family",
        &["config.json: field `model_type`: `mamba` is not supported"],
        |f| {
            json(&f.join("config.json"), set("model_type", json!("mamba")));
        },
    ),
    (
        "factors of another length",
        &["config.json: field `rope_scaling.short_factor`"],
        |f| {
            json(&f.join("config.json"), |config| {
                config["model_type"] = json!("phi3");
                config["rope_scaling"] =
                    json!({"type": "longrope", "short_factor": [1.0], "long_factor": [1.0]});
            });
        },
    ),
];

const TOKENIZERS: &[Case] = &[
    ("cut", &["tokenizer.json"], |f| {
        let bytes = fs::read(f.join("tokenizer.json")).unwrap();
        fs::write(f.join("tokenizer.json"), &bytes[..bytes.len() / 2]).unwrap();
    }),
    (
        "a byte less",
        &["tokenizer.json: no token for byte 0x61"],
        |f| {
            json(&f.join("tokenizer.json"), |file| {
                let vocab = file["model"]["vocab"].as_object_mut().unwrap();
                let id = vocab.remove("a").unwrap();
                vocab.insert("\u{0121}\u{0121}\u{0121}".into(), id);
                file["model"]["merges"] = json!([]);
            });
        },
    ),
    (
        "an id twice",
        &["tokenizer.json: model.vocab: id", "is both"],
        |f| {
            json(&f.join("tokenizer.json"), |file| {
                file["model"]["vocab"]["a"] = file["model"]["vocab"]["b"].clone();
            });
        },
    ),
    (
        "a token twice",
        &["tokenizer.json: model.vocab: token `a` is there twice"],
        |f| {
            let text = fs::read_to_string(f.join("tokenizer.json")).unwrap();
            let twice = text.replacen("\"vocab\":{", "\"vocab\":{\"a\":9999,", 1);
            let twice = twice.replacen("\"vocab\": {", "\"vocab\": {\"a\":9999,", 1);
            assert_ne!(text, twice);
            fs::write(f.join("tokenizer.json"), twice).unwrap();
        },
    ),
    ("not UTF-8", &["tokenizer.json"], |f| {
        let mut bytes = fs::read(f.join("tokenizer.json")).unwrap();
        let at = bytes
            .windows(7)
            .position(|part| part == b"\"vocab\"")
            .unwrap();
        bytes[at + 1] = 0xff;
        fs::write(f.join("tokenizer.json"), bytes).unwrap();
    }),
    (
        "an added token over another",
        &["tokenizer.json: added_tokens: id"],
        |f| {
            json(&f.join("tokenizer.json"), |file| {
                let id = file["model"]["vocab"]["a"].clone();
                file["added_tokens"][0]["id"] = id;
            });
        },
    ),
];

const ADAPTERS: &[Case] = &[
    (
        "another method",
        &["adapter_config.json: field `peft_type`: `IA3`"],
        |f| {
            json(
                &f.join("adapter/adapter_config.json"),
                set("peft_type", json!("IA3")),
            );
        },
    ),
    ("DoRA", &["adapter_config.json: field `use_dora`"], |f| {
        json(
            &f.join("adapter/adapter_config.json"),
            set("use_dora", json!(true)),
        );
    }),
    ("biases", &["adapter_config.json: field `bias`"], |f| {
        json(
            &f.join("adapter/adapter_config.json"),
            set("bias", json!("lora_only")),
        );
    }),
    (
        "PiSSA",
        &["adapter_config.json: field `init_lora_weights`: `pissa`"],
        |f| {
            json(
                &f.join("adapter/adapter_config.json"),
                set("init_lora_weights", json!("pissa")),
            );
        },
    ),
    (
        "another layer",
        &["field `target_modules`: the model has no linear layer `qkv_proj`"],
        |f| {
            let names = json!(["q_proj", "qkv_proj"]);
            json(
                &f.join("adapter/adapter_config.json"),
                set("target_modules", names),
            );
        },
    ),
    (
        "the head",
        &["field `target_modules`: `lm_head` cannot have factors"],
        |f| {
            let names = json!(".*(q_proj|lm_head)");
            json(
                &f.join("adapter/adapter_config.json"),
                set("target_modules", names),
            );
        },
    ),
    (
        "no expression",
        &["adapter_config.json: field `target_modules`: `(q_proj`"],
        |f| {
            json(
                &f.join("adapter/adapter_config.json"),
                set("target_modules", json!("(q_proj")),
            );
        },
    ),
    (
        "an expression without end",
        &["adapter_config.json: field `target_modules`"],
        |f| {
            let slow = json!(r"(([a-z0-9_.])*)*\2x(?=y)");
            json(
                &f.join("adapter/adapter_config.json"),
                set("target_modules", slow),
            );
        },
    ),
    (
        "ranks that disagree",
        &["field `rank_pattern`: several patterns match"],
        |f| {
            let ranks = json!({"q_proj": 2, "self_attn.q_proj": 3});
            json(
                &f.join("adapter/adapter_config.json"),
                set("rank_pattern", ranks),
            );
        },
    ),
    (
        "a rank that the tensors have not",
        &["adapter_model.safetensors", "lora_A.weight` has shape"],
        |f| {
            json(&f.join("adapter/adapter_config.json"), set("r", json!(3)));
        },
    ),
    (
        "a saved norm",
        &["field `modules_to_save`: \"norm\" is not supported"],
        |f| {
            json(
                &f.join("adapter/adapter_config.json"),
                set("modules_to_save", json!(["norm"])),
            );
        },
    ),
    (
        "cut",
        &["adapter_model.safetensors: not a whole safetensors file"],
        |f| {
            let file = f.join("adapter/adapter_model.safetensors");
            let bytes = fs::read(&file).unwrap();
            fs::write(&file, &bytes[..bytes.len() - 1]).unwrap();
        },
    ),
];

const TEMPLATES: &[Case] = &[
    (
        "a template without end",
        &["chat_template.jinja: ", "does not end within"],
        |f| {
            let endless =
                "{% for a in range(99999) %}{% for b in range(99999) %}x{% endfor %}{% endfor %}";
            fs::write(f.join("chat_template.jinja"), endless).unwrap();
        },
    ),
    (
        "a template that calls itself",
        &["chat_template.jinja: "],
        |f| {
            let circle = "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}";
            fs::write(f.join("chat_template.jinja"), circle).unwrap();
        },
    ),
    (
        "a template that fails",
        &["chat_template.jinja: line 2: "],
        |f| fs::write(f.join("chat_template.jinja"), "ok\n{{ nothing() }}").unwrap(),
    ),
    (
        "a template that is cut",
        &["chat_template.jinja: line 1: ", "syntax error"],
        |f| fs::write(f.join("chat_template.jinja"), "{% for m in messages %}").unwrap(),
    ),
    ("not UTF-8", &["chat_template.jinja", "utf-8"], |f| {
        fs::write(f.join("chat_template.jinja"), b"a\xff").unwrap();
    }),
    ("a cut file", &["tokenizer_config.json"], |f| {
        fs::write(f.join("tokenizer_config.json"), b"{\"chat_template\":\"a").unwrap();
    }),
    (
        "a template that is no text",
        &["no chat template", "chat_template"],
        |f| fs::write(f.join("tokenizer_config.json"), r#"{"chat_template":7}"#).unwrap(),
    ),
];

/// Wraps a context in the folder's template.
fn wrap(folder: &Path) -> Result<(), String> {
    let mut loaded = LoadedModel::load(folder).map_err(|error| error.to_string())?;
    loaded
        .use_chat_template(folder)
        .and_then(|()| loaded.whole_item("a context", "a target"))
        .map(drop)
        .map_err(|error| error.to_string())
}

#[test]
fn every_damage_of_a_chat_template_names_file_and_field() {
    for (what, named, damage) in TEMPLATES {
        let folder = tempfile::tempdir().unwrap();
        write(folder.path());
        let good = "{{ messages[0].content }}";
        fs::write(folder.path().join("chat_template.jinja"), good).unwrap();
        wrap(folder.path()).unwrap();
        fs::remove_file(folder.path().join("chat_template.jinja")).unwrap();
        damage(folder.path());
        let error = wrap(folder.path()).expect_err(what);
        for part in *named {
            assert!(error.contains(part), "{what}: {part:?} is not in {error:?}");
        }
    }
}

#[test]
fn every_damage_names_file_and_field() {
    let good = tempfile::tempdir().unwrap();
    write(good.path());
    load(good.path()).unwrap();
    shards(good.path());
    load(good.path()).unwrap();
    for (what, named, damage) in [WEIGHT_FILES, SETTINGS, TOKENIZERS, ADAPTERS].concat() {
        let folder = tempfile::tempdir().unwrap();
        write(folder.path());
        damage(folder.path());
        let error = load(folder.path()).expect_err(what);
        for part in named {
            assert!(error.contains(part), "{what}: {part:?} is not in {error:?}");
        }
    }
}
