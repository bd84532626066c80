//! Records, branches and token bits; inputs are checked by `crate::score`.

use std::ops::Range;
use std::sync::Arc;

use crate::backend::NotFinite;
use crate::cuda::device::{Buffer, Device, count};
use crate::cuda::logits::Logits;
use crate::cuda::raw::{self, Address, NONE, Row, Rows, ScoreRow, Unit, WARPS};
use crate::cuda::rows::{Plan, RowsError, Sums, suffix};
use crate::cuda::tries::{Path, ResidentTrie};
use crate::element::Dtype;
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
    rows: SummedRows<'d>,
    score: Buffer<ScoreRow>,
    layout: Layout,
}

impl std::fmt::Debug for Scoring<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Scoring")
            .field("rows", &self.rows.sums.job.count)
            .finish_non_exhaustive()
    }
}

/// Rows with the masses of their segments, which may be summed a part at a time.
pub(super) struct SummedRows<'d> {
    device: &'d Device,
    _trie: Arc<ResidentTrie>,
    kernel: cudarc::driver::CudaFunction,
    shared: u32,
    sums: Sums,
    dtype: Dtype,
}

impl<'d> SummedRows<'d> {
    /// `logits` is the address of the first row and the elements from row to row.
    pub(super) fn new(
        device: &'d Device,
        vocab: &Vocab,
        tokens: impl Iterator<Item = Option<u32>>,
        dtype: Dtype,
        logits: (Address, usize),
    ) -> Result<Self, CudaError> {
        let trie = device.trie(vocab)?;
        let paths: Vec<&Path> = tokens.map(|token| trie.path(token)).collect();
        let sums = Sums::new(device, vocab, &trie, &Plan::new(paths)?, dtype, logits)?;
        let segments = sums.job.most_segments;
        let shared = 8 * segments + sums.shared();
        let kernel = device.kernel(Unit::Score, &format!("sum_rows_{}", suffix(dtype)), shared)?;
        Ok(Self {
            device,
            _trie: trie,
            kernel,
            shared,
            sums,
            dtype,
        })
    }

    /// The job of some rows only, whose logits start at `logits`; the first that is not finite goes to `bad`.
    pub(super) fn part(
        &self,
        rows: &Range<usize>,
        logits: Address,
        bad: Address,
    ) -> Result<Rows, CudaError> {
        let (all, first) = (self.sums.job, rows.start as u64);
        Ok(Rows {
            rows: all.rows + first * size_of::<Row>() as u64,
            arrived: all.arrived + first * size_of::<u32>() as u64,
            layout: all.layout + first * size_of::<u32>() as u64,
            logits,
            count: count(rows.len())?,
            bad,
            ..all
        })
    }

    /// Starts summing the rows of a job: one read of the logits.
    pub(super) fn sum(&self, job: &Rows) -> Result<(), CudaError> {
        let blocks = job.count.checked_mul(job.slices);
        let blocks = blocks.ok_or(CudaError::Unsupported {
            what: "more than 2^32 - 1 slices of rows",
        })?;
        // SAFETY: the job of `sum_rows`: as many logits as rows (checked where the job was made), a block per slice, and
        // memory for the sums of every segment, all held by `sums` and by the owner of the logits.
        unsafe {
            self.device
                .launch(&self.kernel, (blocks, 1), self.shared, job)
        }
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
        let place = (logits.address(), vocab.len());
        let scoring = Self::at(device, vocab, items, logits.dtype(), place)?;
        check_size(logits, scoring.layout.rows.len(), vocab)?;
        Ok(scoring)
    }

    /// As [`Self::new`] with the address of the logits and the elements from row to row.
    pub(super) fn at(
        device: &'d Device,
        vocab: &Vocab,
        items: &[&[u32]],
        dtype: Dtype,
        logits: (Address, usize),
    ) -> Result<Self, ScoreError> {
        for tokens in items {
            let wrong = |&(_, &rank): &(usize, &u32)| rank >= vocab.byte_tokens();
            if let Some((position, &rank)) = tokens.iter().enumerate().find(wrong) {
                return Err(ScoreError::NotAByteToken { position, rank });
            }
        }
        let tokens = items
            .iter()
            .flat_map(|tokens| tokens.iter().copied().map(Some).chain([None]));
        let rows = SummedRows::new(device, vocab, tokens, dtype, logits)?;
        let layout = Layout::new(vocab, items)?;
        Ok(Self {
            device,
            rows,
            score: device.upload(&layout.rows)?,
            layout,
        })
    }

    /// The rows, to be summed in parts.
    pub(super) fn rows(&self) -> &SummedRows<'d> {
        &self.rows
    }

    /// Starts summing the rows: one read of the logits.
    ///
    /// # Errors
    /// Where the device fails.
    pub fn sum(&self) -> Result<(), CudaError> {
        self.rows.sums.reset(self.device)?;
        self.rows.sum(&self.rows.sums.job)
    }

    /// Interior stops of every item above a threshold, after [`Self::sum`].
    ///
    /// # Errors
    /// Where a logit is not finite, or the device fails.
    pub fn branches(&self, threshold: f32) -> Result<Vec<Vec<Branch>>, ScoreError> {
        self.rows.sums.check(self.device)?;
        let found = self.no_branches()?;
        self.find(0, &self.rows.sums.job, threshold, &found)?;
        Ok(self.by_item(&found)?)
    }

    /// Room for what [`Self::find`] finds.
    pub(super) fn no_branches(&self) -> Result<Buffer<u32>, CudaError> {
        self.device.filled(self.layout.observed.len(), 0xff)
    }

    /// Starts looking for branches in the summed rows of a job, the first of which is `first`.
    pub(super) fn find(
        &self,
        first: usize,
        rows: &Rows,
        threshold: f32,
        found: &Buffer<u32>,
    ) -> Result<(), CudaError> {
        let name = format!("find_branches_{}", suffix(self.rows.dtype));
        let job = raw::Branches {
            rows: *rows,
            score: self.score.address() + (first * size_of::<ScoreRow>()) as u64,
            found: found.address(),
            threshold,
            padding: 0,
        };
        self.per_row(&name, rows.count, &job)
    }

    /// Waits; what was found.
    pub(super) fn by_item(&self, found: &Buffer<u32>) -> Result<Vec<Vec<Branch>>, CudaError> {
        let found = self.device.download(found, self.layout.observed.len())?;
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
        self.rows.sums.check(self.device)?;
        let rows = self.layout.rows.len();
        let bits = self.device.allocate::<f64>(rows)?;
        let job = raw::TokenBits {
            rows: self.rows.sums.job,
            bits: bits.address(),
        };
        self.per_row("token_bits", job.rows.count, &job)?;
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
        self.rows.sums.check(self.device)?;
        let lists = branches.map_or(&[][..], |branches| branches.branches);
        let sums = branches
            .map(|branches| self.sum_branches(vocab, branches))
            .transpose()?;
        self.write(lists, sums.as_ref(), shape, out)
    }

    /// [`Self::records`] with branches whose rows are summed.
    pub(super) fn write(
        &self,
        branches: &[&[Branch]],
        branch_rows: Option<&SummedRows<'_>>,
        shape: &RecordShape,
        out: &mut Records,
    ) -> Result<Vec<Missed>, ScoreError> {
        let device = self.device;
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
            rows: self.rows.sums.job,
            branches: branch_rows.unwrap_or(&self.rows).sums.job,
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
        unsafe { device.launch(&kernel, (job.rows.count, 1), 0, &job) }?;
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
    fn expansion(&self, branches: &[&[Branch]]) -> Result<Vec<u32>, ScoreError> {
        let mut expansion = vec![NONE; self.layout.observed.len()];
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

    fn sum_branches(
        &self,
        vocab: &Vocab,
        BranchRows { branches, logits }: BranchRows<'_>,
    ) -> Result<SummedRows<'d>, ScoreError> {
        let rows = branches.iter().map(|branches| branches.len()).sum();
        check_size(logits, rows, vocab)?;
        let none = std::iter::repeat_n(None, rows);
        let place = (logits.address(), vocab.len());
        let rows = SummedRows::new(self.device, vocab, none, logits.dtype(), place)?;
        rows.sum(&rows.sums.job)?;
        match rows.sums.check(self.device) {
            Ok(()) => Ok(rows),
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
    fn per_row<J: cudarc::driver::DeviceRepr>(
        &self,
        name: &str,
        rows: u32,
        job: &J,
    ) -> Result<(), CudaError> {
        let kernel = self.device.kernel(Unit::Score, name, 0)?;
        let blocks = rows.div_ceil(WARPS);
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
