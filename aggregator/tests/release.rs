//! A release folder is whole, loads as PEFT reads it, and cannot be changed without the signature noticing.

#![cfg(test)]

use std::path::Path;

use consilium_aggregator::release::{
    Artefact, PROOF, Release, ReleaseError, ReleaseInput, ReleaseKey, SIGNATURE, Verdict, judge,
    publish, verify,
};
use consilium_protocol::artefact::Kind;
use consilium_protocol::charter::Charter;
use consilium_protocol::evaluation::{Evaluation, Score};
use consilium_protocol::manifest::{
    Deadlines, Defence, Distillation, FusionRule, Manifest, MergeRule, Mode, Screening,
    SymbolSpace, TargetForm, Training,
};
use consilium_protocol::{ConsortiumId, Digest, InstitutionId, RoundId};
use serde_json::Value;

fn id(name: &str) -> InstitutionId {
    InstitutionId::new(name).unwrap()
}

fn manifest() -> Manifest {
    Manifest {
        consortium: ConsortiumId::new("north").unwrap(),
        round: RoundId(3),
        mode: Mode::Unified,
        charter: Digest::of(b"charter"),
        pivot: Digest::of(b"pivot"),
        reference: Digest::of(b"reference"),
        items: 1,
        symbol_space: SymbolSpace::Bytes,
        symbols: 16,
        fill_permille: 995,
        shard_items: 1,
        fusion: FusionRule::MinCe,
        targets: TargetForm::default(),
        screening: Screening::default(),
        training: Training {
            inner_rounds: 8,
            local_steps: 30,
            rows: 12,
            row_tokens: 96,
            learning_rate_micros: 10_000,
            warmup_permille: 50,
            final_permille: 20,
            cross_entropy_permille: 0,
            rank: 32,
            alpha: 64,
            target_modules: vec!["q_proj".to_owned(), "down_proj".to_owned()],
            modules_to_save: vec!["embed_tokens".to_owned(), "lm_head".to_owned()],
            outer_rate_permille: 700,
            outer_momentum_permille: 700,
            distillation: Distillation::Trie,
            merge: MergeRule::Product,
            defence: Defence::None,
        },
        members: vec![id("bank"), id("clinic")],
        quorum: 2,
        deadlines: Deadlines {
            contribute_seconds: 1,
            distil_seconds: 1,
            evaluate_seconds: 1,
        },
        max_weight: None,
        seed: 1,
        previous_release: None,
    }
}

fn verdict(bound: u32) -> Verdict {
    let charter = Charter {
        consortium: ConsortiumId::new("north").unwrap(),
        log_key: String::new(),
        modes: vec![Mode::Unified],
        quorum: 2,
        max_symbols: 16,
        gate_bound_permille: bound,
        members: Vec::new(),
    };
    let score = |bits_per_byte| Score {
        bits_per_byte,
        accuracy: Some(0.97),
    };
    let site = |name, source| {
        let evaluation = Evaluation {
            candidate: score(0.6),
            pivot: score(0.9),
            source: Some(score(source)),
        };
        (id(name), evaluation)
    };
    judge(&charter, &[site("clinic", 0.5), site("bank", 0.58)], &[])
}

fn publish_into(
    releases: &Path,
    adapter: &[u8],
    verdict: &Verdict,
) -> Result<Release, ReleaseError> {
    let contributions = ["bank", "clinic"].map(|name| Artefact {
        institution: id(name),
        kind: Kind::Records,
        sequence: 0,
        artefact: Digest::of(name.as_bytes()),
    });
    let file = releases.with_extension("adapter");
    std::fs::write(&file, adapter).unwrap();
    let key = ReleaseKey::open(&releases.with_extension("key"))?;
    publish(ReleaseInput {
        releases,
        manifest: &manifest(),
        manifest_digest: Digest::of(b"manifest"),
        targets: Some(Digest::of(b"targets")),
        records: None,
        contributions: &contributions,
        truncation_ppm: &[174_000, 12_000],
        verdict,
        adapter: &file,
        adapter_digest: Digest::of(adapter),
        rank: 32,
        base_model: "north/pivot \"small\"",
        license: "apache-2.0",
        key: &key,
    })
}

fn public_key(releases: &Path) -> String {
    std::fs::read_to_string(releases.join("release.pub")).unwrap()
}

#[test]
fn a_release_folder_is_complete_and_its_documents_say_what_happened() {
    let temporary = tempfile::tempdir().unwrap();
    let releases = temporary.path().join("releases");
    let release = publish_into(&releases, b"adapter", &verdict(250)).unwrap();
    assert_eq!(release.folder, releases.join("round-3"));
    let names: Vec<_> = release
        .files
        .iter()
        .map(|(name, _)| name.as_str())
        .collect();
    assert_eq!(
        names,
        [
            "README.md",
            "adapter_config.json",
            "adapter_model.safetensors",
            SIGNATURE,
            "report.json"
        ]
    );
    for (name, digest) in &release.files {
        assert_eq!(
            Digest::of(&std::fs::read(release.folder.join(name)).unwrap()),
            *digest,
            "{name}"
        );
    }
    let mut left: Vec<_> = std::fs::read_dir(&releases)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    left.sort();
    assert_eq!(left, ["release.pub", "round-3"]);

    let json = |name: &str| -> Value {
        serde_json::from_slice(&std::fs::read(release.folder.join(name)).unwrap()).unwrap()
    };
    let config = json("adapter_config.json");
    for (field, expected) in [
        ("peft_type", Value::from("LORA")),
        ("task_type", Value::from("CAUSAL_LM")),
        (
            "base_model_name_or_path",
            Value::from("north/pivot \"small\""),
        ),
        ("r", Value::from(32)),
        ("lora_alpha", Value::from(64)),
        ("target_modules", Value::from(vec!["q_proj", "down_proj"])),
        (
            "modules_to_save",
            Value::from(vec!["embed_tokens", "lm_head"]),
        ),
        ("bias", Value::from("none")),
        ("inference_mode", Value::from(true)),
    ] {
        assert_eq!(config[field], expected, "{field}");
    }
    let peft: Value = serde_json::from_slice(include_bytes!(
        "../../node/tests/fixtures/llama/adapter/adapter_config.json"
    ))
    .unwrap();
    for (field, value) in config.as_object().unwrap() {
        let theirs = peft.get(field);
        assert!(theirs.is_some(), "PEFT writes no {field}");
        let ours = matches!(
            field.as_str(),
            "r" | "lora_alpha" | "target_modules" | "base_model_name_or_path"
        );
        assert!(
            ours || theirs == Some(value),
            "{field} is {value}, PEFT writes {theirs:?}"
        );
    }
    let report = json("report.json");
    assert_eq!(report["gate"]["sites"][0]["institution"], "bank");
    assert_eq!(report["gate"]["sites"][1]["own_best"], 0.5);
    assert_eq!(report["gate"]["rejected"], Value::Null);
    assert_eq!(report["adapter"], Digest::of(b"adapter").to_string());
    assert_eq!(report["contributions"][1]["institution"], "clinic");
    let card = std::fs::read_to_string(release.folder.join("README.md")).unwrap();
    assert!(card.starts_with("---\nlicense: \"apache-2.0\"\nbase_model: \"north/pivot \\\"small\\\"\"\nlibrary_name: peft\n"));
    assert!(
        card.contains("| clinic | 0.6000 | 0.9000 | 0.5000 | 0.5000 | +20.0 % | 97.0 % |"),
        "{card}"
    );
}

#[test]
fn any_change_of_a_release_is_noticed() {
    let temporary = tempfile::tempdir().unwrap();
    let releases = temporary.path().join("releases");
    let release = publish_into(&releases, b"adapter", &verdict(250)).unwrap();
    let key = public_key(&releases);
    verify(&release.folder, &key).unwrap();
    std::fs::write(release.folder.join(PROOF), "proof").unwrap();
    verify(&release.folder, &key).unwrap();
    for (name, _) in &release.files {
        let path = release.folder.join(name);
        let good = std::fs::read(&path).unwrap();
        for at in [0, good.len() / 2, good.len() - 2] {
            let mut bad = good.clone();
            bad[at] ^= 1;
            std::fs::write(&path, bad).unwrap();
            assert!(
                verify(&release.folder, &key).is_err(),
                "byte {at} of {name}"
            );
        }
        std::fs::write(&path, good).unwrap();
    }
    std::fs::write(release.folder.join("extra.bin"), "x").unwrap();
    let error = verify(&release.folder, &key).unwrap_err();
    assert!(error.to_string().contains("extra.bin"), "{error}");
    std::fs::remove_file(release.folder.join("extra.bin")).unwrap();
    verify(&release.folder, &key).unwrap();
    let other = ReleaseKey::open(&temporary.path().join("other.key")).unwrap();
    assert!(verify(&release.folder, &other.public_pem().unwrap()).is_err());
}

#[test]
fn publishing_again_changes_nothing_and_another_release_of_the_round_is_refused() {
    let temporary = tempfile::tempdir().unwrap();
    let releases = temporary.path().join("releases");
    let first = publish_into(&releases, b"adapter", &verdict(250)).unwrap();
    // What a kill in the middle leaves behind.
    let partial = releases.join(".round-3.partial");
    std::fs::create_dir(&partial).unwrap();
    std::fs::write(partial.join("README.md"), "half").unwrap();
    assert_eq!(
        publish_into(&releases, b"adapter", &verdict(250)).unwrap(),
        first
    );
    let error = publish_into(&releases, b"other", &verdict(250)).unwrap_err();
    assert!(matches!(error, ReleaseError::Exists { .. }), "{error}");
    std::fs::remove_dir_all(&first.folder).unwrap();
    assert_eq!(
        publish_into(&releases, b"adapter", &verdict(250)).unwrap(),
        first
    );
    assert!(!partial.exists());
    let error = publish_into(&releases, b"adapter", &verdict(100)).unwrap_err();
    assert!(matches!(error, ReleaseError::NotPassed), "{error}");
}

#[test]
fn a_key_file_is_private_and_must_hold_a_key() {
    use std::os::unix::fs::PermissionsExt;
    let temporary = tempfile::tempdir().unwrap();
    let path = temporary.path().join("release.key");
    let made = ReleaseKey::open(&path).unwrap();
    assert_eq!(
        std::fs::metadata(&path).unwrap().permissions().mode() & 0o777,
        0o600
    );
    let read = ReleaseKey::open(&path).unwrap();
    assert_eq!(made.public_pem().unwrap(), read.public_pem().unwrap());
    std::fs::write(&path, "no key").unwrap();
    assert!(matches!(
        ReleaseKey::open(&path),
        Err(ReleaseError::Key { .. })
    ));
}

#[test]
#[ignore = "needs the OpenSSF tool: pip install model-signing pyOpenSSL"]
fn the_openssf_tool_accepts_our_signature_and_refuses_a_changed_byte() {
    let temporary = tempfile::tempdir().unwrap();
    let releases = temporary.path().join("releases");
    let release = publish_into(&releases, b"adapter", &verdict(250)).unwrap();
    std::fs::write(release.folder.join(PROOF), "proof").unwrap();
    let accepted = || {
        std::process::Command::new("model_signing")
            .args(["verify", "key"])
            .arg(&release.folder)
            .arg("--signature")
            .arg(release.folder.join(SIGNATURE))
            .arg("--public_key")
            .arg(releases.join("release.pub"))
            .status()
            .unwrap()
            .success()
    };
    assert!(accepted());
    std::fs::write(release.folder.join("adapter_model.safetensors"), b"adaptes").unwrap();
    assert!(!accepted());
}
