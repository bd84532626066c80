//! The adapter that a first round starts from.

use std::collections::HashMap;
use std::path::Path;

use consilium_protocol::Digest;
use consilium_protocol::manifest::Training;
use safetensors::SafeTensors;
use safetensors::tensor::{Dtype, TensorView};

use super::{HEAD, Q, floats, training};
use crate::fusion::adapter::initial::initial_adapter;
use crate::fusion::error::FusionError;

fn initial(pivot: &Path, training: &Training, seed: u64) -> Result<Vec<u8>, FusionError> {
    let file = tempfile::NamedTempFile::new().unwrap();
    initial_adapter(pivot, training, seed, file.as_file())?;
    Ok(std::fs::read(file.path()).unwrap())
}

fn write_pivot(folder: &Path) {
    let two: Vec<u8> = 2.0_f32.to_le_bytes()[2..].repeat(12);
    let one: Vec<u8> = 1.0_f32.to_le_bytes().repeat(12);
    let view = |dtype, data| TensorView::new(dtype, vec![4, 3], data).unwrap();
    let tensors = [
        (
            "model.layers.0.self_attn.q_proj.weight",
            view(Dtype::F32, &one),
        ),
        ("model.layers.1.mlp.up_proj.weight", view(Dtype::BF16, &two)),
        ("model.embed_tokens.weight", view(Dtype::F32, &one)),
        ("lm_head.weight", view(Dtype::BF16, &two)),
    ];
    let bytes = safetensors::serialize(tensors, None::<HashMap<_, _>>).unwrap();
    std::fs::write(folder.join("model.safetensors"), bytes).unwrap();
}

#[test]
fn the_initial_adapter_is_seeded_by_name_and_copies_saved_modules() {
    let folder = tempfile::tempdir().unwrap();
    write_pivot(folder.path());
    let t = training(700, 700);
    let bytes = initial(folder.path(), &t, 1).unwrap();
    assert_eq!(bytes, initial(folder.path(), &t, 1).unwrap());
    assert_ne!(bytes, initial(folder.path(), &t, 2).unwrap());
    let parsed = SafeTensors::deserialize(&bytes).unwrap();
    let mut names = parsed.names();
    names.sort_unstable();
    let up = "base_model.model.model.layers.1.mlp.up_proj";
    assert_eq!(
        names,
        [
            HEAD,
            &format!("{Q}.lora_A.weight"),
            &format!("{Q}.lora_B.weight"),
            &format!("{up}.lora_A.weight"),
            &format!("{up}.lora_B.weight"),
        ]
    );
    assert!(
        floats(parsed.tensor(HEAD).unwrap().data())
            .iter()
            .all(|&v| v.to_bits() == 2.0_f32.to_bits())
    );
    // SHA-256 of the values that ChaCha8, written anew in Python, gives for seed 1 and this name.
    let a = parsed.tensor(&format!("{Q}.lora_A.weight")).unwrap();
    assert_eq!(
        Digest::of(a.data()).to_string(),
        "e0bedbdf87b61a6a67808469af824be56d46fd7e92e53c7a7783a8bff8990f6e"
    );
    let unknown = Training {
        target_modules: vec!["w1".to_owned()],
        ..t.clone()
    };
    assert!(matches!(
        initial(folder.path(), &unknown, 1),
        Err(FusionError::Target(name)) if name == "w1"
    ));
    let tied = Training {
        modules_to_save: vec!["score".to_owned()],
        ..t
    };
    assert!(matches!(
        initial(folder.path(), &tied, 1),
        Err(FusionError::Saved(name)) if name == "score"
    ));
}
