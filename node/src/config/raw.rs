//! The tables as they are written, and the checks of those that are built elsewhere.

use std::num::NonZeroUsize;
use std::path::PathBuf;
use std::time::Duration;

use consilium_kernels::quant::Format;
use consilium_protocol::manifest::Mode;
use consilium_protocol::{ConsortiumId, InstitutionId, limits};
use serde::Deserialize;

use super::{DeviceChoice, ExternalCommand, Memory, Policy, WorkerConfig, format};
use crate::scorer::RawServer;
use crate::scorer::settings::WrongValue;

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct RawConfig {
    pub(super) consortium: ConsortiumId,
    pub(super) institution: InstitutionId,
    pub(super) aggregator: String,
    pub(super) server_name: Option<String>,
    pub(super) identity: PathBuf,
    pub(super) charter: PathBuf,
    pub(super) spool: PathBuf,
    pub(super) pivot: PathBuf,
    pub(super) source: PathBuf,
    #[serde(default)]
    pub(super) source_chat_template: bool,
    pub(super) reference: Option<PathBuf>,
    pub(super) holdout: PathBuf,
    pub(super) capacity: Option<u32>,
    pub(super) policy: RawPolicy,
    #[serde(default)]
    pub(super) worker: RawWorker,
    pub(super) source_server: Option<RawServer>,
    #[serde(default)]
    pub(super) train: RawTrain,
}

#[derive(Deserialize, Default)]
#[serde(deny_unknown_fields)]
pub(super) struct RawTrain {
    #[serde(default)]
    pub(super) data: Vec<PathBuf>,
    pub(super) external: Option<RawExternal>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct RawExternal {
    pub(super) command: Vec<String>,
    pub(super) timeout_hours: Option<f64>,
}

impl RawExternal {
    /// Hours without a setting, and at most.
    const HOURS: (f64, f64) = (24.0, 24.0 * 365.0);

    /// Checks the values.
    pub(super) fn check(self) -> Result<ExternalCommand, WrongValue> {
        let program = self.command.first().map(String::as_str);
        if program.is_none_or(str::is_empty) || self.command.iter().any(|part| part.contains('\0'))
        {
            return Err(WrongValue {
                key: "train.external.command",
                value: format!("{:?}", self.command),
                expected: "a program and its arguments, for example [\"torchrun\", \"train.py\"]"
                    .to_owned(),
            });
        }
        let hours = self.timeout_hours.unwrap_or(Self::HOURS.0);
        if !(hours > 0.0 && hours <= Self::HOURS.1) {
            return Err(WrongValue {
                key: "train.external.timeout_hours",
                value: hours.to_string(),
                expected: format!("more than 0, at most {}", Self::HOURS.1),
            });
        }
        Ok(ExternalCommand {
            command: self.command,
            timeout: Duration::from_secs_f64(hours * 3600.0),
        })
    }
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct RawPolicy {
    pub(super) modes: Vec<Mode>,
    pub(super) max_symbols: u16,
    pub(super) max_rounds: Option<u64>,
    pub(super) max_bytes: Option<u64>,
}

#[derive(Deserialize, Default)]
#[serde(deny_unknown_fields)]
pub(super) struct RawWorker {
    pub(super) threads: Option<usize>,
    pub(super) base: Option<String>,
    #[serde(default)]
    pub(super) checkpoint_activations: bool,
    #[serde(default)]
    pub(super) offload: bool,
    #[serde(default)]
    pub(super) device: DeviceChoice,
}

impl RawPolicy {
    /// Checks the values.
    pub(super) fn check(self) -> Result<Policy, WrongValue> {
        let wrong = |key, value: String, expected: &str| WrongValue {
            key,
            value,
            expected: expected.to_owned(),
        };
        if self.modes.is_empty() {
            let expected = "at least one of \"unified\", \"pairwise\" and \"adapters\"";
            return Err(wrong("policy.modes", "empty".to_owned(), expected));
        }
        if !(1..=limits::SYMBOLS).contains(&self.max_symbols) {
            let expected = format!("1 to {}", limits::SYMBOLS);
            let value = self.max_symbols.to_string();
            return Err(wrong("policy.max_symbols", value, &expected));
        }
        let positive = |key, value: Option<u64>, usual| match value {
            Some(0) => Err(wrong(
                key,
                "0".to_owned(),
                "1 or more; to send nothing, stop the node",
            )),
            value => Ok(value.unwrap_or(usual)),
        };
        Ok(Policy {
            max_symbols: self.max_symbols,
            max_rounds: positive("policy.max_rounds", self.max_rounds, Policy::MAX_ROUNDS)?,
            max_bytes: positive("policy.max_bytes", self.max_bytes, Policy::MAX_BYTES)?,
            modes: self.modes,
        })
    }
}

impl RawWorker {
    /// Checks the values.
    pub(super) fn check(self) -> Result<WorkerConfig, WrongValue> {
        let wrong = |key, value: String, expected: &str| WrongValue {
            key,
            value,
            expected: expected.to_owned(),
        };
        let threads = match self.threads {
            Some(threads) if !(1..=1024).contains(&threads) => {
                let expected = "1 to 1024; leave it out for all cores";
                return Err(wrong("worker.threads", threads.to_string(), expected));
            }
            threads => threads.and_then(NonZeroUsize::new),
        };
        let base = match self.base.as_deref() {
            None => Format::default(),
            Some(name) => Format::named(name)
                .ok_or_else(|| wrong("worker.base", format!("{name:?}"), format::EXPECTED))?,
        };
        Ok(WorkerConfig {
            threads,
            memory: Memory {
                base,
                checkpoint_activations: self.checkpoint_activations,
                offload: self.offload,
                device: self.device,
            },
        })
    }
}

/// A key of `[source_server]` with its table.
pub(super) fn server_key(key: &str) -> &'static str {
    match key {
        "url" => "source_server.url",
        "model" => "source_server.model",
        "top" => "source_server.top",
        "concurrency" => "source_server.concurrency",
        "prompts" => "source_server.prompts",
        "max_tokens" => "source_server.max_tokens",
        "timeout_seconds" => "source_server.timeout_seconds",
        "ca" => "source_server.ca",
        _ => "source_server",
    }
}
