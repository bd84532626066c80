//! Score jobs of the spool, one at a time, kept in parts so that a restart loses little.

use std::collections::BTreeMap;
use std::ops::Range;
use std::path::PathBuf;
use std::time::Duration;

use consilium_kernels::{RecordShape, RecordView};
use consilium_protocol::manifest::SymbolSpace;
use consilium_protocol::reference::ReferenceSet;
use consilium_protocol::shard::{Shard, Symbols};
use consilium_protocol::time::SystemClock;
use consilium_protocol::{Clock as _, Digest, limits};

use super::error::ScorerError;
use super::probe::{Probed, probe};
use super::score::{Asking, score_items, score_token_items};
use super::server::{Server, Stop};
use super::settings::ServerSettings;
use super::source::Source;
use crate::error::with_causes;
use crate::spool::{Job, JobId, Outcome, ScoreJob, Spool};
use crate::worker::jobs::check_symbols;
use crate::worker::progress::Terminal;
use crate::worker::reference::ReferenceCache;
use crate::worker::score::{ShardBuilder, bits, items_in};
use crate::worker::tokens::check_tokenizer;
use crate::worker::{Monitor as _, WorkError};

/// Begins the name of every part in the spool's state.
const PART: &str = "scored-";
/// Wait before the second try of a request.
const WAIT: Duration = Duration::from_secs(1);

/// All that the scorer is given. There is no path of private data among it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ScorerSettings {
    /// The spool that the node's processes share.
    pub spool: PathBuf,
    /// Folder with the source's `config.json` and tokenizer; weights are not read.
    pub source: PathBuf,
    /// Whether the source's chat template wraps the contexts of items.
    pub chat_template: bool,
    /// The server.
    pub server: ServerSettings,
}

/// A job's artefact and the numbers that go with it.
type Done = (Digest, BTreeMap<String, f64>);

/// Does score jobs through the server.
#[derive(Debug)]
pub struct Scorer {
    spool: Spool,
    source: Source,
    server: Server,
    /// Names what parts were scored with: parts of other settings are not taken.
    identity: String,
    asking: Asking,
    is_probed: bool,
    reference: ReferenceCache,
}

impl Scorer {
    /// A scorer that has asked nothing yet.
    ///
    /// # Errors
    /// The spool or the folder of the source cannot be used, or a file of the settings.
    pub fn new(settings: &ScorerSettings) -> Result<Self, ScorerError> {
        Self::with_wait(settings, WAIT)
    }

    /// As [`new`](Self::new), with another wait before the second try of a request.
    ///
    /// # Errors
    /// As [`new`](Self::new).
    pub fn with_wait(settings: &ScorerSettings, wait: Duration) -> Result<Self, ScorerError> {
        let source = Source::load(&settings.source, settings.chat_template)?;
        let server = &settings.server;
        // A vocabulary smaller than the list is listed whole.
        let rows = u32::try_from(source.vocab.len()).unwrap_or(u32::MAX);
        let asking = Asking {
            top: server.top.min(rows),
            max_tokens: server.max_tokens,
        };
        let url = server.url.to_string();
        let frame = source.frame()?;
        let identity = [
            server.kind.name().as_bytes(),
            url.as_bytes(),
            server.model.as_deref().unwrap_or_default().as_bytes(),
            &asking.top.to_le_bytes(),
            &asking.max_tokens.to_le_bytes(),
            source.tokenizer.source(),
            frame.as_bytes(),
        ];
        let identity = Digest::of(&identity.join(&0)).to_string();
        Ok(Self {
            spool: Spool::open(&settings.spool)?,
            server: Server::new(server, wait)?,
            source,
            identity: identity.chars().take(16).collect(),
            asking,
            is_probed: false,
            reference: ReferenceCache::default(),
        })
    }

    /// The spool.
    #[must_use]
    pub const fn spool(&self) -> &Spool {
        &self.spool
    }

    /// Requests that were sent so far.
    #[must_use]
    pub fn requests(&self) -> u64 {
        self.server.requests()
    }

    /// Asks the server about three tokens.
    ///
    /// # Errors
    /// What it lacks, with the flag that gives it.
    pub fn probe(&mut self, stop: Stop<'_>) -> Result<Probed, ScorerError> {
        let probed = probe(&self.server, &self.source, self.asking.top, stop)?;
        self.is_probed = true;
        Ok(probed)
    }

    /// Does the next pending score job, if there is one, and says whether there was. A job that cannot be done gets a
    /// result that says so; one that was stopped or withdrawn gets none.
    ///
    /// # Errors
    /// The spool cannot be read or written.
    pub fn work(&mut self, stop: Stop<'_>) -> Result<bool, ScorerError> {
        let own = |job: &Job| matches!(job, Job::Score(_));
        let Some((id, Job::Score(job))) = self.spool.next_job_of(own)? else {
            return Ok(false);
        };
        let started = SystemClock.now();
        tracing::info!(job = %id, server = self.server.url(), "begins");
        let spool = self.spool.clone();
        let ends = || stop() || !spool.is_wanted(&id);
        let result = self.score(&id, &job, &ends);
        let seconds = SystemClock.now().since(started).as_secs_f64();
        let outcome = match result {
            Ok((artefact, notes)) => {
                tracing::info!(job = %id, seconds, %artefact, "done");
                Outcome::Done {
                    artefact,
                    seconds,
                    notes,
                }
            }
            Err(ScorerError::Stopped | ScorerError::Work(WorkError::Stopped)) => {
                tracing::info!(job = %id, "stopped");
                return Ok(true);
            }
            Err(error) => {
                let problem = with_causes(&error);
                // The server may be another one by the next try.
                self.is_probed = false;
                tracing::warn!(job = %id, problem, "failed");
                Outcome::Failed { problem }
            }
        };
        if self.spool.is_wanted(&id) {
            self.spool.finish(&id, &outcome)?;
            if matches!(outcome, Outcome::Done { .. }) {
                self.remove_parts(|_| true)?;
            }
        }
        Ok(true)
    }

    fn score(&mut self, id: &JobId, job: &ScoreJob, stop: Stop<'_>) -> Result<Done, ScorerError> {
        check_symbols(job.symbols, self.source.hidden_size)?;
        let reference = self.reference.read(&self.spool, &job.reference)?;
        let items = items_in(&reference, &job.items)?;
        let shape = RecordShape {
            k: job.symbols.into(),
            fill_permille: job.fill_permille.into(),
        };
        let space = job.symbol_space;
        check_tokenizer(&self.source.tokenizer, "the source", space)?;
        let mut shard = ShardBuilder::new(job.reference, job.items.clone(), space, &shape)?;
        let prefix = format!("{PART}{}-{id}-", self.identity);
        self.remove_parts(|name| !name.starts_with(&prefix))?;
        let mut terminal = Terminal::new("items");
        let total = items.len() as u64;
        let mut tally = Tally::default();
        let mut first = job.items.start;
        while first < job.items.end {
            if stop() {
                return Err(ScorerError::Stopped);
            }
            let name = format!("{prefix}{first}");
            let part = match self.kept_part(&name, job, first)? {
                Some(part) => part,
                None => {
                    if !self.is_probed {
                        self.probe(stop)?;
                    }
                    let last = first.saturating_add(self.server.width() as u64);
                    let range = first..last.min(job.items.end);
                    let part =
                        self.score_part((&reference, space), range, &shape, &mut tally, stop)?;
                    self.spool.write_state(&name, &part.to_bytes()?)?;
                    part
                }
            };
            first = part.header.last;
            shard.append_part(&part);
            let done = first.saturating_sub(job.items.start);
            terminal.advance(done, total, tally.bits_per_byte())?;
        }
        let bytes = checked(&shard.finish(), &shape)?;
        let artefact = self.spool.put_blob(&bytes)?;
        Ok((artefact, tally.notes(total)))
    }

    fn score_part(
        &self,
        (reference, space): (&ReferenceSet, SymbolSpace),
        items: Range<u64>,
        shape: &RecordShape,
        tally: &mut Tally,
        stop: Stop<'_>,
    ) -> Result<Shard, ScorerError> {
        let chosen = items_in(reference, &items)?;
        let asking = self.asking;
        let mut part = ShardBuilder::new(reference.digest(), items.clone(), space, shape)?;
        tally.items += chosen.len();
        match space {
            SymbolSpace::Bytes => {
                let scored = score_items(&self.source, &self.server, chosen, asking, shape, stop)?;
                part.append(chosen, scored.records.view(), &scored.missed);
                tally.positions += part.positions();
                tally.tokens += scored.tokens;
                tally.branches += scored.branches;
                tally.bits += scored.bits;
            }
            SymbolSpace::Tokens { .. } => {
                let chosen_from = (items.start, chosen);
                let scored = score_token_items(
                    &self.source,
                    &self.server,
                    chosen_from,
                    asking,
                    shape,
                    stop,
                )?;
                for (item, record) in chosen.iter().zip(&scored.records) {
                    part.append_tokens(record.view());
                    tally.positions += item.positions();
                    tally.bits += bits(item, record.view(), space)?;
                }
                tally.tokens += scored.tokens;
            }
        }
        Ok(part.finish())
    }

    /// A part from before, if it is one of this job and begins at this item.
    fn kept_part(
        &self,
        name: &str,
        job: &ScoreJob,
        first: u64,
    ) -> Result<Option<Shard>, ScorerError> {
        let Some(bytes) = self.spool.read_state(name, limits::SHARD)? else {
            return Ok(None);
        };
        let fits = |part: &Shard| {
            let header = &part.header;
            let length = header.last.saturating_sub(header.first);
            header.reference == job.reference
                && (header.space, header.symbols) == (job.symbol_space, job.symbols)
                && header.first == first
                && (1..=job.items.end.saturating_sub(first)).contains(&length)
        };
        Ok(Shard::parse(&bytes).ok().filter(fits))
    }

    fn remove_parts(&self, which: impl Fn(&str) -> bool) -> Result<(), ScorerError> {
        for name in self.spool.states_named(PART)? {
            if which(&name) {
                self.spool.remove_state(&name)?;
            }
        }
        Ok(())
    }
}

/// What the items of this run took; those of parts from before are not in it.
#[derive(Debug, Default)]
struct Tally {
    items: usize,
    positions: usize,
    tokens: usize,
    branches: usize,
    bits: f64,
}

impl Tally {
    fn bits_per_byte(&self) -> Option<f64> {
        (self.positions > 0).then(|| self.bits / self.positions as f64)
    }

    fn notes(&self, total: u64) -> BTreeMap<String, f64> {
        let kept = total.saturating_sub(self.items as u64);
        let mut notes = BTreeMap::from([
            ("tokens".to_owned(), self.tokens as f64),
            ("kept_items".to_owned(), kept as f64),
        ]);
        if let Some(bits) = self.bits_per_byte() {
            notes.insert("bits_per_byte".to_owned(), bits);
            let share = self.branches as f64 / self.tokens.max(1) as f64;
            notes.insert("branches_per_token".to_owned(), share);
        }
        notes
    }
}

/// The bytes of a shard that passes the checks with which an aggregator admits it.
fn checked(shard: &Shard, shape: &RecordShape) -> Result<Vec<u8>, ScorerError> {
    let bytes = shard.to_bytes()?;
    let (codes, end, tail) = (&shard.codes, &shard.end, &shard.tail);
    match &shard.symbols {
        Symbols::Bytes(symbols) => {
            RecordView::new(shape.k, symbols, codes, end, tail)?.check_mass()?;
        }
        Symbols::Tokens(symbols) => {
            RecordView::new(shape.k, symbols, codes, &[], tail)?.check_mass()?;
        }
    }
    Ok(bytes)
}
