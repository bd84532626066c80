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

use crate::backend::{Backend, NotFinite};
use crate::error::ScoreError;
use crate::records::{RecordShape, Records};
use crate::trie::Node;
use crate::vocab::Vocab;
#[cfg(feature = "cuda")]
use crate::cuda;
#[cfg(not(feature = "cuda"))]
use crate::error::CudaError;
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
        let item = ScoreItem::new(vocab, tokens, logits)?;
        let found = match self {
            Self::Reference => reference::score::branches(&item, threshold),
            Self::Cpu => cpu::score::branches(&item, threshold),
            #[cfg(feature = "cuda")]
            Self::Cuda => {
                let found = cuda::host::branches(vocab, &[tokens], logits, threshold)?;
                return Ok(found.into_iter().flatten().collect());
            }
            #[cfg(not(feature = "cuda"))]
            Self::Cuda => return Err(CudaError::NotBuilt.into()),
        };
        Ok(found?)
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
        let item = ScoreItem::new(vocab, tokens, logits)?;
        let item = item.with_branches(branches, branch_logits)?;
        shape.check::<u8>()?;
        out.check_k(shape.k)?;
        match self {
            Self::Reference => reference::score::records(&item, shape, out),
            Self::Cpu => cpu::score::records(&item, shape, out),
            #[cfg(feature = "cuda")]
            Self::Cuda => {
                let items = (&[tokens][..], &[branches][..]);
                let missed = cuda::host::records(vocab, items, logits, branch_logits, shape, out)?;
                Ok(missed.first().copied().unwrap_or_default())
            }
            #[cfg(not(feature = "cuda"))]
            Self::Cuda => Err(CudaError::NotBuilt.into()),
        }
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
        let item = ScoreItem::new(vocab, tokens, logits)?;
        let bits = match self {
            Self::Reference => reference::score::token_bits(&item),
            Self::Cpu => cpu::score::token_bits(&item),
            #[cfg(feature = "cuda")]
            Self::Cuda => return Ok(cuda::host::token_bits(vocab, &[tokens], logits)?.iter().sum()),
            #[cfg(not(feature = "cuda"))]
            Self::Cuda => return Err(CudaError::NotBuilt.into()),
        };
        Ok(bits?)
    }
}

impl From<NotFinite> for ScoreError {
    fn from(NotFinite { row, column }: NotFinite) -> Self {
        Self::NotFinite { row, column }
    }
}

/// Checked inputs of one item, but for the values of the logits.
#[derive(Clone, Copy, Debug)]
pub(crate) struct ScoreItem<'a> {
    pub(crate) vocab: &'a Vocab,
    pub(crate) tokens: &'a [u32],
    logits: &'a [f32],
    pub(crate) branches: &'a [Branch],
    branch_logits: &'a [f32],
}

impl<'a> ScoreItem<'a> {
    /// Checks tokens and sizes; no branches yet.
    pub(crate) fn new(
        vocab: &'a Vocab,
        tokens: &'a [u32],
        logits: &'a [f32],
    ) -> Result<Self, ScoreError> {
        check_length(
            "logits",
            logits.len(),
            (tokens.len() + 1).saturating_mul(vocab.len()),
        )?;
        for (position, &rank) in tokens.iter().enumerate() {
            if rank >= vocab.byte_tokens() {
                return Err(ScoreError::NotAByteToken { position, rank });
            }
        }
        Ok(Self {
            vocab,
            tokens,
            logits,
            branches: &[],
            branch_logits: &[],
        })
    }

    /// Checks branches and takes them.
    pub(crate) fn with_branches(
        self,
        branches: &'a [Branch],
        branch_logits: &'a [f32],
    ) -> Result<Self, ScoreError> {
        let expected = branches.len().saturating_mul(self.vocab.len());
        check_length("branch logits", branch_logits.len(), expected)?;
        let mut last = None;
        for (index, branch) in branches.iter().enumerate() {
            let place = (branch.position, branch.taken);
            if last >= Some(place) || !self.is_interior_stop(branch) {
                return Err(ScoreError::Branch { index });
            }
            last = Some(place);
        }
        Ok(Self {
            branches,
            branch_logits,
            ..self
        })
    }

    fn is_interior_stop(&self, branch: &Branch) -> bool {
        let Some(&token) = self.tokens.get(branch.position as usize) else {
            return false;
        };
        let observed = self.vocab.token_bytes(token);
        let stopped = self.vocab.token_bytes(branch.rank);
        let taken = branch.taken as usize;
        0 < taken && taken < observed.len() && observed.get(..taken) == Some(stopped)
    }

    /// Bytes of token `index`; empty past the last.
    pub(crate) fn bytes(&self, index: usize) -> &'a [u8] {
        self.tokens
            .get(index)
            .map_or(&[], |&rank| self.vocab.token_bytes(rank))
    }

    pub(crate) fn row(&self, index: usize) -> &'a [f32] {
        let width = self.vocab.len();
        &self.logits[index * width..(index + 1) * width]
    }

    pub(crate) fn branch_row(&self, index: usize) -> &'a [f32] {
        let width = self.vocab.len();
        &self.branch_logits[index * width..(index + 1) * width]
    }

    /// Index of the first branch at or after a token.
    pub(crate) fn first_branch(&self, token: usize) -> usize {
        self.branches
            .partition_point(|branch| (branch.position as usize) < token)
    }

    /// Interior nodes of token `index`: bytes taken, and the node.
    pub(crate) fn interior(
        &self,
        index: usize,
    ) -> impl Iterator<Item = (usize, &'a Node)> + use<'a> {
        let bytes = self.bytes(index);
        let trie = self.vocab.trie();
        let mut node = trie.root();
        bytes[..bytes.len().saturating_sub(1)]
            .iter()
            .enumerate()
            .map_while(move |(index, &byte)| {
                node = trie.child(node, byte)?;
                Some((index + 1, node))
            })
    }
}

fn check_length(what: &'static str, got: usize, expected: usize) -> Result<(), ScoreError> {
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
