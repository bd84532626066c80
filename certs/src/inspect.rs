//! Reading certificates, and saying what is wrong with one.

use std::net::IpAddr;
use std::path::Path;

use consilium_protocol::{Digest, UnixMillis};
use x509_parser::certificate::X509Certificate;
use x509_parser::extensions::GeneralName;
use x509_parser::pem::Pem;
use x509_parser::x509::SubjectPublicKeyInfo;

use crate::error::CertsError;
use consilium_protocol::{PeerIdentity, Role};

const EC_PUBLIC_KEY: &str = "1.2.840.10045.2.1";
const P256: &str = "1.2.840.10045.3.1.7";

/// What a certificate says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CertificateView {
    /// Subject name.
    pub subject: String,
    /// Issuer name.
    pub issuer: String,
    /// Serial number, hexadecimal.
    pub serial: String,
    /// SAN URIs.
    pub uris: Vec<String>,
    /// SAN host names.
    pub dns: Vec<String>,
    /// SAN addresses.
    pub ip: Vec<IpAddr>,
    /// Start of validity, seconds since 1970.
    pub not_before: i64,
    /// End of validity, seconds since 1970.
    pub not_after: i64,
    /// Public key, DER of `SubjectPublicKeyInfo`.
    pub public_key_info: Vec<u8>,
    /// SHA-256 of [`Self::public_key_info`]: what pins a key across renewals.
    pub spki_sha256: Digest,
    /// Whether the key is on P-256.
    pub is_p256: bool,
    /// Whether it may sign certificates.
    pub is_ca: bool,
    /// Extended key usage includes TLS client.
    pub client_auth: bool,
    /// Extended key usage includes TLS server.
    pub server_auth: bool,
}

impl CertificateView {
    /// Reads the first certificate of a PEM text; `path` is named in errors.
    ///
    /// # Errors
    /// The text holds no certificate.
    pub fn parse(text: &str, path: &Path) -> Result<Self, CertsError> {
        with_certificate(text, path, Self::of)
    }

    /// Who it is for: its one identity URI.
    #[must_use]
    pub fn identity(&self) -> Option<PeerIdentity> {
        match self.uris.as_slice() {
            [uri] => uri.parse().ok(),
            _ => None,
        }
    }

    fn of(certificate: &X509Certificate<'_>) -> Self {
        let usage = certificate
            .extended_key_usage()
            .ok()
            .flatten()
            .map(|usage| usage.value);
        let (mut uris, mut dns, mut ip) = (Vec::new(), Vec::new(), Vec::new());
        if let Ok(Some(names)) = certificate.subject_alternative_name() {
            for name in &names.value.general_names {
                match name {
                    GeneralName::URI(uri) => uris.push((*uri).to_owned()),
                    GeneralName::DNSName(name) => dns.push((*name).to_owned()),
                    GeneralName::IPAddress(bytes) => ip.extend(address(bytes)),
                    _ => {}
                }
            }
        }
        let public_key = certificate.public_key();
        Self {
            subject: certificate.subject().to_string(),
            issuer: certificate.issuer().to_string(),
            serial: hex::encode(certificate.raw_serial()),
            uris,
            dns,
            ip,
            not_before: certificate.validity().not_before.timestamp(),
            not_after: certificate.validity().not_after.timestamp(),
            public_key_info: public_key.raw.to_vec(),
            spki_sha256: Digest::of(public_key.raw),
            is_p256: is_p256(public_key),
            is_ca: certificate.is_ca(),
            client_auth: usage.is_some_and(|usage| usage.client_auth),
            server_auth: usage.is_some_and(|usage| usage.server_auth),
        }
    }
}

/// What is wrong with a certificate.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Fault {
    /// Signed by another key than the authority's, or altered.
    #[error(
        "not signed by this authority ({authority}); its issuer is {issuer}: use the ca.pem of its own consortium"
    )]
    WrongAuthority {
        /// Subject of the authority.
        authority: String,
        /// Issuer that the certificate names.
        issuer: String,
    },
    /// The authority's certificate may not sign others.
    #[error("ca.pem is not the certificate of an authority")]
    NotAnAuthority,
    /// The certificate is itself an authority.
    #[error("certificate is an authority, not a member's")]
    IsAuthority,
    /// The authority's certificate is not valid now.
    #[error("certificate of the authority is not valid now: make a new authority")]
    AuthorityExpired,
    /// Past the end of validity.
    #[error("expired {0}: request a new certificate")]
    Expired(String),
    /// Before the start of validity.
    #[error("not valid before {0}: check the clock of this machine")]
    NotYetValid(String),
    /// There is no identity URI, or more than one.
    #[error("no single identity consilium://<consortium>/<node|aggregator>/<institution>")]
    NoIdentity,
    /// The identity is of another consortium.
    #[error("certificate is of consortium {got}, the authority of {expected}")]
    WrongConsortium {
        /// Consortium in the certificate.
        got: String,
        /// Consortium of the authority.
        expected: String,
    },
    /// The extended key usage does not fit the role.
    #[error("extended key usage does not fit a {0}: have it issued again")]
    WrongUsage(Role),
    /// The key is not P-256.
    #[error("key is not P-256: have it issued again")]
    WrongKey,
}

impl Fault {
    /// Stable code for scripts.
    #[must_use]
    pub const fn code(&self) -> &'static str {
        match self {
            Self::WrongAuthority { .. } => "CERT-WRONG-AUTHORITY",
            Self::NotAnAuthority => "CERT-NOT-AN-AUTHORITY",
            Self::IsAuthority => "CERT-IS-AUTHORITY",
            Self::AuthorityExpired => "CERT-AUTHORITY-EXPIRED",
            Self::Expired(_) => "CERT-EXPIRED",
            Self::NotYetValid(_) => "CERT-NOT-YET-VALID",
            Self::NoIdentity => "CERT-NO-IDENTITY",
            Self::WrongConsortium { .. } => "CERT-WRONG-CONSORTIUM",
            Self::WrongUsage(_) => "CERT-WRONG-USAGE",
            Self::WrongKey => "CERT-WRONG-KEY",
        }
    }
}

/// Everything that is wrong with a member's certificate under an authority at a time; empty if it
/// is good. The paths are named in errors.
///
/// # Errors
/// One of the texts holds no certificate.
pub fn verify(
    certificate: (&str, &Path),
    authority: (&str, &Path),
    now: UnixMillis,
) -> Result<Vec<Fault>, CertsError> {
    let view = CertificateView::parse(certificate.0, certificate.1)?;
    let root = CertificateView::parse(authority.0, authority.1)?;
    let signed = with_certificate(certificate.0, certificate.1, |leaf| {
        with_certificate(authority.0, authority.1, |root| {
            leaf.issuer().as_raw() == root.subject().as_raw()
                && leaf.verify_signature(Some(root.public_key())).is_ok()
        })
    })??;
    let mut faults = Vec::new();
    if !root.is_ca {
        faults.push(Fault::NotAnAuthority);
    }
    if !signed {
        let (authority, issuer) = (root.subject.clone(), view.issuer.clone());
        faults.push(Fault::WrongAuthority { authority, issuer });
    }
    let now = i64::try_from(now.0 / 1000).map_err(|_| CertsError::Clock)?;
    if now < root.not_before || now > root.not_after {
        faults.push(Fault::AuthorityExpired);
    }
    if now < view.not_before {
        faults.push(Fault::NotYetValid(date(view.not_before)));
    }
    if now > view.not_after {
        faults.push(Fault::Expired(date(view.not_after)));
    }
    if !view.is_p256 {
        faults.push(Fault::WrongKey);
    }
    if view.is_ca {
        faults.push(Fault::IsAuthority);
    } else {
        faults.extend(identity_fault(&view, &root));
    }
    Ok(faults)
}

/// A date as people write it, UTC.
#[must_use]
pub fn date(seconds: i64) -> String {
    x509_parser::time::ASN1Time::from_timestamp(seconds)
        .map_or_else(|_| format!("{seconds} s"), |time| time.to_string())
}

fn identity_fault(view: &CertificateView, root: &CertificateView) -> Option<Fault> {
    let Some(identity) = view.identity() else {
        return Some(Fault::NoIdentity);
    };
    // An authority made elsewhere has a subject of its own; ours names the consortium.
    let expected = root
        .subject
        .strip_prefix("O=")
        .and_then(|name| name.strip_suffix(", CN=authority"));
    if let Some(expected) = expected.filter(|name| *name != identity.consortium.as_str()) {
        let got = identity.consortium.to_string();
        return Some(Fault::WrongConsortium {
            got,
            expected: expected.to_owned(),
        });
    }
    let usage_fits = match identity.role {
        Role::Node => view.client_auth && !view.server_auth,
        Role::Aggregator => view.server_auth && !view.client_auth,
    };
    (!usage_fits).then_some(Fault::WrongUsage(identity.role))
}

fn with_certificate<T>(
    text: &str,
    path: &Path,
    use_it: impl FnOnce(&X509Certificate<'_>) -> T,
) -> Result<T, CertsError> {
    let malformed = || CertsError::Malformed {
        path: path.to_owned(),
        expected: "certificate in PEM",
    };
    let block = Pem::iter_from_buffer(text.as_bytes())
        .next()
        .and_then(Result::ok)
        .filter(|block| block.label == "CERTIFICATE")
        .ok_or_else(malformed)?;
    let certificate = block.parse_x509().map_err(|_| malformed())?;
    Ok(use_it(&certificate))
}

fn is_p256(key: &SubjectPublicKeyInfo<'_>) -> bool {
    let curve = key
        .algorithm
        .parameters
        .as_ref()
        .and_then(|curve| curve.as_oid().ok());
    key.algorithm.algorithm.to_id_string() == EC_PUBLIC_KEY
        && curve.is_some_and(|curve| curve.to_id_string() == P256)
}

fn address(bytes: &[u8]) -> Option<IpAddr> {
    <[u8; 4]>::try_from(bytes)
        .map(IpAddr::from)
        .or_else(|_| <[u8; 16]>::try_from(bytes).map(IpAddr::from))
        .ok()
}
