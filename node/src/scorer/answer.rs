//! What a server says about prompts, whatever it speaks.

use std::collections::BTreeMap;

/// Pairs of token id and natural log-probability at one position.
pub(super) type Pairs = Vec<(u32, f32)>;

/// What was asked: prompts as token ids, and from which token on predictions are wanted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Prompt {
    /// Token ids; at least two.
    pub(super) ids: Vec<u32>,
    /// First token whose prediction is wanted, at least 1.
    pub(super) from: usize,
}

impl Prompt {
    /// Number of wanted predictions.
    pub(super) fn wanted(&self) -> usize {
        self.ids.len().saturating_sub(self.from)
    }

    /// Ids of the tokens whose predictions are wanted.
    pub(super) fn observed(&self) -> &[u32] {
        self.ids.get(self.from..).unwrap_or_default()
    }
}

/// Answer to the prompts of one request, in order.
#[derive(Debug, Default)]
pub(super) struct Answer {
    /// Per prompt and wanted token, what the server lists there; the token itself is always listed.
    pub(super) rows: Vec<Vec<Pairs>>,
    /// What tokens spell, as far as the server says so.
    pub(super) spelled: BTreeMap<u32, String>,
}

/// Servers write impossible tokens as this, or leave their value out.
pub(super) const IMPOSSIBLE: f32 = -9999.0;
