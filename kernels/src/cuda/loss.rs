//! Losses in place; inputs are checked by `crate::loss`.

use std::sync::Arc;

use cudarc::driver::CudaFunction;

use crate::cuda::device::{Buffer, Device, count};
use crate::cuda::logits::Logits;
use crate::cuda::raw::{self, LEVEL_STATE, THREADS, Unit};
use crate::cuda::rows::{Plan, RowsError, Sums, suffix, width_of};
use crate::cuda::terms::{RowOf, Terms, rows_of};
use crate::cuda::tries::ResidentTrie;
use crate::element::Dtype;
use crate::error::{CudaError, LossError};
use crate::loss::{ItemLoss, check_length, probability};
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

/// The loss of rows on the device, ready to run.
pub struct LossJob<'d> {
    device: &'d Device,
    _trie: Arc<ResidentTrie>,
    kernel: CudaFunction,
    shared: u32,
    /// Takes single columns out of the rows, and what it needs of shared memory.
    take: Option<(CudaFunction, u32)>,
    blocks: u32,
    sums: Sums,
    job: raw::Loss,
    losses: Buffer<f64>,
    ready: Buffer<u32>,
    ticket: Buffer<u32>,
    _coefficients: Buffer<raw::Mass>,
    _inputs: Inputs,
}

/// What the kernels read besides the logits.
struct Inputs {
    rows: Buffer<raw::LossRow>,
    terms: Buffer<raw::Term>,
    columns: Buffer<u8>,
    probability: Buffer<f32>,
    slots: Buffer<raw::Slot>,
    classes: Buffer<raw::Class>,
    shares: Buffer<f64>,
}

impl Inputs {
    fn upload(device: &Device, terms: &Terms) -> Result<Self, CudaError> {
        let table: Vec<f32> = (0..=u8::MAX).map(code_probability).collect();
        Ok(Self {
            rows: device.upload(&terms.rows)?,
            terms: device.upload(&terms.terms)?,
            columns: device.upload(&terms.columns)?,
            probability: device.upload(&table)?,
            slots: device.upload(&terms.slots)?,
            classes: device.upload(&terms.classes)?,
            shares: device.upload(&terms.shares)?,
        })
    }
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
    /// Where the inputs are not those of a loss, or the device fails.
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
        let (unit, prefix, single) = if terms.slots.is_empty() {
            (Unit::Loss, "loss", 0)
        } else {
            (Unit::Listed, "listed", 12 * segments)
        };
        let masses = LEVEL_STATE * levels + 8 * (segments + 1) + 4 * (3 * segments) + single;
        let shared = masses + 3 * most_listed + sums.shared();
        let name = if dtype == places.gradient.1 {
            format!("{prefix}_{}", suffix(dtype))
        } else {
            format!(
                "{prefix}_{}_to_{}",
                suffix(dtype),
                suffix(places.gradient.1)
            )
        };
        let kernel = device.kernel(unit, &name, shared)?;
        // As many again as a block reads at a time.
        let candidates = (terms.most_top + 8 * THREADS).next_power_of_two();
        let take = match unit {
            Unit::Listed => {
                let shared = candidates * 8;
                let kernel = device.kernel(unit, &format!("take_{}", suffix(dtype)), shared)?;
                Some((kernel, shared))
            }
            _ => None,
        };
        let resident = device.resident_blocks(&kernel, shared)?;
        // A gradient follows its row's sums by this many rows and up to twice as many: enough that the coefficients are
        // there in time.
        let row_bytes = places.stride * width_of(dtype);
        let lag = count((LAG_BYTES / row_bytes.max(1)).clamp(1, plan.len().max(1)))?;
        let inputs = Inputs::upload(device, &terms)?;
        let coefficients = device.allocate(sums.segments)?;
        let losses = device.allocate(plan.len())?;
        let ready = device.allocate(plan.len())?;
        let ticket = device.allocate(1)?;
        let job = raw::Loss {
            rows: sums.job,
            loss_rows: inputs.rows.address(),
            terms: inputs.terms.address(),
            columns: inputs.columns.address(),
            probability: inputs.probability.address(),
            slots: inputs.slots.address(),
            classes: inputs.classes.address(),
            shares: inputs.shares.address(),
            gradient: places.gradient.0,
            gradient_stride: places.stride as u64,
            coefficients: coefficients.address(),
            losses: losses.address(),
            ready: ready.address(),
            ticket: ticket.address(),
            lag,
            scale: places.scale,
            most_listed,
            candidates,
        };
        Ok(Self {
            device,
            _trie: trie,
            kernel,
            shared,
            take,
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
        if let Some((kernel, shared)) = &self.take {
            // SAFETY: the job of the kernels: a block per row, whose slots and logits nothing else uses meanwhile.
            unsafe {
                let grid = (self.sums.job.count, 1);
                self.device.launch(kernel, grid, *shared, &self.job)
            }?;
        }
        // SAFETY: the job of the loss kernels: logits and gradient of `count` rows (checked by whoever made the job),
        // terms that point into `columns`, `classes` and `shares`, rows that point into `slots`, sums and coefficients for every segment, all held by `self` and its maker.
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

#[expect(
    clippy::cast_possible_truncation,
    reason = "shares of a target, used in f32"
)]
fn code_probability(code: u8) -> f32 {
    probability(code) as f32
}
