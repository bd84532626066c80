//! The charter: what the members agreed on, as a signed TOML file that people can read.
//!
//! The file is a C2SP signed note. Its first line is [`FIRST_LINE`], the rest of the text is TOML, and the
//! consortium's authority signs it.

use std::collections::BTreeSet;

use ed25519_dalek::VerifyingKey;
use serde::{Deserialize, Serialize};

use crate::contribution::Roster;
use crate::ids::{ConsortiumId, InstitutionId};
use crate::limits;
use crate::manifest::Mode;

/// First line of a charter.
pub const FIRST_LINE: &str = "consilium/charter/1";

/// Policy of a consortium.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Charter {
    /// The consortium's name.
    pub consortium: ConsortiumId,
    /// Verifier key of the aggregator's log and manifests, as C2SP prints it: `name+hash+key`.
    pub log_key: String,
    /// Exchange modes that a round may use.
    pub modes: Vec<Mode>,
    /// Members that a phase needs before it may proceed without the others.
    pub quorum: u32,
    /// Most symbols per position that a record may hold.
    pub max_symbols: u16,
    /// How much worse than its own best any site may fare with a release, in thousandths of its bits per byte.
    pub gate_bound_permille: u32,
    /// The members.
    pub members: Vec<Member>,
}

/// One member of the consortium.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Member {
    /// Its identifier.
    pub institution: InstitutionId,
    /// Its ed25519 public key, 64 hexadecimal digits.
    pub key: String,
}

/// Why text is no charter.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("charter: {0}")]
pub struct CharterError(String);

impl Charter {
    /// Parses the text of a charter whose signature was checked.
    ///
    /// # Errors
    /// A sentence that names the field.
    pub fn parse(text: &str) -> Result<Self, CharterError> {
        let toml = text
            .strip_prefix(FIRST_LINE)
            .and_then(|rest| rest.strip_prefix('\n'))
            .ok_or_else(|| CharterError(format!("the first line is not {FIRST_LINE:?}")))?;
        let charter: Self =
            toml::from_str(toml).map_err(|error| CharterError(error.to_string()))?;
        charter.check().map_err(CharterError)?;
        Ok(charter)
    }

    /// The text that is signed.
    ///
    /// # Errors
    /// A value that is out of range.
    pub fn to_text(&self) -> Result<String, CharterError> {
        self.check().map_err(CharterError)?;
        let toml = toml::to_string(self).map_err(|error| CharterError(error.to_string()))?;
        Ok(format!("{FIRST_LINE}\n{toml}"))
    }

    /// The members' public keys.
    #[must_use]
    pub fn roster(&self) -> Roster {
        self.members
            .iter()
            .filter_map(|member| Some((member.institution.clone(), key(&member.key)?)))
            .collect()
    }

    fn check(&self) -> Result<(), String> {
        if self.members.is_empty() || self.members.len() > limits::MEMBERS {
            return Err(format!("members: 1 to {} are possible", limits::MEMBERS));
        }
        let names: BTreeSet<_> = self
            .members
            .iter()
            .map(|member| &member.institution)
            .collect();
        let keys: BTreeSet<_> = self.members.iter().map(|member| &member.key).collect();
        if names.len() != self.members.len() || keys.len() != self.members.len() {
            return Err("members: every institution and every key may stand there once".to_owned());
        }
        for member in &self.members {
            if key(&member.key).is_none() {
                return Err(format!(
                    "members: the key of {} is not an ed25519 public key in 64 hexadecimal digits",
                    member.institution
                ));
            }
        }
        let members = u32::try_from(self.members.len()).unwrap_or(u32::MAX);
        if !(1..=members).contains(&self.quorum) {
            return Err(format!(
                "quorum is {}, expected 1 to {members}",
                self.quorum
            ));
        }
        if !(1..=limits::SYMBOLS).contains(&self.max_symbols) {
            return Err(format!(
                "max_symbols is {}, expected 1 to {}",
                self.max_symbols,
                limits::SYMBOLS
            ));
        }
        if self.modes.is_empty() {
            return Err("modes: at least one is needed".to_owned());
        }
        Ok(())
    }
}

fn key(text: &str) -> Option<VerifyingKey> {
    let mut bytes = [0; 32];
    hex::decode_to_slice(text, &mut bytes).ok()?;
    VerifyingKey::from_bytes(&bytes)
        .ok()
        .filter(|key| !key.is_weak())
}
