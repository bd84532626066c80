//! Losses in place; inputs are checked by `crate::loss`.

use std::ops::Range;
use std::sync::Arc;

use crate::cuda::device::{Buffer, Device, count};
use crate::cuda::logits::Logits;
use crate::cuda::raw::{self, LEVEL_STATE, LossRow, NONE, TERM_LABEL, TERM_TRIE, Unit};
use crate::cuda::rows::{Plan, RowsError, Sums, suffix, width_of};
use crate::cuda::tries::{Path, ResidentTrie};
use crate::element::Dtype;
use crate::error::{CudaError, LossError};
use crate::loss::{self, ItemLoss, NO_LABEL, Place, Term, check_length, probability};
use crate::records::RecordView;
use crate::vocab::Vocab;

impl From<RowsError> for LossError {
    fn from(error: RowsError) -> Self {
        match error {
            RowsError::NotFinite(cell) => cell.into(),
            RowsError::Cuda(error) => error.into(),
        }
    }
}

/// Bytes of logits between a row's sums and its gradient. More than the second-level cache holds, because working out the
/// coefficients takes longer than reading what fits: on an H100 (50 MB) 16 MiB were slower in every shape measured.
const LAG_BYTES: usize = 96 << 20;

/// Terms of the rows of one launch, as they cross to the device.
#[derive(Default)]
struct Terms {
    rows: Vec<LossRow>,
    terms: Vec<raw::Term>,
    columns: Vec<u8>,
    /// Most slots that a term has along one row's token.
    most_listed: u32,
}

/// The loss of rows on the device, ready to run.
pub struct LossJob<'d> {
    device: &'d Device,
    _trie: Arc<ResidentTrie>,
    kernel: cudarc::driver::CudaFunction,
    shared: u32,
    blocks: u32,
    sums: Sums,
    job: raw::Loss,
    losses: Buffer<f64>,
    ready: Buffer<u32>,
    ticket: Buffer<u32>,
    _coefficients: Buffer<raw::Mass>,
    _inputs: (Buffer<LossRow>, Buffer<raw::Term>, Buffer<u8>, Buffer<f32>),
}

impl std::fmt::Debug for LossJob<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("LossJob")
            .field("rows", &self.sums.job.count)
            .finish_non_exhaustive()
    }
}

/// Where logits are and where their gradient goes.
#[derive(Clone, Copy, Debug)]
pub(super) struct Places {
    pub(super) logits: (raw::Address, Dtype),
    pub(super) gradient: (raw::Address, Dtype),
    /// Elements from row to row, of both.
    pub(super) stride: usize,
    /// Factor of the gradient.
    pub(super) scale: f32,
}

impl<'d> LossJob<'d> {
    /// `logits` are the rows of all items, m + 1 for an item of m tokens; [`Self::run`] overwrites them.
    ///
    /// # Errors
    /// Where a label is on no node along its row's token (the CPU computes those), or the device fails.
    pub fn new(
        device: &'d Device,
        vocab: &Vocab,
        items: &[ItemLoss<'_>],
        logits: &'d mut Logits,
    ) -> Result<Self, LossError> {
        let rows = rows_of(vocab, items)?;
        check_length(
            "logits",
            logits.len(),
            rows.len().saturating_mul(vocab.len()),
        )?;
        let place = (logits.address(), logits.dtype());
        let places = Places {
            logits: place,
            gradient: place,
            stride: vocab.len(),
            scale: 1.0,
        };
        Ok(Self::of_rows(device, vocab, &rows, places)?)
    }

    pub(super) fn of_rows(
        device: &'d Device,
        vocab: &Vocab,
        rows: &[RowOf<'_>],
        places: Places,
    ) -> Result<Self, CudaError> {
        let trie = device.trie(vocab)?;
        let (paths, terms) = Terms::of_rows(vocab, &trie, rows)?;
        let plan = Plan::new(paths)?;
        let (logits, dtype) = places.logits;
        let sums = Sums::new(device, vocab, &trie, &plan, dtype, (logits, places.stride))?;
        let (segments, levels) = (sums.job.most_segments, sums.job.most_levels);
        let most_listed = terms.most_listed.next_multiple_of(4);
        let masses = LEVEL_STATE * levels + 8 * (segments + 1) + 4 * (3 * segments);
        let shared = masses + 3 * most_listed + sums.shared();
        let name = if dtype == places.gradient.1 {
            format!("loss_{}", suffix(dtype))
        } else {
            format!("loss_{}_to_{}", suffix(dtype), suffix(places.gradient.1))
        };
        let kernel = device.kernel(Unit::Loss, &name, shared)?;
        let resident = device.resident_blocks(&kernel, shared)?;
        // A gradient follows its row's sums by this many rows and up to twice as many: enough that the coefficients are
        // there in time.
        let row_bytes = places.stride * width_of(dtype);
        let lag = count((LAG_BYTES / row_bytes.max(1)).clamp(1, plan.len().max(1)))?;
        let table: Vec<f32> = (0..=u8::MAX).map(code_probability).collect();
        let inputs = (
            device.upload(&terms.rows)?,
            device.upload(&terms.terms)?,
            device.upload(&terms.columns)?,
            device.upload(&table)?,
        );
        let coefficients = device.allocate(sums.segments)?;
        let losses = device.allocate(plan.len())?;
        let ready = device.allocate(plan.len())?;
        let ticket = device.allocate(1)?;
        let job = raw::Loss {
            rows: sums.job,
            loss_rows: inputs.0.address(),
            terms: inputs.1.address(),
            columns: inputs.2.address(),
            probability: inputs.3.address(),
            gradient: places.gradient.0,
            gradient_stride: places.stride as u64,
            coefficients: coefficients.address(),
            losses: losses.address(),
            ready: ready.address(),
            ticket: ticket.address(),
            lag,
            scale: places.scale,
            most_listed,
            padding: 0,
        };
        Ok(Self {
            device,
            _trie: trie,
            kernel,
            shared,
            blocks: resident,
            sums,
            job,
            losses,
            ready,
            ticket,
            _coefficients: coefficients,
            _inputs: inputs,
        })
    }

    /// Starts the work: logits become the gradient.
    ///
    /// # Errors
    /// Where the device fails.
    pub fn run(&self) -> Result<(), CudaError> {
        self.sums.reset(self.device)?;
        self.device.fill(&self.ready, 0)?;
        self.device.fill(&self.ticket, 0)?;
        // SAFETY: the job of the loss kernels: logits and gradient of `count` rows (checked by whoever made the job),
        // terms that point into `columns`, sums and coefficients for every segment, all held by `self` and its maker.
        unsafe {
            self.device
                .launch(&self.kernel, (self.blocks, 1), self.shared, &self.job)
        }
    }

    /// Waits; the loss of all rows in nats, summed in their order.
    ///
    /// # Errors
    /// Where a logit was not finite, or the device failed.
    pub fn loss(&self) -> Result<f64, LossError> {
        self.sums.check(self.device)?;
        let losses = self
            .device
            .download(&self.losses, self.sums.job.count as usize)?;
        Ok(losses.iter().sum())
    }
}

/// One row of an item.
#[derive(Clone, Copy, Debug)]
pub(super) struct RowOf<'a> {
    item: ItemLoss<'a>,
    place: Place,
}

/// All rows of checked items.
pub(super) fn rows_of<'a>(
    vocab: &'a Vocab,
    items: &'a [ItemLoss<'a>],
) -> Result<Vec<RowOf<'a>>, LossError> {
    let job = loss::LossJob::new(vocab, items)?;
    let rows = (0..job.rows()).map(|row| {
        let (item, place) = job.place(row);
        RowOf { item: *item, place }
    });
    Ok(rows.collect())
}

impl RowOf<'_> {
    fn token(&self, index: usize) -> Option<u32> {
        self.item.tokens.get(index).copied()
    }

    fn has_trie(&self) -> bool {
        self.item
            .terms
            .iter()
            .any(|term| matches!(term, Term::Trie { .. }))
    }

    /// Token along which the row is cut: the observed one where a trie target asks for it, else the label.
    fn path_token(&self, vocab: &Vocab) -> Option<u32> {
        if self.has_trie() {
            return self.token(self.place.index);
        }
        let labels = self.item.terms.iter().filter_map(|term| match term {
            Term::Labels { labels, .. } => labels.get(self.place.index).copied(),
            _ => None,
        });
        labels
            .into_iter()
            .find(|&label| label < vocab.byte_tokens())
    }
}

impl Terms {
    fn of_rows<'t>(
        vocab: &Vocab,
        trie: &'t ResidentTrie,
        rows: &[RowOf<'_>],
    ) -> Result<(Vec<&'t Path>, Self), CudaError> {
        let mut all = Self::default();
        let mut paths = Vec::with_capacity(rows.len());
        for row in rows {
            let path_token = row.path_token(vocab);
            let path = trie.path(path_token);
            let first_term = count(all.terms.len())?;
            for term in row.item.terms {
                match term {
                    Term::Trie { target, weight } => {
                        let positions =
                            path_token.map_or(0, |rank| vocab.token_bytes(rank).len()) + 1;
                        all.trie(
                            target,
                            row.place.offset..row.place.offset + positions,
                            *weight,
                        )?;
                    }
                    Term::Tokens { .. } => {
                        return Err(CudaError::Unsupported {
                            what: "token-space targets",
                        });
                    }
                    Term::Sorted { .. } | Term::Standardised { .. } => {
                        return Err(CudaError::Unsupported {
                            what: "sorted targets",
                        });
                    }
                    Term::Labels { labels, weight } => {
                        let label = labels.get(row.place.index).copied().unwrap_or(NO_LABEL);
                        if let Some(segment) = segment_of(vocab, path, path_token, label)? {
                            all.terms.push(raw::Term {
                                kind: TERM_LABEL,
                                weight: *weight,
                                segment,
                                ..raw::Term::default()
                            });
                        }
                    }
                }
            }
            let first_byte = |index| {
                let token = row.token(index);
                token.map_or(256, |rank| u32::from(vocab.token_bytes(rank)[0]))
            };
            let previous = row
                .place
                .index
                .checked_sub(1)
                .and_then(|index| row.token(index));
            all.rows.push(LossRow {
                first_term,
                terms: count(all.terms.len())? - first_term,
                previous: previous.map_or(NONE, |rank| trie.path(Some(rank)).node),
                first: first_byte(row.place.index),
                next: first_byte(row.place.index + 1),
            });
            paths.push(path);
        }
        Ok((paths, all))
    }

    /// Adds a trie term with its columns at `positions`, which the target has.
    fn trie(
        &mut self,
        target: &RecordView<'_>,
        positions: Range<usize>,
        weight: f32,
    ) -> Result<(), CudaError> {
        let slots = positions.start * target.k()..positions.end * target.k();
        let mut copy = |column: &[u8]| {
            let start = count(self.columns.len());
            self.columns.extend_from_slice(column);
            start
        };
        let term = raw::Term {
            kind: TERM_TRIE,
            weight,
            slots: count(target.k())?,
            symbols: copy(&target.symbols()[slots.clone()])?,
            codes: copy(&target.codes()[slots])?,
            end: copy(&target.end()[positions.clone()])?,
            tail: copy(&target.tail()[positions])?,
            segment: 0,
        };
        self.most_listed = self.most_listed.max(term.codes - term.symbols);
        self.terms.push(term);
        Ok(())
    }
}

/// Segment of a label's class on a row that is cut along `path`; `None` without a label.
fn segment_of(
    vocab: &Vocab,
    path: &Path,
    path_token: Option<u32>,
    label: u32,
) -> Result<Option<u32>, CudaError> {
    if label == NO_LABEL {
        return Ok(None);
    }
    if vocab.end_ranks().contains(&label) {
        return Ok(Some(path.end()));
    }
    if path_token.is_some_and(|token| vocab.token_bytes(token) == vocab.token_bytes(label)) {
        return Ok(Some(path.stop));
    }
    Err(CudaError::Unsupported {
        what: "a label other than the observed token beside a trie target",
    })
}

#[expect(
    clippy::cast_possible_truncation,
    reason = "shares of a target, used in f32"
)]
fn code_probability(code: u8) -> f32 {
    probability(code) as f32
}
