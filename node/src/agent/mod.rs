//! The half of a node that has the network, the keys, the egress gate and the ledger, and neither data nor models.
//!
//! It dials the aggregator, follows its status, turns tasks into jobs of the spool, and hands over what the worker made.
//! Every step may be repeated: after a restart of either side the agent finds jobs, results and ledger lines where they
//! were and goes on.

mod content;
pub mod gate;
pub mod ledger;
mod lessons;
pub mod retry;
pub mod round;
mod session;
mod tasks;
#[cfg(test)]
mod testing;
#[cfg(test)]
mod tests;
pub mod trust;

use std::collections::BTreeMap;
use std::fs::{File, OpenOptions, TryLockError};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use consilium_certs::{CertsError, Member};
use consilium_protocol::frame;
use consilium_protocol::message::Hello;
use consilium_protocol::quic::{
    Client, Credentials, CredentialsError, LinkError, LocalError, PeerError, Tasks,
};
use consilium_protocol::{Clock, Digest};
use tokio::time::Instant;

use crate::config::Config;
use crate::spool::{JobId, Spool, SpoolError};
use gate::{Gate, GateError};
use ledger::{Ledger, LedgerError, Owner, Slot};
use retry::Backoff;
use trust::{Trust, TrustError};

/// File of the ledger in the spool's folder `state`.
pub const LEDGER: &str = "ledger.jsonl";
/// State file with the log entry that ended the last round.
pub const LAST_OUTCOME: &str = "last-outcome.json";
/// File that the running agent keeps locked.
pub const LOCK: &str = "agent.lock";

/// Waits between two attempts to connect.
const RECONNECT: (Duration, Duration) = (Duration::from_millis(500), Duration::from_secs(60));
/// Waits between two attempts of one transfer.
const TRANSFER: (Duration, Duration) = (Duration::from_millis(200), Duration::from_secs(30));
/// How long the aggregator has to notice that we leave.
const GOODBYE: Duration = Duration::from_secs(3);

/// Why the agent ends, or one connection of it.
#[derive(Debug, thiserror::Error)]
pub enum AgentError {
    /// Another agent works on the spool.
    #[error("another agent runs on this spool ({} is locked); stop it first", .0.display())]
    Locked(PathBuf),
    /// The lock file.
    #[error("cannot lock {}", path.display())]
    Lock {
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// Keys and certificate.
    #[error(
        "identity of this node; cert.pem, ca.pem and authority.pub are the operator's answer to request.pem"
    )]
    Identity(#[from] CertsError),
    /// The certificate is another institution's.
    #[error("{} holds the certificate of {found}, the configuration says {expected}", path.display())]
    OtherIdentity {
        /// The member folder.
        path: PathBuf,
        /// Whose certificate it is.
        found: String,
        /// Who the configuration names.
        expected: String,
    },
    /// Certificate and key cannot be used for TLS.
    #[error("identity of this node")]
    Credentials(#[from] CredentialsError),
    /// The connection to the aggregator.
    #[error("aggregator {address}")]
    Link {
        /// Where it is.
        address: String,
        /// What happened.
        source: LinkError,
    },
    /// Charter or log.
    #[error(transparent)]
    Trust(#[from] TrustError),
    /// Gate or ledger, for a reason other than policy.
    #[error(transparent)]
    Gate(#[from] GateError),
    /// The ledger.
    #[error(transparent)]
    Ledger(#[from] LedgerError),
    /// The spool.
    #[error(transparent)]
    Spool(#[from] SpoolError),
    /// A task of this program died.
    #[error("a task of this program was stopped")]
    Stopped,
}

impl AgentError {
    /// Whether connecting again cannot help.
    fn is_final(&self) -> bool {
        match self {
            Self::Link { source, .. } => match source {
                LinkError::Rejected(code) => !code.is_retryable(),
                LinkError::Peer(error) => {
                    matches!(error, PeerError::Certificate(_) | PeerError::Alert(_))
                }
                LinkError::Network(_) => false,
                LinkError::Local(error) => matches!(
                    error,
                    LocalError::Credentials(_)
                        | LocalError::ServerName(_)
                        | LocalError::Bind { .. }
                ),
            },
            Self::Trust(error) => error.is_final(),
            Self::Gate(_) | Self::Spool(_) | Self::Stopped => false,
            Self::Ledger(_)
            | Self::Locked(_)
            | Self::Lock { .. }
            | Self::Identity(_)
            | Self::OtherIdentity { .. }
            | Self::Credentials(_) => true,
        }
    }
}

/// Runs the agent until `tasks` are cancelled.
///
/// # Errors
/// What connecting again cannot mend: identity, charter, a forked log, a broken ledger, a refusal of the aggregator.
pub async fn run(config: &Config, clock: Arc<dyn Clock>, tasks: &Tasks) -> Result<(), AgentError> {
    let mut agent = Agent::open(config, &clock)?;
    tracing::info!(
        institution = %config.institution,
        aggregator = %config.aggregator,
        ledger = %agent.head(),
        "agent started"
    );
    let ended = loop {
        let error = tokio::select! {
            () = tasks.cancelled() => break Ok(()),
            error = Box::pin(session::run(&mut agent)) => error,
        };
        if error.is_final() {
            break Err(error);
        }
        let wait = agent.reconnect.next_wait();
        tracing::warn!(
            error = &error as &dyn std::error::Error,
            ?wait,
            "disconnected"
        );
        tokio::select! {
            () = tasks.cancelled() => break Ok(()),
            () = tokio::time::sleep(wait) => {}
        }
    };
    agent.client.close(GOODBYE).await;
    ended
}

/// What outlives a connection.
struct Agent {
    config: Config,
    member: Member,
    trust: Trust,
    gate: Arc<Mutex<Gate>>,
    spool: Spool,
    client: Client,
    reconnect: Backoff,
    transfer: Backoff,
    /// Jobs that failed: how often, and when to try again.
    failures: BTreeMap<JobId, (u32, Instant)>,
    /// Held for as long as the agent runs.
    _lock: File,
}

impl Agent {
    fn open(config: &Config, clock: &Arc<dyn Clock>) -> Result<Self, AgentError> {
        let spool = Spool::open(&config.spool)?;
        let lock = lock(spool.state_path(LOCK))?;
        let member = Member::load(&config.identity)?;
        let identity = &member.identity;
        if identity.consortium != config.consortium || identity.institution != config.institution {
            return Err(AgentError::OtherIdentity {
                path: config.identity.clone(),
                found: identity.to_string(),
                expected: format!("{} in {}", config.institution, config.consortium),
            });
        }
        let trust = Trust::load(config, &member, &spool)?;
        let owner = Owner {
            consortium: config.consortium.clone(),
            institution: config.institution.clone(),
        };
        let ledger = Ledger::open(&spool.state_path(LEDGER), &owner, Arc::clone(clock))?;
        let source = config.source.resolve_or_folder();
        let gate = Gate::new(config.policy.clone(), owner, &source, ledger);
        let credentials = Credentials::load(&config.identity)?;
        let client = Client::bind(credentials).map_err(|source| AgentError::Link {
            address: config.aggregator.to_string(),
            source,
        })?;
        // Jitter needs to differ between nodes, not to be unpredictable.
        let seed = clock.now().0 ^ u64::from(std::process::id());
        Ok(Self {
            config: config.clone(),
            member,
            trust,
            gate: Arc::new(Mutex::new(gate)),
            spool,
            client,
            reconnect: Backoff::new(RECONNECT.0, RECONNECT.1, seed),
            transfer: Backoff::new(TRANSFER.0, TRANSFER.1, seed),
            failures: BTreeMap::new(),
            _lock: lock,
        })
    }

    fn hello(&self) -> Hello {
        Hello {
            version: frame::VERSION,
            software: concat!("consilium-node ", env!("CARGO_PKG_VERSION")).to_owned(),
            consortium: self.config.consortium.clone(),
            institution: self.config.institution.clone(),
            capacity: self.config.capacity,
            log_size: self.trust.log_size(),
        }
    }

    fn head(&self) -> Digest {
        let gate = self.gate.lock().unwrap_or_else(PoisonError::into_inner);
        gate.ledger().head()
    }

    /// Slots of a round that were filled without a receipt so far.
    fn unacknowledged(&self, manifest: &Digest) -> Vec<Slot> {
        let gate = self.gate.lock().unwrap_or_else(PoisonError::into_inner);
        gate.ledger().unacknowledged(manifest)
    }

    /// Uses the gate off the runtime: it hashes files and waits for the disk.
    async fn with_gate<T: Send + 'static>(
        &self,
        work: impl FnOnce(&mut Gate) -> T + Send + 'static,
    ) -> Result<T, AgentError> {
        let gate = Arc::clone(&self.gate);
        blocking(move || work(&mut gate.lock().unwrap_or_else(PoisonError::into_inner))).await
    }
}

/// Work of more than a millisecond.
async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> T + Send + 'static,
) -> Result<T, AgentError> {
    let done = tokio::task::spawn_blocking(work).await;
    done.map_err(|_| AgentError::Stopped)
}

fn lock(path: PathBuf) -> Result<File, AgentError> {
    let open = OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(false)
        .open(&path);
    let failed = |source| AgentError::Lock {
        path: path.clone(),
        source,
    };
    let file = open.map_err(failed)?;
    match file.try_lock() {
        Ok(()) => Ok(file),
        Err(TryLockError::WouldBlock) => Err(AgentError::Locked(path)),
        Err(TryLockError::Error(source)) => Err(failed(source)),
    }
}
