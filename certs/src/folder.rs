//! File names of the two folders, and reading a member's.

use std::path::{Path, PathBuf};

use consilium_protocol::ConsortiumId;
use consilium_protocol::transcript::VerifierKey;

use crate::error::CertsError;
use crate::identity::SigningIdentity;
use crate::inspect::CertificateView;
use consilium_protocol::PeerIdentity;

use crate::leaf::TlsKey;
use crate::pem::{self, Overwrite};

/// Certificate of the authority; in both folders.
pub const CA: &str = "ca.pem";
/// P-256 key of the authority.
pub const CA_KEY: &str = "ca.key";
/// ed25519 key of the authority.
pub const AUTHORITY_KEY: &str = "authority.key";
/// C2SP verifier key of the authority; in both folders.
pub const AUTHORITY_PUBLIC: &str = "authority.pub";
/// Certificate of a member.
pub const CERTIFICATE: &str = "cert.pem";
/// P-256 key of a member.
pub const KEY: &str = "key.pem";
/// Certificate request of a member.
pub const REQUEST: &str = "request.pem";
/// ed25519 key of a member.
pub const SIGNING_KEY: &str = "signing.key";
/// Public half of [`SIGNING_KEY`], hexadecimal.
pub const SIGNING_PUBLIC: &str = "signing.pub";

/// A member's folder, read and checked.
#[derive(Debug)]
pub struct Member {
    /// Who the certificate is for.
    pub identity: PeerIdentity,
    /// The member's certificate, PEM.
    pub certificate: String,
    /// Its key.
    pub key: TlsKey,
    /// The authority's certificate, PEM.
    pub authority: String,
    /// Under which the charter is verified.
    pub authority_key: VerifierKey,
    /// The member's ed25519 key.
    pub signing: SigningIdentity,
}

impl Member {
    /// Reads a member's folder.
    ///
    /// # Errors
    /// A file is missing, open to others, malformed, or does not belong to the others. Validity and
    /// issuer are not checked here: `inspect::verify` does.
    pub fn load(dir: &Path) -> Result<Self, CertsError> {
        let path = |name| dir.join(name);
        let certificate_path = path(CERTIFICATE);
        let certificate = pem::read_public(&certificate_path)?;
        let view = CertificateView::parse(&certificate, &certificate_path)?;
        let identity = view.identity().ok_or_else(|| CertsError::Malformed {
            path: certificate_path.clone(),
            expected: "certificate with one consilium:// identity",
        })?;
        let key = TlsKey::from_pem(&pem::read_secret(&path(KEY))?, &path(KEY))?;
        if key.public_key_info() != view.public_key_info {
            return Err(CertsError::KeyMismatch {
                key: path(KEY),
                certificate: certificate_path,
            });
        }
        Ok(Self {
            identity,
            certificate,
            key,
            authority: pem::read_public(&path(CA))?,
            authority_key: read_verifier_key(&path(AUTHORITY_PUBLIC))?,
            signing: SigningIdentity::load(&path(SIGNING_KEY))?,
        })
    }
}

/// The ed25519 key in a member's folder, made if there is none. An existing one always stays: the
/// charter lists it, and a renewed certificate does not change that.
///
/// # Errors
/// The key there cannot be read, or a new one not written.
pub fn ensure_signing_key(dir: &Path) -> Result<SigningIdentity, CertsError> {
    let path = dir.join(SIGNING_KEY);
    let identity = if path.symlink_metadata().is_ok() {
        SigningIdentity::load(&path)?
    } else {
        let identity = SigningIdentity::generate()?;
        identity.save(&path, Overwrite::Refuse)?;
        identity
    };
    let public = format!("{}\n", identity.public_hex());
    pem::write_public(&dir.join(SIGNING_PUBLIC), &public, Overwrite::Replace)?;
    Ok(identity)
}

/// Name of the key that signs a consortium's charter.
#[must_use]
pub fn authority_key_name(consortium: &ConsortiumId) -> String {
    format!("{consortium}/authority")
}

/// Name of the key that signs a consortium's log and manifests; also the log's origin.
#[must_use]
pub fn log_key_name(consortium: &ConsortiumId) -> String {
    format!("{consortium}/log")
}

/// Reads a verifier key file: one line.
///
/// # Errors
/// The file cannot be read or holds something else.
pub fn read_verifier_key(path: &Path) -> Result<VerifierKey, CertsError> {
    pem::read_public(path)?
        .trim_end()
        .parse()
        .map_err(|_| malformed_key(path))
}

pub(crate) fn consortium_of(key: &VerifierKey, path: &Path) -> Result<ConsortiumId, CertsError> {
    key.name()
        .as_str()
        .strip_suffix("/authority")
        .and_then(|name| name.parse().ok())
        .ok_or_else(|| malformed_key(path))
}

fn malformed_key(path: &Path) -> CertsError {
    let path = PathBuf::from(path);
    CertsError::Malformed {
        path,
        expected: "verifier key <consortium>/authority+<id>+<base64>",
    }
}
