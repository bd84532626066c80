use super::*;

fn config() -> ModelConfig {
    ModelConfig {
        kv_heads: 2,
        max_positions: 64,
        ..ModelConfig::llama(40, 32, 2, 4, 24)
    }
}

fn order() -> Vec<u32> {
    (0..40).map(|rank| (rank * 7 + 3) % 40).collect()
}

/// A model with weights far from their small beginnings.
fn model(config: ModelConfig) -> Model {
    let model = random(config, order(), 9).unwrap();
    for bank in model.base_banks() {
        bank.edit(|values| values.iter_mut().for_each(|value| *value *= 8.0))
            .unwrap();
    }
    model.duplicate().unwrap()
}

fn tokens(seed: u32, len: u32) -> Vec<u32> {
    (0..len).map(|i| (i * i * 3 + seed * 11 + i) % 40).collect()
}

fn last_logits(model: &Model, tokens: &[u32]) -> Vec<f32> {
    let mut batch = Packed::default();
    let segment = batch.push(tokens.iter().copied());
    let pass = model
        .score(&batch, &[u32::try_from(segment.len).unwrap() - 1])
        .unwrap();
    model.logits(&pass.hidden).unwrap()
}

fn assert_close(got: &[f32], want: &[f32]) {
    let worst = got
        .iter()
        .zip(want)
        .map(|(g, w)| (g - w).abs())
        .fold(0f32, f32::max);
    assert!(
        got.len() == want.len() && worst < 1e-4,
        "largest difference {worst}"
    );
}

#[test]
fn branch_logits_equal_those_of_a_pass_of_their_own() {
    let mut model = model(config());
    model
        .attach_lora(
            LoraConfig {
                rank: 4,
                alpha: 8.0,
                embeddings_and_head: false,
            },
            3,
        )
        .unwrap();
    for bank in model.lora.as_ref().unwrap().banks() {
        bank.edit(|values| values.iter_mut().for_each(|value| *value += 0.02))
            .unwrap();
    }
    let mut batch = Packed::default();
    let items = [tokens(1, 5), tokens(2, 40), tokens(3, 1)];
    for item in &items {
        batch.push(item.iter().copied());
    }
    let rows: Vec<u32> = (0..46).collect();
    let pass = model.score(&batch, &rows).unwrap();
    let logits = model.logits(&pass.hidden).unwrap();
    assert_close(&logits[44 * 40..45 * 40], &last_logits(&model, &items[1]));

    let branch = |item, prefix, token| BranchToken {
        item,
        prefix,
        token,
    };
    let branches = [
        branch(0, 2, 7),
        branch(0, 2, 8),
        branch(0, 5, 1),
        branch(1, 33, 9),
        branch(2, 1, 0),
    ];
    let hidden = model.branch_hidden(&pass.kv, &branches).unwrap();
    let logits = model.logits(&hidden).unwrap();
    for (branch, logits) in branches.iter().zip(logits.chunks(40)) {
        let mut alone = items[branch.item as usize][..branch.prefix as usize].to_vec();
        alone.push(branch.token);
        assert_close(logits, &last_logits(&model, &alone));
    }
    for bad in [branch(3, 1, 1), branch(0, 6, 1), branch(0, 1, 40)] {
        assert!(model.branch_hidden(&pass.kv, &[bad]).is_err(), "{bad:?}");
    }
}

#[test]
fn scoring_and_training_give_the_head_the_same_rows() {
    let mut model = model(config());
    model.train_all().unwrap();
    let mut batch = Packed::default();
    batch.push(tokens(4, 20));
    batch.push(tokens(5, 13));
    let rows = vec![3, 4, 19, 30];
    let trained = model.forward(&batch, rows.clone()).unwrap();
    let scored = model.score(&batch, &rows).unwrap();
    assert_eq!(trained.hidden_rows(), scored.hidden);
}

#[test]
fn a_saved_folder_loads_in_another_order_with_the_same_logits() {
    for tied in [false, true] {
        let model = model(ModelConfig {
            tied,
            eos: vec![5],
            ..config()
        });
        let folder = tempfile::tempdir().unwrap();
        save_folder(&model, folder.path()).unwrap();
        let read = load_folder(folder.path(), (0..40).collect()).unwrap();
        assert_eq!(read.config(), model.config());
        let (got, want) = (
            last_logits(&read, &tokens(6, 9)),
            last_logits(&model, &tokens(6, 9)),
        );
        for (id, &rank) in model.rank_of_id().iter().enumerate() {
            assert!((got[id] - want[rank as usize]).abs() < 1e-6);
        }
        assert_eq!(read.weights().unwrap(), model.weights().unwrap());
    }
}

#[test]
fn folded_adapters_give_the_same_logits() {
    let mut model = model(ModelConfig {
        tied: true,
        ..config()
    });
    model
        .attach_lora(
            LoraConfig {
                rank: 4,
                alpha: 8.0,
                embeddings_and_head: true,
            },
            3,
        )
        .unwrap();
    let mut adapter = model.adapter().unwrap();
    for tensor in adapter.values_mut() {
        tensor.values.iter_mut().for_each(|value| *value += 0.03);
    }
    model.set_adapter(&adapter).unwrap();
    assert_eq!(model.adapter().unwrap(), adapter);
    let folder = tempfile::tempdir().unwrap();
    save_folder(&model, folder.path()).unwrap();
    let read = load_folder(folder.path(), order()).unwrap();
    assert_close(
        &last_logits(&read, &tokens(6, 9)),
        &last_logits(&model, &tokens(6, 9)),
    );
    let want = last_logits(&model, &tokens(6, 9));
    model.train_all().unwrap();
    assert_close(&last_logits(&model, &tokens(6, 9)), &want);
}

#[test]
fn a_wrong_adapter_is_refused_by_tensor_and_changes_nothing() {
    let mut model = model(config());
    let lora = LoraConfig {
        rank: 4,
        alpha: 8.0,
        embeddings_and_head: true,
    };
    assert!(matches!(model.adapter(), Err(ModelError::NoAdapter)));
    model.attach_lora(lora, 3).unwrap();
    let before = model.adapter().unwrap();
    let name = "base_model.model.model.layers.1.mlp.up_proj.lora_B.weight";
    let patched = |f: &dyn Fn(&mut NamedTensors)| {
        let mut adapter = before.clone();
        adapter
            .values_mut()
            .for_each(|tensor| tensor.values.fill(1.0));
        f(&mut adapter);
        adapter
    };
    let cases: [(&str, NamedTensors); 4] = [
        ("is missing", patched(&|a| drop(a.remove(name)))),
        (
            "has shape [4, 24]",
            patched(&|a| a.get_mut(name).unwrap().shape = vec![4, 24]),
        ),
        (
            "not finite",
            patched(&|a| a.get_mut(name).unwrap().values[3] = f32::NAN),
        ),
        (
            "does not belong",
            patched(&|a| {
                a.insert("base_model.model.lora_C".into(), before[name].clone());
            }),
        ),
    ];
    for (reason, adapter) in cases {
        let error = model.set_adapter(&adapter).unwrap_err().to_string();
        assert!(error.contains(reason), "{error}");
        assert!(error.contains(name) || error.contains("lora_C"), "{error}");
        assert_eq!(model.adapter().unwrap(), before);
    }
    let bytes = tensors::encode(&before).unwrap();
    assert_eq!(tensors::decode("a", &bytes).unwrap(), before);
    assert_eq!(bytes, tensors::encode(&before).unwrap());
}

#[test]
fn broken_folders_name_file_and_tensor() {
    let folder = tempfile::tempdir().unwrap();
    let load = || load_folder(folder.path(), order()).unwrap_err().to_string();
    assert!(load().contains("config.json: cannot read"));
    save_folder(&model(config()), folder.path()).unwrap();
    let file = folder.path().join("model.safetensors");
    let good = std::fs::read(&file).unwrap();
    std::fs::write(&file, &good[..good.len() / 2]).unwrap();
    assert!(
        load().contains("model.safetensors: not a whole safetensors file"),
        "{}",
        load()
    );
    std::fs::remove_file(&file).unwrap();
    assert!(
        load().contains("model.safetensors: cannot read"),
        "{}",
        load()
    );

    let mut weights = tensors::decode("w", &good).unwrap();
    weights.insert(
        "model.layers.0.self_attn.q_norm.weight".into(),
        weights["model.norm.weight"].clone(),
    );
    std::fs::write(&file, tensors::encode(&weights).unwrap()).unwrap();
    assert!(
        load().contains("`model.layers.0.self_attn.q_norm.weight` does not belong"),
        "{}",
        load()
    );
    weights.remove("model.layers.0.self_attn.q_norm.weight");
    weights.remove("model.norm.weight");
    std::fs::write(&file, tensors::encode(&weights).unwrap()).unwrap();
    assert!(
        load().contains("`model.norm.weight` is missing"),
        "{}",
        load()
    );

    let index = r#"{"weight_map": {"a": "../../etc/passwd"}}"#;
    std::fs::remove_file(&file).unwrap();
    std::fs::write(folder.path().join("model.safetensors.index.json"), index).unwrap();
    assert!(
        load().contains("is not a file name in this folder"),
        "{}",
        load()
    );
}

#[test]
fn sharded_folders_load() {
    let folder = tempfile::tempdir().unwrap();
    let model = model(config());
    save_folder(&model, folder.path()).unwrap();
    std::fs::remove_file(folder.path().join("model.safetensors")).unwrap();
    let mut parts = [NamedTensors::new(), NamedTensors::new()];
    let mut map = serde_json::Map::new();
    for (index, (name, tensor)) in model.weights().unwrap().into_iter().enumerate() {
        map.insert(
            name.clone(),
            format!("part-{}.safetensors", index % 2).into(),
        );
        parts[index % 2].insert(name, tensor);
    }
    for (index, part) in parts.iter().enumerate() {
        let path = folder.path().join(format!("part-{index}.safetensors"));
        std::fs::write(path, tensors::encode(part).unwrap()).unwrap();
    }
    let index = serde_json::json!({"weight_map": map}).to_string();
    std::fs::write(folder.path().join("model.safetensors.index.json"), index).unwrap();
    let read = load_folder(folder.path(), order()).unwrap();
    assert_eq!(read.weights().unwrap(), model.weights().unwrap());
}

#[test]
fn bad_orders_and_batches_are_refused() {
    assert!(matches!(
        random(config(), (0..39).collect(), 1),
        Err(ModelError::BadOrder { .. })
    ));
    assert!(matches!(
        random(config(), vec![1; 40], 1),
        Err(ModelError::BadOrder { .. })
    ));
    let mut model = model(config());
    let mut batch = Packed::default();
    batch.push([1, 2, 40]);
    assert!(
        model
            .score(&batch, &[0])
            .unwrap_err()
            .to_string()
            .contains("token 40")
    );
    let mut batch = Packed::default();
    batch.push(tokens(1, 65));
    assert!(
        model
            .score(&batch, &[0])
            .unwrap_err()
            .to_string()
            .contains("limit is 64")
    );
    let mut batch = Packed::default();
    batch.push([1, 2]);
    assert!(model.score(&batch, &[2]).is_err() && model.score(&batch, &[]).is_err());
    assert!(matches!(
        model.forward(&batch, vec![0]),
        Err(ModelError::Frozen)
    ));
    model.train_all().unwrap();
    assert!(model.forward(&batch, vec![0]).is_ok());
}

#[test]
fn an_adapter_folder_reads_back_and_what_is_not_implemented_is_refused() {
    let mut written = model(config());
    let lora = LoraConfig {
        rank: 4,
        alpha: 6.0,
        embeddings_and_head: true,
    };
    written.attach_lora(lora, 3).unwrap();
    let folder = tempfile::tempdir().unwrap();
    save_adapter(&written, folder.path(), "base").unwrap();
    let mut read = model(config());
    load_adapter(&mut read, folder.path()).unwrap();
    assert_eq!(read.lora().unwrap().rank, lora.rank);
    assert_eq!(read.adapter().unwrap(), written.adapter().unwrap());

    let path = folder.path().join("adapter_config.json");
    let good: serde_json::Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    for (field, value) in [
        ("peft_type", serde_json::json!("IA3")),
        ("use_dora", serde_json::json!(true)),
        ("rank_pattern", serde_json::json!({"q_proj": 0})),
        ("bias", serde_json::json!("all")),
        ("target_modules", serde_json::json!(["q_proj", "qkv_proj"])),
        ("modules_to_save", serde_json::json!(["norm"])),
        ("r", serde_json::json!(0)),
    ] {
        let mut bad = good.clone();
        bad[field] = value;
        std::fs::write(&path, bad.to_string()).unwrap();
        let error = load_adapter(&mut read, folder.path())
            .unwrap_err()
            .to_string();
        assert!(
            error.contains(&format!("adapter_config.json: field `{field}")),
            "{error}"
        );
    }
}
