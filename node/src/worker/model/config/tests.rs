//! Every field that a family reads is read, and a bad one is named.

use super::*;

fn parse(patch: &Value) -> Result<ModelConfig, ConfigError> {
    let mut object = ModelConfig::llama(400, 128, 3, 4, 344).to_json();
    for (key, value) in patch.as_object().unwrap() {
        object[key] = value.clone();
    }
    ModelConfig::parse(Path::new("m/config.json"), object.as_object().unwrap())
}

#[test]
fn a_written_config_reads_back() {
    let mut config = ModelConfig::llama(400, 128, 3, 4, 344);
    config.eos = vec![256];
    let object = config.to_json();
    let read = ModelConfig::parse(Path::new("c"), object.as_object().unwrap()).unwrap();
    assert_eq!(read, config);
}

#[test]
fn rope_is_read_in_old_and_new_style() {
    assert_eq!(
        parse(&json!({"rope_theta": 5e5})).unwrap().rope,
        Rope::new(5e5)
    );
    let new = json!({"rope_parameters": {"rope_theta": 1e6, "rope_type": "default"}});
    assert_eq!(parse(&new).unwrap().rope, Rope::new(1e6));
}

#[test]
fn absurd_values_name_file_and_field() {
    for (patch, field) in [
        (json!({"hidden_size": 0}), "hidden_size"),
        (json!({"hidden_size": "many"}), "hidden_size"),
        (json!({"num_hidden_layers": 1e30}), "num_hidden_layers"),
        (json!({"num_key_value_heads": 3}), "num_key_value_heads"),
        (json!({"head_dim": 31}), "head_dim"),
        (json!({"vocab_size": null}), "vocab_size"),
        (json!({"model_type": "gpt2"}), "model_type"),
        (
            json!({"rope_scaling": {"rope_type": "yarn"}}),
            "rope_scaling.rope_type",
        ),
        (json!({"quantization_config": {}}), "quantization_config"),
        (json!({"rms_norm_eps": -1.0}), "rms_norm_eps"),
        (json!({"eos_token_id": 400}), "eos_token_id"),
    ] {
        let message = parse(&patch).unwrap_err().to_string();
        let named = format!("m/config.json: field `{field}`");
        assert!(
            message.starts_with(&named),
            "{message} should start with {named}"
        );
    }
}

/// What each family's own configuration says, by the fields that set it apart.
#[test]
fn every_family_is_read_and_written_back() {
    let phi = json!({"model_type": "phi3", "partial_rotary_factor": 0.75, "sliding_window": 64,
        "max_position_embeddings": 131072, "original_max_position_embeddings": 4096,
        "rope_scaling": {"type": "su", "short_factor": vec![1.0; 12], "long_factor": vec![2.5; 12]}});
    let qwen = json!({"model_type": "qwen3", "head_dim": 128, "use_sliding_window": true,
        "sliding_window": 16, "max_window_layers": 2});
    let mistral = json!({"model_type": "mistral", "sliding_window": null});
    for (patch, family, windows, rotated) in [
        (
            json!({"model_type": "llama", "sliding_window": 8}),
            Family::Llama,
            [None; 3],
            32,
        ),
        (mistral, Family::Mistral, [None; 3], 32),
        (
            json!({"model_type": "mistral"}),
            Family::Mistral,
            [Some(4096); 3],
            32,
        ),
        (
            json!({"model_type": "qwen2", "sliding_window": 8}),
            Family::Qwen2,
            [None; 3],
            32,
        ),
        (qwen, Family::Qwen3, [None, None, Some(16)], 128),
        (phi, Family::Phi3, [Some(64); 3], 24),
    ] {
        let config = parse(&patch).unwrap();
        assert_eq!(config.family, family);
        assert_eq!(
            [0, 1, 2].map(|layer| config.window(layer)),
            windows,
            "{patch}"
        );
        assert_eq!(config.rope.rotated(config.head_dim), rotated);
        assert_eq!(config.qkv_bias, family == Family::Qwen2);
        let written = config.to_json();
        let read = ModelConfig::parse(Path::new("c"), written.as_object().unwrap()).unwrap();
        assert_eq!(read, config);
        let Some(RopeScaling::Long { attention, .. }) = config.rope.scaling else {
            continue;
        };
        // sqrt(1 + ln 32 / ln 4096)
        assert!((attention - 1.190_238).abs() < 1e-6, "{attention}");
    }
}
