//! Offline proof that an entry is in a log: <https://c2sp.org/tlog-proof>. The receipt of every
//! contribution and of every release.

use std::fmt;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;

use super::checkpoint::{CheckpointError, VerifiedCheckpoint, parse_decimal, parse_hash};
use super::key::VerifierKey;
use super::note::{MAX_NOTE_BYTES, NoteError, SignedNote};
use super::tree::{MAX_PROOF_HASHES, Tree, TreeError, verify_inclusion};
use crate::ids::Digest;

/// Longest proof in bytes.
pub const MAX_PROOF_BYTES: usize = MAX_NOTE_BYTES + (128 << 10);

/// Longest extra data in bytes.
pub const MAX_EXTRA_BYTES: usize = 64 << 10;

const HEADER: &str = "c2sp.org/tlog-proof@v1";

/// Why a log proof was refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ProofError {
    /// Beyond [`MAX_PROOF_BYTES`].
    #[error("proof has {0} bytes, at most {MAX_PROOF_BYTES} are accepted")]
    TooLong(usize),
    /// A line is not what the format asks for there.
    #[error("proof line {0} is malformed")]
    Line(usize),
    /// There is no blank line before the checkpoint, or the text is not UTF-8.
    #[error("proof holds no checkpoint")]
    NoCheckpoint,
    /// The entry is not in the tree.
    #[error("entry is not proved to be in the log")]
    Inclusion(#[from] TreeError),
    /// The checkpoint is not to be trusted.
    #[error("checkpoint in the proof was refused")]
    Checkpoint(#[from] CheckpointError),
}

/// Index of an entry, path to the root, and the checkpoint with that root.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LogProof {
    /// Data for the reader, not authenticated.
    pub extra: Option<Vec<u8>>,
    /// Position of the entry, from 0.
    pub index: u64,
    /// Sibling of the leaf first.
    pub path: Vec<Digest>,
    /// Signed checkpoint, cosignatures included.
    pub checkpoint: SignedNote,
}

impl LogProof {
    /// Proof for entry `index` of `tree` under a checkpoint of that log.
    ///
    /// # Errors
    /// The tree is smaller than the checkpoint or has another root, or the entry is not under it.
    pub fn new(
        tree: &Tree,
        index: u64,
        checkpoint: &VerifiedCheckpoint,
    ) -> Result<Self, ProofError> {
        let (size, expected) = (checkpoint.checkpoint().size, checkpoint.checkpoint().root);
        let got = tree.root_at(size)?;
        if got != expected {
            return Err(TreeError::WrongRoot { got, expected }.into());
        }
        let path = tree.inclusion(index, size)?;
        Ok(Self {
            extra: None,
            index,
            path,
            checkpoint: checkpoint.note().clone(),
        })
    }

    /// Reads a proof; nothing in it is trusted yet.
    ///
    /// # Errors
    /// Anything but the format of the specification.
    pub fn parse(bytes: &[u8]) -> Result<Self, ProofError> {
        if bytes.len() > MAX_PROOF_BYTES {
            return Err(ProofError::TooLong(bytes.len()));
        }
        let text = str::from_utf8(bytes).map_err(|_| ProofError::NoCheckpoint)?;
        let (head, note) = text.split_once("\n\n").ok_or(ProofError::NoCheckpoint)?;
        let mut lines = (1..).zip(head.split('\n')).peekable();
        if lines.next_if(|(_, line)| *line == HEADER).is_none() {
            return Err(ProofError::Line(1));
        }
        let mut extra = None;
        if let Some((number, line)) = lines.next_if(|(_, line)| line.starts_with("extra ")) {
            extra = Some(parse_extra(line).ok_or(ProofError::Line(number))?);
        }
        let (number, line) = lines.next().ok_or(ProofError::Line(2))?;
        let index = line
            .strip_prefix("index ")
            .and_then(parse_decimal)
            .ok_or(ProofError::Line(number))?;
        let mut path = Vec::new();
        for (number, line) in lines {
            if path.len() == MAX_PROOF_HASHES {
                return Err(ProofError::Line(number));
            }
            path.push(parse_hash(line).ok_or(ProofError::Line(number))?);
        }
        let checkpoint = SignedNote::parse(note.as_bytes()).map_err(CheckpointError::Note)?;
        Ok(Self {
            extra,
            index,
            path,
            checkpoint,
        })
    }

    /// Checks that the entry with this leaf hash is in the log that `log` signs for.
    ///
    /// # Errors
    /// The checkpoint is not the log's, or the path does not lead to its root.
    pub fn verify(
        &self,
        leaf: &Digest,
        log: &VerifierKey,
        witnesses: &[VerifierKey],
    ) -> Result<VerifiedCheckpoint, ProofError> {
        let verified = VerifiedCheckpoint::verify(self.checkpoint.clone(), log, witnesses)?;
        let checkpoint = verified.checkpoint();
        verify_inclusion(
            leaf,
            self.index,
            checkpoint.size,
            &self.path,
            &checkpoint.root,
        )?;
        Ok(verified)
    }
}

impl fmt::Display for LogProof {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{HEADER}")?;
        if let Some(extra) = &self.extra {
            writeln!(f, "extra {}", STANDARD.encode(extra))?;
        }
        writeln!(f, "index {}", self.index)?;
        for hash in &self.path {
            writeln!(f, "{}", STANDARD.encode(hash.as_bytes()))?;
        }
        write!(f, "\n{}", self.checkpoint)
    }
}

impl From<NoteError> for ProofError {
    fn from(error: NoteError) -> Self {
        Self::Checkpoint(error.into())
    }
}

fn parse_extra(line: &str) -> Option<Vec<u8>> {
    let text = line.strip_prefix("extra ")?;
    if text.len() > MAX_EXTRA_BYTES.saturating_mul(4) / 3 {
        return None;
    }
    STANDARD.decode(text).ok()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::checkpoint::Checkpoint;
    use super::super::checkpoint::tests::{SIGNED, log, witness};
    use super::super::tree::leaf_hash;
    use super::super::tree::tests::{LEAVES, example_tree};
    use super::*;

    fn example(index: u64) -> LogProof {
        let checkpoint =
            VerifiedCheckpoint::open(SIGNED.as_bytes(), log().verifier(), &[]).unwrap();
        LogProof::new(&example_tree(), index, &checkpoint).unwrap()
    }

    fn leaf(index: usize) -> Digest {
        leaf_hash(&hex::decode(LEAVES[index]).unwrap())
    }

    #[test]
    fn a_proof_reads_back_and_verifies_its_own_leaf_only() {
        for index in 0..8 {
            let mut proof = example(index as u64);
            proof.extra = (index % 2 == 0).then(|| b"where it came from".to_vec());
            let read = LogProof::parse(proof.to_string().as_bytes()).unwrap();
            assert_eq!(read, proof);
            read.verify(&leaf(index), log().verifier(), &[]).unwrap();
            assert!(
                read.verify(&leaf((index + 1) % 8), log().verifier(), &[])
                    .is_err()
            );
        }
    }

    #[test]
    fn the_text_is_that_of_the_specification() {
        let text = example(3).to_string();
        let lines: Vec<&str> = text.split('\n').collect();
        assert_eq!(lines[..2], ["c2sp.org/tlog-proof@v1", "index 3"]);
        assert_eq!(lines[5], "");
        assert_eq!(lines[6..].join("\n"), SIGNED);
    }

    #[test]
    fn every_mutation_of_one_byte_is_refused() {
        let text = example(5).to_string();
        for at in 0..text.len() {
            for mask in [1, 2, 4, 8, 16, 32, 64, 128, 255] {
                let mut bytes = text.as_bytes().to_vec();
                bytes[at] ^= mask;
                let refused = LogProof::parse(&bytes)
                    .and_then(|proof| proof.verify(&leaf(5), log().verifier(), &[]));
                assert!(refused.is_err(), "byte {at} xor {mask:#04x}");
            }
        }
    }

    #[test]
    fn a_cosigned_proof_tells_who_cosigned() {
        let checkpoint = VerifiedCheckpoint::open(SIGNED.as_bytes(), log().verifier(), &[])
            .unwrap()
            .cosign(&witness(), 1_700_000_000)
            .unwrap();
        let proof = LogProof::new(&example_tree(), 0, &checkpoint).unwrap();
        let proof = LogProof::parse(proof.to_string().as_bytes()).unwrap();
        let witnesses = [witness().verifier().clone()];
        let verified = proof
            .verify(&leaf(0), log().verifier(), &witnesses)
            .unwrap();
        assert_eq!(verified.cosigners().len(), 1);
    }

    #[test]
    fn no_proof_is_made_under_a_checkpoint_of_another_tree() {
        let checkpoint = Checkpoint {
            origin: "fed.example/audit".parse().unwrap(),
            size: 3,
            root: leaf(0),
        };
        let note = checkpoint.sign(&log()).unwrap();
        let checkpoint = VerifiedCheckpoint::verify(note, log().verifier(), &[]).unwrap();
        assert!(matches!(
            LogProof::new(&example_tree(), 0, &checkpoint),
            Err(ProofError::Inclusion(TreeError::WrongRoot { .. }))
        ));
    }

    proptest! {
        #[test]
        fn arbitrary_lines_never_panic(body in "(extra |index |[0-9A-Za-z+/=\\n ]){0,200}") {
            let _ = LogProof::parse(format!("{HEADER}\n{body}").as_bytes());
        }
    }
}
