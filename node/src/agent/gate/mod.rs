//! The egress gate: nothing leaves the site without a [`Permit`], and only [`Gate::release`] makes one.
//!
//! The gate fails closed. It checks the site's policy and the exact bytes (requirement: at most an eighth of the
//! source's hidden size in symbols, or records give the hidden states away), then writes the ledger, and only when that
//! line is on disk does a permit exist. A slot is filled once: a retry sends the same bytes (R-2.11).

mod error;
#[cfg(test)]
mod tests;

use std::fs::File;
use std::io::{self, Read as _};
use std::path::{Path, PathBuf};

use consilium_protocol::artefact::Kind;
use consilium_protocol::contribution::Statement;
use consilium_protocol::manifest::{Manifest, Mode};
use consilium_protocol::message::Upload;
use consilium_protocol::{Digest, RejectCode};
use consilium_protocol::{PeerIdentity, Role};
use ed25519_dalek::SigningKey;

use super::content;
use super::ledger::{Event, Ledger, Owner, Slot};
use crate::config::Policy;
use crate::spool::hash_file;
use crate::width;

pub use error::GateError;

/// Longest `config.json` that is read, in bytes.
const CONFIG_LIMIT: u64 = 4 << 20;

/// The gate of one site, with its ledger.
#[derive(Debug)]
pub struct Gate {
    policy: Policy,
    owner: Owner,
    source: PathBuf,
    ledger: Ledger,
}

/// Leave for one artefact: its bytes were hashed and the ledger holds them. An upload takes one and nothing else.
#[derive(Debug)]
pub struct Permit {
    statement: Statement,
    path: PathBuf,
    length: u64,
    ledger: Digest,
}

impl Permit {
    /// The signed announcement, and the file to send.
    #[must_use]
    pub fn into_upload(self, key: &SigningKey) -> (Upload, PathBuf) {
        let upload = Upload {
            statement: self.statement.sign(key),
            length: self.length,
            ledger: self.ledger,
        };
        (upload, self.path)
    }
}

impl Gate {
    /// A gate that enforces `policy`; `source` is the folder of the institution's model.
    #[must_use]
    pub fn new(policy: Policy, owner: Owner, source: &Path, ledger: Ledger) -> Self {
        Self {
            policy,
            owner,
            source: source.to_owned(),
            ledger,
        }
    }

    /// The ledger, to read.
    #[must_use]
    pub const fn ledger(&self) -> &Ledger {
        &self.ledger
    }

    /// Whether the site takes part in a round at all; asked before any work is done for it.
    ///
    /// # Errors
    /// The first rule that does not allow it.
    pub fn accepts(&self, manifest: &Manifest, digest: &Digest) -> Result<(), GateError> {
        if manifest.consortium != self.owner.consortium {
            return Err(GateError::Statement {
                field: "consortium",
            });
        }
        if !self.policy.modes.contains(&manifest.mode) {
            return Err(GateError::Policy {
                key: "policy.modes",
                problem: format!("the round's mode is {}", manifest.mode.name()),
            });
        }
        let rounds = self.ledger.rounds_besides(digest);
        if rounds >= self.policy.max_rounds {
            return Err(GateError::Policy {
                key: "policy.max_rounds",
                problem: format!("{rounds} of {} rounds are used", self.policy.max_rounds),
            });
        }
        match manifest.mode {
            // Records that are made at home have the form of those that leave.
            Mode::Unified | Mode::Pairwise => self.check_symbols(manifest.symbols),
            Mode::Adapters => Ok(()),
        }
    }

    /// Checks an artefact, writes the ledger, and permits its upload.
    ///
    /// # Errors
    /// The first rule that does not allow it; then nothing was written.
    pub fn release(
        &mut self,
        manifest: &Manifest,
        statement: Statement,
        path: &Path,
        recipient: &PeerIdentity,
    ) -> Result<Permit, GateError> {
        self.accepts(manifest, &statement.manifest)?;
        self.check_recipient(recipient)?;
        self.check_statement(manifest, &statement)?;
        let (got, length) = hash_file(path).map_err(read_failed(path))?;
        if got != statement.artefact {
            return Err(GateError::Digest {
                path: path.to_owned(),
                got,
                expected: statement.artefact,
            });
        }
        self.check_content(manifest, &statement, path, length)?;
        let slot = slot_of(&statement);
        let ledger = match self.ledger.released(&slot) {
            Some((released, _)) if released == got => self.ledger.head(),
            Some((released, _)) => {
                return Err(GateError::Slot {
                    slot,
                    released,
                    got,
                });
            }
            None => {
                self.check_bytes(&statement.manifest, length)?;
                self.ledger.append(Event::Released {
                    slot,
                    mode: manifest.mode,
                    artefact: got,
                    bytes: length,
                    recipient: recipient.to_string(),
                })?
            }
        };
        Ok(Permit {
            statement,
            path: path.to_owned(),
            length,
            ledger,
        })
    }

    /// Notes a receipt whose proof was checked.
    ///
    /// # Errors
    /// The ledger cannot be written.
    pub fn acknowledge(
        &mut self,
        statement: &Statement,
        entry: String,
        proof: String,
    ) -> Result<(), GateError> {
        let slot = slot_of(statement);
        if self.ledger.acknowledged(&slot) != Some(statement.artefact) {
            self.ledger.append(Event::Acknowledged {
                slot,
                artefact: statement.artefact,
                entry,
                proof,
            })?;
        }
        Ok(())
    }

    /// Notes that the aggregator refused.
    ///
    /// # Errors
    /// The ledger cannot be written.
    pub fn refused(&mut self, statement: &Statement, code: RejectCode) -> Result<(), GateError> {
        self.ledger.append(Event::Refused {
            slot: slot_of(statement),
            artefact: statement.artefact,
            code,
        })?;
        Ok(())
    }

    fn check_symbols(&self, symbols: u16) -> Result<(), GateError> {
        if symbols > self.policy.max_symbols {
            return Err(GateError::Policy {
                key: "policy.max_symbols",
                problem: format!("{symbols} symbols, {} allowed", self.policy.max_symbols),
            });
        }
        let hidden = hidden_size(&self.source)?;
        if u32::from(symbols) > hidden / 8 {
            return Err(GateError::Symbols { symbols, hidden });
        }
        Ok(())
    }

    fn check_recipient(&self, recipient: &PeerIdentity) -> Result<(), GateError> {
        if recipient.role == Role::Aggregator && recipient.consortium == self.owner.consortium {
            return Ok(());
        }
        Err(GateError::Recipient {
            recipient: recipient.to_string(),
            expected: self.owner.consortium.to_string(),
        })
    }

    fn check_statement(&self, manifest: &Manifest, statement: &Statement) -> Result<(), GateError> {
        let field = if statement.consortium != self.owner.consortium {
            "consortium"
        } else if statement.institution != self.owner.institution {
            "institution"
        } else if statement.round != manifest.round {
            "round"
        } else {
            return Ok(());
        };
        Err(GateError::Statement { field })
    }

    fn check_bytes(&self, manifest: &Digest, length: u64) -> Result<(), GateError> {
        let used = self.ledger.bytes_of_round(manifest);
        let most = self.policy.max_bytes;
        if used.checked_add(length).is_some_and(|sum| sum <= most) {
            return Ok(());
        }
        Err(GateError::Policy {
            key: "policy.max_bytes",
            problem: format!("{used} of {most} bytes of the round are used, this is {length} more"),
        })
    }

    fn check_content(
        &self,
        manifest: &Manifest,
        statement: &Statement,
        path: &Path,
        length: u64,
    ) -> Result<(), GateError> {
        let kind = statement.kind;
        let refused = |problem| GateError::Content {
            path: path.to_owned(),
            kind,
            problem,
        };
        if length > kind.limit() {
            return Err(refused(format!("{length} bytes, at most {}", kind.limit())));
        }
        match (manifest.mode, kind) {
            (Mode::Unified, Kind::Records) => {
                let bytes = std::fs::read(path).map_err(read_failed(path))?;
                let header =
                    content::records(manifest, statement.sequence, &bytes).map_err(refused)?;
                self.check_symbols(header.symbols)
            }
            (Mode::Pairwise | Mode::Adapters, Kind::Records) => Err(refused(format!(
                "in mode {} no records leave",
                manifest.mode.name()
            ))),
            (Mode::Unified | Mode::Pairwise | Mode::Adapters, Kind::Adapter) => {
                let header = content::read_header(path).map_err(read_failed(path))?;
                content::adapter(manifest, &header, length).map_err(refused)
            }
            (Mode::Unified | Mode::Pairwise | Mode::Adapters, Kind::Evaluation) => {
                let bytes = std::fs::read(path).map_err(read_failed(path))?;
                content::evaluation(&bytes).map_err(refused)
            }
        }
    }
}

/// Number of hidden units of the model in a folder, from its `config.json`.
fn hidden_size(folder: &Path) -> Result<u32, GateError> {
    let path = folder.join("config.json");
    let problem = |problem: String| GateError::Source {
        path: path.clone(),
        problem,
    };
    let mut text = String::new();
    File::open(&path)
        .and_then(|file| file.take(CONFIG_LIMIT).read_to_string(&mut text))
        .map_err(|error| problem(error.to_string()))?;
    let config: serde_json::Value =
        serde_json::from_str(&text).map_err(|error| problem(error.to_string()))?;
    let width = width::of(&config).and_then(|width| u32::try_from(width).ok());
    width.ok_or_else(|| problem(format!("missing field `{}`", width::NAMES.join("`, `"))))
}

fn slot_of(statement: &Statement) -> Slot {
    Slot {
        round: statement.round,
        manifest: statement.manifest,
        kind: statement.kind,
        sequence: statement.sequence,
    }
}

fn read_failed(path: &Path) -> impl Fn(io::Error) -> GateError + '_ {
    move |source| GateError::Read {
        path: path.to_owned(),
        source,
    }
}
