//! Why something does not leave the site.

use std::io;
use std::path::PathBuf;

use consilium_protocol::Digest;
use consilium_protocol::artefact::Kind;

use crate::agent::ledger::{LedgerError, Slot};

/// Why something does not leave the site.
#[derive(Debug, thiserror::Error)]
pub enum GateError {
    /// The site's policy does not allow the round.
    #[error("{key} does not allow it: {problem}")]
    Policy {
        /// Key of the configuration.
        key: &'static str,
        /// What was asked for, and what is allowed.
        problem: String,
    },
    /// More symbols than an eighth of the source's hidden size.
    #[error(
        "{symbols} symbols per position are more than an eighth of the source's hidden size {hidden}: its hidden states would leave with them (R-2.1)"
    )]
    Symbols {
        /// Symbols asked for.
        symbols: u16,
        /// Hidden size of the source.
        hidden: u32,
    },
    /// The source's hidden size is not known, so the rule above cannot be checked.
    #[error("{}: {problem}; the egress gate needs `hidden_size` of the source", path.display())]
    Source {
        /// The source's `config.json`.
        path: PathBuf,
        /// What is wrong with it.
        problem: String,
    },
    /// The receiver is not this consortium's aggregator.
    #[error("{recipient} is not the aggregator of {expected}")]
    Recipient {
        /// Who would receive it.
        recipient: String,
        /// The consortium of the configuration.
        expected: String,
    },
    /// The statement is not about this round or not ours.
    #[error("the statement's {field} is not that of the open round and this institution")]
    Statement {
        /// The field.
        field: &'static str,
    },
    /// The file is not the artefact that the statement is about.
    #[error("{} has digest {got}, the statement says {expected}", path.display())]
    Digest {
        /// The file.
        path: PathBuf,
        /// Its digest.
        got: Digest,
        /// The statement's.
        expected: Digest,
    },
    /// The bytes hold something else than what may leave as this kind.
    #[error("{} must not leave as {}: {problem}", path.display(), kind.name())]
    Content {
        /// The file.
        path: PathBuf,
        /// What it would leave as.
        kind: Kind,
        /// What is wrong.
        problem: String,
    },
    /// Other bytes were released for this slot before.
    #[error("{slot} was released as {released} before; other bytes for it ({got}) never leave")]
    Slot {
        /// The slot.
        slot: Slot,
        /// What the ledger holds.
        released: Digest,
        /// What was asked for.
        got: Digest,
    },
    /// The file cannot be read.
    #[error("cannot read {}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The ledger.
    #[error(transparent)]
    Ledger(#[from] LedgerError),
}
