//! `node.toml`: who the node is, whom it dials, what it reads, and what may leave.
//!
//! Unknown keys are refused. Relative paths start at the folder of the file. What is parsed is checked; later code takes
//! the built type. Whether folders and files exist is the business of the half that reads them.

pub(crate) mod format;
mod raw;
mod template;
#[cfg(test)]
mod tests;

use std::fmt;
use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::ValueEnum;
use consilium_kernels::quant::Format;
use consilium_protocol::manifest::Mode;
use consilium_protocol::{ConsortiumId, InstitutionId};
use serde::{Deserialize, Serialize};

use raw::{RawConfig, RawExternal, server_key};

use crate::scorer::ServerSettings;
use crate::scorer::settings::WrongValue;

pub use template::template;

use crate::hub::ModelPlace;

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
    /// The pivot: a folder, or its name in the local Hugging Face cache.
    pub pivot: ModelPlace,
    /// The institution's own model, likewise; only its `config.json` and tokenizer are read where a server has it.
    pub source: ModelPlace,
    /// Whether the source's chat template wraps the contexts that it scores; false by default.
    pub source_chat_template: bool,
    /// The site's model server that scores with the source, if one does.
    pub source_server: Option<ServerSettings>,
    /// The reference set; with it no other one is used, without it the round's is fetched.
    pub reference: Option<PathBuf>,
    /// Private items for the evaluation, JSON lines.
    pub holdout: PathBuf,
    /// Relative training speed that the node declares; 0 takes part with records only. 1 by default. In a round of mode
    /// `adapters` that counts it, also how much this site's adapter weighs: items of private text, say.
    pub capacity: u32,
    /// Files or folders of private text that rounds of mode `adapters` train on; empty takes part in none.
    pub train_data: Vec<PathBuf>,
    /// What may leave the site.
    pub policy: Policy,
    /// The worker.
    pub worker: WorkerConfig,
    /// The site's own training command, if it has one.
    pub external: Option<ExternalCommand>,
}

/// `[train.external]`: a command that trains in place of this program.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ExternalCommand {
    /// Program and arguments; no shell reads them.
    pub command: Vec<String>,
    /// Longest time that it may take.
    pub timeout: Duration,
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
    /// Where models compute, and how the pivot is held while an adapter of it is trained.
    pub memory: Memory,
}

/// Where models compute, and how one is held in memory while an adapter of it is trained: keys of `[worker]`, in node.toml and in
/// a training file.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Memory {
    /// How its weights are stored; `f32` by default.
    #[serde(with = "format")]
    pub base: Format,
    /// Whether activations are computed again in the backward pass rather than kept.
    pub checkpoint_activations: bool,
    /// Whether the layers' weights stay in a file, in the spool or in the run's folder, or beside an NVIDIA device in the host's
    /// memory, and are read when they are computed.
    pub offload: bool,
    /// Where models compute, also those that are not trained.
    pub device: DeviceChoice,
}

/// Where models compute, as settings and options say it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum DeviceChoice {
    /// This machine's processors.
    Cpu,
    /// The first NVIDIA device that the process sees (`CUDA_VISIBLE_DEVICES`); an error where there is none.
    Cuda,
    /// An NVIDIA device where this program can use one, else the processors.
    #[default]
    Auto,
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
        let model = |key, value: &Path| at(key, value).map(|_| ModelPlace::new(folder, value));
        let aggregator = parse_address(&raw.aggregator).ok_or_else(|| {
            let expected = "host:port, for example \"aggregator.example.org:443\"";
            wrong("aggregator", &format!("{:?}", raw.aggregator), expected)
        })?;
        let server_name = raw.server_name.unwrap_or_else(|| aggregator.host.clone());
        if server_name.is_empty() || server_name.contains([' ', '/', '\n']) {
            let expected = "the host name or address in the aggregator's certificate";
            return Err(wrong("server_name", &format!("{server_name:?}"), expected));
        }
        let built = |error: WrongValue, key| ConfigError::Value {
            path: path.to_owned(),
            key,
            value: error.value,
            expected: error.expected,
        };
        let server = raw
            .source_server
            .map(|server| server.within(folder).check());
        let source_server = server.transpose().map_err(|error| {
            let key = server_key(error.key);
            built(error, key)
        })?;
        let ours = |error: WrongValue| {
            let key = error.key;
            built(error, key)
        };
        let train_data = raw.train.data.iter().map(|path| at("train.data", path));
        let train_data = train_data.collect::<Result<Vec<_>, _>>()?;
        let external = raw.train.external.map(RawExternal::check);
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
            pivot: model("pivot", &raw.pivot)?,
            source: model("source", &raw.source)?,
            source_chat_template: raw.source_chat_template,
            source_server,
            reference: reference.transpose()?,
            holdout: at("holdout", &raw.holdout)?,
            capacity: raw.capacity.unwrap_or(1),
            train_data,
            policy: raw.policy.check().map_err(ours)?,
            worker: raw.worker.check().map_err(ours)?,
            external: external.transpose().map_err(ours)?,
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
