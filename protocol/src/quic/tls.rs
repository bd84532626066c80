//! TLS of both sides: version 1.3 only, certificates both ways, hybrid post-quantum key exchange first, no resumption.
//!
//! A resumed session would reuse a certificate chain that was verified in the past, so there are no tickets, no session
//! store and no early data. Every handshake gets a verifier of its own that keeps its reason, because
//! QUIC reports a failed handshake as a number and a sentence.

use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};

use rustls::client::WebPkiServerVerifier;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{CryptoProvider, aws_lc_rs};
use rustls::pki_types::pem::{Error as PemError, PemObject as _};
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::server::{NoServerSessionStorage, WebPkiClientVerifier};
use rustls::sign::{CertifiedKey, SingleCertAndKey};
use rustls::{CertificateError, DigitallySignedStruct, DistinguishedName, RootCertStore};
use rustls::{ClientConfig, ServerConfig, SignatureScheme};
use x509_parser::time::ASN1Time;
use zeroize::Zeroizing;

use super::identity::{IdentityError, PeerIdentity, Role};
use crate::frame::ALPN;

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

/// Why a peer's certificate does not pass.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum CertificateFault {
    /// It showed none.
    #[error("the peer showed no certificate")]
    Missing,
    /// Past its end.
    #[error("the peer's certificate expired on {0}; the peer must renew it")]
    Expired(String),
    /// Before its start.
    #[error("the peer's certificate is not valid before {0}; check the clocks of both machines")]
    NotYetValid(String),
    /// Of another authority.
    #[error(
        "the peer's certificate is not from the authority in our ca.pem; both must be of the same consortium"
    )]
    UnknownAuthority,
    /// For other host names.
    #[error("the aggregator's certificate is for {presented:?}, not for {expected:?}")]
    WrongName {
        /// Name that was dialled.
        expected: String,
        /// Names in the certificate.
        presented: Vec<String>,
    },
    /// Extended key usage of the other side.
    #[error("the peer's certificate is for another purpose (extended key usage)")]
    WrongPurpose,
    /// It names nobody.
    #[error("the peer's certificate does not say who it is")]
    Identity(#[from] IdentityError),
    /// A node where an aggregator should be, or the other way round.
    #[error("the peer's certificate is of {identity}, expected the role {expected}")]
    WrongRole {
        /// Identity in the certificate.
        identity: String,
        /// Role that may be there.
        expected: Role,
    },
    /// Of another consortium.
    #[error("the peer's certificate is of {identity}, expected the consortium {expected}")]
    WrongConsortium {
        /// Identity in the certificate.
        identity: String,
        /// Our consortium.
        expected: String,
    },
    /// Anything else.
    #[error("the peer's certificate does not pass: {0}")]
    Other(String),
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
            .and_then(|leaf| PeerIdentity::from_der(leaf))
            .map_err(|source| CredentialsError::Identity {
                path: certificate.path.to_owned(),
                source,
            })?;
        let private = PrivateKeyDer::from_pem_slice(key.text)
            .map_err(|error| malformed(key.path, "a private key", describe(&error)))?;
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
        })
    }

    /// Who we are, as our certificate says.
    #[must_use]
    pub const fn identity(&self) -> &PeerIdentity {
        &self.identity
    }

    /// Configuration for one handshake with the aggregator of our consortium.
    pub(crate) fn client(&self, fault: &FaultSlot) -> Result<ClientConfig, CredentialsError> {
        let verifier = ServerVerifier {
            inner: Arc::clone(&self.servers),
            expected: self.identity.clone(),
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
    pub(crate) fn server(&self, fault: &FaultSlot) -> Result<ServerConfig, CredentialsError> {
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

    /// Checks that a peer has `role` in our consortium.
    pub(crate) fn check(&self, peer: &PeerIdentity, role: Role) -> Result<(), CertificateFault> {
        check(peer, role, &self.identity)
    }
}

/// Where a verifier leaves its reason.
#[derive(Debug, Clone, Default)]
pub(crate) struct FaultSlot(Arc<OnceLock<CertificateFault>>);

impl FaultSlot {
    /// The reason, if the verifier refused.
    pub(crate) fn take(&self) -> Option<CertificateFault> {
        self.0.get().cloned()
    }

    fn fill(&self, fault: CertificateFault) {
        // The first reason is the one that ended the handshake.
        let _ = self.0.set(fault);
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

fn check(peer: &PeerIdentity, role: Role, ours: &PeerIdentity) -> Result<(), CertificateFault> {
    if peer.consortium != ours.consortium {
        return Err(CertificateFault::WrongConsortium {
            identity: peer.to_string(),
            expected: ours.consortium.to_string(),
        });
    }
    if peer.role != role {
        return Err(CertificateFault::WrongRole {
            identity: peer.to_string(),
            expected: role,
        });
    }
    Ok(())
}

fn fault(error: &rustls::Error) -> CertificateFault {
    let rustls::Error::InvalidCertificate(reason) = error else {
        return CertificateFault::Other(error.to_string());
    };
    match reason {
        CertificateError::ExpiredContext { not_after, .. } => {
            CertificateFault::Expired(date(*not_after))
        }
        CertificateError::NotValidYetContext { not_before, .. } => {
            CertificateFault::NotYetValid(date(*not_before))
        }
        CertificateError::UnknownIssuer | CertificateError::BadSignature => {
            CertificateFault::UnknownAuthority
        }
        CertificateError::NotValidForNameContext {
            expected,
            presented,
        } => CertificateFault::WrongName {
            expected: expected.to_str().into_owned(),
            presented: presented.clone(),
        },
        CertificateError::InvalidPurpose | CertificateError::InvalidPurposeContext { .. } => {
            CertificateFault::WrongPurpose
        }
        _ => CertificateFault::Other(error.to_string()),
    }
}

fn date(time: UnixTime) -> String {
    i64::try_from(time.as_secs())
        .ok()
        .and_then(|seconds| ASN1Time::from_timestamp(seconds).ok())
        .map_or_else(
            || format!("second {}", time.as_secs()),
            |time| time.to_string(),
        )
}

/// Chain and name as webpki checks them, then role and consortium.
#[derive(Debug)]
struct ServerVerifier {
    inner: Arc<WebPkiServerVerifier>,
    expected: PeerIdentity,
    fault: FaultSlot,
}

impl ServerCertVerifier for ServerVerifier {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        server_name: &ServerName<'_>,
        ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        let verified = self
            .inner
            .verify_server_cert(end_entity, intermediates, server_name, ocsp_response, now)
            .inspect_err(|error| self.fault.fill(fault(error)))?;
        PeerIdentity::from_der(end_entity)
            .map_err(CertificateFault::from)
            .and_then(|peer| check(&peer, Role::Aggregator, &self.expected))
            .map_err(|fault| {
                self.fault.fill(fault);
                rustls::Error::from(CertificateError::ApplicationVerificationFailure)
            })?;
        Ok(verified)
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.inner.verify_tls12_signature(message, cert, dss)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.inner.verify_tls13_signature(message, cert, dss)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.inner.supported_verify_schemes()
    }
}

/// Chain as webpki checks it. Role and consortium are checked after the handshake, where a reject code can be sent.
#[derive(Debug)]
struct ClientVerifier {
    inner: Arc<dyn ClientCertVerifier>,
    fault: FaultSlot,
}

impl ClientCertVerifier for ClientVerifier {
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        self.inner.root_hint_subjects()
    }

    fn verify_client_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, rustls::Error> {
        self.inner
            .verify_client_cert(end_entity, intermediates, now)
            .inspect_err(|error| self.fault.fill(fault(error)))
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.inner.verify_tls12_signature(message, cert, dss)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.inner.verify_tls13_signature(message, cert, dss)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.inner.supported_verify_schemes()
    }
}
