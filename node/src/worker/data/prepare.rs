//! From files to items on disk, in one pass and bounded memory.

use std::path::Path;
use std::sync::Arc;

use consilium_protocol::Digest;
use rand::{Rng as _, SeedableRng as _};
use rand_chacha::ChaCha12Rng;
use rayon::prelude::*;
use serde::Serialize;

use super::encode::Encoder;
use super::fit::{Fit, LongItems, fit};
use super::item::Item;
use super::read::{BadRows, Placed, Source};
use super::store::{TokenFile, TokenWriter};
use super::DataError;

/// Records that are tokenised at once, and the bytes of text they may have together.
const RECORDS: usize = 512;
const BYTES: usize = 4 << 20;

/// What is made of the records.
#[derive(Debug, Clone, Copy)]
pub struct Preparation {
    /// Longest item, in row tokens.
    pub length: usize,
    /// What becomes of longer ones.
    pub long: LongItems,
    /// Share of the records that is held out for evaluation, 0 to below 1.
    pub held_out: f64,
    /// Seed of the choice of these.
    pub seed: u64,
    /// Bytes of text after which reading stops; all without it.
    pub at_most: Option<u64>,
}

/// What was found.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct Counts {
    /// Files that were read.
    pub files: u64,
    /// Good records.
    pub records: u64,
    /// Bad records that were skipped.
    pub bad: u64,
    /// Records held out.
    pub held_out: u64,
    /// Records whose context lost its beginning.
    pub shortened: u64,
    /// Records that went into several items, or were cut off.
    pub broken: u64,
    /// Items to train on.
    pub items: u64,
    /// Their row tokens.
    pub tokens: u64,
    /// Tokens of them that are learned, ends included.
    pub learned: u64,
    /// Bytes of text that were read.
    pub text_bytes: u64,
}

/// Items to train on and to evaluate with.
#[derive(Debug)]
pub struct Dataset {
    /// Items to train on.
    pub train: Arc<TokenFile>,
    /// Items held out; empty where none are.
    pub held_out: Arc<TokenFile>,
    /// What was found.
    pub counts: Counts,
}

impl Dataset {
    /// Digest of all items and of their division: the same digest means the same training.
    #[must_use]
    pub fn digest(&self) -> Digest {
        let both = [self.train.digest().to_string(), self.held_out.digest().to_string()];
        Digest::of(both.concat().as_bytes())
    }
}

/// Reads all records of a source, tokenises them on all threads, fits them into rows and keeps them in a folder, in files
/// without a name. `watch` sees the bytes of text that were read so far.
///
/// # Errors
/// Bad files, more bad records than allowed, a full disk, nothing to train on, or what `watch` gives.
pub fn prepare<E: From<DataError>>(
    source: &Source,
    encoder: &Encoder<'_>,
    how: &Preparation,
    max_bad_rows: u64,
    folder: &Path,
    mut watch: impl FnMut(&Counts) -> Result<(), E>,
) -> Result<Dataset, E> {
    let mut sink = Sink {
        how,
        train: TokenWriter::new(folder)?,
        held_out: TokenWriter::new(folder)?,
        choice: ChaCha12Rng::seed_from_u64(how.seed),
        counts: Counts::default(),
    };
    let mut bad = BadRows::up_to(max_bad_rows);
    let mut waiting: Vec<Placed> = Vec::new();
    let (mut bytes, mut last_file) = (0, None);
    source.read(&mut bad, |bad, placed| {
        if last_file != Some(placed.file) {
            last_file = Some(placed.file);
            sink.counts.files += 1;
        }
        bytes += placed.row.bytes();
        waiting.push(placed);
        if waiting.len() >= RECORDS || bytes >= BYTES {
            sink.take(source, encoder, &mut waiting, bad)?;
            bytes = 0;
            watch(&sink.counts)?;
        }
        Ok::<bool, E>(how.at_most.is_none_or(|most| sink.counts.text_bytes + (bytes as u64) < most))
    })?;
    sink.take(source, encoder, &mut waiting, &mut bad)?;
    sink.counts.bad = bad.count();
    watch(&sink.counts)?;
    let counts = sink.counts;
    if counts.items == 0 {
        return Err(DataError::NothingLeft {
            records: counts.records,
        }
        .into());
    }
    Ok(Dataset {
        train: Arc::new(sink.train.finish()?),
        held_out: Arc::new(sink.held_out.finish()?),
        counts,
    })
}

/// Where items go.
struct Sink<'a> {
    how: &'a Preparation,
    train: TokenWriter,
    held_out: TokenWriter,
    choice: ChaCha12Rng,
    counts: Counts,
}

impl Sink<'_> {
    fn take(
        &mut self,
        source: &Source,
        encoder: &Encoder<'_>,
        waiting: &mut Vec<Placed>,
        bad: &mut BadRows,
    ) -> Result<(), DataError> {
        let items: Vec<Result<Item, String>> = waiting
            .par_iter()
            .map(|placed| encoder.item(&placed.row))
            .collect();
        for (placed, item) in waiting.drain(..).zip(items) {
            self.counts.text_bytes += placed.row.bytes() as u64;
            match item {
                Ok(item) => self.keep(item)?,
                Err(reason) => bad.skip(source.path(placed.file), placed.place, reason)?,
            }
        }
        Ok(())
    }

    fn keep(&mut self, item: Item) -> Result<(), DataError> {
        let counts = &mut self.counts;
        counts.records += 1;
        // Drawn for every record, so that the choice depends on the record's number alone. 2^-53 steps are exact.
        let draw = (self.choice.next_u64() >> 11) as f64 / (1_u64 << 53) as f64;
        let is_held_out = draw < self.how.held_out;
        let mut pieces = Vec::new();
        match fit(item, self.how.length, self.how.long, &mut pieces) {
            Fit::Whole => {}
            Fit::Shortened => counts.shortened += 1,
            Fit::Broken => counts.broken += 1,
        }
        if is_held_out {
            counts.held_out += 1;
            return pieces.iter().try_for_each(|piece| self.held_out.push(piece));
        }
        for piece in &pieces {
            counts.items += 1;
            counts.tokens += piece.row_tokens() as u64;
            counts.learned += piece.labels() as u64;
            self.train.push(piece)?;
        }
        Ok(())
    }
}
