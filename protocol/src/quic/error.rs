//! What can go wrong on a link, told apart by who has to act.

use std::io;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use quinn::{ConnectionError, ReadError, ReadExactError, TransportErrorCode, VarInt, WriteError};

use super::chunk::ChunkError;
use super::tls::CredentialsError;
use super::verify::CertificateFault;
use crate::codec::CodecError;
use crate::frame::FrameError;
use crate::ids::Digest;
use crate::reject::RejectCode;

/// Why a connection, a message or a transfer failed.
#[derive(Debug, thiserror::Error)]
pub enum LinkError {
    /// The peer answered, and said no.
    #[error("the peer refused: {0}")]
    Rejected(RejectCode),
    /// The peer broke the rules, or we are not in its good books.
    #[error(transparent)]
    Peer(#[from] PeerError),
    /// What lies between.
    #[error(transparent)]
    Network(#[from] NetworkError),
    /// This machine.
    #[error(transparent)]
    Local(#[from] LocalError),
}

/// What a peer did.
#[derive(Debug, thiserror::Error)]
pub enum PeerError {
    /// Its certificate does not pass.
    #[error(transparent)]
    Certificate(#[from] CertificateFault),
    /// It ended the TLS handshake, mostly because of our certificate.
    #[error("the peer ended the TLS handshake: {0}")]
    Alert(Alert),
    /// Not a frame, or not the frame that may come here.
    #[error(transparent)]
    Frame(#[from] FrameError),
    /// Not the message that the frame announced.
    #[error(transparent)]
    Message(#[from] CodecError),
    /// Not a chunk.
    #[error(transparent)]
    Chunk(#[from] ChunkError),
    /// The stream ended too early.
    #[error("the peer ended the stream in the middle of a {0}")]
    Ended(&'static str),
    /// Bytes after the end of the content.
    #[error("the peer sent more than it announced")]
    Trailing,
    /// Nothing came in time.
    #[error("the peer sent no {what} within {within:?}")]
    Late {
        /// What was due.
        what: &'static str,
        /// How long it may take.
        within: Duration,
    },
    /// It moves too slowly.
    #[error("the peer moved {bytes} bytes in {window:?}, expected at least {floor}")]
    TooSlow {
        /// Bytes moved.
        bytes: u64,
        /// Bytes expected.
        floor: u64,
        /// In this time.
        window: Duration,
    },
    /// It wants to continue where the content has ended.
    #[error("the peer asks for offset {offset} of {length} bytes")]
    Offset {
        /// Offset asked for.
        offset: u64,
        /// Bytes of the content.
        length: u64,
    },
    /// More than the caller takes.
    #[error("the peer announces {length} bytes, at most {limit} are taken")]
    Length {
        /// Announced bytes.
        length: u64,
        /// Allowed bytes.
        limit: u64,
    },
    /// The content is not what was asked for.
    #[error("the content has digest {got}, expected {expected}")]
    Digest {
        /// Digest of the bytes received.
        got: Digest,
        /// Digest announced.
        expected: Digest,
    },
    /// It gave the stream up with a number that means nothing to us.
    #[error("the peer gave the stream up (error {0})")]
    Abandoned(u64),
    /// It broke a rule of QUIC, or says that we did.
    #[error("QUIC protocol violated: {0}")]
    Transport(String),
}

/// What happened on the way.
#[derive(Debug, thiserror::Error)]
pub enum NetworkError {
    /// The name has no address.
    #[error("{host} cannot be resolved")]
    Resolve {
        /// Name that was looked up.
        host: String,
        /// The resolver's reason, if it gave one.
        source: Option<io::Error>,
    },
    /// No handshake in time.
    #[error("no answer from {address} within {within:?}: is it running, and does UDP get through?")]
    Handshake {
        /// Where we dialled, or who dialled us.
        address: SocketAddr,
        /// How long it may take.
        within: Duration,
    },
    /// Silence for longer than the idle timeout.
    #[error("the connection went silent")]
    TimedOut,
    /// The peer does not know the connection any more.
    #[error("the connection was reset: the peer has restarted")]
    Reset,
    /// The peer closed the connection without a reason.
    #[error("the peer closed the connection")]
    Closed,
}

/// What failed on this machine.
#[derive(Debug, thiserror::Error)]
pub enum LocalError {
    /// Certificate, key or authority.
    #[error(transparent)]
    Credentials(#[from] CredentialsError),
    /// The socket.
    #[error("cannot bind {address}")]
    Bind {
        /// Address asked for.
        address: SocketAddr,
        /// The system's reason.
        source: io::Error,
    },
    /// Neither a host name nor an address.
    #[error("{0:?} is neither a host name nor an address")]
    ServerName(String),
    /// Quinn refuses to dial.
    #[error("cannot dial")]
    Dial(#[from] quinn::ConnectError),
    /// A file.
    #[error("{}", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// The system's reason.
        source: io::Error,
    },
    /// Reader or writer of the content.
    #[error("content cannot be read or written")]
    Content(#[source] io::Error),
    /// Somebody else is writing this file.
    #[error("{} is being written by another transfer", .0.display())]
    Locked(PathBuf),
    /// The file is not the artefact that was announced.
    #[error("{} has {got} bytes, {expected} were announced", path.display())]
    Length {
        /// The file.
        path: PathBuf,
        /// Its bytes.
        got: u64,
        /// Bytes announced.
        expected: u64,
    },
    /// A message of ours is out of range.
    #[error("message of our own")]
    Message(#[source] CodecError),
    /// We closed the connection.
    #[error("the connection was closed here")]
    Closed,
    /// A task of ours died.
    #[error("a task of this program was stopped")]
    Stopped,
}

/// A TLS alert in words.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Alert(pub u8);

impl std::fmt::Display for Alert {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let words = match self.0 {
            42 => "it finds our certificate bad",
            43 => "our certificate is for another purpose",
            44 => "our certificate was revoked",
            45 => "our certificate has expired or is not valid yet; renew it, or check the clock",
            46 => "it does not know our certificate",
            48 | 51 => "our certificate is from another authority; use the one of this consortium",
            49 => "our certificate is for another role or consortium",
            70 => "no common TLS version",
            112 => "it does not serve the name we dialled",
            116 => "it asks for a certificate and got none",
            120 => "no common protocol version",
            _ => return write!(f, "alert {}", self.0),
        };
        write!(f, "{words} (alert {})", self.0)
    }
}

impl LinkError {
    /// What the peer is told, when it is told anything.
    #[must_use]
    pub fn code(&self) -> RejectCode {
        match self {
            Self::Rejected(code) => *code,
            Self::Peer(error) => error.code(),
            Self::Network(_) => RejectCode::TimedOut,
            Self::Local(error) => error.code(),
        }
    }

    /// Whether the same request may succeed later without anybody changing anything.
    #[must_use]
    pub fn is_retryable(&self) -> bool {
        match self {
            Self::Rejected(code) => code.is_retryable(),
            Self::Peer(error) => matches!(
                error,
                PeerError::Ended(_)
                    | PeerError::Late { .. }
                    | PeerError::TooSlow { .. }
                    | PeerError::Digest { .. }
                    | PeerError::Abandoned(_)
            ),
            Self::Network(_) => true,
            Self::Local(error) => matches!(error, LocalError::Locked(_)),
        }
    }

    /// The code of a refusal.
    #[must_use]
    pub const fn rejection(&self) -> Option<RejectCode> {
        match self {
            Self::Rejected(code) => Some(*code),
            _ => None,
        }
    }

    /// Names the file behind a reader or writer.
    pub(crate) fn in_file(self, path: &Path) -> Self {
        match self {
            Self::Local(LocalError::Content(source)) => LocalError::file(path)(source).into(),
            other => other,
        }
    }

    /// Meaning of a number in RESET_STREAM or STOP_SENDING.
    pub(crate) fn from_stream_code(code: VarInt) -> Self {
        RejectCode::from_number(code.into_inner()).map_or_else(
            || PeerError::Abandoned(code.into_inner()).into(),
            Self::Rejected,
        )
    }
}

impl PeerError {
    fn code(&self) -> RejectCode {
        match self {
            Self::Certificate(_) | Self::Alert(_) => RejectCode::Identity,
            Self::Frame(FrameError::Version(_)) => RejectCode::Version,
            Self::Frame(FrameError::TooLong { .. })
            | Self::Message(CodecError::TooLong { .. })
            | Self::Length { .. } => RejectCode::TooLarge,
            Self::Late { .. } | Self::TooSlow { .. } | Self::Ended(_) | Self::Abandoned(_) => {
                RejectCode::TimedOut
            }
            Self::Digest { .. } => RejectCode::Digest,
            Self::Frame(_)
            | Self::Message(_)
            | Self::Chunk(_)
            | Self::Trailing
            | Self::Offset { .. }
            | Self::Transport(_) => RejectCode::Malformed,
        }
    }
}

impl LocalError {
    /// Attaches the path to an error of the file system.
    pub(crate) fn file(path: &Path) -> impl FnOnce(io::Error) -> Self {
        move |source| Self::File {
            path: path.to_owned(),
            source,
        }
    }

    fn code(&self) -> RejectCode {
        match self {
            Self::File { source, .. } | Self::Content(source) => match source.kind() {
                io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => RejectCode::Storage,
                _ => RejectCode::Internal,
            },
            Self::Locked(_) => RejectCode::Busy,
            Self::Closed | Self::Stopped => RejectCode::ShuttingDown,
            _ => RejectCode::Internal,
        }
    }
}

impl From<ConnectionError> for LinkError {
    fn from(error: ConnectionError) -> Self {
        match error {
            ConnectionError::ApplicationClosed(close) => {
                RejectCode::from_number(close.error_code.into_inner())
                    .map_or_else(|| NetworkError::Closed.into(), Self::Rejected)
            }
            ConnectionError::ConnectionClosed(close) => match alert(close.error_code) {
                Some(alert) => PeerError::Alert(alert).into(),
                None if close.error_code == TransportErrorCode::CONNECTION_REFUSED => {
                    Self::Rejected(RejectCode::Busy)
                }
                None => PeerError::Transport(close.to_string()).into(),
            },
            ConnectionError::TransportError(error) => {
                PeerError::Transport(error.to_string()).into()
            }
            ConnectionError::VersionMismatch => {
                PeerError::Transport("no common QUIC version".to_owned()).into()
            }
            ConnectionError::TimedOut => NetworkError::TimedOut.into(),
            ConnectionError::Reset => NetworkError::Reset.into(),
            ConnectionError::LocallyClosed | ConnectionError::CidsExhausted => {
                LocalError::Closed.into()
            }
        }
    }
}

impl From<WriteError> for LinkError {
    fn from(error: WriteError) -> Self {
        match error {
            WriteError::Stopped(code) => Self::from_stream_code(code),
            WriteError::ConnectionLost(error) => error.into(),
            WriteError::ClosedStream | WriteError::ZeroRttRejected => LocalError::Closed.into(),
        }
    }
}

impl From<ReadError> for LinkError {
    fn from(error: ReadError) -> Self {
        match error {
            ReadError::Reset(code) => Self::from_stream_code(code),
            ReadError::ConnectionLost(error) => error.into(),
            ReadError::ClosedStream
            | ReadError::IllegalOrderedRead
            | ReadError::ZeroRttRejected => LocalError::Closed.into(),
        }
    }
}

impl LinkError {
    /// A read of exactly so many bytes of `what`.
    pub(crate) fn reading(what: &'static str) -> impl FnOnce(ReadExactError) -> Self {
        move |error| match error {
            ReadExactError::FinishedEarly(_) => PeerError::Ended(what).into(),
            ReadExactError::ReadError(error) => error.into(),
        }
    }
}

pub(crate) fn alert(code: TransportErrorCode) -> Option<Alert> {
    let number = u64::from(code).checked_sub(0x100)?;
    u8::try_from(number).ok().map(Alert)
}
