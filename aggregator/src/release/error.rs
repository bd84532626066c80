//! Why a release was not published, or is not the one that was signed.

use std::path::{Path, PathBuf};

use consilium_protocol::{Digest, RoundId};

/// Why a release was not published, or is not the one that was signed.
#[derive(Debug, thiserror::Error)]
pub enum ReleaseError {
    /// The gate rejected the candidate.
    #[error("the candidate did not pass the gate")]
    NotPassed,
    /// Another release of this round is there.
    #[error("{}: a different release of round {round} is there; move it away first", folder.display())]
    Exists {
        /// The folder.
        folder: PathBuf,
        /// The round.
        round: RoundId,
    },
    /// The adapter's file is not the candidate.
    #[error("the adapter has digest {got}, the candidate's is {expected}; restore it from a copy")]
    Adapter {
        /// Digest of the copied file.
        got: Digest,
        /// Digest of the candidate.
        expected: Digest,
    },
    /// A document could not be written as JSON.
    #[error("{file}: {source}")]
    Json {
        /// The file.
        file: &'static str,
        /// What serde said.
        source: serde_json::Error,
    },
    /// A key file that holds no P-256 key.
    #[error("{what}: not a P-256 key in PEM: {problem}")]
    Key {
        /// The file or key.
        what: String,
        /// What is wrong.
        problem: String,
    },
    /// The system's random numbers failed.
    #[error("no random numbers: {0}")]
    Random(String),
    /// The signature does not hold.
    #[error("signature: {0}")]
    Signature(String),
    /// A file could not be read or written.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file or folder.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
}

impl ReleaseError {
    pub(super) fn io(path: &Path) -> impl FnOnce(std::io::Error) -> Self {
        let path = path.to_owned();
        move |source| Self::Io { path, source }
    }
}
