//! Rows of logits on the device and the memory that summing them takes.

use crate::backend::NotFinite;
use crate::cuda::device::{Buffer, Device, count};
use crate::cuda::raw::{Address, Mass, RING, Row, Rows, SKEW, TILE, Unit, WARPS};
use crate::cuda::tries::{Path, ResidentTrie};
use crate::element::Dtype;
use crate::error::CudaError;
use crate::vocab::Vocab;

/// Why a job on rows gave no result.
#[derive(Debug)]
pub(super) enum RowsError {
    NotFinite(NotFinite),
    Cuda(CudaError),
}

impl From<CudaError> for RowsError {
    fn from(error: CudaError) -> Self {
        Self::Cuda(error)
    }
}

/// Suffix of the kernels for an element type.
pub(super) fn suffix(dtype: Dtype) -> &'static str {
    match dtype {
        Dtype::F32 => "f32",
        Dtype::Bf16 => "bf16",
        Dtype::F16 => "f16",
    }
}

/// Bytes of an element.
pub(super) fn width_of(dtype: Dtype) -> usize {
    match dtype {
        Dtype::F32 => 4,
        Dtype::Bf16 | Dtype::F16 => 2,
    }
}

/// Partitions of the rows of one launch, and the memory of their sums.
pub(super) struct Plan {
    rows: Vec<Row>,
    segments: u32,
    most_segments: u32,
    most_levels: u32,
}

impl Plan {
    pub(super) fn new<'a>(paths: impl IntoIterator<Item = &'a Path>) -> Result<Self, CudaError> {
        let mut plan = Self {
            rows: Vec::new(),
            segments: 0,
            most_segments: 1,
            most_levels: 1,
        };
        for path in paths {
            plan.rows.push(path.row(plan.segments));
            plan.most_segments = plan.most_segments.max(path.segments);
            plan.most_levels = plan.most_levels.max(path.levels);
            plan.segments =
                plan.segments
                    .checked_add(path.segments)
                    .ok_or(CudaError::Unsupported {
                        what: "more than 2^32 - 1 segments in one call",
                    })?;
        }
        Ok(plan)
    }

    pub(super) fn len(&self) -> usize {
        self.rows.len()
    }
}

/// What a launch on rows needs besides the logits; lives until the launch is done.
pub(super) struct Sums {
    pub(super) job: Rows,
    pub(super) segments: usize,
    bad: Buffer<u64>,
    arrived: Buffer<u32>,
    _rows: Buffer<Row>,
    _edges: Buffer<Mass>,
    _masses: Buffer<Mass>,
    _layout: (Buffer<u32>, Buffer<u32>),
}

impl Sums {
    /// `logits` is the address of `[plan.len(), stride]` elements.
    pub(super) fn new(
        device: &Device,
        vocab: &Vocab,
        trie: &ResidentTrie,
        plan: &Plan,
        dtype: Dtype,
        (logits, stride): (Address, usize),
    ) -> Result<Self, CudaError> {
        let width = count(vocab.len())?;
        // Slices of up to 64 KiB: long enough to hide what a block does before, short enough to spread one row. A row
        // starts up to `SKEW` elements behind a boundary of 128 bytes.
        let tiles = if dtype == Dtype::F32 { 8 } else { 16 };
        let slices = (width + SKEW).div_ceil(tiles * TILE * WARPS);
        let tiles = (width + SKEW).div_ceil(slices * TILE * WARPS);
        let edges = plan.len() * (slices * WARPS) as usize * 2;
        let sums = Self {
            job: Rows::default(),
            segments: plan.segments as usize,
            bad: device.filled(1, 0xff)?,
            arrived: device.filled(plan.len(), 0)?,
            _rows: device.upload(&plan.rows)?,
            _edges: device.allocate(edges)?,
            _masses: device.allocate(plan.segments as usize)?,
            _layout: (
                device.allocate(plan.segments as usize + plan.len())?,
                device.allocate(plan.segments as usize)?,
            ),
        };
        let job = Rows {
            nodes: trie.nodes.address(),
            starts: trie.starts.address(),
            levels: trie.levels.address(),
            rows: sums._rows.address(),
            logits,
            stride: stride as u64,
            count: count(plan.len())?,
            live: count(vocab.live())?,
            ends: vocab.byte_tokens(),
            width,
            tiles,
            slices,
            most_segments: plan.most_segments,
            most_levels: plan.most_levels,
            edges: sums._edges.address(),
            segments: sums._masses.address(),
            layout: sums._layout.0.address(),
            owners: sums._layout.1.address(),
            arrived: sums.arrived.address(),
            bad: sums.bad.address(),
        };
        let kernel = device.kernel(Unit::Score, "lay_out_rows", 0)?;
        // SAFETY: the job of `lay_out_rows`: a block per row, room for the starts of all its segments and one more, and for their owners; what
        // it reads lives as long as `sums` and the vocabulary's trie, which the maker of the job holds.
        unsafe { device.launch(&kernel, (job.count, 1), 0, &job) }?;
        Ok(Self { job, ..sums })
    }

    /// Makes another launch possible.
    pub(super) fn reset(&self, device: &Device) -> Result<(), CudaError> {
        device.fill(&self.arrived, 0)
    }

    /// Bytes of shared memory that reading a row takes: tiles on their way, starts in a tile, starts of the segments.
    pub(super) fn shared(&self) -> u32 {
        WARPS * (RING + TILE) + 4 * (self.job.most_segments + 3)
    }

    /// Waits, and names the first logit that is not finite.
    pub(super) fn check(&self, device: &Device) -> Result<(), RowsError> {
        let bad = device.download(&self.bad, 1)?;
        let cell = bad.first().and_then(|&cell| usize::try_from(cell).ok());
        let width = self.job.width as usize;
        match cell {
            Some(usize::MAX) | None => Ok(()),
            Some(cell) => Err(RowsError::NotFinite(NotFinite {
                row: cell / width,
                column: cell % width,
            })),
        }
    }
}
