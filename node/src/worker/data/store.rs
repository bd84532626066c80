//! Items in memory or on disk. On disk they are two files without a name: nothing is left behind by a process that is
//! killed, and memory does not grow with their number.

use std::fs::File;
use std::io::{self, BufWriter, Write as _};
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use consilium_protocol::Digest;
use sha2::{Digest as _, Sha256};

use super::DataError;
use super::item::Item;

/// Bytes of an entry of the index: offset of the item, its words, its row tokens.
const ENTRY: usize = 16;

/// Words before the tokens of an item: lengths of context and target, number of given ranges, whether it is open.
const HEADER: usize = 4;

/// Items that batches are made of.
#[derive(Debug, Clone)]
pub enum Items {
    /// In memory.
    Memory(Arc<[Item]>),
    /// On disk.
    File(Arc<TokenFile>),
}

impl Items {
    /// How many.
    #[must_use]
    pub fn len(&self) -> usize {
        match self {
            Self::Memory(items) => items.len(),
            Self::File(file) => file.len,
        }
    }

    /// Whether there are none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Row tokens of one.
    ///
    /// # Errors
    /// The disk.
    pub fn row_tokens(&self, index: usize) -> Result<usize, DataError> {
        match self {
            Self::Memory(items) => Ok(items.get(index).map_or(0, Item::row_tokens)),
            Self::File(file) => {
                let entry = file.entry(index).map_err(DataError::Tokens)?;
                Ok(entry.row_tokens)
            }
        }
    }

    /// One of them.
    ///
    /// # Errors
    /// The disk.
    pub fn get(&self, index: usize) -> Result<Item, DataError> {
        match self {
            Self::Memory(items) => Ok(items.get(index).cloned().unwrap_or_default()),
            Self::File(file) => file.item(index).map_err(DataError::Tokens),
        }
    }

    /// The first that has more row tokens than `length`, and how many.
    pub(super) fn longer_than(&self, length: usize) -> Option<(usize, usize)> {
        match self {
            Self::Memory(items) => (0..)
                .zip(items.iter().map(Item::row_tokens))
                .find(|(_, tokens)| *tokens > length),
            Self::File(file) => Some(file.longest).filter(|(_, tokens)| *tokens > length),
        }
    }
}

impl From<Arc<[Item]>> for Items {
    fn from(items: Arc<[Item]>) -> Self {
        Self::Memory(items)
    }
}

impl From<Arc<TokenFile>> for Items {
    fn from(file: Arc<TokenFile>) -> Self {
        Self::File(file)
    }
}

/// Items on disk.
#[derive(Debug)]
pub struct TokenFile {
    tokens: File,
    index: File,
    len: usize,
    /// Place and row tokens of the longest item.
    longest: (usize, usize),
    digest: Digest,
}

struct Entry {
    offset: u64,
    words: usize,
    row_tokens: usize,
}

impl TokenFile {
    /// SHA-256 of all items in order.
    #[must_use]
    pub const fn digest(&self) -> Digest {
        self.digest
    }

    fn entry(&self, index: usize) -> io::Result<Entry> {
        let mut bytes = [0_u8; ENTRY];
        let at = index as u64 * ENTRY as u64;
        self.index.read_exact_at(&mut bytes, at)?;
        let (words, _) = bytes.as_chunks::<4>();
        let [low, high, words, row_tokens] = [0, 1, 2, 3].map(|at| u32::from_le_bytes(words[at]));
        Ok(Entry {
            offset: u64::from(high) << 32 | u64::from(low),
            words: words as usize,
            row_tokens: row_tokens as usize,
        })
    }

    fn item(&self, index: usize) -> io::Result<Item> {
        let entry = self.entry(index)?;
        let mut bytes = vec![0; entry.words * size_of::<u32>()];
        self.tokens.read_exact_at(&mut bytes, entry.offset)?;
        let (words, _) = bytes.as_chunks::<4>();
        let words: Vec<u32> = words.iter().map(|word| u32::from_le_bytes(*word)).collect();
        decode(&words).ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, "changed on disk"))
    }
}

fn decode(words: &[u32]) -> Option<Item> {
    let (&[context, target, given, open], rest) = words.split_first_chunk::<HEADER>()?;
    let (context, rest) = rest.split_at_checked(context as usize)?;
    let (target, rest) = rest.split_at_checked(target as usize)?;
    let (ranges, rest) = rest.as_chunks::<2>();
    if ranges.len() != given as usize || !rest.is_empty() {
        return None;
    }
    Some(Item {
        context: context.to_vec(),
        target: target.to_vec(),
        given: (ranges.iter())
            .map(|&[start, end]| start as usize..end as usize)
            .collect(),
        open: open != 0,
    })
}

/// Writes a [`TokenFile`].
#[derive(Debug)]
pub struct TokenWriter {
    folder: PathBuf,
    tokens: BufWriter<File>,
    index: BufWriter<File>,
    offset: u64,
    len: usize,
    longest: (usize, usize),
    hash: Sha256,
}

impl TokenWriter {
    /// Makes the two files in a folder, without names.
    ///
    /// # Errors
    /// The folder cannot be written to.
    pub fn new(folder: &Path) -> Result<Self, DataError> {
        let file = || {
            tempfile::tempfile_in(folder)
                .map(BufWriter::new)
                .map_err(|source| DataError::Store {
                    folder: folder.into(),
                    source,
                })
        };
        Ok(Self {
            folder: folder.into(),
            tokens: file()?,
            index: file()?,
            offset: 0,
            len: 0,
            longest: (0, 0),
            hash: Sha256::new(),
        })
    }

    /// Appends an item.
    ///
    /// # Errors
    /// The disk is full.
    pub fn push(&mut self, item: &Item) -> Result<(), DataError> {
        let word = |value: usize| u32::try_from(value).map_err(|_| DataError::TooMany);
        if self.len >= u32::MAX as usize {
            return Err(DataError::TooMany);
        }
        let mut words = vec![
            word(item.context.len())?,
            word(item.target.len())?,
            word(item.given.len())?,
            u32::from(item.open),
        ];
        words.extend(item.context.iter().chain(&item.target));
        for range in &item.given {
            words.extend([word(range.start)?, word(range.end)?]);
        }
        let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
        let row_tokens = item.row_tokens();
        let sizes = u64::from(word(words.len())?) | u64::from(word(row_tokens)?) << 32;
        self.write(&bytes, sizes)
            .map_err(|source| DataError::Store {
                folder: self.folder.clone(),
                source,
            })?;
        if row_tokens > self.longest.1 {
            self.longest = (self.len, row_tokens);
        }
        self.len += 1;
        Ok(())
    }

    fn write(&mut self, bytes: &[u8], sizes: u64) -> io::Result<()> {
        self.hash.update(bytes);
        self.tokens.write_all(bytes)?;
        self.index.write_all(&self.offset.to_le_bytes())?;
        self.index.write_all(&sizes.to_le_bytes())?;
        self.offset += bytes.len() as u64;
        Ok(())
    }

    /// Ends the writing.
    ///
    /// # Errors
    /// The disk is full.
    pub fn finish(self) -> Result<TokenFile, DataError> {
        let folder = self.folder;
        let failed = |source: io::Error| DataError::Store { folder, source };
        let flushed =
            [self.tokens, self.index].map(|file| file.into_inner().map_err(io::Error::from));
        let (tokens, index) = match flushed {
            [Ok(tokens), Ok(index)] => (tokens, index),
            [Err(error), _] | [_, Err(error)] => return Err(failed(error)),
        };
        Ok(TokenFile {
            tokens,
            index,
            len: self.len,
            longest: self.longest,
            digest: Digest::from_bytes(self.hash.finalize().into()),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn items_come_back_from_disk_and_no_file_is_left() {
        let folder = tempfile::tempdir().unwrap();
        let items: Vec<Item> = (0..50_u32)
            .map(|i| Item {
                given: (0..i as usize % 3).map(|at| 4 * at..4 * at + 2).collect(),
                open: i % 4 == 0,
                ..Item::new((0..i % 7).collect(), (0..11 + i).collect())
            })
            .collect();
        let mut writer = TokenWriter::new(folder.path()).unwrap();
        for item in &items {
            writer.push(item).unwrap();
        }
        let file = writer.finish().unwrap();
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0);
        let file = Items::from(Arc::new(file));
        assert_eq!(file.len(), items.len());
        for at in [49, 3, 0, 21] {
            assert_eq!(file.get(at).unwrap(), items[at]);
            assert_eq!(file.row_tokens(at).unwrap(), items[at].row_tokens());
        }
        let longest = items.iter().map(Item::row_tokens).max().unwrap();
        assert_eq!(file.longer_than(longest), None);
        assert_eq!(file.longer_than(longest - 1).unwrap().1, longest);
        assert!(file.get(50).is_err());
    }
}
