//! Text to train on: records of files, items of tokens, batches of packed items.

pub mod batches;
mod chat;
mod encode;
mod fit;
mod item;
mod jsonl;
mod lines;
mod parquet;
mod prepare;
mod read;
mod shape;
mod store;

use std::path::PathBuf;

use super::tokenizer::{Tokenizer, TokenizerError};

pub use batches::{Batch, Batches, Cursor, PackedItem};
pub use chat::{ChatFormat, PlainChat};
pub use encode::Encoder;
pub use fit::{LongItems, Loss};
pub use item::Item;
pub use prepare::{Counts, Dataset, Preparation, count, prepare};
pub use read::{BadRows, Place, Placed, Source};
pub use shape::{Row, Shape};
pub use store::{Items, TokenFile, TokenWriter};

/// Why data was refused. Names places and never holds the text.
#[derive(Debug, thiserror::Error)]
pub enum DataError {
    /// A file could not be read.
    #[error("{}: cannot read", path.display())]
    Read {
        /// File.
        path: PathBuf,
        /// Cause.
        source: std::io::Error,
    },
    /// A record is bad, and no more of them may be skipped.
    #[error("{}:{place}: {reason}; {}", path.display(), allowed(*before))]
    Row {
        /// File.
        path: PathBuf,
        /// Line or row.
        place: Place,
        /// What is wrong, and what would be right.
        reason: String,
        /// Bad records before it.
        before: u64,
    },
    /// A table is damaged or has other columns.
    #[error("{}: {reason}", path.display())]
    Table {
        /// File.
        path: PathBuf,
        /// What is wrong, and what would be right.
        reason: String,
    },
    /// A file without a record.
    #[error(
        "{}: holds no records; it takes one a line, as text, or as JSON if its name ends in .jsonl",
        path.display()
    )]
    NoRecords {
        /// File.
        path: PathBuf,
    },
    /// A folder without a file of records.
    #[error("{}: no file in it ends in .jsonl, .ndjson, .json, .parquet or .txt", path.display())]
    NoFiles {
        /// Folder.
        path: PathBuf,
    },
    /// There is nothing to train on.
    #[error("no records")]
    Empty,
    /// All records are held out, or too long.
    #[error("of {records} records none is left to train on; lower held_out or raise row_tokens")]
    NothingLeft {
        /// Good records.
        records: u64,
    },
    /// More items than can be ordered.
    #[error("more than {} items; split the run into stages", u32::MAX)]
    TooMany,
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
    /// Tokens could not be kept on disk.
    #[error("{}: cannot keep tokens there", folder.display())]
    Store {
        /// Folder of the file, which has no name.
        folder: PathBuf,
        /// Cause.
        source: std::io::Error,
    },
    /// Tokens could not be read back.
    #[error("the file of tokens")]
    Tokens(#[source] std::io::Error),
}

fn allowed(before: u64) -> String {
    if before == 0 {
        "repair it, or let up to N bad records be skipped with --max-bad-rows N".to_owned()
    } else {
        format!("{before} bad records were skipped before it, as many as are allowed")
    }
}

/// One record: what is given, and what is learned.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Record {
    /// Given text, may be empty.
    pub context: String,
    /// Text to predict, not empty.
    pub target: String,
}

/// Tokenises records. Context and target are encoded apart, so that the target's bytes begin with a token.
///
/// # Errors
/// The tokenizer does not give a text's bytes back.
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
            Ok(Item::new(context, encode(index, &record.target)?))
        })
        .collect()
}

#[cfg(test)]
mod tests;
