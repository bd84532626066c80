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
