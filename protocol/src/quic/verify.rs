//! Judging a peer's certificate, and keeping the reason: QUIC reports a failed handshake as a number and a sentence.

use std::sync::{Arc, OnceLock};

use rustls::client::WebPkiServerVerifier;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::{CertificateError, DigitallySignedStruct, DistinguishedName, SignatureScheme};
use x509_parser::time::ASN1Time;

use super::identity::{self, IdentityError};
use crate::identity::{PeerIdentity, Role};

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

/// Where a verifier leaves its reason.
#[derive(Debug, Clone, Default)]
pub(super) struct FaultSlot(Arc<OnceLock<CertificateFault>>);

impl FaultSlot {
    /// The reason, if the verifier refused.
    pub(super) fn take(&self) -> Option<CertificateFault> {
        self.0.get().cloned()
    }

    fn fill(&self, fault: CertificateFault) {
        // The first reason is the one that ended the handshake.
        let _ = self.0.set(fault);
    }
}

/// Chain and name as webpki checks them, then role and consortium.
#[derive(Debug)]
pub(super) struct ServerVerifier {
    pub(super) inner: Arc<WebPkiServerVerifier>,
    pub(super) ours: PeerIdentity,
    pub(super) fault: FaultSlot,
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
        identity::of_certificate(end_entity)
            .map_err(CertificateFault::from)
            .and_then(|peer| check(&peer, Role::Aggregator, &self.ours))
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
pub(super) struct ClientVerifier {
    pub(super) inner: Arc<dyn ClientCertVerifier>,
    pub(super) fault: FaultSlot,
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

/// Checks that a peer has `role` in the consortium of `ours`.
pub(super) fn check(
    peer: &PeerIdentity,
    role: Role,
    ours: &PeerIdentity,
) -> Result<(), CertificateFault> {
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
