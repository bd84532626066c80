//! The consortium's authority: signs certificates with a P-256 key and the charter with ed25519.

use std::path::Path;

use consilium_protocol::charter::{self, Charter};
use consilium_protocol::transcript::{NoteSigner, SignatureKind, SignedNote, VerifierKey};
use consilium_protocol::{ConsortiumId, UnixMillis};
use rcgen::{
    BasicConstraints, CertificateParams, CertificateSigningRequestParams, IsCa, Issuer,
    KeyUsagePurpose, PublicKeyData, SanType,
};

use crate::error::CertsError;
use crate::folder;
use crate::identity::SigningIdentity;
use crate::inspect::CertificateView;
use crate::leaf::{self, Credentials, LeafProfile, TlsKey};
use crate::pem::{self, Overwrite};

/// Validity of an authority unless asked otherwise, in years of 365 days.
pub const DEFAULT_YEARS: u32 = 10;

/// Longest validity of an authority, in years of 365 days.
pub const MAX_YEARS: u32 = 30;

/// The authority's keys and certificate.
#[derive(Debug)]
pub struct Authority {
    consortium: ConsortiumId,
    certificate: String,
    key: TlsKey,
    signer: NoteSigner,
    identity: SigningIdentity,
}

impl Authority {
    /// Makes a new authority in memory; [`Self::save`] writes it.
    ///
    /// # Errors
    /// No random bytes, or `years` is out of range.
    pub fn create(
        consortium: &ConsortiumId,
        years: u32,
        now: UnixMillis,
    ) -> Result<Self, CertsError> {
        if !(1..=MAX_YEARS).contains(&years) {
            let (days, most) = (years.saturating_mul(365), MAX_YEARS * 365);
            return Err(CertsError::Validity { days, most });
        }
        let key = TlsKey::generate()?;
        let identity = SigningIdentity::generate()?;
        let mut params = CertificateParams::default();
        params.distinguished_name = leaf::subject(consortium, "authority");
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        params.serial_number = Some(leaf::random_serial()?);
        leaf::set_validity(&mut params, now, years * 365)?;
        let certificate = params.self_signed(key.pair())?.pem();
        let signer = note_signer(consortium, &identity)?;
        Ok(Self {
            consortium: consortium.clone(),
            certificate,
            key,
            signer,
            identity,
        })
    }

    /// Writes the authority's folder.
    ///
    /// # Errors
    /// A file exists and must not be replaced, or cannot be written.
    pub fn save(&self, dir: &Path, overwrite: Overwrite) -> Result<(), CertsError> {
        let path = |name| dir.join(name);
        let names = [
            folder::CA,
            folder::CA_KEY,
            folder::AUTHORITY_KEY,
            folder::AUTHORITY_PUBLIC,
        ]
        .map(path);
        pem::check_absent(&names, overwrite)?;
        pem::create_folder(dir)?;
        let public = format!("{}\n", self.verifier_key());
        self.identity
            .save(&path(folder::AUTHORITY_KEY), overwrite)?;
        pem::write_public(&path(folder::AUTHORITY_PUBLIC), &public, overwrite)?;
        pem::write_secret(&path(folder::CA_KEY), &self.key.to_pem(), overwrite)?;
        pem::write_public(&path(folder::CA), &self.certificate, overwrite)
    }

    /// Reads the authority's folder.
    ///
    /// # Errors
    /// A file is missing, open to others, malformed, or does not belong to the others.
    pub fn load(dir: &Path) -> Result<Self, CertsError> {
        let ca_path = dir.join(folder::CA);
        let certificate = pem::read_public(&ca_path)?;
        let view = CertificateView::parse(&certificate, &ca_path)?;
        let key_path = dir.join(folder::CA_KEY);
        let key = TlsKey::from_pem(&pem::read_secret(&key_path)?, &key_path)?;
        if key.public_key_info() != view.public_key_info {
            return Err(CertsError::KeyMismatch {
                key: key_path,
                certificate: ca_path,
            });
        }
        let signing_path = dir.join(folder::AUTHORITY_KEY);
        let identity = SigningIdentity::load(&signing_path)?;
        let public_path = dir.join(folder::AUTHORITY_PUBLIC);
        let public = folder::read_verifier_key(&public_path)?;
        let consortium = folder::consortium_of(&public, &public_path)?;
        let signer = note_signer(&consortium, &identity)?;
        if *signer.verifier() != public {
            return Err(CertsError::AuthorityMismatch {
                public: public_path,
                key: signing_path,
            });
        }
        Ok(Self {
            consortium,
            certificate,
            key,
            signer,
            identity,
        })
    }

    /// The consortium.
    #[must_use]
    pub const fn consortium(&self) -> &ConsortiumId {
        &self.consortium
    }

    /// The authority's certificate, PEM: the trust anchor of every member.
    #[must_use]
    pub fn certificate(&self) -> &str {
        &self.certificate
    }

    /// Under which charters are verified.
    #[must_use]
    pub const fn verifier_key(&self) -> &VerifierKey {
        self.signer.verifier()
    }

    /// Makes a key and its certificate. For demonstrations: a site that makes its own key sends a
    /// [`leaf::request`] instead.
    ///
    /// # Errors
    /// The profile is refused.
    pub fn issue(&self, profile: &LeafProfile, now: UnixMillis) -> Result<Credentials, CertsError> {
        let key = TlsKey::generate()?;
        let certificate = self.certify(profile, key.pair(), now)?;
        Ok(Credentials { certificate, key })
    }

    /// Fills a member's folder: [`Self::issue`], a signing key if there is none, and what the
    /// member trusts. Returns the signing key, whose public half belongs into the charter.
    ///
    /// # Errors
    /// The profile is refused, or a file exists and must not be replaced, or cannot be written.
    pub fn issue_into(
        &self,
        profile: &LeafProfile,
        dir: &Path,
        now: UnixMillis,
        overwrite: Overwrite,
    ) -> Result<SigningIdentity, CertsError> {
        let credentials = self.issue(profile, now)?;
        let (key, certificate) = (dir.join(folder::KEY), dir.join(folder::CERTIFICATE));
        pem::check_absent(&[key.clone(), certificate.clone()], overwrite)?;
        pem::create_folder(dir)?;
        let signing = folder::ensure_signing_key(dir)?;
        pem::write_secret(&key, &credentials.key.to_pem(), overwrite)?;
        pem::write_public(&certificate, &credentials.certificate, overwrite)?;
        self.write_trust(dir)?;
        Ok(signing)
    }

    /// Writes what a member trusts into its folder: `ca.pem` and `authority.pub`.
    ///
    /// # Errors
    /// A file cannot be written.
    pub fn write_trust(&self, dir: &Path) -> Result<(), CertsError> {
        let public = format!("{}\n", self.verifier_key());
        pem::write_public(&dir.join(folder::CA), &self.certificate, Overwrite::Replace)?;
        pem::write_public(
            &dir.join(folder::AUTHORITY_PUBLIC),
            &public,
            Overwrite::Replace,
        )
    }

    /// Certifies the key of a request. The certificate says what `profile` says; the request is
    /// refused if it asks for another identity or for names beyond it.
    ///
    /// # Errors
    /// The request in `path` is malformed, not signed by its own key, or asks for something else.
    pub fn sign_request(
        &self,
        request: &str,
        path: &Path,
        profile: &LeafProfile,
        now: UnixMillis,
    ) -> Result<String, CertsError> {
        let request = CertificateSigningRequestParams::from_pem(request).map_err(|_| {
            CertsError::Malformed {
                path: path.to_owned(),
                expected: "certificate request signed by its own key",
            }
        })?;
        let key = &request.public_key;
        if PublicKeyData::algorithm(key) != &rcgen::PKCS_ECDSA_P256_SHA256 {
            return Err(CertsError::RequestKey);
        }
        let approved = profile.names(&self.consortium)?;
        let expected = profile.identity(&self.consortium);
        let mut identities = Vec::new();
        for name in &request.params.subject_alt_names {
            match name {
                SanType::URI(uri) => identities.push(uri.as_str()),
                other if approved.contains(other) => {}
                SanType::DnsName(name) => {
                    return Err(CertsError::RequestName(name.as_str().to_owned()));
                }
                SanType::IpAddress(ip) => return Err(CertsError::RequestName(ip.to_string())),
                _ => return Err(CertsError::RequestName("of another kind".to_owned())),
            }
        }
        if identities != [expected.to_string()] {
            let got = identities
                .first()
                .copied()
                .unwrap_or("no identity")
                .to_owned();
            return Err(CertsError::RequestIdentity { got, expected });
        }
        self.certify(profile, key, now)
    }

    /// Signs a charter of this consortium. `path` is named in errors.
    ///
    /// # Errors
    /// The text is no charter, is of another consortium, or cannot be a note.
    pub fn sign_charter(&self, text: &str, path: &Path) -> Result<SignedNote, CertsError> {
        let whole = if text.starts_with(charter::FIRST_LINE) {
            text.to_owned()
        } else {
            format!("{}\n{text}", charter::FIRST_LINE)
        };
        let parsed = Charter::parse(&whole).map_err(|source| CertsError::Charter {
            path: path.to_owned(),
            source,
        })?;
        let refused = |field, problem| CertsError::CharterField {
            path: path.to_owned(),
            field,
            problem,
        };
        if parsed.consortium != self.consortium {
            let problem = format!(
                "is {}, but this is the authority of {}",
                parsed.consortium, self.consortium
            );
            return Err(refused("consortium", problem));
        }
        if let Err(error) = parsed.log_key.parse::<VerifierKey>() {
            return Err(refused("log_key", error.to_string()));
        }
        let end = if whole.ends_with('\n') { "" } else { "\n" };
        Ok(SignedNote::sign(format!("{whole}{end}"), &self.signer)?)
    }

    fn certify(
        &self,
        profile: &LeafProfile,
        key: &impl PublicKeyData,
        now: UnixMillis,
    ) -> Result<String, CertsError> {
        let params = profile.certificate(&self.consortium, now)?;
        let own = CertificateView::parse(&self.certificate, Path::new(folder::CA))?;
        if params.not_after.unix_timestamp() > own.not_after {
            return Err(CertsError::OutlivesAuthority { days: profile.days });
        }
        let issuer = Issuer::from_ca_cert_pem(&self.certificate, self.key.pair())?;
        Ok(params.signed_by(key, &issuer)?.pem())
    }
}

fn note_signer(
    consortium: &ConsortiumId,
    identity: &SigningIdentity,
) -> Result<NoteSigner, CertsError> {
    identity.note_signer(
        &folder::authority_key_name(consortium),
        SignatureKind::Ed25519,
    )
}
