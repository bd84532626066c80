//! Publishing a release: a PEFT folder with report, card and signature that appears whole or not at all.

use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};

use consilium_protocol::artefact::{Kind, folder_digest};
use consilium_protocol::manifest::Manifest;
use consilium_protocol::{Digest, InstitutionId};
use serde::Serialize;

use super::card::{Report, adapter_config, card};
use super::error::ReleaseError;
use super::gate::Verdict;
use super::signature::{ReleaseKey, SIGNATURE, file_digest};
use crate::rounds::RecordsReport;

/// Name of the log proof, which the caller adds once the release is logged; neither signature nor digest cover it.
pub const PROOF: &str = "release.tlog-proof";
/// Name of the public key file beside the release folders.
const PUBLIC_KEY: &str = "release.pub";
const ADAPTER: &str = "adapter_model.safetensors";
const CONFIG: &str = "adapter_config.json";
const REPORT: &str = "report.json";
const CARD: &str = "README.md";

/// A contribution that counted.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Artefact {
    /// Who handed it over.
    pub institution: InstitutionId,
    /// What it is.
    pub kind: Kind,
    /// Its slot.
    pub sequence: u32,
    /// Its digest.
    pub artefact: Digest,
}

/// Everything that a release is made of. Nothing here depends on the time of day, so a restarted aggregator makes the same
/// release again.
#[derive(Debug, Clone, Copy)]
pub struct ReleaseInput<'a> {
    /// Folder of all releases.
    pub releases: &'a Path,
    /// The round's manifest.
    pub manifest: &'a Manifest,
    /// Its digest.
    pub manifest_digest: Digest,
    /// Index of the target shards, in modes that have targets.
    pub targets: Option<Digest>,
    /// What the records showed, in modes that have records.
    pub records: Option<&'a RecordsReport>,
    /// Contributions that counted, in log order.
    pub contributions: &'a [Artefact],
    /// Truncation error of each inner round, as logged.
    pub truncation_ppm: &'a [u32],
    /// The gate's decision.
    pub verdict: &'a Verdict,
    /// `adapter_model.safetensors` of the candidate, which is copied.
    pub adapter: &'a Path,
    /// Its digest.
    pub adapter_digest: Digest,
    /// Rank of its matrices: the manifest's, or more where the merge rule stacks factors.
    pub rank: usize,
    /// Where users find the pivot: a hub name or a path.
    pub base_model: &'a str,
    /// SPDX identifier of the licence.
    pub license: &'a str,
    /// The key that signs.
    pub key: &'a ReleaseKey,
}

/// A published release.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Release {
    /// Where it is.
    pub folder: PathBuf,
    /// Folder digest over all files, the signature included and the log proof left out.
    pub digest: Digest,
    /// Digest of `report.json`.
    pub report: Digest,
    /// The files with their digests, in name order.
    pub files: Vec<(String, Digest)>,
}

/// Writes `round-N` under `releases`: into a temporary folder, fsynced, then renamed.
///
/// Publishing the same release again changes nothing. Blocks on the disk.
///
/// # Errors
/// A candidate that the gate rejected, a different release of this round, or a disk that fails.
pub fn publish(input: ReleaseInput<'_>) -> Result<Release, ReleaseError> {
    if !input.verdict.passed() {
        return Err(ReleaseError::NotPassed);
    }
    let name = format!("round-{}", input.manifest.round);
    let config = pretty(
        CONFIG,
        &adapter_config(&input.manifest.training, input.rank, input.base_model),
    )?;
    let report = pretty(REPORT, &Report::of(&input))?;
    let card = card(&input);
    let mut documents: Vec<(&str, &[u8])> = vec![
        (CARD, card.as_bytes()),
        (CONFIG, &config),
        (REPORT, &report),
    ];
    let named = |documents: &[(&str, &[u8])]| -> Vec<(String, Digest)> {
        let documents = documents.iter();
        let mut files: Vec<_> = documents
            .map(|(name, bytes)| ((*name).to_owned(), Digest::of(bytes)))
            .chain([(ADAPTER.to_owned(), input.adapter_digest)])
            .collect();
        files.sort();
        files
    };
    let signature = input.key.sign(&name, &named(&documents))?;
    documents.push((SIGNATURE, &signature));
    let files = named(&documents);
    let release = Release {
        folder: input.releases.join(&name),
        digest: folder_digest(&files),
        report: Digest::of(&report),
        files,
    };
    std::fs::create_dir_all(input.releases).map_err(ReleaseError::io(input.releases))?;
    publish_key(&input)?;
    if release.folder.exists() {
        return if is_same(&release)? {
            Ok(release)
        } else {
            Err(ReleaseError::Exists {
                folder: release.folder,
                round: input.manifest.round,
            })
        };
    }
    let partial = input.releases.join(format!(".{name}.partial"));
    if partial.exists() {
        std::fs::remove_dir_all(&partial).map_err(ReleaseError::io(&partial))?;
    }
    std::fs::create_dir(&partial).map_err(ReleaseError::io(&partial))?;
    for (name, bytes) in documents {
        write(&partial.join(name), bytes)?;
    }
    copy(input.adapter, &partial.join(ADAPTER), input.adapter_digest)?;
    sync_folder(&partial)?;
    std::fs::rename(&partial, &release.folder).map_err(ReleaseError::io(&release.folder))?;
    sync_folder(input.releases)?;
    Ok(release)
}

/// The public key beside the folders, for people who check a release by hand.
fn publish_key(input: &ReleaseInput<'_>) -> Result<(), ReleaseError> {
    let pem = input.key.public_pem()?;
    let path = input.releases.join(PUBLIC_KEY);
    if std::fs::read(&path).is_ok_and(|old| old == pem.as_bytes()) {
        return Ok(());
    }
    let partial = input.releases.join(format!(".{PUBLIC_KEY}.partial"));
    write(&partial, pem.as_bytes())?;
    std::fs::rename(&partial, &path).map_err(ReleaseError::io(&path))?;
    sync_folder(input.releases)
}

fn is_same(release: &Release) -> Result<bool, ReleaseError> {
    for (name, digest) in &release.files {
        let path = release.folder.join(name);
        if !path.is_file() || file_digest(&path)? != *digest {
            return Ok(false);
        }
    }
    Ok(true)
}

fn pretty<T: Serialize>(file: &'static str, document: &T) -> Result<Vec<u8>, ReleaseError> {
    let mut bytes = serde_json::to_vec_pretty(document)
        .map_err(|source| ReleaseError::Json { file, source })?;
    bytes.push(b'\n');
    Ok(bytes)
}

fn write(path: &Path, bytes: &[u8]) -> Result<(), ReleaseError> {
    let mut file = File::create(path).map_err(ReleaseError::io(path))?;
    file.write_all(bytes)
        .and_then(|()| file.sync_all())
        .map_err(ReleaseError::io(path))
}

fn copy(from: &Path, to: &Path, expected: Digest) -> Result<(), ReleaseError> {
    let mut source = File::open(from).map_err(ReleaseError::io(from))?;
    let mut target = File::create(to).map_err(ReleaseError::io(to))?;
    std::io::copy(&mut source, &mut target)
        .and_then(|_| target.sync_all())
        .map_err(ReleaseError::io(to))?;
    let got = file_digest(to)?;
    if got == expected {
        Ok(())
    } else {
        Err(ReleaseError::Adapter { got, expected })
    }
}

fn sync_folder(path: &Path) -> Result<(), ReleaseError> {
    File::open(path)
        .and_then(|folder| folder.sync_all())
        .map_err(ReleaseError::io(path))
}
