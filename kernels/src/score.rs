//! Next-byte records of a language model along observed text, honest about its tokenisation.
//!
//! For an item of m tokens `t_0..t_{m-1}` let `p_i` be the softmax of row i, `root_i(c)` the mass
//! of its tokens that start with byte c (or of all end tokens), and `p(u..)` the mass of tokens at
//! or below prefix u.
//!
//! - *First byte*: `root_0`.
//! - *Boundary byte* (coupled), before token i > 0, also the final end: the previous token stopped
//!   or runs on, `p_{i-1}(t_{i-1}) root_i(c) + p_{i-1}(t_{i-1} + c ..)`, over their sum
//!   `p_{i-1}(t_{i-1} ..)`.
//! - *Interior byte* k of token i, u = `t_i[..k]`: the token runs on, `p_i(u + c ..)`; where u is
//!   itself a token whose share of `p_i(u ..)` passes a threshold, one extra forward after
//!   (context, t_0..t_{i-1}, u) adds the case that it stopped there, `p_i(u) root_branch(c)`
//!   ("exact+1"). Over the sum of what is counted.
//!
//! What this leaves out is measured before normalising ([`Missed`]). Normalising is done within a
//! node, against the node's own largest logit where it is improbable, so extreme logits neither
//! divide by zero nor drown.
//!
//! A record lists a position's symbols likeliest first (ties: the smaller) until they and the end
//! hold `fill_permille` of the mass or the slots are full, always at least one, then in ascending
//! order.

use std::iter::Peekable;
use std::ops::Range;

use crate::backend::{Backend, NotFinite};
use crate::cpu::Level;
use crate::element::Element;
use crate::error::ScoreError;
use crate::records::{RecordShape, Records};
use crate::rows::Rows;
use crate::vocab::Vocab;
use crate::{cpu, reference};

/// A stop inside an observed token that wants a forward pass of its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Branch {
    /// Index i of the observed token.
    pub position: u32,
    /// Bytes k of that token consumed, `0 < k < n`.
    pub taken: u32,
    /// Rank of the token that spells those bytes; the likeliest where several do.
    pub rank: u32,
}

/// Mass that the records of an item leave out, measured before normalising.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Missed {
    /// Mean over interior bytes: share of the mass at the node that stops there, where no branch
    /// counts it; where one does, the share of the mass agreeing with the observed byte that runs
    /// through the branch, which the following bytes drop.
    pub short: f32,
    /// Mean over boundary bytes, ends excluded: share of the mass agreeing with the observed byte
    /// that belongs to tokens longer than the previous one, which the following bytes drop.
    pub long: f32,
}

/// Interior stops with more than `threshold` (1e-3 is a good one) of their node's mass, in order of
/// position and bytes taken: the forwards that [`records`] wants.
///
/// `tokens` are the ranks of the target without the end, `logits` `[tokens.len() + 1, V]`: row i
/// predicts token i, the last row the end of the record.
///
/// # Errors
/// Where sizes disagree, a rank spells no bytes, or a logit is not finite.
pub fn branches(
    vocab: &Vocab,
    tokens: &[u32],
    logits: &[f32],
    threshold: f32,
) -> Result<Vec<Branch>, ScoreError> {
    Backend::best().branches(vocab, tokens, logits, threshold)
}

/// Appends the L + 1 positions of an item to `out`.
///
/// `branch_logits` is `[branches.len(), V]`: row b holds the logits after the context, the tokens
/// before `branches[b].position`, and the branch token. Without branches this gives merely coupled
/// records.
///
/// # Errors
/// Where sizes disagree, a rank spells no bytes, a branch is no interior stop, the shape is not
/// that of `out`, or a logit is not finite; `out` is then unchanged.
pub fn records(
    vocab: &Vocab,
    tokens: &[u32],
    logits: &[f32],
    branches: &[Branch],
    branch_logits: &[f32],
    shape: &RecordShape,
    out: &mut Records,
) -> Result<Missed, ScoreError> {
    Backend::best().records(vocab, tokens, logits, branches, branch_logits, shape, out)
}

/// Bits of the observed tokens and the end, `-sum log2 p`: the canonical tokenisation's upper
/// bound.
///
/// # Errors
/// As [`branches`].
pub fn token_bits(vocab: &Vocab, tokens: &[u32], logits: &[f32]) -> Result<f64, ScoreError> {
    Backend::best().token_bits(vocab, tokens, logits)
}

/// Tokens of an item and the branches that were asked for.
#[derive(Clone, Copy, Debug)]
pub struct ItemTokens<'a> {
    /// Ranks of the m tokens of the target, without the end.
    pub tokens: &'a [u32],
    /// From [`branches_of`], or none for merely coupled records.
    pub branches: &'a [Branch],
}

/// [`branches`] of several items, whose rows of logits follow each other.
///
/// # Errors
/// As [`branches`]; rows are counted over all items.
pub fn branches_of<T: Element>(
    vocab: &Vocab,
    items: &[&[u32]],
    logits: &[T],
    threshold: f32,
) -> Result<Vec<Vec<Branch>>, ScoreError> {
    Backend::best().branches_of(vocab, items, logits, threshold)
}

/// [`records`] of several items, whose rows of logits follow each other, as do those of their
/// branches.
///
/// # Errors
/// As [`records`]; rows are counted over all items.
pub fn records_of<T: Element>(
    vocab: &Vocab,
    items: &[ItemTokens<'_>],
    logits: &[T],
    branch_logits: &[T],
    shape: &RecordShape,
    out: &mut Records,
) -> Result<Vec<Missed>, ScoreError> {
    Backend::best().records_of(vocab, items, logits, branch_logits, shape, out)
}

/// [`token_bits`] of several items, whose rows of logits follow each other.
///
/// # Errors
/// As [`branches_of`].
pub fn token_bits_of<T: Element>(
    vocab: &Vocab,
    items: &[&[u32]],
    logits: &[T],
) -> Result<Vec<f64>, ScoreError> {
    Backend::best().token_bits_of(vocab, items, logits)
}

impl Backend {
    /// [`branches`] on this implementation.
    ///
    /// # Errors
    /// As [`branches`].
    pub fn branches(
        self,
        vocab: &Vocab,
        tokens: &[u32],
        logits: &[f32],
        threshold: f32,
    ) -> Result<Vec<Branch>, ScoreError> {
        let found = self.branches_of(vocab, &[tokens], logits, threshold)?;
        Ok(found.into_iter().flatten().collect())
    }

    /// [`records`] on this implementation.
    ///
    /// # Errors
    /// As [`records`].
    pub fn records(
        self,
        vocab: &Vocab,
        tokens: &[u32],
        logits: &[f32],
        branches: &[Branch],
        branch_logits: &[f32],
        shape: &RecordShape,
        out: &mut Records,
    ) -> Result<Missed, ScoreError> {
        let items = [ItemTokens { tokens, branches }];
        let missed = self.records_of(vocab, &items, logits, branch_logits, shape, out)?;
        Ok(missed[0])
    }

    /// [`token_bits`] on this implementation.
    ///
    /// # Errors
    /// As [`token_bits`].
    pub fn token_bits(
        self,
        vocab: &Vocab,
        tokens: &[u32],
        logits: &[f32],
    ) -> Result<f64, ScoreError> {
        Ok(self.token_bits_of(vocab, &[tokens], logits)?[0])
    }

    /// [`branches_of`] on this implementation.
    ///
    /// # Errors
    /// As [`branches_of`].
    pub fn branches_of<T: Element>(
        self,
        vocab: &Vocab,
        items: &[&[u32]],
        logits: &[T],
        threshold: f32,
    ) -> Result<Vec<Vec<Branch>>, ScoreError> {
        let job = ScoreJob::new(vocab, items)?;
        check_length(
            "logits",
            logits.len(),
            job.rows().saturating_mul(vocab.len()),
        )?;
        match self {
            Self::Reference => Ok(reference::score::branches(&job, logits, threshold)?),
            Self::Cpu => {
                let rows = 0..job.rows();
                let found = cpu::score::branches(Level::best(), &job, rows, logits, threshold)?;
                Ok(job.by_item(found))
            }
            #[cfg(feature = "cuda")]
            Self::Cuda => crate::cuda::host::branches(vocab, items, logits, threshold),
            #[cfg(not(feature = "cuda"))]
            Self::Cuda => Err(crate::error::CudaError::NotBuilt.into()),
        }
    }

    /// [`records_of`] on this implementation.
    ///
    /// # Errors
    /// As [`records_of`].
    pub fn records_of<T: Element>(
        self,
        vocab: &Vocab,
        items: &[ItemTokens<'_>],
        logits: &[T],
        branch_logits: &[T],
        shape: &RecordShape,
        out: &mut Records,
    ) -> Result<Vec<Missed>, ScoreError> {
        let tokens: Vec<&[u32]> = items.iter().map(|item| item.tokens).collect();
        let score = ScoreJob::new(vocab, &tokens)?;
        check_length(
            "logits",
            logits.len(),
            score.rows().saturating_mul(vocab.len()),
        )?;
        let job = RecordsJob::new(score, items, shape)?;
        let expected = job.branch_rows().saturating_mul(vocab.len());
        check_length("branch logits", branch_logits.len(), expected)?;
        out.check_k(shape.k)?;
        match self {
            Self::Reference => reference::score::records(&job, logits, branch_logits, out),
            Self::Cpu => records_on_cpu(Level::best(), &job, logits, branch_logits, out),
            #[cfg(feature = "cuda")]
            Self::Cuda => {
                crate::cuda::host::records(vocab, items, logits, branch_logits, shape, out)
            }
            #[cfg(not(feature = "cuda"))]
            Self::Cuda => Err(crate::error::CudaError::NotBuilt.into()),
        }
    }

    /// [`token_bits_of`] on this implementation.
    ///
    /// # Errors
    /// As [`token_bits_of`].
    pub fn token_bits_of<T: Element>(
        self,
        vocab: &Vocab,
        items: &[&[u32]],
        logits: &[T],
    ) -> Result<Vec<f64>, ScoreError> {
        let job = ScoreJob::new(vocab, items)?;
        check_length(
            "logits",
            logits.len(),
            job.rows().saturating_mul(vocab.len()),
        )?;
        let rows = 0..job.rows();
        let bits = match self {
            Self::Reference => reference::score::token_bits(&job, logits)?,
            Self::Cpu => cpu::score::token_bits(Level::best(), &job, rows, logits)?,
            #[cfg(feature = "cuda")]
            Self::Cuda => return crate::cuda::host::token_bits(vocab, items, logits),
            #[cfg(not(feature = "cuda"))]
            Self::Cuda => return Err(crate::error::CudaError::NotBuilt.into()),
        };
        Ok(job.sums(&bits))
    }
}

fn records_on_cpu<T: Element>(
    level: Level,
    job: &RecordsJob<'_>,
    logits: &[T],
    branch_logits: &[T],
    out: &mut Records,
) -> Result<Vec<Missed>, ScoreError> {
    let roots =
        cpu::score::roots(level, job.score.vocab, 0, branch_logits).map_err(branch_error)?;
    let mut parts = RecordParts::new(job);
    parts.add(level, 0..job.score.rows(), logits, &roots)?;
    parts.finish(out)
}

/// Names a cell among the logits of branches.
pub(crate) fn branch_error(NotFinite { row, column }: NotFinite) -> ScoreError {
    ScoreError::BranchNotFinite { row, column }
}

/// Records of a job whose rows come in several parts.
#[derive(Debug)]
pub(crate) struct RecordParts<'a> {
    job: &'a RecordsJob<'a>,
    before: Option<cpu::score::Boundary>,
    means: Vec<Means>,
    records: Records,
}

impl<'a> RecordParts<'a> {
    pub(crate) fn new(job: &'a RecordsJob<'a>) -> Self {
        Self {
            job,
            before: None,
            means: vec![Means::default(); job.score.tokens.len()],
            records: Records::empty(job.shape.k),
        }
    }

    /// Takes the logits of the next rows.
    pub(crate) fn add<T: Element>(
        &mut self,
        level: Level,
        rows: Range<usize>,
        logits: &[T],
        roots: &[cpu::Dense],
    ) -> Result<(), ScoreError> {
        let Self {
            job,
            before,
            means,
            records,
        } = self;
        cpu::score::records(level, job, rows, logits, roots, before, means, records)
    }

    /// Appends all positions to `out`.
    pub(crate) fn finish(self, out: &mut Records) -> Result<Vec<Missed>, ScoreError> {
        out.append(self.records.view())?;
        Ok(self.means.into_iter().map(Means::missed).collect())
    }
}

/// Shares that an item's positions observe, in order.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Means {
    short: Mean,
    long: Mean,
}

impl Means {
    pub(crate) fn observe(&mut self, short: &[f64], long: Option<f64>) {
        for &share in short {
            self.short.observe(share);
        }
        if let Some(share) = long {
            self.long.observe(share);
        }
    }

    pub(crate) fn missed(self) -> Missed {
        Missed {
            short: self.short.value(),
            long: self.long.value(),
        }
    }
}

#[derive(Clone, Copy, Debug, Default)]
struct Mean {
    sum: f64,
    count: u64,
}

impl Mean {
    fn observe(&mut self, value: f64) {
        self.sum += value;
        self.count += 1;
    }

    #[expect(clippy::cast_possible_truncation, reason = "a share, reported as f32")]
    fn value(self) -> f32 {
        if self.count == 0 {
            0.0
        } else {
            (self.sum / self.count as f64) as f32
        }
    }
}

impl From<NotFinite> for ScoreError {
    fn from(NotFinite { row, column }: NotFinite) -> Self {
        Self::NotFinite { row, column }
    }
}

/// Checked tokens of some items, and where their rows are.
#[derive(Clone, Debug)]
pub(crate) struct ScoreJob<'a> {
    pub(crate) vocab: &'a Vocab,
    pub(crate) tokens: Vec<&'a [u32]>,
    rows: Rows,
}

impl<'a> ScoreJob<'a> {
    pub(crate) fn new(vocab: &'a Vocab, items: &[&'a [u32]]) -> Result<Self, ScoreError> {
        for tokens in items {
            for (position, &rank) in tokens.iter().enumerate() {
                if rank >= vocab.byte_tokens() {
                    return Err(ScoreError::NotAByteToken { position, rank });
                }
            }
        }
        Ok(Self {
            vocab,
            tokens: items.to_vec(),
            rows: Rows::new(items.iter().map(|tokens| tokens.len() + 1)),
        })
    }

    /// Rows of all items.
    pub(crate) fn rows(&self) -> usize {
        self.rows.len()
    }

    /// Item of a row, and the row's index there.
    pub(crate) fn place(&self, row: usize) -> (usize, usize) {
        self.rows.find(row)
    }

    /// Rows of an item.
    pub(crate) fn rows_of(&self, item: usize) -> Range<usize> {
        self.rows.start(item)..self.rows.start(item + 1)
    }

    /// Token that a row predicts; `None` for the end.
    pub(crate) fn token(&self, row: usize) -> Option<u32> {
        let (item, index) = self.place(row);
        self.tokens[item].get(index).copied()
    }

    /// Bytes of that token; none for the end.
    pub(crate) fn bytes(&self, row: usize) -> &'a [u8] {
        self.token(row)
            .map_or(&[], |rank| self.vocab.token_bytes(rank))
    }

    /// What was found by row, ascending, as a list per item.
    pub(crate) fn by_item<R>(&self, found: Vec<(usize, R)>) -> Vec<Vec<R>> {
        let mut items: Vec<Vec<R>> = self.tokens.iter().map(|_| Vec::new()).collect();
        for (row, value) in found {
            items[self.place(row).0].push(value);
        }
        items
    }

    /// Values per row, summed per item in order.
    pub(crate) fn sums(&self, values: &[f64]) -> Vec<f64> {
        (0..self.tokens.len())
            .map(|item| values[self.rows_of(item)].iter().sum())
            .collect()
    }
}

/// Checked items with branches.
#[derive(Clone, Debug)]
pub(crate) struct RecordsJob<'a> {
    pub(crate) score: ScoreJob<'a>,
    pub(crate) branches: Vec<&'a [Branch]>,
    branch_rows: Rows,
    pub(crate) shape: RecordShape,
}

impl<'a> RecordsJob<'a> {
    pub(crate) fn new(
        score: ScoreJob<'a>,
        items: &[ItemTokens<'a>],
        shape: &RecordShape,
    ) -> Result<Self, ScoreError> {
        shape.check::<u8>()?;
        for item in items {
            let mut last = None;
            for (index, branch) in item.branches.iter().enumerate() {
                let place = (branch.position, branch.taken);
                if last >= Some(place) || !is_interior_stop(score.vocab, item.tokens, branch) {
                    return Err(ScoreError::Branch { index });
                }
                last = Some(place);
            }
        }
        Ok(Self {
            score,
            branches: items.iter().map(|item| item.branches).collect(),
            branch_rows: Rows::new(items.iter().map(|item| item.branches.len())),
            shape: *shape,
        })
    }

    /// Rows of branch logits.
    pub(crate) fn branch_rows(&self) -> usize {
        self.branch_rows.len()
    }

    /// Rows of branch logits of an item.
    pub(crate) fn branch_rows_of(&self, item: usize) -> Range<usize> {
        self.branch_rows.start(item)..self.branch_rows.start(item + 1)
    }

    /// Branches of a row's token, with the rows of their logits.
    pub(crate) fn branches(
        &self,
        row: usize,
    ) -> Peekable<impl Iterator<Item = (usize, &'a Branch)>> {
        let (item, index) = self.score.place(row);
        let branches = self.branches[item];
        let first = branches.partition_point(|branch| (branch.position as usize) < index);
        let rows = self.branch_rows.start(item) + first..;
        let here = branches[first..].iter();
        rows.zip(here.take_while(move |branch| branch.position as usize == index))
            .peekable()
    }
}

fn is_interior_stop(vocab: &Vocab, tokens: &[u32], branch: &Branch) -> bool {
    let Some(&token) = tokens.get(branch.position as usize) else {
        return false;
    };
    let observed = vocab.token_bytes(token);
    let stopped = vocab.token_bytes(branch.rank);
    let taken = branch.taken as usize;
    0 < taken && taken < observed.len() && observed.get(..taken) == Some(stopped)
}

pub(crate) fn check_length(
    what: &'static str,
    got: usize,
    expected: usize,
) -> Result<(), ScoreError> {
    if got == expected {
        Ok(())
    } else {
        Err(ScoreError::Length {
            what,
            got,
            expected,
        })
    }
}
