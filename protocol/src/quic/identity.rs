//! Who a certificate is for: `consilium://<consortium>/<node|aggregator>/<institution>`.

#![warn(clippy::indexing_slicing, clippy::arithmetic_side_effects)]

use std::fmt;

use x509_parser::extensions::GeneralName;
use x509_parser::prelude::{FromDer as _, X509Certificate};

use crate::ids::{ConsortiumId, Digest, InstitutionId};
use crate::time::UnixMillis;

/// What the holder of a certificate does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Role {
    /// Dials the aggregator.
    Node,
    /// Serves the nodes.
    Aggregator,
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Node => "node",
            Self::Aggregator => "aggregator",
        })
    }
}

/// Why a certificate names nobody.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum IdentityError {
    /// Not a certificate.
    #[error("not an X.509 certificate")]
    Certificate,
    /// There is no identity URI.
    #[error(
        "no identity in the certificate: expected a subject alternative name consilium://<consortium>/<node|aggregator>/<institution>"
    )]
    Missing,
    /// There is more than one URI.
    #[error("{0} URIs in the certificate, expected one identity")]
    Several(usize),
    /// The URI has another form.
    #[error("{0:?} is not consilium://<consortium>/<node|aggregator>/<institution>")]
    Form(String),
}

/// A peer, as its certificate says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PeerIdentity {
    /// What it does.
    pub role: Role,
    /// Its consortium.
    pub consortium: ConsortiumId,
    /// Its institution.
    pub institution: InstitutionId,
    /// SHA-256 of the certificate's `SubjectPublicKeyInfo`: pins a key across renewals.
    pub spki: Digest,
    /// When the certificate ends.
    pub not_after: UnixMillis,
}

impl PeerIdentity {
    /// Reads the identity of a certificate. Signature, issuer and validity are checked by TLS.
    ///
    /// # Errors
    /// The certificate does not hold exactly one identity.
    pub fn from_der(certificate: &[u8]) -> Result<Self, IdentityError> {
        let (rest, certificate) =
            X509Certificate::from_der(certificate).map_err(|_| IdentityError::Certificate)?;
        if !rest.is_empty() {
            return Err(IdentityError::Certificate);
        }
        let names = certificate
            .subject_alternative_name()
            .map_err(|_| IdentityError::Certificate)?
            .ok_or(IdentityError::Missing)?;
        let mut uris = names
            .value
            .general_names
            .iter()
            .filter_map(|name| match name {
                GeneralName::URI(uri) => Some(*uri),
                _ => None,
            });
        let uri = uris.next().ok_or(IdentityError::Missing)?;
        match uris.count() {
            0 => {}
            more => return Err(IdentityError::Several(more.saturating_add(1))),
        }
        let (consortium, role, institution) =
            parse_uri(uri).ok_or_else(|| IdentityError::Form(uri.chars().take(200).collect()))?;
        let seconds = certificate.validity().not_after.timestamp();
        Ok(Self {
            role,
            consortium,
            institution,
            spki: Digest::of(certificate.public_key().raw),
            not_after: UnixMillis(u64::try_from(seconds).unwrap_or(0).saturating_mul(1000)),
        })
    }
}

impl fmt::Display for PeerIdentity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            role,
            consortium,
            institution,
            ..
        } = self;
        write!(f, "consilium://{consortium}/{role}/{institution}")
    }
}

fn parse_uri(uri: &str) -> Option<(ConsortiumId, Role, InstitutionId)> {
    let mut parts = uri.strip_prefix("consilium://")?.split('/');
    let consortium = parts.next()?.parse().ok()?;
    let role = match parts.next()? {
        "node" => Role::Node,
        "aggregator" => Role::Aggregator,
        _ => return None,
    };
    let institution = parts.next()?.parse().ok()?;
    parts
        .next()
        .is_none()
        .then_some((consortium, role, institution))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn only_the_whole_form_is_an_identity() {
        let (consortium, role, institution) = parse_uri("consilium://demo/node/st-anna").unwrap();
        assert_eq!(
            (consortium.as_str(), role, institution.as_str()),
            ("demo", Role::Node, "st-anna")
        );
        for bad in [
            "",
            "https://demo/node/st-anna",
            "consilium://demo/node",
            "consilium://demo/node/st-anna/",
            "consilium://demo/admin/st-anna",
            "consilium://demo/Node/st-anna",
            "consilium:///node/st-anna",
            "consilium://demo/node/st-anna?x",
        ] {
            assert!(parse_uri(bad).is_none(), "{bad:?} was accepted");
        }
    }

    proptest! {
        #[test]
        fn any_bytes_are_refused_without_a_panic(bytes in proptest::collection::vec(any::<u8>(), 0..512)) {
            prop_assert!(PeerIdentity::from_der(&bytes).is_err());
        }
    }
}
