//! What an institution signs when it hands something over, and the proof that it was checked.
//!
//! The statement is text, so that anybody can check a signature with `openssl pkeyutl -verify -rawin`:
//!
//! ```text
//! consilium/contribution/1
//! <consortium>
//! <round>
//! <manifest digest>
//! <institution>
//! <kind>
//! <sequence>
//! <artefact digest>
//! ```
//!
//! every line ended by a newline. The signature is ed25519 (RFC 8032), verified strictly.

#![warn(clippy::indexing_slicing, clippy::arithmetic_side_effects)]

use std::collections::BTreeMap;

use bincode::{Decode, Encode};
use ed25519_dalek::{Signature, Signer, SigningKey, VerifyingKey};
use serde::{Deserialize, Serialize};

use crate::artefact::Kind;
use crate::ids::{ConsortiumId, Digest, InstitutionId, RoundId};
use crate::reject::RejectCode;

/// First line of every signed statement.
pub const DOMAIN: &str = "consilium/contribution/1";

/// Public keys of the members.
pub type Roster = BTreeMap<InstitutionId, VerifyingKey>;

/// The slot of a contribution, and the artefact that fills it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, Encode, Decode)]
pub struct Statement {
    /// Consortium of the round.
    pub consortium: ConsortiumId,
    /// Round it is meant for.
    pub round: RoundId,
    /// Manifest of that round.
    pub manifest: Digest,
    /// Who hands it over.
    pub institution: InstitutionId,
    /// What it is.
    pub kind: Kind,
    /// Shard, inner round or 0, see [`Kind`].
    pub sequence: u32,
    /// SHA-256 of the artefact's bytes.
    pub artefact: Digest,
}

impl Statement {
    /// The bytes that are signed.
    #[must_use]
    pub fn to_bytes(&self) -> Vec<u8> {
        format!(
            "{DOMAIN}\n{}\n{}\n{}\n{}\n{}\n{}\n{}\n",
            self.consortium,
            self.round,
            self.manifest,
            self.institution,
            self.kind.name(),
            self.sequence,
            self.artefact
        )
        .into_bytes()
    }

    /// Signs with the institution's key.
    #[must_use]
    pub fn sign(self, key: &SigningKey) -> Unverified<Self> {
        let signature = key.sign(&self.to_bytes()).to_bytes();
        Unverified {
            body: self,
            signature,
        }
    }
}

/// Why a signed statement does not count.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// The signer is no member.
    #[error("{0} is not a member of the charter")]
    NotMember(InstitutionId),
    /// The signature does not verify under the member's key.
    #[error("the signature of {0} does not verify")]
    Signature(InstitutionId),
    /// Signed for another consortium.
    #[error("signed for consortium {got}, expected {expected}")]
    WrongConsortium {
        /// Consortium in the statement.
        got: ConsortiumId,
        /// Ours.
        expected: ConsortiumId,
    },
    /// Signed for another round.
    #[error("signed for round {got}, expected {expected}")]
    WrongRound {
        /// Round in the statement.
        got: RoundId,
        /// The open round.
        expected: RoundId,
    },
    /// Signed for another manifest of this round.
    #[error("signed for manifest {got}, expected {expected}")]
    WrongManifest {
        /// Manifest in the statement.
        got: Digest,
        /// Manifest of the open round.
        expected: Digest,
    },
}

impl Refusal {
    /// What the peer is told.
    #[must_use]
    pub const fn code(&self) -> RejectCode {
        match self {
            Self::NotMember(_) => RejectCode::NotMember,
            Self::Signature(_) => RejectCode::Signature,
            Self::WrongConsortium { .. } => RejectCode::Identity,
            Self::WrongRound { .. } | Self::WrongManifest { .. } => RejectCode::WrongRound,
        }
    }
}

/// What a signature must be bound to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Binding {
    /// Our consortium.
    pub consortium: ConsortiumId,
    /// The open round.
    pub round: RoundId,
    /// Its manifest.
    pub manifest: Digest,
}

/// A body with a signature that nobody checked yet.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub struct Unverified<T> {
    body: T,
    signature: [u8; 64],
}

impl Unverified<Statement> {
    /// A statement and a signature that came from elsewhere.
    #[must_use]
    pub const fn new(body: Statement, signature: [u8; 64]) -> Self {
        Self { body, signature }
    }

    /// What the sender claims, for routing and error messages only.
    #[must_use]
    pub const fn claim(&self) -> &Statement {
        &self.body
    }

    /// Checks membership, signature and binding, in this order.
    ///
    /// # Errors
    /// The first check that fails.
    pub fn verify(self, roster: &Roster, at: &Binding) -> Result<Verified<Statement>, Refusal> {
        let Self { body, signature } = self;
        let key = roster
            .get(&body.institution)
            .ok_or_else(|| Refusal::NotMember(body.institution.clone()))?;
        key.verify_strict(&body.to_bytes(), &Signature::from_bytes(&signature))
            .map_err(|_| Refusal::Signature(body.institution.clone()))?;
        if body.consortium != at.consortium {
            return Err(Refusal::WrongConsortium {
                got: body.consortium,
                expected: at.consortium.clone(),
            });
        }
        if body.round != at.round {
            return Err(Refusal::WrongRound {
                got: body.round,
                expected: at.round,
            });
        }
        if body.manifest != at.manifest {
            return Err(Refusal::WrongManifest {
                got: body.manifest,
                expected: at.manifest,
            });
        }
        Ok(Verified { body, signature })
    }
}

/// A body whose signer, signature, round and manifest were checked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Verified<T> {
    body: T,
    signature: [u8; 64],
}

impl<T> Verified<T> {
    /// The checked body.
    #[must_use]
    pub const fn body(&self) -> &T {
        &self.body
    }

    /// The signature as received, for the log.
    #[must_use]
    pub const fn signature(&self) -> &[u8; 64] {
        &self.signature
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn statement() -> Statement {
        Statement {
            consortium: ConsortiumId::new("demo").unwrap(),
            round: RoundId(4),
            manifest: Digest::of(b"manifest"),
            institution: InstitutionId::new("clinic").unwrap(),
            kind: Kind::Records,
            sequence: 3,
            artefact: Digest::of(b"artefact"),
        }
    }

    fn binding() -> Binding {
        let Statement {
            consortium,
            round,
            manifest,
            ..
        } = statement();
        Binding {
            consortium,
            round,
            manifest,
        }
    }

    fn key() -> SigningKey {
        SigningKey::from_bytes(&std::array::from_fn(|i| u8::try_from(i).unwrap()))
    }

    fn roster() -> Roster {
        Roster::from([(statement().institution, key().verifying_key())])
    }

    #[test]
    fn the_signed_bytes_and_the_signature_are_pinned() {
        let golden = include_bytes!("../tests/vectors/statement.txt");
        assert_eq!(statement().to_bytes(), golden);
        assert_eq!(
            hex::encode(statement().sign(&key()).signature),
            include_str!("../tests/vectors/statement.signature").trim()
        );
    }

    #[test]
    fn a_signature_counts_only_for_its_signer_round_and_manifest() {
        let signed = statement().sign(&key());
        assert!(signed.clone().verify(&roster(), &binding()).is_ok());

        let stranger = Roster::new();
        assert_eq!(
            signed
                .clone()
                .verify(&stranger, &binding())
                .unwrap_err()
                .code(),
            RejectCode::NotMember
        );
        let later = Binding {
            round: RoundId(5),
            ..binding()
        };
        assert_eq!(
            signed.clone().verify(&roster(), &later).unwrap_err(),
            Refusal::WrongRound {
                got: RoundId(4),
                expected: RoundId(5)
            }
        );
        let other = Binding {
            manifest: Digest::of(b"other"),
            ..binding()
        };
        assert_eq!(
            signed.verify(&roster(), &other).unwrap_err().code(),
            RejectCode::WrongRound
        );
    }

    #[test]
    fn every_flipped_bit_of_body_or_signature_is_refused() {
        let signed = statement().sign(&key());
        for byte in 0..64 {
            let mut signature = signed.signature;
            signature[byte] ^= 1;
            let forged = Unverified::new(statement(), signature);
            assert!(
                forged.verify(&roster(), &binding()).is_err(),
                "signature byte {byte}"
            );
        }
        let changed = Statement {
            sequence: 4,
            ..statement()
        };
        assert!(
            Unverified::new(changed, signed.signature)
                .verify(&roster(), &binding())
                .is_err()
        );
    }
}
