//! Opening a round: the manifest is in the log, signed, within the charter and the site's policy, and about the pivot and
//! the reference set that lie here. Anything else is refused, and the node stays connected and idle.

use std::path::{Path, PathBuf};

use consilium_protocol::artefact::Kind;
use consilium_protocol::artefact::{folder_digest, is_model_file};
use consilium_protocol::contribution::Statement;
use consilium_protocol::manifest::{Manifest, ManifestError, Mode};
use consilium_protocol::reference::{ReferenceError, ReferenceSet};
use consilium_protocol::transcript::{NoteError, SignedNote, VerifierKey};
use consilium_protocol::{Digest, InstitutionId, RoundId};

use super::gate::GateError;
use super::trust::Trust;
use crate::config::Config;
use crate::spool::{Spool, SpoolError, hash_file};

/// Longest reference set that is taken, in bytes: it is held in memory.
pub(crate) const REFERENCE: u64 = 8 << 30;

/// Why the node does not take part in a round.
#[derive(Debug, thiserror::Error)]
pub enum RefusedRound {
    /// The manifest is not signed by the log's key.
    #[error("the manifest's signature")]
    Signature(#[source] NoteError),
    /// The manifest is malformed or contradicts the charter.
    #[error(transparent)]
    Manifest(#[from] ManifestError),
    /// A field contradicts what is known otherwise.
    #[error("the manifest's {field} is {got}, expected {expected}")]
    Field {
        /// The field.
        field: &'static str,
        /// What stands there.
        got: String,
        /// What should.
        expected: String,
    },
    /// This institution is not invited.
    #[error("{0} is not among the manifest's members")]
    NotInvited(InstitutionId),
    /// The site's policy does not allow it.
    #[error(transparent)]
    Policy(GateError),
    /// Another pivot lies here.
    #[error(
        "the manifest's pivot is {expected}, the folder {} has digest {got}; get the pivot of this round from the operator",
        path.display()
    )]
    Pivot {
        /// Folder of the pivot.
        path: PathBuf,
        /// Its digest.
        got: Digest,
        /// The manifest's.
        expected: Digest,
    },
    /// The round wants what this site is not set up for.
    #[error("{wanted}; {fix}")]
    Setting {
        /// What the round wants.
        wanted: String,
        /// What to set.
        fix: &'static str,
    },
    /// The pivot cannot be read.
    #[error("the pivot {} cannot be read", path.display())]
    PivotFolder {
        /// Folder of the pivot.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// The configuration names another reference set.
    #[error(
        "the manifest's reference set is {expected}, {} has digest {got}; name that file under `reference`, or leave it out to fetch it",
        path.display()
    )]
    Reference {
        /// The file.
        path: PathBuf,
        /// Its digest.
        got: Digest,
        /// The manifest's.
        expected: Digest,
    },
    /// The reference set is malformed.
    #[error(transparent)]
    ReferenceContent(#[from] ReferenceError),
}

/// A round that the node takes part in.
#[derive(Debug, Clone)]
pub(crate) struct OpenRound {
    pub(crate) manifest: Manifest,
    /// Digest of the signed manifest.
    pub(crate) digest: Digest,
    /// Adapter that inner round 0 starts from.
    pub(crate) start: Digest,
}

impl OpenRound {
    /// The statement with which this institution fills a slot.
    pub(crate) fn statement(
        &self,
        institution: &InstitutionId,
        kind: Kind,
        sequence: u32,
        artefact: Digest,
    ) -> Statement {
        Statement {
            consortium: self.manifest.consortium.clone(),
            round: self.manifest.round,
            manifest: self.digest,
            institution: institution.clone(),
            kind,
            sequence,
            artefact,
        }
    }
}

/// Checks a signed manifest against the log entry's round, the charter and our name.
pub(crate) fn check_manifest(
    note: &[u8],
    round: RoundId,
    trust: &Trust,
    institution: &InstitutionId,
) -> Result<Manifest, RefusedRound> {
    let manifest = open_manifest(note, trust.log_key())?;
    let differs = |field, got: String, expected: String| RefusedRound::Field {
        field,
        got,
        expected,
    };
    if manifest.round != round {
        let (got, expected) = (manifest.round.to_string(), round.to_string());
        return Err(differs("round", got, expected));
    }
    if manifest.charter != trust.charter_digest() {
        let (got, expected) = (
            manifest.charter.to_string(),
            trust.charter_digest().to_string(),
        );
        return Err(differs("charter", got, expected));
    }
    manifest.obeys(trust.charter())?;
    if manifest.members.binary_search(institution).is_err() {
        return Err(RefusedRound::NotInvited(institution.clone()));
    }
    Ok(manifest)
}

fn open_manifest(note: &[u8], log_key: &VerifierKey) -> Result<Manifest, RefusedRound> {
    let verified = SignedNote::parse(note)
        .and_then(|note| note.verify(std::slice::from_ref(log_key)))
        .map_err(RefusedRound::Signature)?;
    Ok(Manifest::parse(verified.text())?)
}

/// Checks that the site is set up for what the round's mode and loss ask of it.
pub(crate) fn check_setup(manifest: &Manifest, config: &Config) -> Result<(), RefusedRound> {
    let distillation = &manifest.training.distillation;
    if config.capacity == 0 {
        // It trains nothing.
        Ok(())
    } else if manifest.mode == Mode::Adapters && config.train_data.is_empty() {
        Err(RefusedRound::Setting {
            wanted: "the round's mode adapters trains on private text".to_owned(),
            fix: "name it under `data` in [train], or set capacity = 0",
        })
    } else if distillation.sorted_symbols().is_some() && config.source_server.is_some() {
        Err(RefusedRound::Setting {
            wanted: format!(
                "the round's distillation {} needs the source's own logits, and the source is behind a server",
                distillation.name()
            ),
            fix: "leave out [source_server] and give the folder of the source its weights",
        })
    } else {
        Ok(())
    }
}

/// Checks that the pivot in a folder is the manifest's. Reads all of its weights.
pub(crate) fn check_pivot(folder: &Path, expected: Digest) -> Result<(), RefusedRound> {
    let got = pivot_digest(folder).map_err(|source| RefusedRound::PivotFolder {
        path: folder.to_owned(),
        source,
    })?;
    if got == expected {
        return Ok(());
    }
    Err(RefusedRound::Pivot {
        path: folder.to_owned(),
        got,
        expected,
    })
}

/// Stores the configured reference set as a blob if it is the manifest's.
pub(crate) fn take_reference(
    path: &Path,
    expected: Digest,
    spool: &Spool,
) -> Result<Result<(), RefusedRound>, SpoolError> {
    let got = spool.put_blob_file(path)?;
    if got == expected {
        return Ok(Ok(()));
    }
    spool.remove_blob(&got)?;
    Ok(Err(RefusedRound::Reference {
        path: path.to_owned(),
        got,
        expected,
    }))
}

/// Checks that the reference set has the items that the manifest says.
pub(crate) fn check_reference(manifest: &Manifest, bytes: &[u8]) -> Result<(), RefusedRound> {
    let set = ReferenceSet::parse(bytes)?;
    let items = u64::try_from(set.items().len()).unwrap_or(u64::MAX);
    if items == manifest.items {
        return Ok(());
    }
    Err(RefusedRound::Field {
        field: "items",
        got: manifest.items.to_string(),
        expected: format!("{items}, as many as the reference set has"),
    })
}

fn pivot_digest(folder: &Path) -> std::io::Result<Digest> {
    let mut files = Vec::new();
    for entry in std::fs::read_dir(folder)? {
        let entry = entry?;
        if let Some(name) = entry.file_name().to_str()
            && is_model_file(name)
        {
            let (digest, _) = hash_file(&entry.path())?;
            files.push((name.to_owned(), digest));
        }
    }
    Ok(folder_digest(&files))
}
