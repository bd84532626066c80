//! Records, branches and token bits; inputs are checked by `crate::score`.

use std::sync::Arc;

use crate::backend::NotFinite;
use crate::cuda::device::{Buffer, Device, count};
use crate::cuda::logits::Logits;
use crate::cuda::raw::{self, NONE, ScoreRow, Unit, WARPS};
use crate::cuda::rows::{Plan, RowsError, Sums, suffix};
use crate::cuda::tries::ResidentTrie;
use crate::error::{CudaError, ScoreError};
use crate::records::{RecordShape, Records};
use crate::score::{Branch, Missed};
use crate::vocab::Vocab;

impl From<RowsError> for ScoreError {
    fn from(error: RowsError) -> Self {
        match error {
            RowsError::NotFinite(cell) => cell.into(),
            RowsError::Cuda(error) => error.into(),
        }
    }
}

/// Rows of several items, ready to be scored: everything but the logits' values is on the device.
pub struct Scoring<'d> {
    device: &'d Device,
    _trie: Arc<ResidentTrie>,
    kernel: cudarc::driver::CudaFunction,
    shared: u32,
    sums: Sums,
    logits: &'d Logits,
    score: Buffer<ScoreRow>,
    layout: Layout,
}

impl std::fmt::Debug for Scoring<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Scoring")
            .field("rows", &self.sums.job.count)
            .finish_non_exhaustive()
    }
}

/// Where the rows' positions go.
struct Layout {
    rows: Vec<ScoreRow>,
    /// Observed byte of every position, 256 at the end of an item.
    observed: Vec<u32>,
    /// Positions of every item.
    items: Vec<usize>,
}

impl Layout {
    fn new(vocab: &Vocab, items: &[&[u32]]) -> Result<Self, CudaError> {
        let mut layout = Self {
            rows: Vec::new(),
            observed: Vec::new(),
            items: Vec::with_capacity(items.len()),
        };
        for tokens in items {
            let start = layout.observed.len();
            for (index, token) in tokens.iter().map(Some).chain([None]).enumerate() {
                let bytes = token.map_or(&[][..], |&rank| vocab.token_bytes(rank));
                let row = ScoreRow {
                    position: count(layout.observed.len())?,
                    bytes: count(bytes.len())?,
                    previous: if index == 0 {
                        NONE
                    } else {
                        count(layout.rows.len())? - 1
                    },
                    padding: 0,
                };
                layout.rows.push(row);
                layout
                    .observed
                    .extend(bytes.iter().map(|&byte| u32::from(byte)));
            }
            layout.observed.push(256);
            layout.items.push(layout.observed.len() - start);
        }
        Ok(layout)
    }
}

/// Branches of several items and the rows after them.
#[derive(Clone, Copy, Debug)]
pub struct BranchRows<'a> {
    /// Branches of every item, in order.
    pub branches: &'a [&'a [Branch]],
    /// One row per branch, item by item.
    pub logits: &'a Logits,
}

impl<'d> Scoring<'d> {
    /// `items` are the ranks of every item's tokens, `logits` their rows, `m + 1` for an item of m tokens.
    ///
    /// # Errors
    /// Where the rows are beyond the kernels' limits, or the device fails.
    pub fn new(
        device: &'d Device,
        vocab: &Vocab,
        items: &[&[u32]],
        logits: &'d Logits,
    ) -> Result<Self, ScoreError> {
        for tokens in items {
            let wrong = |&(_, &rank): &(usize, &u32)| rank >= vocab.byte_tokens();
            if let Some((position, &rank)) = tokens.iter().enumerate().find(wrong) {
                return Err(ScoreError::NotAByteToken { position, rank });
            }
        }
        let trie = device.trie(vocab)?;
        let tokens = items
            .iter()
            .flat_map(|tokens| tokens.iter().copied().map(Some).chain([None]));
        let plan = Plan::new(tokens.map(|token| trie.path(token)))?;
        check_size(logits, plan.len(), vocab)?;
        let place = (logits.address(), vocab.len());
        let sums = Sums::new(device, vocab, &trie, &plan, logits.dtype(), place)?;
        let layout = Layout::new(vocab, items)?;
        let (kernel, shared) = sum_kernel(device, &sums, logits)?;
        Ok(Self {
            device,
            _trie: trie,
            kernel,
            shared,
            sums,
            logits,
            score: device.upload(&layout.rows)?,
            layout,
        })
    }

    /// Starts summing the rows: one read of the logits.
    ///
    /// # Errors
    /// Where the device fails.
    pub fn sum(&self) -> Result<(), CudaError> {
        self.sums.reset(self.device)?;
        run_sums(self.device, &self.kernel, self.shared, &self.sums)
    }

    /// Interior stops of every item above a threshold, after [`Self::sum`].
    ///
    /// # Errors
    /// Where a logit is not finite, or the device fails.
    pub fn branches(&self, threshold: f32) -> Result<Vec<Vec<Branch>>, ScoreError> {
        self.sums.check(self.device)?;
        let positions = self.layout.observed.len();
        let found = self.device.filled::<u32>(positions, 0xff)?;
        let name = format!("find_branches_{}", suffix(self.logits.dtype()));
        let job = raw::Branches {
            rows: self.sums.job,
            score: self.score.address(),
            found: found.address(),
            threshold,
            padding: 0,
        };
        self.per_row(&name, &job)?;
        let found = self.device.download(&found, positions)?;
        let mut items = Vec::with_capacity(self.layout.items.len());
        let mut rows = self.layout.rows.iter().peekable();
        let mut start = 0;
        for &length in &self.layout.items {
            let mut branches = Vec::new();
            let mut position = 0;
            while let Some(row) = rows.next_if(|row| (row.position as usize) < start + length) {
                for taken in 1..row.bytes {
                    let rank = found[(row.position + taken) as usize];
                    if rank != NONE {
                        branches.push(Branch {
                            position,
                            taken,
                            rank,
                        });
                    }
                }
                position += 1;
            }
            start += length;
            items.push(branches);
        }
        Ok(items)
    }

    /// Bits of every item's tokens and end, after [`Self::sum`].
    ///
    /// # Errors
    /// Where a logit is not finite, or the device fails.
    pub fn token_bits(&self) -> Result<Vec<f64>, ScoreError> {
        self.sums.check(self.device)?;
        let rows = self.layout.rows.len();
        let bits = self.device.allocate::<f64>(rows)?;
        let job = raw::TokenBits {
            rows: self.sums.job,
            bits: bits.address(),
        };
        self.per_row("token_bits", &job)?;
        let bits = self.device.download(&bits, rows)?;
        let mut sums = Vec::with_capacity(self.layout.items.len());
        for (row, bits) in self.layout.rows.iter().zip(bits) {
            if row.previous == NONE {
                sums.push(0.0);
            }
            if let Some(sum) = sums.last_mut() {
                *sum += bits;
            }
        }
        Ok(sums)
    }

    /// Appends the positions of all items to `out`, after [`Self::sum`].
    ///
    /// # Errors
    /// Where a logit is not finite, or the device fails; `out` is then unchanged.
    pub fn records(
        &self,
        vocab: &Vocab,
        branches: Option<BranchRows<'_>>,
        shape: &RecordShape,
        out: &mut Records,
    ) -> Result<Vec<Missed>, ScoreError> {
        let device = self.device;
        self.sums.check(device)?;
        let branch_sums = branches
            .map(|branches| self.sum_branches(vocab, branches))
            .transpose()?;
        let expansion = self.expansion(branches)?;
        let positions = self.layout.observed.len();
        let observed = device.upload(&self.layout.observed)?;
        let expansion = device.upload(&expansion)?;
        let slots = positions * shape.k;
        let (symbols, codes) = (device.allocate::<u8>(slots)?, device.allocate::<u8>(slots)?);
        let (end, tail) = (
            device.allocate::<u8>(positions)?,
            device.allocate::<u8>(positions)?,
        );
        let missed = device.filled::<f64>(positions, 0)?;
        let job = raw::Output {
            rows: self.sums.job,
            branches: branch_sums.as_ref().map_or(self.sums.job, |sums| sums.job),
            score: self.score.address(),
            branch: expansion.address(),
            observed: observed.address(),
            slots: count(shape.k)?,
            fill_permille: shape.fill_permille,
            symbols: symbols.address(),
            codes: codes.address(),
            end: end.address(),
            tail: tail.address(),
            missed: missed.address(),
        };
        let kernel = device.kernel(Unit::Score, "write_records", 0)?;
        // SAFETY: the job of `write_records`: one block per row, columns with one entry per position (and slot), all
        // held by this function until the download below has waited.
        unsafe { device.launch(&kernel, (self.sums.job.count, 1), 0, &job) }?;
        let records = Records::from_columns(
            shape.k,
            device.download(&symbols, slots)?,
            device.download(&codes, slots)?,
            device.download(&end, positions)?,
            device.download(&tail, positions)?,
        )?;
        let missed = device.download(&missed, positions)?;
        out.append(records.view())?;
        Ok(self.missed(&missed))
    }

    /// Branch row of every position, or [`NONE`].
    fn expansion(&self, branches: Option<BranchRows<'_>>) -> Result<Vec<u32>, ScoreError> {
        let mut expansion = vec![NONE; self.layout.observed.len()];
        let Some(BranchRows { branches, .. }) = branches else {
            return Ok(expansion);
        };
        let mut first_rows = (0_usize..)
            .zip(&self.layout.rows)
            .filter(|(_, row)| row.previous == NONE);
        let mut index = 0;
        for branches in branches {
            let first = first_rows.next().map_or(0, |(index, _)| index);
            for branch in *branches {
                let row = self.layout.rows.get(first + branch.position as usize);
                let row = row.filter(|row| 0 < branch.taken && branch.taken < row.bytes);
                let row = row.ok_or(ScoreError::Branch { index })?;
                expansion[(row.position + branch.taken) as usize] = count(index)?;
                index += 1;
            }
        }
        Ok(expansion)
    }

    fn sum_branches(&self, vocab: &Vocab, branches: BranchRows<'_>) -> Result<Sums, ScoreError> {
        let trie = self.device.trie(vocab)?;
        let rows = branches
            .branches
            .iter()
            .map(|branches| branches.len())
            .sum();
        let plan = Plan::new(std::iter::repeat_n(trie.path(None), rows))?;
        check_size(branches.logits, rows, vocab)?;
        let place = (branches.logits.address(), vocab.len());
        let sums = Sums::new(
            self.device,
            vocab,
            &trie,
            &plan,
            branches.logits.dtype(),
            place,
        )?;
        let (kernel, shared) = sum_kernel(self.device, &sums, branches.logits)?;
        run_sums(self.device, &kernel, shared, &sums)?;
        match sums.check(self.device) {
            Ok(()) => Ok(sums),
            Err(RowsError::NotFinite(NotFinite { row, column })) => {
                Err(ScoreError::BranchNotFinite { row, column })
            }
            Err(RowsError::Cuda(error)) => Err(error.into()),
        }
    }

    fn missed(&self, missed: &[f64]) -> Vec<Missed> {
        let mut items = Vec::with_capacity(self.layout.items.len());
        let mut means = [(0.0, 0_u32); 2];
        for row in &self.layout.rows {
            let first = row.position as usize;
            if row.bytes > 0 && row.previous != NONE {
                means[1].0 += missed[first];
                means[1].1 += 1;
            }
            for taken in 1..row.bytes as usize {
                means[0].0 += missed[first + taken];
                means[0].1 += 1;
            }
            if row.bytes == 0 {
                let [short, long] = means.map(mean);
                items.push(Missed { short, long });
                means = [(0.0, 0); 2];
            }
        }
        items
    }

    /// Runs a kernel of one warp per row.
    fn per_row<J: cudarc::driver::DeviceRepr>(&self, name: &str, job: &J) -> Result<(), CudaError> {
        let kernel = self.device.kernel(Unit::Score, name, 0)?;
        let blocks = self.sums.job.count.div_ceil(WARPS);
        // SAFETY: both kernels of one warp per row take rows that are summed, and a result with an entry per row or
        // position, which the callers hold until they have downloaded it.
        unsafe { self.device.launch(&kernel, (blocks, 1), 0, job) }
    }
}

#[expect(clippy::cast_possible_truncation, reason = "a share, reported as f32")]
fn mean((sum, count): (f64, u32)) -> f32 {
    if count == 0 {
        0.0
    } else {
        (sum / f64::from(count)) as f32
    }
}

fn check_size(logits: &Logits, rows: usize, vocab: &Vocab) -> Result<(), ScoreError> {
    let (got, expected) = (logits.len(), rows * vocab.len());
    if got == expected {
        Ok(())
    } else {
        Err(ScoreError::Length {
            what: "logits",
            got,
            expected,
        })
    }
}

fn sum_kernel(
    device: &Device,
    sums: &Sums,
    logits: &Logits,
) -> Result<(cudarc::driver::CudaFunction, u32), CudaError> {
    let shared = 8 * sums.job.most_segments + sums.shared();
    let name = format!("sum_rows_{}", suffix(logits.dtype()));
    Ok((device.kernel(Unit::Score, &name, shared)?, shared))
}

fn run_sums(
    device: &Device,
    kernel: &cudarc::driver::CudaFunction,
    shared: u32,
    sums: &Sums,
) -> Result<(), CudaError> {
    let blocks = sums
        .job
        .count
        .checked_mul(sums.job.slices)
        .ok_or(CudaError::Unsupported {
            what: "more than 2^32 - 1 slices of rows",
        })?;
    // SAFETY: the job of `sum_rows`: as many logits as rows (checked where the job was made), a block per slice, and
    // memory for the sums of every segment, all held by `sums` and by the owner of the logits.
    unsafe { device.launch(kernel, (blocks, 1), shared, &sums.job) }
}
