//! What the agent believes: the charter that the consortium's authority signed, and the log whose key the charter names.
//!
//! The newest checkpoint that was proved consistent is kept in the spool. A log that shrank, forked, or opened one round
//! with two manifests is evidence of a fault, and the agent stops.

use std::collections::BTreeMap;

use consilium_certs::Member;
use consilium_protocol::charter::{Charter, CharterError};
use consilium_protocol::event::{Entry, EntryError};
use consilium_protocol::message::{Logged, Welcome};
use consilium_protocol::transcript::{
    CheckpointError, KeyError, LogProof, NoteError, ProofError, SignedNote, TreeError,
    VerifiedCheckpoint, VerifierKey, tree,
};
use consilium_protocol::{Digest, RoundId, limits};

use crate::config::Config;
use crate::spool::{Spool, SpoolError};

/// State file with the newest checkpoint.
pub(crate) const CHECKPOINT: &str = "checkpoint";
/// State file with the manifest of every round seen.
const ROUNDS: &str = "rounds.json";
/// Longest list of rounds that is read, in bytes.
const ROUNDS_LIMIT: u64 = 64 << 20;

/// Why something of the charter or the log is not believed.
#[derive(Debug, thiserror::Error)]
pub enum TrustError {
    /// The charter file cannot be read.
    #[error("{file}: {problem}", file = path.display())]
    Charter {
        /// The file.
        path: std::path::PathBuf,
        /// What is wrong, and what helps.
        problem: String,
    },
    /// The aggregator runs under another charter.
    #[error(
        "the aggregator runs under charter {theirs}, this node under {ours}; get the consortium's current charter from its operator"
    )]
    OtherCharter {
        /// Digest of our file.
        ours: Digest,
        /// Digest of the aggregator's.
        theirs: Digest,
    },
    /// The log is not a continuation of what it was.
    #[error(
        "the aggregator's log contradicts what it showed before ({problem}); keep {evidence} as evidence and tell the other members",
        evidence = evidence.display()
    )]
    Fork {
        /// How.
        problem: String,
        /// The stored checkpoint.
        evidence: std::path::PathBuf,
    },
    /// A checkpoint that the log's key did not sign.
    #[error("the log's checkpoint")]
    Checkpoint(#[from] CheckpointError),
    /// An entry without a valid proof.
    #[error("a log entry")]
    Proof(#[from] ProofError),
    /// Bytes that are no entry.
    #[error(transparent)]
    Entry(#[from] EntryError),
    /// An entry of another consortium, or not the one that may stand there.
    #[error("the aggregator showed a log entry that is not {0}")]
    Unexpected(&'static str),
    /// A state file.
    #[error(transparent)]
    Spool(#[from] SpoolError),
}

impl TrustError {
    /// Whether trying again cannot help.
    pub(crate) const fn is_final(&self) -> bool {
        matches!(
            self,
            Self::Charter { .. } | Self::OtherCharter { .. } | Self::Fork { .. }
        )
    }
}

/// Charter and log of one consortium.
#[derive(Debug)]
pub(crate) struct Trust {
    charter: Charter,
    charter_digest: Digest,
    log_key: VerifierKey,
    spool: Spool,
    newest: Option<VerifiedCheckpoint>,
    rounds: BTreeMap<u64, Digest>,
}

impl Trust {
    /// Reads the charter and what the log showed before.
    pub(crate) fn load(
        config: &Config,
        member: &Member,
        spool: &Spool,
    ) -> Result<Self, TrustError> {
        let wrong = |problem: String| TrustError::Charter {
            path: config.charter.clone(),
            problem,
        };
        let bytes = std::fs::read(&config.charter).map_err(|error| {
            wrong(format!(
                "cannot read ({error}); the operator has the signed charter"
            ))
        })?;
        let charter = open_charter(&bytes, member).map_err(|error| wrong(error.to_string()))?;
        if charter.consortium != config.consortium {
            return Err(wrong(format!(
                "is the charter of {}, the configuration says {}",
                charter.consortium, config.consortium
            )));
        }
        let ours = charter
            .members
            .iter()
            .find(|listed| listed.institution == config.institution)
            .ok_or_else(|| wrong(format!("does not list {}", config.institution)))?;
        let public = member.signing.public_hex();
        if ours.key != public {
            return Err(wrong(format!(
                "lists another key for {}; its signing.key here has the public half {public}",
                config.institution
            )));
        }
        let log_key: VerifierKey = charter
            .log_key
            .parse()
            .map_err(|error: KeyError| wrong(format!("log_key: {error}")))?;
        let document = u64::try_from(limits::DOCUMENT).unwrap_or(u64::MAX);
        let newest = match spool.read_state(CHECKPOINT, document)? {
            Some(note) => Some(VerifiedCheckpoint::open(&note, &log_key, &[])?),
            None => None,
        };
        let rounds = match spool.read_state(ROUNDS, ROUNDS_LIMIT)? {
            Some(json) => serde_json::from_slice(&json).map_err(|error| SpoolError::Malformed {
                path: spool.state_path(ROUNDS),
                problem: error.to_string(),
            })?,
            None => BTreeMap::new(),
        };
        Ok(Self {
            charter,
            charter_digest: Digest::of(&bytes),
            log_key,
            spool: spool.clone(),
            newest,
            rounds,
        })
    }

    pub(crate) const fn charter(&self) -> &Charter {
        &self.charter
    }

    pub(crate) const fn charter_digest(&self) -> Digest {
        self.charter_digest
    }

    pub(crate) const fn log_key(&self) -> &VerifierKey {
        &self.log_key
    }

    /// Entries of the log that were proved to stay.
    pub(crate) fn log_size(&self) -> u64 {
        self.newest
            .as_ref()
            .map_or(0, |newest| newest.checkpoint().size)
    }

    /// Checks the aggregator's charter and that its log continues what it showed before; remembers the checkpoint.
    pub(crate) fn welcome(&mut self, welcome: &Welcome) -> Result<(), TrustError> {
        if welcome.charter != self.charter_digest {
            return Err(TrustError::OtherCharter {
                ours: self.charter_digest,
                theirs: welcome.charter,
            });
        }
        let new = VerifiedCheckpoint::open(welcome.checkpoint.as_bytes(), &self.log_key, &[])?;
        let (old_size, old_root) = match &self.newest {
            Some(newest) => (newest.checkpoint().size, newest.checkpoint().root),
            None => (0, tree::empty_root()),
        };
        tree::verify_consistency(
            old_size,
            new.checkpoint().size,
            &welcome.consistency,
            &old_root,
            &new.checkpoint().root,
        )
        .map_err(|error: TreeError| self.fork(error.to_string()))?;
        self.spool
            .write_state(CHECKPOINT, new.note().to_string().as_bytes())?;
        self.newest = Some(new);
        Ok(())
    }

    /// The entry, once its proof was checked.
    pub(crate) fn entry(&self, logged: &Logged) -> Result<Entry, TrustError> {
        let proof = LogProof::parse(logged.proof.as_bytes())?;
        let verified = proof.verify(&tree::leaf_hash(&logged.entry), &self.log_key, &[])?;
        let (shown, newest) = (verified.checkpoint(), self.newest.as_ref());
        if let Some(newest) = newest.map(VerifiedCheckpoint::checkpoint)
            && newest.size == shown.size
            && newest.root != shown.root
        {
            let problem = format!("two trees of {} entries", shown.size);
            return Err(self.fork(problem));
        }
        let entry = logged.parse()?;
        if entry.consortium == self.charter.consortium {
            Ok(entry)
        } else {
            Err(TrustError::Unexpected("of this consortium"))
        }
    }

    /// Remembers a round's manifest; another one for the same round is a fork.
    pub(crate) fn round(&mut self, round: RoundId, manifest: Digest) -> Result<(), TrustError> {
        match self.rounds.get(&round.0) {
            Some(known) if *known == manifest => Ok(()),
            Some(known) => Err(self.fork(format!(
                "round {round} has manifests {known} and {manifest}"
            ))),
            None => {
                self.rounds.insert(round.0, manifest);
                // A map of numbers to digests always is JSON.
                let json = serde_json::to_vec(&self.rounds).unwrap_or_default();
                Ok(self.spool.write_state(ROUNDS, &json)?)
            }
        }
    }

    fn fork(&self, problem: String) -> TrustError {
        TrustError::Fork {
            problem,
            evidence: self.spool.state_path(CHECKPOINT),
        }
    }
}

#[derive(Debug, thiserror::Error)]
enum CharterFault {
    #[error("not signed by the authority in authority.pub ({0}); get both from the operator")]
    Note(#[from] NoteError),
    #[error(transparent)]
    Content(#[from] CharterError),
}

fn open_charter(bytes: &[u8], member: &Member) -> Result<Charter, CharterFault> {
    let known = std::slice::from_ref(&member.authority_key);
    let note = SignedNote::parse(bytes)?.verify(known)?;
    Ok(Charter::parse(note.text())?)
}
