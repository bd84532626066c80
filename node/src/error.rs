//! What can end a command, with the code and the exit status that scripts see.

use std::path::PathBuf;

use consilium_certs::CertsError;
use consilium_protocol::quic::LinkError;

use crate::agent::AgentError;
use crate::agent::gate::GateError;
use crate::agent::ledger::LedgerError;
use crate::config::ConfigError;
use crate::scorer::ScorerError;
use crate::spool::SpoolError;
use crate::worker::WorkError;

/// Why a command failed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum NodeError {
    /// The configuration.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// The agent.
    #[error(transparent)]
    Agent(Box<AgentError>),
    /// The ledger.
    #[error(transparent)]
    Ledger(#[from] LedgerError),
    /// The spool.
    #[error(transparent)]
    Spool(#[from] SpoolError),
    /// The worker.
    #[error(transparent)]
    Work(Box<WorkError>),
    /// The scorer.
    #[error(transparent)]
    Scorer(Box<ScorerError>),
    /// Keys and certificates.
    #[error(transparent)]
    Certs(#[from] CertsError),
    /// A file that is not to be replaced.
    #[error("{} exists and stays as it is; choose another folder with --out, or edit it", .0.display())]
    Exists(PathBuf),
    /// The machine gives no threads, signals or processes.
    #[error("cannot {doing}")]
    System {
        /// What was tried.
        doing: &'static str,
        /// Why it failed.
        source: std::io::Error,
    },
}

impl From<AgentError> for NodeError {
    fn from(error: AgentError) -> Self {
        Self::Agent(Box::new(error))
    }
}

impl From<WorkError> for NodeError {
    fn from(error: WorkError) -> Self {
        Self::Work(Box::new(error))
    }
}

impl From<ScorerError> for NodeError {
    fn from(error: ScorerError) -> Self {
        Self::Scorer(Box::new(error))
    }
}

impl NodeError {
    /// Stable code for scripts.
    #[must_use]
    pub const fn code(&self) -> &'static str {
        match self {
            Self::Config(_) => "NODE-CONFIG",
            Self::Agent(error) => agent_code(error),
            Self::Ledger(LedgerError::Broken { .. }) => "NODE-LEDGER-BROKEN",
            Self::Ledger(_) => "NODE-LEDGER",
            Self::Spool(_) => "NODE-SPOOL",
            Self::Work(_) => "NODE-WORK",
            Self::Scorer(error) => scorer_code(error),
            Self::Certs(error) => error.code(),
            Self::Exists(_) => "NODE-EXISTS",
            Self::System { .. } => "NODE-SYSTEM",
        }
    }

    /// Exit status: 2 for usage and files, 3 for the network, 4 for refused identities and signatures, 5 for policy, 70
    /// for a fault of ours.
    #[must_use]
    pub const fn exit_status(&self) -> u8 {
        match self {
            Self::Config(_) | Self::Work(_) | Self::Spool(_) | Self::Exists(_) => 2,
            Self::Agent(error) => agent_status(error),
            Self::Scorer(error) => scorer_status(error),
            Self::Ledger(error) => ledger_status(error),
            Self::Certs(error) => error.exit_status(),
            Self::System { .. } => 70,
        }
    }
}

/// An error and what caused it, on one line. Some of our dependencies' errors repeat their cause; it is said once.
pub(crate) fn with_causes(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let next = error.to_string();
        if !text.contains(&next) {
            text = format!("{text}: {next}");
        }
        cause = error.source();
    }
    text
}

const fn scorer_code(error: &ScorerError) -> &'static str {
    match error {
        ScorerError::Transport { .. } => "SERVER-UNREACHABLE",
        ScorerError::Refused { .. } => "SERVER-REFUSED",
        ScorerError::Response { .. } | ScorerError::Listed { .. } => "SERVER-UNFIT",
        _ => "NODE-SCORER",
    }
}

const fn scorer_status(error: &ScorerError) -> u8 {
    match error {
        ScorerError::Transport { .. } => 3,
        _ => 2,
    }
}

const fn agent_code(error: &AgentError) -> &'static str {
    match error {
        AgentError::Locked(_) | AgentError::Lock { .. } => "NODE-LOCKED",
        AgentError::Identity(_) | AgentError::OtherIdentity { .. } | AgentError::Credentials(_) => {
            "NODE-IDENTITY"
        }
        AgentError::Link {
            source: LinkError::Network(_),
            ..
        } => "NET-UNREACHABLE",
        AgentError::Link {
            source: LinkError::Local(_),
            ..
        } => "NET-LOCAL",
        AgentError::Link { .. } => "NET-REFUSED",
        AgentError::Trust(_) => "NODE-TRUST",
        AgentError::Gate(_) => "NODE-GATE",
        AgentError::Ledger(LedgerError::Broken { .. }) => "NODE-LEDGER-BROKEN",
        AgentError::Ledger(_) => "NODE-LEDGER",
        AgentError::Spool(_) => "NODE-SPOOL",
        AgentError::Stopped => "NODE-INTERNAL",
    }
}

const fn agent_status(error: &AgentError) -> u8 {
    match error {
        AgentError::Locked(_) | AgentError::Lock { .. } | AgentError::Spool(_) => 2,
        AgentError::Link {
            source: LinkError::Network(_),
            ..
        } => 3,
        AgentError::Link {
            source: LinkError::Local(_),
            ..
        } => 2,
        AgentError::Identity(error) => error.exit_status(),
        AgentError::Link { .. }
        | AgentError::OtherIdentity { .. }
        | AgentError::Credentials(_)
        | AgentError::Trust(_) => 4,
        AgentError::Gate(GateError::Ledger(error)) | AgentError::Ledger(error) => {
            ledger_status(error)
        }
        AgentError::Gate(_) => 5,
        AgentError::Stopped => 70,
    }
}

/// Nothing may leave on a broken ledger, which is policy; a file that cannot be written is not.
const fn ledger_status(error: &LedgerError) -> u8 {
    match error {
        LedgerError::Broken { .. } => 5,
        LedgerError::Io { .. } | LedgerError::Owner { .. } => 2,
    }
}
