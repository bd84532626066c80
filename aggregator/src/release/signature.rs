//! Signatures over release folders in the OpenSSF model-signing form: a Sigstore bundle v0.3 whose DSSE envelope holds an
//! in-toto statement with the SHA-256 of every file, signed with ECDSA on P-256.
//!
//! `model_signing verify key --public_key release.pub` checks them without our code. (OpenSSF Model Signing
//! specification, <https://github.com/ossf/model-signing-spec>; DSSE v1; RFC 6979 nonces, so that the same release has
//! the same signature.)

use std::fmt;
use std::fs::{File, OpenOptions};
use std::io::{ErrorKind, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use consilium_protocol::Digest;
use p256::ecdsa::signature::{Signer, Verifier};
use p256::ecdsa::{DerSignature, SigningKey, VerifyingKey};
use p256::pkcs8::{
    DecodePrivateKey, DecodePublicKey, EncodePrivateKey, EncodePublicKey, LineEnding,
};
use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};

use super::error::ReleaseError;
use super::publish::PROOF;

/// Name of the signature file.
pub const SIGNATURE: &str = "model.sig";

const MEDIA_TYPE: &str = "application/vnd.dev.sigstore.bundle.v0.3+json";
const PAYLOAD_TYPE: &str = "application/vnd.in-toto+json";
const STATEMENT_TYPE: &str = "https://in-toto.io/Statement/v1";
const PREDICATE_TYPE: &str = "https://model_signing/signature/v1.0";

/// The P-256 key that signs releases.
pub struct ReleaseKey(SigningKey);

impl fmt::Debug for ReleaseKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("ReleaseKey")
    }
}

impl ReleaseKey {
    /// Reads a PKCS#8 PEM file, or makes a new key there (mode 0600) where there is none.
    ///
    /// # Errors
    /// A file that cannot be read or written, or that holds no P-256 key.
    pub fn open(path: &Path) -> Result<Self, ReleaseError> {
        match std::fs::read_to_string(path) {
            Ok(pem) => Self::from_pem(&pem).map_err(|problem| ReleaseError::Key {
                what: path.display().to_string(),
                problem,
            }),
            Err(error) if error.kind() == ErrorKind::NotFound => Self::create(path),
            Err(error) => Err(ReleaseError::io(path)(error)),
        }
    }

    /// The public key as SubjectPublicKeyInfo in PEM.
    ///
    /// # Errors
    /// A key that cannot be encoded.
    pub fn public_pem(&self) -> Result<String, ReleaseError> {
        self.0
            .verifying_key()
            .to_public_key_pem(LineEnding::LF)
            .map_err(|error| ReleaseError::Key {
                what: "release key".to_owned(),
                problem: error.to_string(),
            })
    }

    fn from_pem(pem: &str) -> Result<Self, String> {
        SigningKey::from_pkcs8_pem(pem)
            .map(Self)
            .map_err(|error| error.to_string())
    }

    fn create(path: &Path) -> Result<Self, ReleaseError> {
        let key = loop {
            let mut secret = [0; 32];
            getrandom::fill(&mut secret)
                .map_err(|error| ReleaseError::Random(error.to_string()))?;
            // Fails for zero and values beyond the curve's order: less than one draw in 2^32.
            if let Ok(key) = SigningKey::from_slice(&secret) {
                break key;
            }
        };
        let pem = key
            .to_pkcs8_pem(LineEnding::LF)
            .map_err(|error| ReleaseError::Key {
                what: path.display().to_string(),
                problem: error.to_string(),
            })?;
        let mut file = OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(path)
            .map_err(ReleaseError::io(path))?;
        file.write_all(pem.as_bytes())
            .and_then(|()| file.sync_all())
            .map_err(ReleaseError::io(path))?;
        Ok(Self(key))
    }

    /// The bundle over files of a release, given with their digests in name order.
    pub(super) fn sign(
        &self,
        name: &str,
        files: &[(String, Digest)],
    ) -> Result<Vec<u8>, ReleaseError> {
        let json = |source| ReleaseError::Json {
            file: SIGNATURE,
            source,
        };
        let payload = serde_json::to_vec(&Statement::of(name, files)).map_err(json)?;
        let signature: DerSignature = self.0.sign(&pae(PAYLOAD_TYPE, &payload));
        let hint = hint(&self.public_pem()?);
        let bundle = Bundle {
            media_type: MEDIA_TYPE.to_owned(),
            verification_material: Material {
                public_key: Hint { hint },
                tlog_entries: [],
            },
            dsse_envelope: Envelope {
                payload: STANDARD.encode(payload),
                payload_type: PAYLOAD_TYPE.to_owned(),
                signatures: vec![Signature {
                    sig: STANDARD.encode(signature.as_bytes()),
                    keyid: String::new(),
                }],
            },
        };
        serde_json::to_vec(&bundle).map_err(json)
    }
}

/// Checks a release folder against its signature: the bundle is signed by `public_pem`, and the folder holds exactly the
/// signed files, apart from the signature and the log proof.
///
/// # Errors
/// The first thing that does not hold.
pub fn verify(folder: &Path, public_pem: &str) -> Result<(), ReleaseError> {
    let wrong = |problem: String| ReleaseError::Signature(problem);
    let path = folder.join(SIGNATURE);
    let bytes = std::fs::read(&path).map_err(ReleaseError::io(&path))?;
    let bundle: Bundle =
        serde_json::from_slice(&bytes).map_err(|error| wrong(error.to_string()))?;
    let key = VerifyingKey::from_public_key_pem(public_pem).map_err(|error| ReleaseError::Key {
        what: "public key".to_owned(),
        problem: error.to_string(),
    })?;
    if bundle.verification_material.public_key.hint != hint(public_pem) {
        return Err(wrong("made by another key".to_owned()));
    }
    let envelope = &bundle.dsse_envelope;
    if bundle.media_type != MEDIA_TYPE || envelope.payload_type != PAYLOAD_TYPE {
        return Err(wrong("not a model signature of this version".to_owned()));
    }
    let decode = |text: &str| {
        STANDARD
            .decode(text)
            .map_err(|error| wrong(error.to_string()))
    };
    let payload = decode(&envelope.payload)?;
    let [signature] = envelope.signatures.as_slice() else {
        return Err(wrong(format!(
            "{} signatures, expected 1",
            envelope.signatures.len()
        )));
    };
    let signature = DerSignature::from_bytes(&decode(&signature.sig)?)
        .map_err(|error| wrong(error.to_string()))?;
    key.verify(&pae(&envelope.payload_type, &payload), &signature)
        .map_err(|_| wrong("not made by this key over this statement".to_owned()))?;
    let statement: Statement =
        serde_json::from_slice(&payload).map_err(|error| wrong(error.to_string()))?;
    let name = statement
        .subject
        .first()
        .map_or("", |subject| subject.name.as_str());
    let expected = Statement::of(name, &digests(folder)?);
    if statement == expected {
        return Ok(());
    }
    let differs = statement
        .predicate
        .resources
        .iter()
        .find(|resource| !expected.predicate.resources.contains(resource))
        .or_else(|| {
            let signed = &statement.predicate.resources;
            expected
                .predicate
                .resources
                .iter()
                .find(|resource| !signed.contains(resource))
        });
    Err(wrong(differs.map_or_else(
        || "the statement is not about this folder".to_owned(),
        |resource| format!("{} is not the file that was signed", resource.name),
    )))
}

/// Digests of the files that a signature covers, in name order.
fn digests(folder: &Path) -> Result<Vec<(String, Digest)>, ReleaseError> {
    let mut files = Vec::new();
    for entry in std::fs::read_dir(folder).map_err(ReleaseError::io(folder))? {
        let entry = entry.map_err(ReleaseError::io(folder))?;
        let name = entry.file_name().to_string_lossy().into_owned();
        if name != SIGNATURE && name != PROOF {
            files.push((name, file_digest(&entry.path())?));
        }
    }
    files.sort();
    Ok(files)
}

/// SHA-256 of a file, read in pieces.
pub(super) fn file_digest(path: &Path) -> Result<Digest, ReleaseError> {
    File::open(path)
        .and_then(Digest::of_reader)
        .map_err(ReleaseError::io(path))
}

/// How a bundle names its key: SHA-256 of the public key file.
fn hint(public_pem: &str) -> String {
    hex::encode(Sha256::digest(public_pem))
}

/// DSSE's pre-authentication encoding: what is signed.
fn pae(payload_type: &str, payload: &[u8]) -> Vec<u8> {
    let mut bytes = format!(
        "DSSEv1 {} {payload_type} {} ",
        payload_type.len(),
        payload.len()
    )
    .into_bytes();
    bytes.extend_from_slice(payload);
    bytes
}

#[derive(Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Bundle {
    media_type: String,
    verification_material: Material,
    dsse_envelope: Envelope,
}

#[derive(Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Material {
    public_key: Hint,
    tlog_entries: [u8; 0],
}

#[derive(Serialize, Deserialize)]
struct Hint {
    hint: String,
}

#[derive(Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Envelope {
    payload: String,
    payload_type: String,
    signatures: Vec<Signature>,
}

#[derive(Serialize, Deserialize)]
struct Signature {
    sig: String,
    keyid: String,
}

#[derive(PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Statement {
    #[serde(rename = "_type")]
    kind: String,
    subject: Vec<Subject>,
    predicate_type: String,
    predicate: Predicate,
}

#[derive(PartialEq, Serialize, Deserialize)]
struct Subject {
    name: String,
    digest: SubjectDigest,
}

#[derive(PartialEq, Serialize, Deserialize)]
struct SubjectDigest {
    sha256: String,
}

#[derive(PartialEq, Serialize, Deserialize)]
struct Predicate {
    serialization: Serialization,
    resources: Vec<Resource>,
}

#[derive(PartialEq, Serialize, Deserialize)]
struct Serialization {
    method: String,
    hash_type: String,
    allow_symlinks: bool,
    ignore_paths: Vec<String>,
}

#[derive(PartialEq, Serialize, Deserialize)]
struct Resource {
    name: String,
    algorithm: String,
    digest: String,
}

impl Statement {
    fn of(name: &str, files: &[(String, Digest)]) -> Self {
        let mut all = Sha256::new();
        for (_, digest) in files {
            all.update(digest.as_bytes());
        }
        Self {
            kind: STATEMENT_TYPE.to_owned(),
            subject: vec![Subject {
                name: name.to_owned(),
                digest: SubjectDigest {
                    sha256: hex::encode(all.finalize()),
                },
            }],
            predicate_type: PREDICATE_TYPE.to_owned(),
            predicate: Predicate {
                serialization: Serialization {
                    method: "files".to_owned(),
                    hash_type: "sha256".to_owned(),
                    allow_symlinks: false,
                    ignore_paths: vec![SIGNATURE.to_owned(), PROOF.to_owned()],
                },
                resources: files
                    .iter()
                    .map(|(name, digest)| Resource {
                        name: name.clone(),
                        algorithm: "sha256".to_owned(),
                        digest: digest.to_string(),
                    })
                    .collect(),
            },
        }
    }
}
