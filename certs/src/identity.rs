//! The ed25519 key of an institution or of the authority, and its file.

use std::fmt;
use std::path::Path;

use consilium_protocol::transcript::{KeyName, NoteSigner, SignatureKind};
use ed25519_dalek::pkcs8::spki::der::pem::LineEnding;
use ed25519_dalek::pkcs8::{DecodePrivateKey as _, EncodePrivateKey as _, KeypairBytes};
use ed25519_dalek::{Signature, Signer as _, SigningKey, VerifyingKey};
use zeroize::{Zeroize as _, Zeroizing};

use crate::error::CertsError;
use crate::pem::{self, Overwrite};

/// An ed25519 signing key; wiped when dropped, never shown.
#[derive(Clone)]
pub struct SigningIdentity(SigningKey);

impl SigningIdentity {
    /// A new key from the operating system's random source.
    ///
    /// # Errors
    /// There are no random bytes.
    pub fn generate() -> Result<Self, CertsError> {
        let mut seed = Zeroizing::new([0; 32]);
        getrandom::fill(&mut *seed).map_err(|_| CertsError::Random)?;
        Ok(Self(SigningKey::from_bytes(&seed)))
    }

    /// A key from its 32 secret bytes.
    #[must_use]
    pub fn from_seed(seed: &[u8; 32]) -> Self {
        Self(SigningKey::from_bytes(seed))
    }

    /// Reads a key file.
    ///
    /// # Errors
    /// The file is open to others, cannot be read, or holds no ed25519 key in PKCS#8 PEM.
    pub fn load(path: &Path) -> Result<Self, CertsError> {
        let text = pem::read_secret(path)?;
        let key = SigningKey::from_pkcs8_pem(&text).map_err(|_| CertsError::Malformed {
            path: path.to_owned(),
            expected: "ed25519 private key in PKCS#8 PEM; make one with `consilium-certs identity new`",
        })?;
        Ok(Self(key))
    }

    /// Writes the key file, mode 0600.
    ///
    /// # Errors
    /// The file exists and must not be replaced, or cannot be written.
    pub fn save(&self, path: &Path, overwrite: Overwrite) -> Result<(), CertsError> {
        // Without the public half: OpenSSL 3.0 does not read the newer form that holds it.
        let mut bytes = KeypairBytes {
            secret_key: self.0.to_bytes(),
            public_key: None,
        };
        let text = bytes.to_pkcs8_pem(LineEnding::LF);
        bytes.secret_key.zeroize();
        let text = text.map_err(|_| rcgen::Error::CouldNotParseKeyPair)?;
        pem::write_secret(path, &text, overwrite)
    }

    /// The public half.
    #[must_use]
    pub fn public_key(&self) -> VerifyingKey {
        self.0.verifying_key()
    }

    /// The public half as the charter lists it: 64 hexadecimal digits.
    #[must_use]
    pub fn public_hex(&self) -> String {
        hex::encode(self.public_key().as_bytes())
    }

    /// Signs a message. Domain separation is the caller's.
    #[must_use]
    pub fn sign(&self, message: &[u8]) -> Signature {
        self.0.sign(message)
    }

    /// The key itself, for functions that sign typed statements.
    #[must_use]
    pub const fn signing_key(&self) -> &SigningKey {
        &self.0
    }

    /// The key under a name that signs notes.
    ///
    /// # Errors
    /// The name is not fit for notes.
    pub fn note_signer(&self, name: &str, kind: SignatureKind) -> Result<NoteSigner, CertsError> {
        let name: KeyName = name.parse()?;
        Ok(NoteSigner::new(name, kind, &self.0)?)
    }
}

impl fmt::Debug for SigningIdentity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "SigningIdentity(public {}, secret redacted)",
            self.public_hex()
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_reads_back_and_signs_alike() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("signing.key");
        let made = SigningIdentity::generate().unwrap();
        made.save(&path, Overwrite::Refuse).unwrap();
        let read = SigningIdentity::load(&path).unwrap();
        assert_eq!(read.sign(b"message"), made.sign(b"message"));
        made.public_key()
            .verify_strict(b"message", &read.sign(b"message"))
            .unwrap();
        assert_ne!(
            SigningIdentity::generate().unwrap().public_hex(),
            made.public_hex()
        );
    }

    #[test]
    fn debug_shows_no_secret() {
        let identity = SigningIdentity::from_seed(&[0xab; 32]);
        let shown = format!("{identity:?} {identity:#?}");
        assert!(!shown.contains("abab") && !shown.contains("171"), "{shown}");
    }

    #[test]
    fn other_content_is_refused_by_name() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("signing.key");
        let p256 = crate::TlsKey::generate().unwrap().to_pem();
        for text in ["", "nonsense", p256.as_str()] {
            pem::write_secret(&path, text, Overwrite::Replace).unwrap();
            let refused = SigningIdentity::load(&path).unwrap_err().to_string();
            assert!(
                refused.contains("signing.key") && refused.contains("ed25519"),
                "{refused}"
            );
        }
    }
}
