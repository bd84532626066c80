//! Messages of the control and transfer streams.
//!
//! The node opens every stream. The first one is the control stream: [`Hello`] up, [`Welcome`] or [`Reject`] down, then
//! a [`Status`] down whenever the node's task changes; the latest one counts. Each transfer has a stream of its own:
//!
//! ```text
//! upload:    Upload -> Ready | Reject,  chunks -> Receipt | Reject
//! download:  Download -> Content | Reject,  <- chunks
//! ```

use std::ops::Range;

use bincode::{Decode, Encode};

use crate::codec::Wire;
use crate::contribution::{Statement, Unverified};
use crate::event::{Entry, EntryError};
use crate::frame;
use crate::ids::{ConsortiumId, Digest, InstitutionId};
use crate::limits;
use crate::reject::RejectCode;

/// A [`Wire`] type with a number of its own in the frame header.
pub trait Message: Wire {
    /// Number in the frame header.
    const KIND: u16;
}

macro_rules! messages {
    ($($name:ident = $kind:literal;)+) => { $(
        impl Message for $name {
            const KIND: u16 = $kind;
        }
    )+ };
}

messages! {
    Hello = 1;
    Welcome = 2;
    Status = 3;
    Upload = 4;
    Ready = 5;
    Receipt = 6;
    Reject = 7;
    Download = 8;
    Content = 9;
}

fn short(name: &str, text: &str) -> Result<(), String> {
    if text.len() > limits::TEXT || text.chars().any(char::is_control) {
        return Err(format!(
            "{name} must be plain text of at most {} bytes",
            limits::TEXT
        ));
    }
    Ok(())
}

/// First message of a node.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub struct Hello {
    /// Newest protocol version the node speaks.
    pub version: u16,
    /// Name and version of its software.
    pub software: String,
    /// The consortium it means.
    pub consortium: ConsortiumId,
    /// Who it is; the certificate must say the same.
    pub institution: InstitutionId,
    /// Relative training speed; 0 takes part with records only.
    pub capacity: u32,
    /// Entries of the log it has seen; the aggregator proves consistency from there.
    pub log_size: u64,
}

impl Wire for Hello {
    const LIMIT: usize = 1024;

    fn validate(&self) -> Result<(), String> {
        short("software", &self.software)
    }
}

/// The aggregator's answer to [`Hello`].
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub struct Welcome {
    /// Version both will speak.
    pub version: u16,
    /// Digest of the signed charter; fetched like any artefact.
    pub charter: Digest,
    /// The log's newest signed checkpoint.
    pub checkpoint: String,
    /// Consistency proof from `log_size` of the hello to the checkpoint, hashes in order.
    pub consistency: Vec<Digest>,
}

impl Wire for Welcome {
    const LIMIT: usize = 8192;

    fn validate(&self) -> Result<(), String> {
        if (frame::OLDEST_VERSION..=frame::VERSION).contains(&self.version) {
            Ok(())
        } else {
            Err(format!("version {} is not supported", self.version))
        }
    }
}

/// A log entry with the proof that the log holds it.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub struct Logged {
    /// The entry's bytes.
    pub entry: Vec<u8>,
    /// C2SP `tlog-proof@v1` text.
    pub proof: String,
}

impl Logged {
    /// Parses the entry. The proof is checked by the transcript module.
    ///
    /// # Errors
    /// The bytes are no entry.
    pub fn parse(&self) -> Result<Entry, EntryError> {
        Entry::parse(&self.entry)
    }
}

/// What the open round wants of a node now.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub struct Status {
    /// The open round's `Opened` entry; none while no round is open.
    pub round: Option<Logged>,
    /// What to do.
    pub task: Task,
}

impl Wire for Status {
    const LIMIT: usize = limits::FRAME;
}

/// One node's task.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub enum Task {
    /// Nothing to do until the next status.
    Wait,
    /// Score these shards of the reference set and hand the records over.
    Score {
        /// Shards that are still missing, ascending.
        shards: Vec<u32>,
    },
    /// Train the adapter for one inner round and hand it over.
    Distil {
        /// Inner round, from 0.
        inner: u32,
        /// Entry with the adapter to start from: `Opened` or `Merged`.
        start: Logged,
        /// `Fused` entry with the targets.
        targets: Logged,
        /// The node's part of the reference set.
        part: Part,
    },
    /// Measure the candidate on the private holdout.
    Evaluate {
        /// `Merged` entry with the candidate.
        candidate: Logged,
    },
    /// The round has ended.
    Finished {
        /// `Released` or `Rejected` entry.
        outcome: Logged,
    },
    /// In a round without shared records: train the adapter for one inner round on what lies at the site, as the manifest's
    /// mode says, and hand it over.
    Train {
        /// Inner round, from 0.
        inner: u32,
        /// Entry with the adapter to start from: `Opened` or `Merged`.
        start: Logged,
    },
}

/// A random part of the reference set: positions `from..to` of the permutation that `seed` gives.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, Encode, Decode, serde::Serialize, serde::Deserialize,
)]
pub struct Part {
    /// Seed of the permutation, the same for all parts of an inner round.
    pub seed: u64,
    /// First position.
    pub from: u64,
    /// Position after the last.
    pub to: u64,
}

impl Part {
    /// The positions as a range.
    #[must_use]
    pub const fn range(&self) -> Range<u64> {
        self.from..self.to
    }
}

/// Announces an artefact that fills a slot.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub struct Upload {
    /// Slot and digest, signed by the institution.
    pub statement: Unverified<Statement>,
    /// Bytes of the artefact.
    pub length: u64,
    /// Head of the node's ledger, which holds the artefact's digest already.
    pub ledger: Digest,
}

impl Wire for Upload {
    const LIMIT: usize = 2048;

    fn validate(&self) -> Result<(), String> {
        let limit = self.statement.claim().kind.limit();
        if (1..=limit).contains(&self.length) {
            Ok(())
        } else {
            Err(format!("length is {}, expected 1 to {limit}", self.length))
        }
    }
}

/// The aggregator will take the rest of an artefact.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub struct Ready {
    /// Bytes that it already has.
    pub offset: u64,
}

impl Wire for Ready {
    const LIMIT: usize = 64;
}

/// The contribution is stored, logged and counts.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub struct Receipt {
    /// The `Accepted` entry and its proof.
    pub accepted: Logged,
}

impl Wire for Receipt {
    const LIMIT: usize = limits::FRAME;
}

/// The request is refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Encode, Decode)]
pub struct Reject {
    /// Why.
    pub code: RejectCode,
}

impl Wire for Reject {
    const LIMIT: usize = 16;
}

/// Asks for an artefact.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Encode, Decode)]
pub struct Download {
    /// Which.
    pub digest: Digest,
    /// Bytes that the node already has.
    pub offset: u64,
}

impl Wire for Download {
    const LIMIT: usize = 64;
}

/// The rest of an artefact follows in chunks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Encode, Decode)]
pub struct Content {
    /// Bytes of the whole artefact.
    pub length: u64,
}

impl Wire for Content {
    const LIMIT: usize = 64;

    fn validate(&self) -> Result<(), String> {
        if self.length <= limits::ARTEFACT {
            Ok(())
        } else {
            Err(format!(
                "length is {}, expected at most {}",
                self.length,
                limits::ARTEFACT
            ))
        }
    }
}
