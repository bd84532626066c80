use super::*;

fn sample() -> String {
    template(
        &ConsortiumId::new("demo").unwrap(),
        &InstitutionId::new("clinic").unwrap(),
        "127.0.0.1:4433",
    )
}

fn parse(text: &str) -> Result<Config, ConfigError> {
    Config::parse(text, Path::new("/etc/consilium/node.toml"))
}

#[test]
fn what_init_writes_is_accepted_and_paths_start_at_the_file() {
    let config = parse(&sample()).unwrap();
    assert_eq!(config.spool, Path::new("/etc/consilium/spool"));
    assert_eq!(config.server_name, "127.0.0.1");
    assert_eq!(config.aggregator.to_string(), "127.0.0.1:4433");
    assert_eq!((config.worker.threads, config.capacity), (None, 1));
    assert_eq!(config.worker.memory, Memory::default());
    let small = sample()
        .replace("# base = \"f32\"", "base = \"nf4\"")
        .replace("# device = \"auto\"", "device = \"cpu\"")
        .replace("# offload = false", "offload = true");
    let memory = parse(&small).unwrap().worker.memory;
    assert_eq!((memory.base, memory.offload), (Format::Nf4, true));
    assert_eq!(memory.device, DeviceChoice::Cpu);
    assert!(!memory.checkpoint_activations);
    let absolute = sample().replace("\"pivot\"", "\"/models/pivot\"");
    let pivot = parse(&absolute).unwrap().pivot;
    assert_eq!(pivot.folder(), Path::new("/models/pivot"));
    let v6 = sample().replace("127.0.0.1:", "[::1]:");
    let config = parse(&v6).unwrap();
    assert_eq!(config.aggregator.to_string(), "[::1]:4433");
    assert_eq!(config.server_name, "::1");
}

#[test]
#[expect(clippy::too_many_lines, reason = "a table")]
fn every_error_names_file_key_and_fix() {
    let cases = [
        (
            "spool = \"spool\"",
            "spol = \"spool\"",
            "spol",
            "expected one of",
        ),
        ("spool = \"spool\"", "", "spool", "missing field"),
        (
            "spool = \"spool\"",
            "spool = \"\"",
            "spool",
            "relative to this file",
        ),
        ("spool = \"spool\"", "spool = 3", "spool", "expected"),
        ("\"demo\"", "\"De Mo\"", "De Mo", "use 1 to 64"),
        ("127.0.0.1:4433", "127.0.0.1", "aggregator", "host:port"),
        ("127.0.0.1:4433", "127.0.0.1:0", "aggregator", "host:port"),
        ("127.0.0.1:4433", "https://x:1", "aggregator", "host:port"),
        ("127.0.0.1:4433", "::1:443", "aggregator", "host:port"),
        ("[\"unified\"]", "[]", "policy.modes", "at least one"),
        ("[\"unified\"]", "[\"all\"]", "all", "unified"),
        (
            "max_symbols = 16",
            "max_symbols = 0",
            "policy.max_symbols",
            "1 to 256",
        ),
        (
            "max_symbols = 16",
            "max_symbols = 257",
            "policy.max_symbols",
            "1 to 256",
        ),
        (
            "max_rounds = 100",
            "max_rounds = 0",
            "policy.max_rounds",
            "1 or more",
        ),
        (
            "max_rounds = 100",
            "max_rounds = -1",
            "max_rounds",
            "expected u64",
        ),
        ("[policy]", "[polcy]", "polcy", "expected one of"),
        (
            "# threads = 8",
            "threads = 0",
            "worker.threads",
            "1 to 1024",
        ),
        ("# threads = 8", "thread = 8", "thread", "expected"),
        ("# base = \"f32\"", "base = \"fp4\"", "worker.base", "nf4"),
        ("# offload = false", "offload = 1", "offload", "boolean"),
        (
            "# device = \"auto\"",
            "device = \"gpu\"",
            "device = \"gpu\"",
            "`cuda`",
        ),
        ("# capacity = 1", "capacity = -1", "capacity", "u32"),
        (
            "# source_chat_template = false",
            "source_chat_template = 1",
            "source_chat_template",
            "boolean",
        ),
        (
            "# [source_server]\n# kind = \"vllm\"",
            "[source_server]\nkind = \"tgi\"\nurl = \"http://a\"",
            "tgi",
            "sglang",
        ),
        (
            "# [source_server]\n# kind = \"vllm\"",
            "[source_server]\nkind = \"vllm\"\nurl = \"http://a\"",
            "source_server.model",
            "--served-model-name",
        ),
        (
            "# [train.external]",
            "[train.external]\ncommand = []",
            "train.external.command",
            "torchrun",
        ),
        (
            "# [train.external]",
            "[train.external]\ncommand = [\"a\"]\ntimeout_hours = 0",
            "train.external.timeout_hours",
            "more than 0",
        ),
        (
            "# [source_server]\n# kind = \"vllm\"",
            "[source_server]\nkind = \"sglang\"\nurl = \"a\"",
            "source_server.url",
            "http://host:port",
        ),
    ];
    for (from, to, key, fix) in cases {
        let text = sample().replacen(from, to, 1);
        assert_ne!(text, sample(), "{from} is not in the sample");
        let error = parse(&text).expect_err(to).to_string();
        for part in ["/etc/consilium/node.toml", key, fix] {
            assert!(error.contains(part), "{to}: {part:?} is not in {error:?}");
        }
    }
    let missing = Config::load(Path::new("/nowhere/node.toml")).unwrap_err();
    assert!(missing.to_string().contains("consilium-node init"));
}
