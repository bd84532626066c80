//! What a round does about records that give their source away, and about a fusion that one source spoils.

use serde::{Deserialize, Serialize};

use crate::ids::Digest;

/// Something that a source's records give away.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Finding {
    /// Wrong words of the reference set did not surprise it.
    Decoy,
    /// Its records are nearly another's.
    Duplicate,
    /// It says nearly the same everywhere: a free rider.
    Constant,
}

/// Bounds and policy of screening. A bound of 0 turns its finding off.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Screening {
    /// Digest of the key of the reference set's decoys, see [`crate::decoys`]; published once the records are closed.
    pub decoys: Option<Digest>,
    /// Least bits that a decoy must cost a source on the mean, in thousandths.
    pub decoy_millibits: u32,
    /// Least mean total variation between the records of two sources, in thousandths.
    pub duplicate_permille: u32,
    /// Least mean total variation of a source between one position and the next, in thousandths.
    pub constant_permille: u32,
    /// Whether sources that fail the decoys take no part in the fusion. All findings are reported in any case.
    pub exclude_decoy: bool,
    /// The same for those that repeat another's records; of equal ones the first by name stays.
    pub exclude_duplicate: bool,
    /// The same for those that say nearly the same everywhere.
    pub exclude_free_rider: bool,
    /// Most items of the holdout that contributions are measured on; 0 for no accounts and no public gate.
    pub account_items: u32,
    /// How much worse the fusion of all may be than that without any one source, in thousandths of the latter's bits per
    /// byte on the holdout; beyond it the round is rejected and that source named. 0 for no public gate.
    pub gate_permille: u32,
}

impl Default for Screening {
    fn default() -> Self {
        Self {
            decoys: None,
            decoy_millibits: 2000,
            duplicate_permille: 10,
            constant_permille: 50,
            exclude_decoy: true,
            exclude_duplicate: false,
            exclude_free_rider: false,
            account_items: 1000,
            gate_permille: 100,
        }
    }
}

impl Screening {
    /// Whether a source with this finding takes no part.
    #[must_use]
    pub const fn excludes(&self, finding: Finding) -> bool {
        match finding {
            Finding::Decoy => self.exclude_decoy,
            Finding::Duplicate => self.exclude_duplicate,
            Finding::Constant => self.exclude_free_rider,
        }
    }

    pub(super) fn is_default(&self) -> bool {
        *self == Self::default()
    }

    pub(super) fn check(&self) -> Result<(), String> {
        for (name, value, most) in [
            ("decoy_millibits", self.decoy_millibits, 16_000),
            ("duplicate_permille", self.duplicate_permille, 1000),
            ("constant_permille", self.constant_permille, 1000),
            ("account_items", self.account_items, 1_000_000),
            ("gate_permille", self.gate_permille, 10_000),
        ] {
            if value > most {
                return Err(format!("screening.{name} is {value}, expected 0 to {most}"));
            }
        }
        Ok(())
    }
}
