//! `node.toml`: who the node is, whom it dials, what it reads, and what may leave.
//!
//! Unknown keys are refused. Relative paths start at the folder of the file. What is parsed is checked; later code takes
//! the built type. Whether folders and files exist is the business of the half that reads them.

use std::fmt;
use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};

use consilium_kernels::quant::Format;
use consilium_protocol::manifest::Mode;
use consilium_protocol::{ConsortiumId, InstitutionId, limits};
use serde::Deserialize;

/// Longest configuration file in bytes.
const LIMIT: u64 = 1 << 20;

/// Why a configuration file cannot be used. Every text names the file, the key and the fix.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file cannot be read.
    #[error("cannot read {}; write one with `consilium-node init`, or name it with --config", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// Not TOML, an unknown or missing key, or a value of another type.
    #[error("{}: {problem}", path.display())]
    Syntax {
        /// The file.
        path: PathBuf,
        /// Line, key and what is expected there.
        problem: String,
    },
    /// A value that is out of range.
    #[error("{}: {key} is {value}, expected {expected}", path.display())]
    Value {
        /// The file.
        path: PathBuf,
        /// The key, with the table it is in.
        key: &'static str,
        /// What stands there.
        value: String,
        /// What may stand there.
        expected: String,
    },
}

/// A node's configuration.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Config {
    /// The file it was read from; given on to the worker.
    pub path: PathBuf,
    /// The consortium.
    pub consortium: ConsortiumId,
    /// This institution.
    pub institution: InstitutionId,
    /// Where the aggregator listens.
    pub aggregator: Address,
    /// Name in the aggregator's certificate.
    pub server_name: String,
    /// Member folder with certificate and keys, see `consilium_certs::folder`.
    pub identity: PathBuf,
    /// The signed charter.
    pub charter: PathBuf,
    /// The spool that agent and worker share.
    pub spool: PathBuf,
    /// Folder of the pivot.
    pub pivot: PathBuf,
    /// Folder of the institution's own model.
    pub source: PathBuf,
    /// The reference set; with it no other one is used, without it the round's is fetched.
    pub reference: Option<PathBuf>,
    /// Private items for the evaluation, JSON lines.
    pub holdout: PathBuf,
    /// Relative training speed that the node declares; 0 takes part with records only. 1 by default.
    pub capacity: u32,
    /// What may leave the site.
    pub policy: Policy,
    /// The worker.
    pub worker: WorkerConfig,
}

/// Policy of the site; the egress gate enforces it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Policy {
    /// Exchange modes the site takes part in.
    pub modes: Vec<Mode>,
    /// Most symbols per position (K) that a record may hold.
    pub max_symbols: u16,
    /// Most rounds that may receive anything, counted over the life of the ledger; 100 by default.
    pub max_rounds: u64,
    /// Most bytes that may leave in one round; 4 GiB by default.
    pub max_bytes: u64,
}

impl Policy {
    const MAX_ROUNDS: u64 = 100;
    const MAX_BYTES: u64 = 4 << 30;
}

/// Settings of the worker.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct WorkerConfig {
    /// Threads; all cores if absent.
    pub threads: Option<NonZeroUsize>,
    /// How the pivot is held while an adapter of it is trained.
    pub memory: Memory,
}

/// How a model is held in memory while an adapter of it is trained.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Memory {
    /// How its weights are stored; `f32` by default.
    pub base: Format,
    /// Whether activations are computed again in the backward pass rather than kept.
    pub checkpoint_activations: bool,
    /// Whether the layers' weights stay in a file in the spool and are read when they are computed.
    pub offload: bool,
}

/// Host and port.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Address {
    /// Name or address, an IPv6 address without brackets.
    pub host: String,
    /// UDP port, not 0.
    pub port: u16,
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.host.contains(':') {
            write!(f, "[{}]:{}", self.host, self.port)
        } else {
            write!(f, "{}:{}", self.host, self.port)
        }
    }
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawConfig {
    consortium: ConsortiumId,
    institution: InstitutionId,
    aggregator: String,
    server_name: Option<String>,
    identity: PathBuf,
    charter: PathBuf,
    spool: PathBuf,
    pivot: PathBuf,
    source: PathBuf,
    reference: Option<PathBuf>,
    holdout: PathBuf,
    capacity: Option<u32>,
    policy: RawPolicy,
    #[serde(default)]
    worker: RawWorker,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawPolicy {
    modes: Vec<Mode>,
    max_symbols: u16,
    max_rounds: Option<u64>,
    max_bytes: Option<u64>,
}

#[derive(Deserialize, Default)]
#[serde(deny_unknown_fields)]
struct RawWorker {
    threads: Option<usize>,
    base: Option<String>,
    #[serde(default)]
    checkpoint_activations: bool,
    #[serde(default)]
    offload: bool,
}

impl Config {
    /// Reads and checks a file.
    ///
    /// # Errors
    /// The first thing that is wrong with it.
    pub fn load(path: &Path) -> Result<Self, ConfigError> {
        let read = |source| ConfigError::Read {
            path: path.to_owned(),
            source,
        };
        if std::fs::metadata(path).map_err(read)?.len() > LIMIT {
            let path = path.to_owned();
            let problem = format!("longer than {LIMIT} bytes");
            return Err(ConfigError::Syntax { path, problem });
        }
        let text = std::fs::read_to_string(path).map_err(read)?;
        let path = std::path::absolute(path).map_err(read)?;
        Self::parse(&text, &path)
    }

    /// Checks the text of a file that lies, or would lie, at `path`.
    ///
    /// # Errors
    /// The first thing that is wrong with it.
    pub fn parse(text: &str, path: &Path) -> Result<Self, ConfigError> {
        let raw: RawConfig = toml::from_str(text).map_err(|error| ConfigError::Syntax {
            path: path.to_owned(),
            problem: error.to_string().trim_end().to_owned(),
        })?;
        let wrong = |key, value: &dyn fmt::Display, expected: &str| ConfigError::Value {
            path: path.to_owned(),
            key,
            value: value.to_string(),
            expected: expected.to_owned(),
        };
        let folder = path.parent().unwrap_or_else(|| Path::new("."));
        let at = |key, relative: &Path| {
            if relative.as_os_str().is_empty() {
                Err(wrong(key, &"empty", "a path, relative to this file"))
            } else {
                Ok(folder.join(relative))
            }
        };
        let aggregator = parse_address(&raw.aggregator).ok_or_else(|| {
            let expected = "host:port, for example \"aggregator.example.org:443\"";
            wrong("aggregator", &format!("{:?}", raw.aggregator), expected)
        })?;
        let server_name = raw.server_name.unwrap_or_else(|| aggregator.host.clone());
        if server_name.is_empty() || server_name.contains([' ', '/', '\n']) {
            let expected = "the host name or address in the aggregator's certificate";
            return Err(wrong("server_name", &format!("{server_name:?}"), expected));
        }
        let policy = raw.policy;
        if policy.modes.is_empty() {
            let expected = "at least one mode, for example [\"unified\"]";
            return Err(wrong("policy.modes", &"empty", expected));
        }
        if !(1..=limits::SYMBOLS).contains(&policy.max_symbols) {
            let expected = format!("1 to {}", limits::SYMBOLS);
            return Err(wrong("policy.max_symbols", &policy.max_symbols, &expected));
        }
        let max_rounds = policy.max_rounds.unwrap_or(Policy::MAX_ROUNDS);
        let max_bytes = policy.max_bytes.unwrap_or(Policy::MAX_BYTES);
        for (key, value) in [
            ("policy.max_rounds", max_rounds),
            ("policy.max_bytes", max_bytes),
        ] {
            if value == 0 {
                return Err(wrong(
                    key,
                    &value,
                    "1 or more; to send nothing, stop the node",
                ));
            }
        }
        let threads = match raw.worker.threads {
            Some(threads) if !(1..=1024).contains(&threads) => {
                let expected = "1 to 1024; leave it out for all cores";
                return Err(wrong("worker.threads", &threads, expected));
            }
            threads => threads.and_then(NonZeroUsize::new),
        };
        let base = match raw.worker.base.as_deref() {
            None => Format::default(),
            Some(name) => Format::named(name).ok_or_else(|| {
                let expected = "\"f32\", \"bf16\", \"int8\" or \"nf4\"";
                wrong("worker.base", &format!("{name:?}"), expected)
            })?,
        };
        let memory = Memory {
            base,
            checkpoint_activations: raw.worker.checkpoint_activations,
            offload: raw.worker.offload,
        };
        let reference = raw.reference.map(|path| at("reference", &path));
        Ok(Self {
            path: path.to_owned(),
            consortium: raw.consortium,
            institution: raw.institution,
            aggregator,
            server_name,
            identity: at("identity", &raw.identity)?,
            charter: at("charter", &raw.charter)?,
            spool: at("spool", &raw.spool)?,
            pivot: at("pivot", &raw.pivot)?,
            source: at("source", &raw.source)?,
            reference: reference.transpose()?,
            holdout: at("holdout", &raw.holdout)?,
            capacity: raw.capacity.unwrap_or(1),
            policy: Policy {
                modes: policy.modes,
                max_symbols: policy.max_symbols,
                max_rounds,
                max_bytes,
            },
            worker: WorkerConfig { threads, memory },
        })
    }
}

fn parse_address(text: &str) -> Option<Address> {
    let (host, port) = text.rsplit_once(':')?;
    let host = match host.strip_prefix('[') {
        Some(inner) => inner.strip_suffix(']')?,
        None if host.contains(':') => return None,
        None => host,
    };
    let port = port.parse().ok().filter(|port| *port != 0)?;
    let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '-' | ':' | '_');
    (!host.is_empty() && host.chars().all(plain)).then(|| Address {
        host: host.to_owned(),
        port,
    })
}

/// A commented file for `init`; it parses once written.
#[must_use]
pub fn template(
    consortium: &ConsortiumId,
    institution: &InstitutionId,
    aggregator: &str,
) -> String {
    format!(
        r#"# Configuration of a Consilium node. Unknown keys are refused. Relative paths start at this file's folder.

consortium = "{consortium}"
institution = "{institution}"

# The aggregator; the node only dials out (UDP).
aggregator = "{aggregator}"
# Name in the aggregator's certificate, if it is not the host above.
# server_name = "aggregator.example.org"

# Certificate and keys of this site, made by `consilium-certs`. Private keys never leave this folder.
identity = "identity"
# The charter as the operator signed it.
charter = "charter.note"

# Jobs, results and artefacts: the only folder that agent and worker share.
spool = "spool"

# Model folders as on the Hugging Face hub: config.json, tokenizer.json, *.safetensors.
pivot = "pivot"
source = "source"

# Public reference set. Named here, the node takes part only in rounds on this very file; otherwise it is fetched.
# reference = "reference.jsonl"
# Private items for the evaluation; only its mean scores leave the site.
holdout = "holdout.jsonl"

# Relative training speed of this site's worker; 0 takes part with records only.
# capacity = 1

# What may leave the site. Anything that is not allowed here does not.
[policy]
modes = ["unified"]
# Symbols per position of a record; never more than an eighth of the source's hidden size.
max_symbols = 16
# Rounds that may receive anything, over the life of the ledger.
max_rounds = 100
# Bytes per round.
max_bytes = 4_294_967_296

[worker]
# Threads; all cores without it.
# threads = 8
# How the pivot's weights are stored while its adapter is trained: "f32", "bf16", "int8" or "nf4" (4 bits).
# base = "f32"
# Activations are computed again in the backward pass rather than kept: less memory, a third more work.
# checkpoint_activations = false
# The weights of the layers stay in a file in the spool, and one layer at a time is read.
# offload = false
"#
    )
}

#[cfg(test)]
mod tests {
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
            .replace("# offload = false", "offload = true");
        let memory = parse(&small).unwrap().worker.memory;
        assert_eq!((memory.base, memory.offload), (Format::Nf4, true));
        assert!(!memory.checkpoint_activations);
        let absolute = sample().replace("\"pivot\"", "\"/models/pivot\"");
        assert_eq!(parse(&absolute).unwrap().pivot, Path::new("/models/pivot"));
        let v6 = sample().replace("127.0.0.1:", "[::1]:");
        let config = parse(&v6).unwrap();
        assert_eq!(config.aggregator.to_string(), "[::1]:4433");
        assert_eq!(config.server_name, "::1");
    }

    #[test]
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
            ("# capacity = 1", "capacity = -1", "capacity", "u32"),
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
}
