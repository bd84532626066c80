//! Why a tokenizer was refused.

use std::path::PathBuf;

use consilium_kernels::VocabError;

/// Why a tokenizer was refused, or could not encode a text.
#[derive(Debug, thiserror::Error)]
pub enum TokenizerError {
    /// A file could not be read.
    #[error("{path}: cannot read: {source}")]
    Read {
        /// File.
        path: PathBuf,
        /// Cause.
        source: std::io::Error,
    },
    /// A file could not be written.
    #[error("{path}: cannot write: {source}")]
    Write {
        /// File.
        path: PathBuf,
        /// Cause.
        source: std::io::Error,
    },
    /// A file is not what it should be.
    #[error("{path}: {reason}")]
    Invalid {
        /// File.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
    /// The vocabulary could not be trained.
    #[error("cannot train a vocabulary: {reason}")]
    Train {
        /// What is wrong.
        reason: String,
    },
    /// The tokenizer failed on a text.
    #[error("cannot tokenise: {reason}")]
    Encode {
        /// What it said.
        reason: String,
    },
    /// The tokens of a text spell something else, so scores of its bytes would be wrong.
    #[error(
        "the tokens of a text of {bytes} bytes spell something else from byte {at} on: the tokenizer \
         normalises text, or has no token for it"
    )]
    NotExact {
        /// Length of the text.
        bytes: usize,
        /// First byte of the first token that differs.
        at: usize,
    },
    /// A model has fewer rows than the tokenizer has tokens.
    #[error("the tokenizer has {tokens} tokens, the model only {rows} rows")]
    TooManyTokens {
        /// Tokens.
        tokens: usize,
        /// Rows of the embedding.
        rows: usize,
    },
    /// The vocabulary cannot be sorted.
    #[error(transparent)]
    Vocab(#[from] VocabError),
}
