//! TLS of both sides: version 1.3 only, certificates both ways, hybrid post-quantum key exchange first, no resumption.
//!
//! A resumed session would reuse a certificate chain that was verified in the past, so there are no tickets, no session
//! store and no early data. Every handshake gets a verifier of its own, which keeps its reason.

use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustls::client::WebPkiServerVerifier;
use rustls::crypto::{CryptoProvider, aws_lc_rs};
use rustls::pki_types::pem::{Error as PemError, PemObject as _};
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::server::danger::ClientCertVerifier;
use rustls::server::{NoServerSessionStorage, WebPkiClientVerifier};
use rustls::sign::{CertifiedKey, SingleCertAndKey};
use rustls::{ClientConfig, RootCertStore, ServerConfig};
use zeroize::Zeroizing;

use super::identity::{self, IdentityError};
use super::reset::ResetSecret;
use super::verify::{ClientVerifier, FaultSlot, ServerVerifier};
use crate::frame::ALPN;
use crate::identity::PeerIdentity;

/// Why our own certificate, key or authority cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum CredentialsError {
    /// The file cannot be read.
    #[error("{}: cannot be read", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// The system's reason.
        source: std::io::Error,
    },
    /// The file holds something else.
    #[error("{}: expected {expected} in PEM, found {found}", path.display())]
    Malformed {
        /// The file.
        path: PathBuf,
        /// What belongs there.
        expected: &'static str,
        /// What is there.
        found: String,
    },
    /// The certificate names nobody.
    #[error("{}", path.display())]
    Identity {
        /// The certificate.
        path: PathBuf,
        /// What is wrong with it.
        source: IdentityError,
    },
    /// Key and certificate are of different pairs.
    #[error("{} is not the key of {}: use the pair that was issued together", key.display(), certificate.display())]
    KeyMismatch {
        /// The key.
        key: PathBuf,
        /// The certificate.
        certificate: PathBuf,
    },
    /// The library refuses.
    #[error("TLS configuration")]
    Tls(#[from] rustls::Error),
    /// The authority cannot verify anybody.
    #[error("{}: cannot be used as an authority", path.display())]
    Authority {
        /// The authority's certificate.
        path: PathBuf,
        /// The library's reason.
        source: rustls::client::VerifierBuilderError,
    },
}

/// A PEM text and the file that errors name.
#[derive(Clone, Copy)]
pub struct Pem<'a> {
    /// File it came from.
    pub path: &'a Path,
    /// Its content.
    pub text: &'a [u8],
}

impl fmt::Debug for Pem<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Pem({}, content redacted)", self.path.display())
    }
}

/// Our certificate, its key, and the authority that both sides trust.
#[derive(Clone)]
pub struct Credentials {
    identity: PeerIdentity,
    provider: Arc<CryptoProvider>,
    certified: Arc<SingleCertAndKey>,
    servers: Arc<WebPkiServerVerifier>,
    clients: Arc<dyn ClientCertVerifier>,
    reset: ResetSecret,
}

impl fmt::Debug for Credentials {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Credentials({}, key redacted)", self.identity)
    }
}

impl Credentials {
    /// Reads `ca.pem`, `cert.pem` and `key.pem` of a member's folder. The mode of the key file is not checked here.
    ///
    /// # Errors
    /// Names the file and what is wrong with it.
    pub fn load(folder: &Path) -> Result<Self, CredentialsError> {
        let read = |path: &Path| {
            std::fs::read(path)
                .map(Zeroizing::new)
                .map_err(|source| CredentialsError::Read {
                    path: path.to_owned(),
                    source,
                })
        };
        let paths = ["ca.pem", "cert.pem", "key.pem"].map(|name| folder.join(name));
        let [ca, certificate, key] = &paths;
        let (ca_text, certificate_text, key_text) = (read(ca)?, read(certificate)?, read(key)?);
        Self::from_pem(
            Pem {
                path: ca,
                text: &ca_text,
            },
            Pem {
                path: certificate,
                text: &certificate_text,
            },
            Pem {
                path: key,
                text: &key_text,
            },
        )
    }

    /// Authority, certificate (leaf first) and key from texts that were read elsewhere.
    ///
    /// # Errors
    /// Names the file and what is wrong with it.
    pub fn from_pem(
        authority: Pem<'_>,
        certificate: Pem<'_>,
        key: Pem<'_>,
    ) -> Result<Self, CredentialsError> {
        let provider = Arc::new(provider());
        let mut roots = RootCertStore::empty();
        for root in certificates(authority)? {
            roots
                .add(root)
                .map_err(|error| malformed(authority.path, AN_AUTHORITY, error.to_string()))?;
        }
        let roots = Arc::new(roots);
        let chain = certificates(certificate)?;
        let identity = chain
            .first()
            .ok_or(IdentityError::Certificate)
            .and_then(|leaf| identity::of_certificate(leaf))
            .map_err(|source| CredentialsError::Identity {
                path: certificate.path.to_owned(),
                source,
            })?;
        let private = PrivateKeyDer::from_pem_slice(key.text)
            .map_err(|error| malformed(key.path, "a private key", describe(&error)))?;
        let reset = ResetSecret::of_key(private.secret_der());
        let certified =
            CertifiedKey::from_der(chain, private, &provider).map_err(|error| match error {
                rustls::Error::InconsistentKeys(_) => CredentialsError::KeyMismatch {
                    key: key.path.to_owned(),
                    certificate: certificate.path.to_owned(),
                },
                other => malformed(key.path, "a private key", other.to_string()),
            })?;
        let refused = |source| CredentialsError::Authority {
            path: authority.path.to_owned(),
            source,
        };
        let servers =
            WebPkiServerVerifier::builder_with_provider(Arc::clone(&roots), Arc::clone(&provider))
                .build()
                .map_err(refused)?;
        let clients = WebPkiClientVerifier::builder_with_provider(roots, Arc::clone(&provider))
            .build()
            .map_err(refused)?;
        Ok(Self {
            identity,
            provider,
            certified: Arc::new(SingleCertAndKey::from(certified)),
            servers,
            clients,
            reset,
        })
    }

    /// Who we are, as our certificate says.
    #[must_use]
    pub const fn identity(&self) -> &PeerIdentity {
        &self.identity
    }

    /// What resets of our connections are made of.
    pub(super) const fn reset(&self) -> &ResetSecret {
        &self.reset
    }

    /// Configuration for one handshake with the aggregator of our consortium.
    pub(super) fn client(&self, fault: &FaultSlot) -> Result<ClientConfig, CredentialsError> {
        let verifier = ServerVerifier {
            inner: Arc::clone(&self.servers),
            ours: self.identity.clone(),
            fault: fault.clone(),
        };
        let mut config = ClientConfig::builder_with_provider(Arc::clone(&self.provider))
            .with_protocol_versions(&[&rustls::version::TLS13])?
            .dangerous()
            .with_custom_certificate_verifier(Arc::new(verifier))
            .with_client_cert_resolver(Arc::clone(&self.certified) as _);
        config.alpn_protocols = vec![ALPN.to_vec()];
        config.resumption = rustls::client::Resumption::disabled();
        config.enable_early_data = false;
        Ok(config)
    }

    /// Configuration for one handshake with whoever has a certificate of our authority.
    pub(super) fn server(&self, fault: &FaultSlot) -> Result<ServerConfig, CredentialsError> {
        let verifier = ClientVerifier {
            inner: Arc::clone(&self.clients),
            fault: fault.clone(),
        };
        let mut config = ServerConfig::builder_with_provider(Arc::clone(&self.provider))
            .with_protocol_versions(&[&rustls::version::TLS13])?
            .with_client_cert_verifier(Arc::new(verifier))
            .with_cert_resolver(Arc::clone(&self.certified) as _);
        config.alpn_protocols = vec![ALPN.to_vec()];
        config.session_storage = Arc::new(NoServerSessionStorage {});
        config.send_tls13_tickets = 0;
        config.max_early_data_size = 0;
        Ok(config)
    }
}

const AN_AUTHORITY: &str = "the certificate of an authority";

fn provider() -> CryptoProvider {
    use aws_lc_rs::kx_group::{SECP256R1, X25519, X25519MLKEM768};
    CryptoProvider {
        kx_groups: vec![X25519MLKEM768, X25519, SECP256R1],
        ..aws_lc_rs::default_provider()
    }
}

fn certificates(pem: Pem<'_>) -> Result<Vec<CertificateDer<'static>>, CredentialsError> {
    let chain: Vec<_> = CertificateDer::pem_slice_iter(pem.text)
        .collect::<Result<_, _>>()
        .map_err(|error| malformed(pem.path, "a certificate", describe(&error)))?;
    if chain.is_empty() {
        let found = describe(&PemError::NoItemsFound);
        return Err(malformed(pem.path, "a certificate", found));
    }
    Ok(chain)
}

fn malformed(path: &Path, expected: &'static str, found: String) -> CredentialsError {
    CredentialsError::Malformed {
        path: path.to_owned(),
        expected,
        found,
    }
}

fn describe(error: &PemError) -> String {
    match error {
        PemError::NoItemsFound => "none".to_owned(),
        PemError::MissingSectionEnd { .. } => "a section without its END line".to_owned(),
        PemError::IllegalSectionStart { .. } => "a damaged BEGIN line".to_owned(),
        PemError::Base64Decode(_) => "damaged base64".to_owned(),
        other => other.to_string(),
    }
}
