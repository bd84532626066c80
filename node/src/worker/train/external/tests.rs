use std::fs;
use std::time::Duration;

use safetensors::tensor::TensorView;

use super::*;
use crate::worker::model::{LoraConfig, save_adapter};
use crate::worker::testing::model;

/// A base model, an adapter of it as a good command would write it, and a run that asks for that.
struct Site {
    folder: tempfile::TempDir,
    run: ExternalRun,
}

impl Site {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let at = |name: &str| folder.path().join(name);
        let mut base = model(3);
        base.save(&at("base")).unwrap();
        let lora = LoraConfig {
            rank: 4,
            alpha: 8.0,
            embeddings_and_head: false,
        };
        base.model.attach_lora(lora, 5).unwrap();
        save_adapter(&base.model, &at("good"), "base").unwrap();
        let run = ExternalRun {
            base: at("base"),
            data: vec![at("notes.jsonl"), at("letters")],
            output: at("adapter"),
            rank: 4,
            alpha: 8.0,
            target_modules: TARGETS.map(str::to_owned).to_vec(),
            steps: 30,
            learning_rate: 2e-4,
            rows: 8,
            row_tokens: 512,
            seed: 9,
        };
        Self { folder, run }
    }

    fn at(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn train(&self, script: &str) -> Result<AdapterSummary, String> {
        self.train_until(script, 60_000, &|| false)
    }

    fn train_until(
        &self,
        script: &str,
        timeout_millis: u64,
        stop: &dyn Fn() -> bool,
    ) -> Result<AdapterSummary, String> {
        let good = self.at("good");
        let command = ExternalCommand {
            command: ["sh", "-c", script, "sh", good.to_str().unwrap()]
                .map(str::to_owned)
                .to_vec(),
            timeout: Duration::from_millis(timeout_millis),
        };
        train_external(&command, &self.run, stop).map_err(|error| error.to_string())
    }
}

const COPY: &str = "cp \"$1\"/* \"$CONSILIUM_OUTPUT\"";

#[test]
fn a_command_is_told_the_run_and_its_adapter_becomes_the_output() {
    let site = Site::new();
    let summary = site
        .train(&format!("env | grep ^CONSILIUM_; {COPY}"))
        .unwrap();
    assert_eq!(summary.layers, 14);
    assert!(site.at("adapter/adapter_model.safetensors").exists());
    assert!(!site.at("adapter.unchecked").exists());
    let log = fs::read_to_string(site.at("adapter.log")).unwrap();
    let mut lines: Vec<&str> = log.lines().collect();
    lines.sort_unstable();
    let root = site.folder.path().display();
    assert_eq!(
        lines,
        [
            "CONSILIUM_ALPHA=8".to_owned(),
            format!("CONSILIUM_BASE_MODEL={root}/base"),
            format!("CONSILIUM_DATA={root}/notes.jsonl:{root}/letters"),
            "CONSILIUM_LEARNING_RATE=0.0002".to_owned(),
            format!("CONSILIUM_OUTPUT={root}/adapter.unchecked"),
            "CONSILIUM_RANK=4".to_owned(),
            "CONSILIUM_ROWS=8".to_owned(),
            "CONSILIUM_ROW_TOKENS=512".to_owned(),
            "CONSILIUM_SEED=9".to_owned(),
            "CONSILIUM_STEPS=30".to_owned(),
            "CONSILIUM_TARGET_MODULES=q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj"
                .to_owned(),
        ]
    );
    let again = site.train(COPY).unwrap_err();
    assert!(
        again.contains("output") && again.contains("exists"),
        "{again}"
    );
}

#[test]
fn a_failure_gives_the_status_the_log_and_its_last_lines() {
    let site = Site::new();
    let script = "for i in $(seq 100); do echo line $i; done; echo CUDA out of memory >&2; exit 7";
    let problem = site.train(script).unwrap_err();
    for part in [
        "`sh`",
        "exit status: 7",
        "adapter.log",
        "line 100",
        "CUDA out of memory",
    ] {
        assert!(problem.contains(part), "{part} is not in: {problem}");
    }
    assert!(!problem.contains("line 50\n"), "{problem}");
    assert!(!site.at("adapter").exists());

    let command = ExternalCommand {
        command: vec!["no-such-program".to_owned()],
        timeout: Duration::from_secs(9),
    };
    let problem = train_external(&command, &site.run, &|| false).unwrap_err();
    assert!(problem.to_string().contains("no-such-program"), "{problem}");
}

#[test]
fn what_takes_too_long_or_is_to_stop_ends_with_all_that_it_started() {
    let site = Site::new();
    // The shell's own child would go on after it.
    let script = "sleep 1000 & echo $! > \"$CONSILIUM_OUTPUT/child\"; echo started; wait";
    let child = || fs::read_to_string(site.at("adapter.unchecked/child")).unwrap_or_default();
    let gone = |pid: &str| !Path::new("/proc").join(pid.trim()).join("exe").exists();
    let problem = site.train_until(script, 700, &|| false).unwrap_err();
    assert!(
        problem.contains("timeout_hours") && problem.contains("started"),
        "{problem}"
    );
    let pid = child();
    assert!(!pid.is_empty() && gone(&pid), "{pid} still runs");

    let stop = || child().ends_with('\n');
    let problem = site.train_until(script, 60_000, &stop).unwrap_err();
    assert_eq!(problem, WorkError::Stopped.to_string());
    assert!(gone(&child()));
}

#[test]
fn a_folder_that_is_not_the_adapter_asked_for_is_refused_by_file_and_key() {
    let site = Site::new();
    let config = |field: &str, value: &str| {
        format!(
            "{COPY}; sed -i 's/\"{field}\": [^,]*/\"{field}\": {value}/' \"$CONSILIUM_OUTPUT\"/adapter_config.json"
        )
    };
    let weights = |name: &str| {
        format!("{COPY}; cp \"$1\"/../{name} \"$CONSILIUM_OUTPUT\"/adapter_model.safetensors")
    };
    site.write("cut", |bytes| bytes[..bytes.len() - 4].to_vec());
    site.write("text", |_| b"not a tensor file".to_vec());
    site.change("nan", |name, shape, values| {
        if name.contains("layers.1") && name.contains("v_proj.lora_B") {
            values[3] = f32::NAN;
        }
        (name, shape)
    });
    site.change("shape", |name, shape, _| {
        let turned = name.contains("layers.0.self_attn.q_proj.lora_A");
        (
            name,
            if turned {
                vec![shape[1], shape[0]]
            } else {
                shape
            },
        )
    });
    site.change("half", |name, shape, _| {
        (name.replace("layers.1.mlp.up_proj.lora_B", "x"), shape)
    });
    site.change("other", |name, shape, _| {
        (
            name.replace("layers.1.mlp.up_proj", "layers.7.mlp.up_proj"),
            shape,
        )
    });
    site.change("module", |name, shape, _| {
        (name.replace("up_proj", "wide_proj"), shape)
    });
    let cases = [
        ("true".to_owned(), vec!["adapter_config.json", "read"]),
        (
            config("r", "5"),
            vec!["adapter_config.json", "r: is 5, expected 4"],
        ),
        (config("lora_alpha", "9.0"), vec!["lora_alpha"]),
        (config("peft_type", "\"IA3\""), vec!["peft_type", "LORA"]),
        (config("use_dora", "true"), vec!["use_dora"]),
        (config("bias", "\"all\""), vec!["bias", "none"]),
        (
            config("modules_to_save", "[\"lm_head\"]"),
            vec!["modules_to_save"],
        ),
        (
            format!("{COPY}; rm \"$CONSILIUM_OUTPUT\"/*.safetensors"),
            vec!["adapter_model.safetensors"],
        ),
        (
            weights("cut"),
            vec!["adapter_model.safetensors", "truncated"],
        ),
        (
            weights("text"),
            vec!["adapter_model.safetensors", "no safetensors"],
        ),
        (
            weights("nan"),
            vec!["layers.1.self_attn.v_proj.lora_B", "not finite"],
        ),
        (
            weights("shape"),
            vec!["layers.0.self_attn.q_proj.lora_A", "expected [4, 32]"],
        ),
        (
            weights("half"),
            vec!["x.weight", "expected base_model.model."],
        ),
        (weights("other"), vec!["layers.7.mlp.up_proj", "no matrix"]),
        (weights("module"), vec!["wide_proj", "expected q_proj"]),
    ];
    for (script, parts) in cases {
        let problem = site.train(&script).unwrap_err();
        for part in parts {
            assert!(problem.contains(part), "{part} is not in: {problem}");
        }
        assert!(!site.at("adapter").exists(), "{problem}");
    }
}

impl Site {
    /// Other bytes than the good weights.
    fn write(&self, name: &str, change: impl Fn(&[u8]) -> Vec<u8>) {
        let good = fs::read(self.at("good/adapter_model.safetensors")).unwrap();
        fs::write(self.at(name), change(&good)).unwrap();
    }

    /// The good weights with other names, shapes or values.
    fn change(
        &self,
        name: &str,
        change: impl Fn(String, Vec<usize>, &mut [f32]) -> (String, Vec<usize>),
    ) {
        self.write(name, |bytes| {
            let tensors = safetensors::SafeTensors::deserialize(bytes).unwrap();
            let changed = tensors.tensors().into_iter().map(|(name, view)| {
                let mut values: Vec<f32> = view
                    .data()
                    .chunks_exact(4)
                    .map(|four| f32::from_le_bytes(four.try_into().unwrap()))
                    .collect();
                let (name, shape) = change(name, view.shape().to_vec(), &mut values);
                let bytes: Vec<u8> = values
                    .iter()
                    .flat_map(|value| value.to_le_bytes())
                    .collect();
                (name, shape, bytes)
            });
            let changed: Vec<_> = changed.collect();
            let views = changed.iter().map(|(name, shape, bytes)| {
                let view = TensorView::new(safetensors::Dtype::F32, shape.clone(), bytes).unwrap();
                (name.as_str(), view)
            });
            safetensors::serialize(views, None).unwrap()
        });
    }
}
