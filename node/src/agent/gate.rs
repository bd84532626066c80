//! The egress gate: nothing leaves the site without a [`Permit`], and only [`Gate::release`] makes one.
//!
//! The gate fails closed. It checks the site's policy and the exact bytes (requirement R-2.1: at most an eighth of the
//! source's hidden size in symbols, or records give the hidden states away), then writes the ledger, and only when that
//! line is on disk does a permit exist. A slot is filled once: a retry sends the same bytes (R-2.11).

use std::fs::File;
use std::io::{self, Read as _};
use std::path::{Path, PathBuf};

use consilium_certs::{PeerIdentity, Role};
use consilium_protocol::artefact::Kind;
use consilium_protocol::contribution::Statement;
use consilium_protocol::manifest::{Manifest, Mode};
use consilium_protocol::message::Upload;
use consilium_protocol::{Digest, RejectCode};
use ed25519_dalek::SigningKey;
use serde::Deserialize;

use super::content;
use super::ledger::{Event, Ledger, LedgerError, Owner, Slot};
use crate::config::Policy;
use crate::spool::hash_file;

/// Longest `config.json` that is read, in bytes.
const CONFIG_LIMIT: u64 = 4 << 20;

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
                problem: format!("the round's mode is {:?}", manifest.mode),
            });
        }
        let rounds = self.ledger.rounds_besides(digest);
        if rounds >= self.policy.max_rounds {
            return Err(GateError::Policy {
                key: "policy.max_rounds",
                problem: format!("{rounds} of {} rounds are used", self.policy.max_rounds),
            });
        }
        self.check_symbols(manifest.symbols)
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
            (Mode::Unified, Kind::Adapter) => {
                let header = content::read_header(path).map_err(read_failed(path))?;
                content::adapter(manifest, &header, length).map_err(refused)
            }
            (Mode::Unified, Kind::Evaluation) => {
                let bytes = std::fs::read(path).map_err(read_failed(path))?;
                content::evaluation(&bytes).map_err(refused)
            }
        }
    }
}

/// Number of hidden units of the model in a folder, from its `config.json`.
fn hidden_size(folder: &Path) -> Result<u32, GateError> {
    #[derive(Deserialize)]
    struct Fields {
        hidden_size: u32,
    }
    let path = folder.join("config.json");
    let problem = |problem: String| GateError::Source {
        path: path.clone(),
        problem,
    };
    let mut text = String::new();
    File::open(&path)
        .and_then(|file| file.take(CONFIG_LIMIT).read_to_string(&mut text))
        .map_err(|error| problem(error.to_string()))?;
    serde_json::from_str::<Fields>(&text)
        .map(|fields| fields.hidden_size)
        .map_err(|error| problem(error.to_string()))
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

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use consilium_protocol::time::SystemClock;
    use consilium_protocol::{ConsortiumId, InstitutionId, RoundId};

    use super::*;
    use crate::agent::testing::{adapter, evaluation, manifest, shard};

    struct Site {
        folder: tempfile::TempDir,
        gate: Gate,
    }

    fn owner() -> Owner {
        Owner {
            consortium: ConsortiumId::new("demo").unwrap(),
            institution: InstitutionId::new("clinic").unwrap(),
        }
    }

    fn policy() -> Policy {
        Policy {
            modes: vec![Mode::Unified],
            max_symbols: 16,
            max_rounds: 1,
            max_bytes: 100_000,
        }
    }

    fn site(policy: Policy) -> Site {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("config.json"), r#"{"hidden_size": 128}"#).unwrap();
        let ledger = Ledger::open(
            &folder.path().join("ledger.jsonl"),
            &owner(),
            Arc::new(SystemClock),
        )
        .unwrap();
        let gate = Gate::new(policy, owner(), folder.path(), ledger);
        Site { folder, gate }
    }

    fn hub() -> PeerIdentity {
        "consilium://demo/aggregator/hub".parse().unwrap()
    }

    impl Site {
        fn put(&self, bytes: &[u8]) -> PathBuf {
            let path = self.folder.path().join(Digest::of(bytes).to_string());
            std::fs::write(&path, bytes).unwrap();
            path
        }

        fn release(&mut self, kind: Kind, bytes: &[u8]) -> Result<Permit, GateError> {
            let path = self.put(bytes);
            self.gate
                .release(&manifest(), statement(kind, bytes), &path, &hub())
        }

        fn lines(&self) -> usize {
            let text = std::fs::read_to_string(self.folder.path().join("ledger.jsonl")).unwrap();
            text.lines().count()
        }
    }

    fn statement(kind: Kind, bytes: &[u8]) -> Statement {
        Statement {
            consortium: owner().consortium,
            round: RoundId(1),
            manifest: Digest::of(b"signed manifest"),
            institution: owner().institution,
            kind,
            sequence: 0,
            artefact: Digest::of(bytes),
        }
    }

    #[test]
    fn what_the_round_asks_for_leaves_once_it_is_in_the_ledger() {
        let mut site = site(policy());
        for (kind, bytes) in [
            (Kind::Records, shard(&manifest(), 0)),
            (Kind::Adapter, adapter(&manifest(), 4)),
            (Kind::Evaluation, evaluation()),
        ] {
            let before = site.lines();
            let permit = site.release(kind, &bytes).unwrap();
            assert_eq!(site.lines(), before + 1);
            let text = std::fs::read_to_string(site.folder.path().join("ledger.jsonl")).unwrap();
            let line = text.lines().last().unwrap();
            assert!(line.contains(&Digest::of(&bytes).to_string()), "{line}");
            let key = SigningKey::from_bytes(&[7; 32]);
            let (upload, _) = permit.into_upload(&key);
            assert_eq!(upload.ledger, Digest::of(line.as_bytes()));
            assert_eq!(upload.length, u64::try_from(bytes.len()).unwrap());
            // A retry sends the same bytes and is no second release.
            site.release(kind, &bytes).unwrap();
            assert_eq!(site.lines(), before + 1);
        }
    }

    #[test]
    fn each_rule_of_the_policy_holds_and_leaves_no_line() {
        let records = shard(&manifest(), 0);
        let refuse = |policy: Policy, key: &str| {
            let mut site = site(policy);
            let refused = site.release(Kind::Records, &records).unwrap_err();
            assert!(refused.to_string().contains(key), "{refused}");
            assert_eq!(site.lines(), 1, "{refused}");
        };
        refuse(
            Policy {
                modes: Vec::new(),
                ..policy()
            },
            "policy.modes",
        );
        refuse(
            Policy {
                max_symbols: 15,
                ..policy()
            },
            "policy.max_symbols",
        );
        refuse(
            Policy {
                max_rounds: 0,
                ..policy()
            },
            "policy.max_rounds",
        );
        let almost = u64::try_from(records.len()).unwrap() - 1;
        refuse(
            Policy {
                max_bytes: almost,
                ..policy()
            },
            "policy.max_bytes",
        );
    }

    #[test]
    fn the_hidden_size_of_the_source_bounds_the_symbols() {
        let records = shard(&manifest(), 0);
        for (config, message) in [
            (
                Some(r#"{"hidden_size": 127}"#),
                "eighth of the source's hidden size 127",
            ),
            (Some(r#"{"hidden": 128}"#), "missing field `hidden_size`"),
            (Some("{"), "config.json"),
            (None, "config.json"),
        ] {
            let mut site = site(policy());
            let path = site.folder.path().join("config.json");
            match config {
                Some(text) => std::fs::write(path, text).unwrap(),
                None => std::fs::remove_file(path).unwrap(),
            }
            let refused = site.release(Kind::Records, &records).unwrap_err();
            assert!(refused.to_string().contains(message), "{refused}");
            assert_eq!(site.lines(), 1);
        }
    }

    #[test]
    fn only_this_consortiums_aggregator_receives_and_only_our_own_statements() {
        let bytes = evaluation();
        let mut site = site(policy());
        let path = site.put(&bytes);
        let good = statement(Kind::Evaluation, &bytes);
        for peer in [
            "consilium://demo/node/hub",
            "consilium://other/aggregator/hub",
        ] {
            let refused =
                site.gate
                    .release(&manifest(), good.clone(), &path, &peer.parse().unwrap());
            assert!(
                matches!(refused, Err(GateError::Recipient { .. })),
                "{peer}"
            );
        }
        let mut wrong = vec![good.clone(), good.clone(), good];
        wrong[0].institution = InstitutionId::new("bank").unwrap();
        wrong[1].round = RoundId(2);
        wrong[2].consortium = ConsortiumId::new("other").unwrap();
        for statement in wrong {
            let refused = site.gate.release(&manifest(), statement, &path, &hub());
            assert!(matches!(refused, Err(GateError::Statement { .. })));
        }
        assert_eq!(site.lines(), 1);
    }

    #[test]
    fn other_bytes_never_leave_for_the_statement_or_for_a_slot_once_filled() {
        let mut site = site(policy());
        let (bytes, other) = (adapter(&manifest(), 4), adapter(&manifest(), 5));
        let path = site.put(&other);
        let swapped =
            site.gate
                .release(&manifest(), statement(Kind::Adapter, &bytes), &path, &hub());
        assert!(matches!(swapped, Err(GateError::Digest { .. })));
        site.release(Kind::Adapter, &bytes).unwrap();
        let second = site.release(Kind::Adapter, &other);
        assert!(matches!(second, Err(GateError::Slot { .. })));
        assert_eq!(site.lines(), 2);
    }

    #[test]
    fn a_second_round_beyond_the_limit_receives_nothing() {
        let mut site = site(policy());
        let bytes = evaluation();
        site.release(Kind::Evaluation, &bytes).unwrap();
        let path = site.put(&bytes);
        let mut next = statement(Kind::Evaluation, &bytes);
        next.manifest = Digest::of(b"another manifest");
        let refused = site.gate.release(&manifest(), next, &path, &hub());
        assert!(
            matches!(refused, Err(GateError::Policy { key, .. }) if key == "policy.max_rounds")
        );
        site.release(Kind::Evaluation, &bytes).unwrap();
    }
}
