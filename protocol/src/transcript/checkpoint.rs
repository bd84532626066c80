//! Checkpoints of a log and witnesses' cosignatures: <https://c2sp.org/tlog-checkpoint>,
//! <https://c2sp.org/tlog-cosignature>.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;

use super::key::{KeyName, NoteSigner, VerifierKey};
use super::note::{Author, NoteError, SignedNote};
use crate::ids::Digest;

/// Why a checkpoint was refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum CheckpointError {
    /// The text is not exactly origin, size and root.
    #[error("checkpoint is not three lines: origin, decimal size, base64 root")]
    Format,
    /// Signed for or by another log.
    #[error("checkpoint of log {got}, expected {expected}")]
    WrongOrigin {
        /// Origin or key name found.
        got: KeyName,
        /// Origin or key name asked for.
        expected: KeyName,
    },
    /// The log's own signature is missing; cosignatures do not replace it.
    #[error("checkpoint is not signed by log {0}")]
    NotSignedByLog(KeyName),
    /// The note itself.
    #[error(transparent)]
    Note(#[from] NoteError),
}

/// What a log says about itself: so many entries under this root.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Checkpoint {
    /// Identity of the log; equals the name of its key.
    pub origin: KeyName,
    /// Number of entries.
    pub size: u64,
    /// Root of the tree over them.
    pub root: Digest,
}

impl Checkpoint {
    /// The signed text.
    #[must_use]
    pub fn text(&self) -> String {
        format!(
            "{}\n{}\n{}\n",
            self.origin,
            self.size,
            STANDARD.encode(self.root.as_bytes())
        )
    }

    /// Reads the text of a checkpoint. Extension lines are refused: witnesses vouch for none.
    ///
    /// # Errors
    /// Anything but the canonical form.
    pub fn parse_text(text: &str) -> Result<Self, CheckpointError> {
        let text = text.strip_suffix('\n').ok_or(CheckpointError::Format)?;
        let mut lines = text.split('\n');
        let (Some(origin), Some(size), Some(root), None) =
            (lines.next(), lines.next(), lines.next(), lines.next())
        else {
            return Err(CheckpointError::Format);
        };
        Ok(Self {
            origin: origin.parse().map_err(|_| CheckpointError::Format)?,
            size: parse_decimal(size).ok_or(CheckpointError::Format)?,
            root: parse_hash(root).ok_or(CheckpointError::Format)?,
        })
    }

    /// Signs with the log's key.
    ///
    /// # Errors
    /// The key has another name than the log, or is a cosignature key.
    pub fn sign(&self, signer: &NoteSigner) -> Result<SignedNote, CheckpointError> {
        let name = signer.verifier().name();
        if *name != self.origin {
            return Err(CheckpointError::WrongOrigin {
                got: name.clone(),
                expected: self.origin.clone(),
            });
        }
        Ok(SignedNote::sign(self.text(), signer)?)
    }
}

/// A checkpoint signed by its log.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VerifiedCheckpoint {
    checkpoint: Checkpoint,
    cosigners: Vec<Author>,
    note: SignedNote,
}

impl VerifiedCheckpoint {
    /// Reads a checkpoint and checks the log's signature and those of known witnesses.
    ///
    /// # Errors
    /// Malformed, of another log, or a signature of a known key is missing (the log's) or wrong.
    pub fn open(
        bytes: &[u8],
        log: &VerifierKey,
        witnesses: &[VerifierKey],
    ) -> Result<Self, CheckpointError> {
        Self::verify(SignedNote::parse(bytes)?, log, witnesses)
    }

    /// As [`Self::open`], for a note already read.
    ///
    /// # Errors
    /// As [`Self::open`].
    pub fn verify(
        note: SignedNote,
        log: &VerifierKey,
        witnesses: &[VerifierKey],
    ) -> Result<Self, CheckpointError> {
        let mut known = vec![log.clone()];
        known.extend_from_slice(witnesses);
        let note = note.verify(&known)?;
        if !note.is_signed_by(log) {
            return Err(CheckpointError::NotSignedByLog(log.name().clone()));
        }
        let checkpoint = Checkpoint::parse_text(note.text())?;
        if checkpoint.origin != *log.name() {
            return Err(CheckpointError::WrongOrigin {
                got: checkpoint.origin,
                expected: log.name().clone(),
            });
        }
        let cosigners = note
            .authors()
            .iter()
            .filter(|author| author.time.is_some())
            .cloned()
            .collect();
        Ok(Self {
            checkpoint,
            cosigners,
            note: note.note().clone(),
        })
    }

    /// Origin, size and root.
    #[must_use]
    pub const fn checkpoint(&self) -> &Checkpoint {
        &self.checkpoint
    }

    /// Known witnesses that cosigned, with the time each states.
    #[must_use]
    pub fn cosigners(&self) -> &[Author] {
        &self.cosigners
    }

    /// The note, to store or to pass on.
    #[must_use]
    pub const fn note(&self) -> &SignedNote {
        &self.note
    }

    /// Adds a witness's cosignature at `seconds` since 1970. The witness must have verified
    /// consistency with, and durably stored, the largest checkpoint it cosigned before.
    ///
    /// # Errors
    /// The key is no cosignature key, or the note is full.
    pub fn cosign(mut self, signer: &NoteSigner, seconds: u64) -> Result<Self, CheckpointError> {
        self.note.cosign(signer, seconds)?;
        self.cosigners.push(Author {
            key: signer.verifier().clone(),
            time: Some(seconds),
        });
        Ok(self)
    }
}

/// ASCII decimal without leading zeros or sign.
pub(super) fn parse_decimal(text: &str) -> Option<u64> {
    let canonical = text == "0" || !text.starts_with('0');
    if !canonical || !text.bytes().all(|byte| byte.is_ascii_digit()) {
        return None;
    }
    text.parse().ok()
}

/// Base64 of exactly 32 bytes.
pub(super) fn parse_hash(text: &str) -> Option<Digest> {
    if text.len() != 44 {
        return None;
    }
    Some(Digest::from_bytes(
        STANDARD.decode(text).ok()?.try_into().ok()?,
    ))
}

#[cfg(test)]
pub(super) mod tests {
    use ed25519_dalek::SigningKey;

    use super::super::key::SignatureKind;
    use super::super::tree::tests::example_tree;
    use super::*;

    pub(in crate::transcript) const SIGNED: &str = "fed.example/audit\n8\n\
        XcnaeacGWamtVZy3Ad7ZoqudgjqtL0lgz+Nw7/RgQyg=\n\n— fed.example/audit \
        jRZ0AFLZxIh0wHL1BVTeeEEAjB+26Lq4AsbszVZYr0b7eUk5FOdfhy10UfzoEKhPMReds/cd0rPdXFVb4uPTFmVdHg0=\n";
    const WITNESS_LINE: &str = "— witness.example/w1 \
        IDJKvgAAAABlU/EAHAud25zDCz4J6deGOFnp5n6lnkgt+3o7UFxr5zpF46RvPW0rcVXuERHTQLTUKKlOjjAYrEtrKUXsGANllw+FDw==\n";

    pub(in crate::transcript) fn signer(name: &str, kind: SignatureKind, first: u8) -> NoteSigner {
        let seed: [u8; 32] = std::array::from_fn(|i| first.wrapping_add(u8::try_from(i).unwrap()));
        NoteSigner::new(name.parse().unwrap(), kind, &SigningKey::from_bytes(&seed)).unwrap()
    }

    pub(in crate::transcript) fn log() -> NoteSigner {
        signer("fed.example/audit", SignatureKind::Ed25519, 0x00)
    }

    pub(in crate::transcript) fn witness() -> NoteSigner {
        signer("witness.example/w1", SignatureKind::Cosignature, 0x20)
    }

    fn example() -> Checkpoint {
        let tree = example_tree();
        Checkpoint {
            origin: "fed.example/audit".parse().unwrap(),
            size: tree.size(),
            root: tree.root(),
        }
    }

    #[test]
    fn the_recorded_checkpoint_and_cosignature_are_reproduced_to_the_byte() {
        let note = example().sign(&log()).unwrap();
        assert_eq!(note.to_string(), SIGNED);
        let verified = VerifiedCheckpoint::open(SIGNED.as_bytes(), log().verifier(), &[]).unwrap();
        assert_eq!(*verified.checkpoint(), example());
        let cosigned = verified
            .cosign(&witness(), 1_700_000_000)
            .unwrap()
            .note()
            .to_string();
        assert_eq!(cosigned, format!("{SIGNED}{WITNESS_LINE}"));
        let witnesses = [witness().verifier().clone()];
        let read =
            VerifiedCheckpoint::open(cosigned.as_bytes(), log().verifier(), &witnesses).unwrap();
        assert_eq!(
            read.cosigners(),
            [Author {
                key: witnesses[0].clone(),
                time: Some(1_700_000_000)
            }]
        );
    }

    #[test]
    fn every_mutation_of_one_byte_is_refused() {
        for at in 0..SIGNED.len() {
            for mask in [1, 2, 4, 8, 16, 32, 64, 128, 255] {
                let mut bytes = SIGNED.as_bytes().to_vec();
                bytes[at] ^= mask;
                assert!(
                    VerifiedCheckpoint::open(&bytes, log().verifier(), &[]).is_err(),
                    "byte {at} xor {mask:#04x}"
                );
            }
        }
    }

    #[test]
    fn a_cosignature_for_another_time_is_refused() {
        let witnesses = [witness().verifier().clone()];
        let blob = WITNESS_LINE.trim_end().rsplit(' ').next().unwrap();
        for byte in 4..12 {
            let mut bytes = STANDARD.decode(blob).unwrap();
            bytes[byte] ^= 1;
            let line = format!("— witness.example/w1 {}\n", STANDARD.encode(bytes));
            let text = format!("{SIGNED}{line}");
            let refusal = VerifiedCheckpoint::open(text.as_bytes(), log().verifier(), &witnesses);
            assert!(matches!(
                refusal,
                Err(CheckpointError::Note(NoteError::BadSignature(_)))
            ));
        }
    }

    #[test]
    fn a_witness_alone_makes_no_checkpoint() {
        let text = SIGNED.split("— ").next().unwrap();
        let text = format!("{text}{WITNESS_LINE}");
        let witnesses = [witness().verifier().clone()];
        assert_eq!(
            VerifiedCheckpoint::open(text.as_bytes(), log().verifier(), &witnesses),
            Err(CheckpointError::NotSignedByLog(
                "fed.example/audit".parse().unwrap()
            ))
        );
    }

    #[test]
    fn only_the_canonical_text_is_read() {
        let root = STANDARD.encode([7; 32]);
        assert!(Checkpoint::parse_text(&format!("a\n0\n{root}\n")).is_ok());
        for text in [
            format!("a\n01\n{root}\n"),
            format!("a\n+1\n{root}\n"),
            format!("a\n\n{root}\n"),
            format!("a\n18446744073709551616\n{root}\n"),
            format!("a\n1\n{root}"),
            format!("a\n1\n{root}\nextension\n"),
            format!("a b\n1\n{root}\n"),
            format!("a\n1\n{}\n", STANDARD.encode([7; 31])),
            "a\n1\n".to_owned(),
        ] {
            assert_eq!(
                Checkpoint::parse_text(&text),
                Err(CheckpointError::Format),
                "{text:?}"
            );
        }
    }

    #[test]
    fn a_checkpoint_of_another_log_is_refused() {
        let stranger = signer("other.example", SignatureKind::Ed25519, 0x00);
        assert!(matches!(
            example().sign(&stranger),
            Err(CheckpointError::WrongOrigin { .. })
        ));
        let forged = SignedNote::sign(example().text(), &stranger).unwrap();
        assert!(matches!(
            VerifiedCheckpoint::verify(forged, stranger.verifier(), &[]),
            Err(CheckpointError::WrongOrigin { .. })
        ));
    }
}
