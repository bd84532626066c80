//! From files to items on disk, in one pass and bounded memory.

use std::path::Path;
use std::sync::Arc;

use consilium_protocol::Digest;
use rand::{Rng as _, SeedableRng as _};
use rand_chacha::ChaCha12Rng;
use rayon::prelude::*;
use serde::Serialize;

use super::DataError;
use super::encode::Encoder;
use super::fit::{Fit, LongItems, fit};
use super::item::Item;
use super::read::{BadRows, Placed, Source};
use super::store::{TokenFile, TokenWriter};

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
    /// Bad records that may be skipped.
    pub max_bad_rows: u64,
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

impl Counts {
    /// Adds those of another source.
    pub fn add(&mut self, other: &Self) {
        let Self {
            files,
            records,
            bad,
            held_out,
            shortened,
            broken,
            items,
            tokens,
            learned,
            text_bytes,
        } = other;
        self.files += files;
        self.records += records;
        self.bad += bad;
        self.held_out += held_out;
        self.shortened += shortened;
        self.broken += broken;
        self.items += items;
        self.tokens += tokens;
        self.learned += learned;
        self.text_bytes += text_bytes;
    }
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
        let both = [
            self.train.digest().to_string(),
            self.held_out.digest().to_string(),
        ];
        Digest::of(both.concat().as_bytes())
    }
}

/// Reads all records of a source, tokenises them on all threads, fits them into rows and keeps them in a folder, in files
/// without a name. `watch` sees what was found so far.
///
/// # Errors
/// Bad files, more bad records than allowed, a full disk, nothing to train on, or what `watch` gives.
pub fn prepare<E: From<DataError>>(
    source: &Source,
    encoder: &Encoder<'_>,
    how: &Preparation,
    folder: &Path,
    watch: impl FnMut(&Counts) -> Result<(), E>,
) -> Result<Dataset, E> {
    let writers = Some([TokenWriter::new(folder)?, TokenWriter::new(folder)?]);
    let sink = run(source, encoder, how, writers, watch)?;
    let [train, held_out] = match sink.writers {
        Some(writers) => writers.map(TokenWriter::finish),
        None => return Err(DataError::Empty.into()),
    };
    Ok(Dataset {
        train: Arc::new(train?),
        held_out: Arc::new(held_out?),
        counts: sink.counts,
    })
}

/// As [`prepare`], but keeps nothing.
///
/// # Errors
/// As [`prepare`].
pub fn count<E: From<DataError>>(
    source: &Source,
    encoder: &Encoder<'_>,
    how: &Preparation,
    watch: impl FnMut(&Counts) -> Result<(), E>,
) -> Result<Counts, E> {
    Ok(run(source, encoder, how, None, watch)?.counts)
}

fn run<'a, E: From<DataError>>(
    source: &Source,
    encoder: &Encoder<'_>,
    how: &'a Preparation,
    writers: Option<[TokenWriter; 2]>,
    mut watch: impl FnMut(&Counts) -> Result<(), E>,
) -> Result<Sink<'a>, E> {
    let mut sink = Sink {
        how,
        writers,
        choice: ChaCha12Rng::seed_from_u64(how.seed),
        counts: Counts::default(),
    };
    let mut bad = BadRows::up_to(how.max_bad_rows);
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
        let text = sink.counts.text_bytes + bytes as u64;
        Ok::<bool, E>(how.at_most.is_none_or(|most| text < most))
    })?;
    sink.take(source, encoder, &mut waiting, &mut bad)?;
    sink.counts.bad = bad.count();
    watch(&sink.counts)?;
    if sink.counts.items == 0 {
        let records = sink.counts.records;
        return Err(DataError::NothingLeft { records }.into());
    }
    Ok(sink)
}

/// Where items go.
struct Sink<'a> {
    how: &'a Preparation,
    /// Items to train on, and those held out.
    writers: Option<[TokenWriter; 2]>,
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
            let Some([_, held_out]) = &mut self.writers else {
                return Ok(());
            };
            return pieces.iter().try_for_each(|piece| held_out.push(piece));
        }
        for piece in &pieces {
            counts.items += 1;
            counts.tokens += piece.row_tokens() as u64;
            counts.learned += piece.labels() as u64;
            if let Some([train, _]) = &mut self.writers {
                train.push(piece)?;
            }
        }
        Ok(())
    }
}
