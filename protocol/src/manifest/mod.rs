//! The manifest: the signed and logged document that opens a round. It is data; no part of it is executed.
//!
//! The file is a C2SP signed note. Its first line is [`FIRST_LINE`], the second is canonical JSON (RFC 8785: keys in
//! order, integers only), and the aggregator signs it with the key that the charter names.

mod merging;
mod rules;
mod screening;

use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::charter::Charter;
use crate::contribution::Binding;
use crate::ids::{ConsortiumId, Digest, InstitutionId, RoundId};
use crate::limits;

pub use merging::{Defence, MergeRule};
pub use rules::{Distillation, FusionRule, TargetForm, TargetTail};
pub use screening::{Finding, Screening};

/// First line of a manifest.
pub const FIRST_LINE: &str = "consilium/manifest/1";

/// What leaves the sites in a round.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Mode {
    /// Records on the reference set, then pivot adapters (InfiFusion, unified; arXiv 2501.02795).
    Unified,
    /// Pivot adapters only: each node distils its own source into the pivot at home (InfiFusion, pairwise).
    Pairwise,
    /// Pivot adapters only, trained on private text (federated LoRA).
    Adapters,
}

impl Mode {
    /// The name in documents and settings.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Unified => "unified",
            Self::Pairwise => "pairwise",
            Self::Adapters => "adapters",
        }
    }

    /// Whether records leave the sites and are fused before anybody trains.
    #[must_use]
    pub const fn shares_records(self) -> bool {
        matches!(self, Self::Unified)
    }
}

/// The alphabet of the records.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum SymbolSpace {
    /// Next bytes and the end of the record: comparable across tokenizers.
    #[default]
    Bytes,
    /// Tokens of one tokenizer that all members and the pivot share.
    Tokens {
        /// SHA-256 of its `tokenizer.json`, byte for byte.
        tokenizer: Digest,
        /// Tokens in the vocabulary: one more than the largest id of that file.
        size: u32,
    },
}

impl SymbolSpace {
    /// Whether records are of bytes.
    #[must_use]
    pub const fn is_bytes(&self) -> bool {
        matches!(self, Self::Bytes)
    }

    fn check(&self, symbols: u16) -> Result<(), String> {
        match *self {
            Self::Tokens { size, .. } if size <= symbols.into() => Err(format!(
                "symbol_space has {size} tokens and symbols is {symbols}, which would list them all; lower symbols"
            )),
            Self::Bytes | Self::Tokens { .. } => Ok(()),
        }
    }
}

/// Longest wait for each phase, in seconds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Deadlines {
    /// From opening until the records are closed.
    pub contribute_seconds: u32,
    /// One inner round of distillation.
    pub distil_seconds: u32,
    /// Evaluation of the candidate.
    pub evaluate_seconds: u32,
}

/// How the pivot's adapter is trained and merged. Fractions are integers so that the document is canonical.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Training {
    /// Inner rounds of distil and merge.
    pub inner_rounds: u32,
    /// Optimiser steps of each node in one inner round.
    pub local_steps: u32,
    /// Packed rows of one batch.
    pub rows: u32,
    /// Tokens of one row.
    pub row_tokens: u32,
    /// Peak learning rate in millionths.
    pub learning_rate_micros: u32,
    /// Share of all steps spent warming up, in thousandths.
    pub warmup_permille: u32,
    /// Learning rate at the end relative to the peak, in thousandths.
    pub final_permille: u32,
    /// Weight of the cross-entropy beside the trie loss, in thousandths of the sum.
    pub cross_entropy_permille: u32,
    /// Rank of the adapter.
    pub rank: u32,
    /// LoRA alpha: the product is scaled by alpha / rank.
    pub alpha: u32,
    /// Linear layers that carry an adapter, by their PEFT names.
    pub target_modules: Vec<String>,
    /// Modules that are trained whole and averaged as full deltas.
    pub modules_to_save: Vec<String>,
    /// Outer learning rate of the merge, in thousandths.
    pub outer_rate_permille: u32,
    /// Outer Nesterov momentum, in thousandths.
    pub outer_momentum_permille: u32,
    /// What the adapter learns from beside labels.
    pub distillation: Distillation,
    /// How adapters become one.
    pub merge: MergeRule,
    /// What protects the merge.
    pub defence: Defence,
}

/// One round's parameters.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Manifest {
    /// The consortium.
    pub consortium: ConsortiumId,
    /// Number of this round.
    pub round: RoundId,
    /// What leaves the sites.
    pub mode: Mode,
    /// Digest of the signed charter that this round obeys.
    pub charter: Digest,
    /// Digest of the pivot's folder, see [`crate::artefact::folder_digest`].
    pub pivot: Digest,
    /// Digest of the reference set.
    pub reference: Digest,
    /// Items of the reference set.
    pub items: u64,
    /// Alphabet of the records.
    pub symbol_space: SymbolSpace,
    /// Symbol slots of one position (K).
    pub symbols: u16,
    /// Mass that the slots hold before the rest goes to the tail, in thousandths.
    pub fill_permille: u16,
    /// Items of one shard.
    pub shard_items: u32,
    /// How records become targets.
    pub fusion: FusionRule,
    /// What becomes of a fused record before it is sent back.
    #[serde(default, skip_serializing_if = "TargetForm::is_plain")]
    pub targets: TargetForm,
    /// What is done about records that give their source away.
    #[serde(default, skip_serializing_if = "Screening::is_default")]
    pub screening: Screening,
    /// How the adapter is trained and merged.
    pub training: Training,
    /// Members of this round, ascending.
    pub members: Vec<InstitutionId>,
    /// Members that a phase needs once its deadline has passed.
    pub quorum: u32,
    /// Longest wait for each phase.
    pub deadlines: Deadlines,
    /// In mode [`Mode::Adapters`], the most that a member's declared capacity counts in the merge; absent, all adapters
    /// count alike, as in the other modes without records.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_weight: Option<u32>,
    /// Seed of parts and initial factors.
    pub seed: u64,
    /// The release this round starts from, if any.
    pub previous_release: Option<Digest>,
}

/// Why text is no manifest, or not one that the charter allows.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("manifest: {0}")]
pub struct ManifestError(String);

impl Manifest {
    /// Parses the text of a manifest whose signature was checked.
    ///
    /// # Errors
    /// A sentence that names the field.
    pub fn parse(text: &str) -> Result<Self, ManifestError> {
        let json = text
            .strip_prefix(FIRST_LINE)
            .and_then(|rest| rest.strip_prefix('\n'))
            .ok_or_else(|| ManifestError(format!("the first line is not {FIRST_LINE:?}")))?;
        let manifest: Self =
            serde_json::from_str(json).map_err(|error| ManifestError(error.to_string()))?;
        manifest.check().map_err(ManifestError)?;
        Ok(manifest)
    }

    /// The text that is signed.
    ///
    /// # Errors
    /// A value that is out of range.
    pub fn to_text(&self) -> Result<String, ManifestError> {
        self.check().map_err(ManifestError)?;
        let json = canonical_json(self).map_err(|error| ManifestError(error.to_string()))?;
        Ok(format!("{FIRST_LINE}\n{json}\n"))
    }

    /// Checks this manifest against the charter it names.
    ///
    /// # Errors
    /// The first contradiction.
    pub fn obeys(&self, charter: &Charter) -> Result<(), ManifestError> {
        let problem = if self.consortium != charter.consortium {
            format!(
                "consortium is {}, the charter's is {}",
                self.consortium, charter.consortium
            )
        } else if !charter.modes.contains(&self.mode) {
            format!("mode {} is not in the charter", self.mode.name())
        } else if self.symbols > charter.max_symbols {
            format!(
                "symbols is {}, the charter allows {}",
                self.symbols, charter.max_symbols
            )
        } else if self.quorum < charter.quorum {
            format!(
                "quorum is {}, the charter wants {}",
                self.quorum, charter.quorum
            )
        } else if let Some(stranger) = self.members.iter().find(|id| {
            !charter
                .members
                .iter()
                .any(|member| member.institution == **id)
        }) {
            format!("{stranger} is not a member of the charter")
        } else {
            return Ok(());
        };
        Err(ManifestError(problem))
    }

    /// Shards of one member's records.
    #[must_use]
    pub fn shards(&self) -> u32 {
        u32::try_from(self.items.div_ceil(u64::from(self.shard_items.max(1)))).unwrap_or(u32::MAX)
    }

    /// Items of shard `index`, counted from 0.
    #[must_use]
    pub fn shard_range(&self, index: u32) -> std::ops::Range<u64> {
        let from = u64::from(index)
            .saturating_mul(u64::from(self.shard_items))
            .min(self.items);
        from..from
            .saturating_add(u64::from(self.shard_items))
            .min(self.items)
    }

    /// What signatures of this round are bound to; `digest` is that of the signed manifest.
    #[must_use]
    pub fn binding(&self, digest: Digest) -> Binding {
        Binding {
            consortium: self.consortium.clone(),
            round: self.round,
            manifest: digest,
        }
    }

    /// Longest wait for an inner round.
    #[must_use]
    pub fn distil_wait(&self) -> Duration {
        Duration::from_secs(u64::from(self.deadlines.distil_seconds))
    }

    fn check(&self) -> Result<(), String> {
        let t = &self.training;
        let members = u64::try_from(self.members.len()).unwrap_or(u64::MAX);
        let ranges: [(&str, u64, u64, u64); 18] = [
            ("items", self.items, 1, limits::ITEMS),
            ("symbols", self.symbols.into(), 1, limits::SYMBOLS.into()),
            ("fill_permille", self.fill_permille.into(), 500, 1000),
            (
                "shard_items",
                self.shard_items.into(),
                1,
                limits::SHARD_ITEMS.into(),
            ),
            ("members", members, 1, 1024),
            ("quorum", self.quorum.into(), 1, members),
            (
                "contribute_seconds",
                self.deadlines.contribute_seconds.into(),
                1,
                31_536_000,
            ),
            (
                "distil_seconds",
                self.deadlines.distil_seconds.into(),
                1,
                31_536_000,
            ),
            (
                "evaluate_seconds",
                self.deadlines.evaluate_seconds.into(),
                1,
                31_536_000,
            ),
            (
                "inner_rounds",
                t.inner_rounds.into(),
                1,
                limits::INNER_ROUNDS.into(),
            ),
            ("local_steps", t.local_steps.into(), 1, 1_000_000),
            ("rows", t.rows.into(), 1, 65_536),
            ("row_tokens", t.row_tokens.into(), 2, 1 << 20),
            (
                "learning_rate_micros",
                t.learning_rate_micros.into(),
                1,
                1_000_000,
            ),
            (
                "cross_entropy_permille",
                t.cross_entropy_permille.into(),
                0,
                1000,
            ),
            ("rank", t.rank.into(), 1, 4096),
            ("alpha", t.alpha.into(), 1, 65_536),
            ("outer_rate_permille", t.outer_rate_permille.into(), 1, 2000),
        ];
        for (name, value, least, most) in ranges {
            if !(least..=most).contains(&value) {
                return Err(format!("{name} is {value}, expected {least} to {most}"));
            }
        }
        for (name, value) in [
            ("warmup_permille", t.warmup_permille),
            ("final_permille", t.final_permille),
            ("outer_momentum_permille", t.outer_momentum_permille),
        ] {
            if value > 1000 {
                return Err(format!("{name} is {value}, expected 0 to 1000"));
            }
        }
        if !self.members.is_sorted_by(|a, b| a < b) {
            return Err("members are not ascending".to_owned());
        }
        match self.max_weight {
            Some(_) if self.mode != Mode::Adapters => {
                let mode = self.mode.name();
                return Err(format!(
                    "max_weight is for mode adapters; leave it out in mode {mode}"
                ));
            }
            Some(most) if !(1..=limits::WEIGHT).contains(&most) => {
                return Err(format!(
                    "max_weight is {most}, expected 1 to {}",
                    limits::WEIGHT
                ));
            }
            Some(_) | None => {}
        }
        self.symbol_space.check(self.symbols)?;
        self.fusion.check(self.members.len())?;
        self.targets.check(t.distillation)?;
        self.screening.check()?;
        t.distillation.check(self.mode)?;
        t.merge.check(t)?;
        t.defence.check(t, self.quorum)
    }
}

/// Canonical JSON of a document whose numbers are integers and whose keys are ASCII (RFC 8785 for that subset).
///
/// # Errors
/// A value that JSON cannot carry.
pub fn canonical_json<T: Serialize>(value: &T) -> Result<String, serde_json::Error> {
    serde_json::to_value(value).map(|value| value.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn records_never_list_a_whole_vocabulary() {
        let tokens = |size| SymbolSpace::Tokens {
            tokenizer: Digest::of(b"tokenizer.json"),
            size,
        };
        assert_eq!(SymbolSpace::Bytes.check(256), Ok(()));
        assert_eq!(tokens(17).check(16), Ok(()));
        let refused = tokens(16).check(16).unwrap_err();
        assert!(refused.contains("symbol_space has 16 tokens"), "{refused}");
    }
}
