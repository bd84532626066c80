//! What can go wrong with keys and certificates; every text names the file or field and the fix.

use std::io;
use std::path::PathBuf;

use consilium_protocol::charter::CharterError;
use consilium_protocol::transcript::{KeyError, NoteError};

use consilium_protocol::PeerIdentity;

/// A failure of this crate.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CertsError {
    /// A file cannot be read.
    #[error("cannot read {}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// A file cannot be written.
    #[error("cannot write {}", path.display())]
    Write {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// A file is there already.
    #[error("{} exists; choose another place, or pass --force to replace it", .0.display())]
    Exists(PathBuf),
    /// A key file that others may read or write.
    #[error("key file {} has mode {mode:04o}, open to others; run: chmod 600 {}", path.display(), path.display())]
    LoosePermissions {
        /// The file.
        path: PathBuf,
        /// Its permission bits.
        mode: u32,
    },
    /// A folder or a device, or longer than any file of its kind.
    #[error("{} is not a plain text file of at most {limit} bytes", path.display())]
    NotAFile {
        /// The path.
        path: PathBuf,
        /// Bytes accepted.
        limit: u64,
    },
    /// The content is something else.
    #[error("{} holds no {expected}", path.display())]
    Malformed {
        /// The file.
        path: PathBuf,
        /// What was looked for.
        expected: &'static str,
    },
    /// A key that is not the certificate's.
    #[error("{} is not the key of {}; restore the pair, or request a new certificate", key.display(), certificate.display())]
    KeyMismatch {
        /// The key file.
        key: PathBuf,
        /// The certificate file.
        certificate: PathBuf,
    },
    /// The two keys of an authority belong to different consortia.
    #[error("{} does not name the key in {}; restore both from the same backup", public.display(), key.display())]
    AuthorityMismatch {
        /// The verifier key file.
        public: PathBuf,
        /// The signing key file.
        key: PathBuf,
    },
    /// The request asks for something else than the operator approves.
    #[error(
        "request names {got}, but {expected} was approved; check with the site, then correct --institution or the role, or have the request made again"
    )]
    RequestIdentity {
        /// Identity in the request.
        got: String,
        /// Identity given to `sign`.
        expected: PeerIdentity,
    },
    /// The request asks for a server name that was not approved.
    #[error(
        "request asks for the name {0}; pass it with --dns or --ip to approve it, or have the request made again"
    )]
    RequestName(String),
    /// The request's key is not P-256.
    #[error("request holds a key that is not P-256; make the key with `consilium-certs request`")]
    RequestKey,
    /// Not a host name.
    #[error("--dns {0:?} is not a host name: use letters, digits, '-' and '.', no wildcard")]
    HostName(String),
    /// An aggregator that nobody could verify by name.
    #[error("an aggregator needs a name that nodes dial: pass --dns or --ip")]
    NoServerName,
    /// A node with a server name.
    #[error("a node only dials out and has no server name: drop --dns and --ip")]
    NodeWithServerName,
    /// A validity of zero, or beyond what is sensible.
    #[error("validity of {days} days is out of range, expected 1 to {most}")]
    Validity {
        /// Days asked for.
        days: u32,
        /// Most days accepted.
        most: u32,
    },
    /// The certificate would be valid longer than its authority.
    #[error(
        "certificate of {days} days would outlive its authority; pass fewer --days, or make a new authority"
    )]
    OutlivesAuthority {
        /// Days asked for.
        days: u32,
    },
    /// A clock that shows no date a certificate can hold.
    #[error("the clock of this machine is out of range; set it first")]
    Clock,
    /// The charter file.
    #[error("{} is refused", path.display())]
    Charter {
        /// The file.
        path: PathBuf,
        /// Why.
        source: CharterError,
    },
    /// The charter is of another consortium, or names a key that is none.
    #[error("{}: {field} {problem}", path.display())]
    CharterField {
        /// The file.
        path: PathBuf,
        /// The key in the file.
        field: &'static str,
        /// What is wrong with it.
        problem: String,
    },
    /// A signed note.
    #[error("signed note is refused")]
    Note(#[from] NoteError),
    /// The name of a key.
    #[error("key name is refused")]
    Key(#[from] KeyError),
    /// The operating system gave no random bytes.
    #[error("no random bytes from the operating system")]
    Random,
    /// The certificate library refused to build what it was asked for.
    #[error("cannot build the certificate: {0}")]
    Build(#[from] rcgen::Error),
}

impl CertsError {
    /// Stable code for scripts.
    #[must_use]
    pub const fn code(&self) -> &'static str {
        match self {
            Self::Read { .. } => "CERTS-READ",
            Self::Write { .. } => "CERTS-WRITE",
            Self::Exists(_) => "CERTS-EXISTS",
            Self::LoosePermissions { .. } => "CERTS-KEY-MODE",
            Self::NotAFile { .. } => "CERTS-NOT-A-FILE",
            Self::Malformed { .. } => "CERTS-MALFORMED",
            Self::KeyMismatch { .. } => "CERTS-KEY-MISMATCH",
            Self::AuthorityMismatch { .. } => "CERTS-AUTHORITY-MISMATCH",
            Self::RequestIdentity { .. } => "CERTS-REQUEST-IDENTITY",
            Self::RequestName(_) => "CERTS-REQUEST-NAME",
            Self::RequestKey => "CERTS-REQUEST-KEY",
            Self::HostName(_) => "CERTS-HOST-NAME",
            Self::NoServerName => "CERTS-NO-SERVER-NAME",
            Self::NodeWithServerName => "CERTS-NODE-SERVER-NAME",
            Self::Validity { .. } => "CERTS-VALIDITY",
            Self::OutlivesAuthority { .. } => "CERTS-OUTLIVES-AUTHORITY",
            Self::Clock => "CERTS-CLOCK",
            Self::Charter { .. } | Self::CharterField { .. } => "CERTS-CHARTER",
            Self::Note(_) => "CERTS-NOTE",
            Self::Key(_) => "CERTS-KEY-NAME",
            Self::Random => "CERTS-RANDOM",
            Self::Build(_) => "CERTS-BUILD",
        }
    }

    /// Exit status of the command-line program: 4 for a refused identity, key or signature, 70 for
    /// a fault of ours, else 2.
    #[must_use]
    pub const fn exit_status(&self) -> u8 {
        match self {
            Self::LoosePermissions { .. }
            | Self::KeyMismatch { .. }
            | Self::AuthorityMismatch { .. }
            | Self::RequestIdentity { .. }
            | Self::RequestName(_)
            | Self::RequestKey
            | Self::Note(_) => 4,
            Self::Random | Self::Build(_) => 70,
            _ => 2,
        }
    }
}
