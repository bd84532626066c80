//! `aggregator.toml`. Unknown keys are refused; paths are relative to the file.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use consilium_certs::{CertsError, folder};
use consilium_protocol::charter::Charter;
use consilium_protocol::transcript::note::SignedNote;
use consilium_protocol::{ConsortiumId, Digest};
use serde::Deserialize;

/// Settings of an aggregator, paths made absolute.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// Name of the consortium.
    pub consortium: ConsortiumId,
    /// UDP address to listen on.
    pub listen: SocketAddr,
    /// Folder of blobs, index, log and releases.
    pub data_dir: PathBuf,
    /// The aggregator's member folder: certificate, keys, what it trusts.
    pub identity: PathBuf,
    /// The signed charter.
    pub charter: PathBuf,
    /// Folder of the pivot; its tensors are copied and hashed, never computed with.
    pub pivot: PathBuf,
    /// The reference set.
    pub reference: PathBuf,
    /// What releases say about themselves.
    #[serde(default)]
    pub release: ReleaseConfig,
}

/// What releases say about themselves.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ReleaseConfig {
    /// Where users find the pivot: a hub name or a path.
    pub base_model: String,
    /// SPDX identifier of the licence.
    pub license: String,
}

impl Default for ReleaseConfig {
    fn default() -> Self {
        Self {
            base_model: "pivot".to_owned(),
            license: "apache-2.0".to_owned(),
        }
    }
}

/// What is wrong with a file of the operator.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file cannot be read.
    #[error("{}: cannot be read", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// The system's reason.
        source: std::io::Error,
    },
    /// The authority's key is not where the certificate should have brought it.
    #[error(
        "the folder `identity` is not complete; `consilium-certs sign aggregator` writes cert.pem, ca.pem and authority.pub"
    )]
    Identity(#[from] CertsError),
    /// The file does not say what it should.
    #[error("{}: {problem}", path.display())]
    Content {
        /// The file.
        path: PathBuf,
        /// What is wrong, and with which field.
        problem: String,
    },
}

impl ConfigError {
    /// A problem with what `path` says.
    pub(crate) fn content(path: &Path, problem: impl std::fmt::Display) -> Self {
        Self::Content {
            path: path.to_owned(),
            problem: problem.to_string(),
        }
    }
}

/// Reads a file of the operator.
pub(crate) fn read(path: &Path) -> Result<Vec<u8>, ConfigError> {
    std::fs::read(path).map_err(|source| ConfigError::Read {
        path: path.to_owned(),
        source,
    })
}

impl Config {
    /// Reads and checks the file.
    ///
    /// # Errors
    /// It cannot be read, or a key is unknown, missing or out of range.
    pub fn load(path: &Path) -> Result<Self, ConfigError> {
        let bytes = read(path)?;
        let text = str::from_utf8(&bytes).map_err(|error| ConfigError::content(path, error))?;
        let mut config: Self =
            toml::from_str(text).map_err(|error| ConfigError::content(path, error))?;
        let base = path.parent().unwrap_or_else(|| Path::new("."));
        for entry in [
            &mut config.data_dir,
            &mut config.identity,
            &mut config.charter,
            &mut config.pivot,
            &mut config.reference,
        ] {
            *entry = base.join(&*entry);
        }
        Ok(config)
    }

    /// Reads the charter and checks its signature and consortium. Returns it with its bytes and digest.
    ///
    /// # Errors
    /// It cannot be read, is not signed by the authority, or is of another consortium.
    pub fn charter(&self) -> Result<(Charter, Vec<u8>, Digest), ConfigError> {
        let path = &self.charter;
        let wrong = |problem: String| ConfigError::content(path, problem);
        let key = folder::read_verifier_key(&self.identity.join(folder::AUTHORITY_PUBLIC))?;
        let bytes = read(path)?;
        let note = SignedNote::parse(&bytes)
            .and_then(|note| note.verify(&[key]))
            .map_err(|error| {
                wrong(format!(
                    "{error}; sign it with `consilium-certs charter sign`"
                ))
            })?;
        let charter = Charter::parse(note.text()).map_err(|error| wrong(error.to_string()))?;
        if charter.consortium != self.consortium {
            return Err(wrong(format!(
                "is of consortium {}, the configuration says {}",
                charter.consortium, self.consortium
            )));
        }
        let digest = Digest::of(&bytes);
        Ok((charter, bytes, digest))
    }
}
