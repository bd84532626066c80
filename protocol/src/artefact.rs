//! Kinds of artefacts and digests of whole folders.

use bincode::{Decode, Encode};
use serde::{Deserialize, Serialize};

use crate::ids::Digest;
use crate::limits;

/// What an institution hands over in a round. The sequence number of its slot counts what the variant says.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, Encode, Decode,
)]
#[serde(rename_all = "snake_case")]
pub enum Kind {
    /// A shard of records; one slot per shard.
    Records,
    /// A trained adapter; one slot per inner round.
    Adapter,
    /// A private evaluation of the candidate; slot 0.
    Evaluation,
}

impl Kind {
    /// The kind's name in signatures and logs.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Records => "records",
            Self::Adapter => "adapter",
            Self::Evaluation => "evaluation",
        }
    }

    /// The kind with this name.
    #[must_use]
    pub fn from_name(name: &str) -> Option<Self> {
        [Self::Records, Self::Adapter, Self::Evaluation]
            .into_iter()
            .find(|kind| kind.name() == name)
    }

    /// Longest artefact of this kind in bytes.
    #[must_use]
    pub const fn limit(self) -> u64 {
        match self {
            Self::Records => limits::SHARD,
            Self::Adapter => limits::ARTEFACT,
            Self::Evaluation => limits::EVALUATION,
        }
    }
}

/// Digest of a folder of files: SHA-256 over `"<file digest>  <name>\n"` lines in name order, which is what
/// `sha256sum` prints for the sorted names.
#[must_use]
pub fn folder_digest(files: &[(String, Digest)]) -> Digest {
    let mut lines: Vec<String> = files
        .iter()
        .map(|(name, digest)| format!("{name}\0{digest}  {name}\n"))
        .collect();
    lines.sort();
    let text: String = lines
        .iter()
        .filter_map(|line| line.split_once('\0'))
        .map(|(_, line)| line)
        .collect();
    Digest::of(text.as_bytes())
}

/// Whether a file of a model folder belongs to the model's identity.
#[must_use]
pub fn is_model_file(name: &str) -> bool {
    matches!(name, "config.json" | "tokenizer.json") || name.ends_with(".safetensors")
}
