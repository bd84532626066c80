//! Text to train on: records of a file, items of tokens, batches of packed items.

pub mod batches;
pub mod jsonl;

use std::path::PathBuf;

use super::tokenizer::{Tokenizer, TokenizerError};

pub use batches::{Batch, Batches, Cursor, PackedItem};
pub use jsonl::read_records;

/// Why data was refused.
#[derive(Debug, thiserror::Error)]
pub enum DataError {
    /// A file could not be read.
    #[error("{path}: cannot read")]
    Read {
        /// File.
        path: PathBuf,
        /// Cause.
        source: std::io::Error,
    },
    /// A line is no record.
    #[error("{path}:{line}: {reason}")]
    Line {
        /// File.
        path: PathBuf,
        /// Line, from 1.
        line: usize,
        /// What is wrong, and what would be right.
        reason: String,
    },
    /// A file without a record.
    #[error(
        "{path}: holds no records; it takes one a line, as text or as JSON if its name ends in .jsonl"
    )]
    NoRecords {
        /// File.
        path: PathBuf,
    },
    /// There is nothing to train on.
    #[error("no records")]
    Empty,
    /// An item does not fit into a row.
    #[error("item {index} has {tokens} tokens, more than the {length} of a row")]
    TooLong {
        /// Index of the item.
        index: usize,
        /// Its tokens, the leading end-of-record token included.
        tokens: usize,
        /// Longest row.
        length: usize,
    },
    /// Text could not be tokenised exactly.
    #[error("record {index}")]
    Tokenize {
        /// Index of the record.
        index: usize,
        /// Cause.
        source: TokenizerError,
    },
}

/// One record: what is given, and what is learned.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Record {
    /// Given text, may be empty.
    pub context: String,
    /// Text to predict, not empty.
    pub target: String,
}

/// One record as token ids, without end-of-record tokens.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Item {
    /// Given tokens.
    pub context: Vec<u32>,
    /// Tokens to predict; an end-of-record token is predicted after them.
    pub target: Vec<u32>,
}

impl Item {
    /// Tokens in a packed row: a leading end-of-record token, context, target.
    pub fn row_tokens(&self) -> usize {
        1 + self.context.len() + self.target.len()
    }
}

/// Tokenises records. Context and target are encoded apart, so that the target's bytes begin with a token.
pub fn tokenize(tokenizer: &Tokenizer, records: &[Record]) -> Result<Vec<Item>, DataError> {
    let encode = |index: usize, text: &str| {
        tokenizer
            .encode(text)
            .map_err(|source| DataError::Tokenize { index, source })
    };
    records
        .iter()
        .enumerate()
        .map(|(index, record)| {
            let context = encode(index, &record.context)?;
            Ok(Item {
                context,
                target: encode(index, &record.target)?,
            })
        })
        .collect()
}

/// Cuts items that do not fit a row of `length` tokens into several; later pieces have no context.
pub fn cut(items: Vec<Item>, length: usize) -> Vec<Item> {
    let most = length.saturating_sub(1).max(1);
    let mut out = Vec::with_capacity(items.len());
    for item in items {
        if item.row_tokens() <= length {
            out.push(item);
            continue;
        }
        let tokens = [item.context, item.target].concat();
        for piece in tokens.chunks(most) {
            out.push(Item {
                context: Vec::new(),
                target: piece.to_vec(),
            });
        }
    }
    out
}
