//! Certificates of nodes and aggregators, and the keys they certify.

use std::fmt;
use std::net::IpAddr;
use std::path::Path;

use consilium_protocol::{ConsortiumId, InstitutionId, PeerIdentity, Role, UnixMillis};
use rcgen::string::Ia5String;
use rcgen::{
    CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa, KeyPair,
    KeyUsagePurpose, PublicKeyData as _, SanType, SerialNumber,
};
use x509_parser::time::ASN1Time;
use zeroize::{Zeroize as _, Zeroizing};

use crate::error::CertsError;

/// Validity of a leaf unless asked otherwise, in days.
pub const DEFAULT_DAYS: u32 = 90;

/// Longest validity of a leaf, in days.
pub const MAX_DAYS: u32 = 825;

/// How far a certificate's validity starts in the past: sites whose clocks run late accept it.
const BACKDATE_SECONDS: i64 = 600;

const SECONDS_A_DAY: i64 = 86_400;

/// What a certificate is to say.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LeafProfile {
    /// Role of the holder.
    pub role: Role,
    /// The holder.
    pub institution: InstitutionId,
    /// Host names that nodes dial; aggregators only.
    pub dns: Vec<String>,
    /// Addresses that nodes dial; aggregators only.
    pub ip: Vec<IpAddr>,
    /// Validity from now.
    pub days: u32,
}

impl LeafProfile {
    /// A node's certificate of 90 days.
    #[must_use]
    pub const fn node(institution: InstitutionId) -> Self {
        Self {
            role: Role::Node,
            institution,
            dns: Vec::new(),
            ip: Vec::new(),
            days: DEFAULT_DAYS,
        }
    }

    /// An aggregator's certificate of 90 days under the names that nodes dial.
    #[must_use]
    pub const fn aggregator(institution: InstitutionId, dns: Vec<String>, ip: Vec<IpAddr>) -> Self {
        Self {
            role: Role::Aggregator,
            institution,
            dns,
            ip,
            days: DEFAULT_DAYS,
        }
    }

    /// Names and identity in the form of the certificate library; checks every field.
    pub(crate) fn names(&self, consortium: &ConsortiumId) -> Result<Vec<SanType>, CertsError> {
        if !(1..=MAX_DAYS).contains(&self.days) {
            return Err(CertsError::Validity {
                days: self.days,
                most: MAX_DAYS,
            });
        }
        let has_server_name = !self.dns.is_empty() || !self.ip.is_empty();
        match self.role {
            Role::Aggregator if !has_server_name => return Err(CertsError::NoServerName),
            Role::Node if has_server_name => return Err(CertsError::NodeWithServerName),
            Role::Aggregator | Role::Node => {}
        }
        let uri = self.identity(consortium).to_string();
        let mut names = vec![SanType::URI(Ia5String::try_from(uri)?)];
        for name in &self.dns {
            if !is_host_name(name) {
                return Err(CertsError::HostName(name.clone()));
            }
            names.push(SanType::DnsName(Ia5String::try_from(name.as_str())?));
        }
        names.extend(self.ip.iter().copied().map(SanType::IpAddress));
        Ok(names)
    }

    pub(crate) fn identity(&self, consortium: &ConsortiumId) -> PeerIdentity {
        PeerIdentity {
            consortium: consortium.clone(),
            role: self.role,
            institution: self.institution.clone(),
        }
    }

    /// The whole certificate but for issuer and key.
    pub(crate) fn certificate(
        &self,
        consortium: &ConsortiumId,
        now: UnixMillis,
    ) -> Result<CertificateParams, CertsError> {
        let mut params = CertificateParams::default();
        params.subject_alt_names = self.names(consortium)?;
        params.distinguished_name = subject(consortium, self.institution.as_str());
        params.is_ca = IsCa::ExplicitNoCa;
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = vec![match self.role {
            Role::Node => ExtendedKeyUsagePurpose::ClientAuth,
            Role::Aggregator => ExtendedKeyUsagePurpose::ServerAuth,
        }];
        params.use_authority_key_identifier_extension = true;
        set_validity(&mut params, now, self.days)?;
        params.serial_number = Some(random_serial()?);
        Ok(params)
    }
}

/// A P-256 key for TLS; wiped when dropped, never shown.
pub struct TlsKey(KeyPair);

impl TlsKey {
    /// A new key.
    ///
    /// # Errors
    /// The operating system gives no random bytes.
    pub fn generate() -> Result<Self, CertsError> {
        Ok(Self(KeyPair::generate_for(&rcgen::PKCS_ECDSA_P256_SHA256)?))
    }

    /// Reads a key from the text of `path`.
    ///
    /// # Errors
    /// The text is no P-256 private key in PKCS#8 PEM.
    pub fn from_pem(text: &str, path: &Path) -> Result<Self, CertsError> {
        KeyPair::from_pkcs8_pem_and_sign_algo(text, &rcgen::PKCS_ECDSA_P256_SHA256)
            .map(Self)
            .map_err(|_| CertsError::Malformed {
                path: path.to_owned(),
                expected: "P-256 private key in PKCS#8 PEM",
            })
    }

    /// The private key in PKCS#8 PEM.
    #[must_use]
    pub fn to_pem(&self) -> Zeroizing<String> {
        Zeroizing::new(self.0.serialize_pem())
    }

    /// The public half, DER of `SubjectPublicKeyInfo`.
    #[must_use]
    pub fn public_key_info(&self) -> Vec<u8> {
        self.0.subject_public_key_info()
    }

    pub(crate) const fn pair(&self) -> &KeyPair {
        &self.0
    }
}

impl Drop for TlsKey {
    fn drop(&mut self) {
        self.0.zeroize();
    }
}

impl fmt::Debug for TlsKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("TlsKey(P-256, secret redacted)")
    }
}

/// A key and its certificate.
#[derive(Debug)]
pub struct Credentials {
    /// The certificate, PEM.
    pub certificate: String,
    /// Its key.
    pub key: TlsKey,
}

/// A certificate request for the authority; the key stays here.
///
/// # Errors
/// A field of the profile is refused.
pub fn request(
    consortium: &ConsortiumId,
    profile: &LeafProfile,
    key: &TlsKey,
) -> Result<String, CertsError> {
    let mut params = CertificateParams::default();
    params.subject_alt_names = profile.names(consortium)?;
    params.distinguished_name = subject(consortium, profile.institution.as_str());
    Ok(params.serialize_request(key.pair())?.pem()?)
}

pub(crate) fn subject(consortium: &ConsortiumId, name: &str) -> DistinguishedName {
    let mut subject = DistinguishedName::new();
    subject.push(DnType::OrganizationName, consortium.as_str());
    subject.push(DnType::CommonName, name);
    subject
}

pub(crate) fn set_validity(
    params: &mut CertificateParams,
    now: UnixMillis,
    days: u32,
) -> Result<(), CertsError> {
    let now = i64::try_from(now.0 / 1000).map_err(|_| CertsError::Clock)?;
    let date = |seconds: Option<i64>| {
        seconds
            .and_then(|seconds| ASN1Time::from_timestamp(seconds).ok())
            .map(|time| time.to_datetime())
            .ok_or(CertsError::Clock)
    };
    params.not_before = date(now.checked_sub(BACKDATE_SECONDS))?;
    params.not_after = date(now.checked_add(i64::from(days) * SECONDS_A_DAY))?;
    Ok(())
}

/// 126 random bits: renewals of one key differ, and the number is positive in DER.
pub(crate) fn random_serial() -> Result<SerialNumber, CertsError> {
    let mut bytes = [0_u8; 16];
    getrandom::fill(&mut bytes).map_err(|_| CertsError::Random)?;
    let [first, ..] = &mut bytes;
    *first = (*first & 0x7f) | 0x40;
    Ok(SerialNumber::from_slice(&bytes))
}

fn is_host_name(name: &str) -> bool {
    let is_label = |label: &str| {
        (1..=63).contains(&label.len())
            && !label.starts_with('-')
            && !label.ends_with('-')
            && label
                .bytes()
                .all(|byte| byte.is_ascii_alphanumeric() || byte == b'-')
    };
    name.len() <= 253 && name.split('.').all(is_label) && name.parse::<IpAddr>().is_err()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn profiles_that_make_no_sense_are_refused() {
        let consortium = ConsortiumId::new("demo").unwrap();
        let id = InstitutionId::new("op").unwrap();
        let names = |profile: &LeafProfile| profile.names(&consortium).map(|names| names.len());
        let bare = LeafProfile::aggregator(id.clone(), vec![], vec![]);
        assert!(matches!(names(&bare), Err(CertsError::NoServerName)));
        let mut node = LeafProfile::node(id.clone());
        assert_eq!(names(&node).unwrap(), 1);
        node.days = 0;
        assert!(matches!(
            names(&node),
            Err(CertsError::Validity { days: 0, .. })
        ));
        node.days = 1;
        node.dns.push("localhost".to_owned());
        assert!(matches!(names(&node), Err(CertsError::NodeWithServerName)));
        for host in [
            "",
            "*.example.org",
            "a..b",
            "-a.example",
            "a b",
            "127.0.0.1",
            "a_b",
        ] {
            let profile = LeafProfile::aggregator(id.clone(), vec![host.to_owned()], vec![]);
            assert!(
                matches!(names(&profile), Err(CertsError::HostName(_))),
                "{host:?}"
            );
        }
        let good = vec!["Fusion.Example.org".to_owned(), "localhost".to_owned()];
        assert_eq!(
            names(&LeafProfile::aggregator(id, good, vec![])).unwrap(),
            3
        );
    }

    #[test]
    fn debug_of_a_tls_key_shows_no_secret() {
        let key = TlsKey::generate().unwrap();
        let body: String = key
            .to_pem()
            .lines()
            .filter(|line| !line.starts_with('-'))
            .collect();
        let shown = format!("{key:?}");
        assert_eq!(shown, "TlsKey(P-256, secret redacted)");
        assert!(!shown.contains(&body));
    }
}
