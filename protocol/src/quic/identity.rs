//! Who a certificate is for.

#![warn(clippy::indexing_slicing, clippy::arithmetic_side_effects)]

use x509_parser::extensions::GeneralName;
use x509_parser::prelude::{FromDer as _, X509Certificate};

use crate::identity::{NoIdentity, PeerIdentity};

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
    #[error(transparent)]
    Form(#[from] NoIdentity),
}

/// Reads the identity of a certificate in DER. Signature, issuer and validity are checked by TLS.
///
/// # Errors
/// The certificate does not hold exactly one identity.
pub(super) fn of_certificate(der: &[u8]) -> Result<PeerIdentity, IdentityError> {
    let (rest, certificate) =
        X509Certificate::from_der(der).map_err(|_| IdentityError::Certificate)?;
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
        0 => Ok(uri.parse()?),
        more => Err(IdentityError::Several(more.saturating_add(1))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn any_bytes_are_refused_without_a_panic(bytes in proptest::collection::vec(any::<u8>(), 0..512)) {
            prop_assert!(of_certificate(&bytes).is_err());
        }
    }
}
