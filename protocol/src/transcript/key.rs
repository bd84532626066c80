//! Names and keys of signed notes: <https://c2sp.org/signed-note#signatures>.

use std::fmt;
use std::str::FromStr;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use ed25519_dalek::{Signature, Signer as _, SigningKey, VerifyingKey};
use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};

/// Longest key name in bytes.
pub const MAX_KEY_NAME_BYTES: usize = 256;

/// Why a key or its name was refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum KeyError {
    /// A name holds a space, a plus or a control character, or has a bad length.
    #[error(
        "key name {0:?} needs 1 to {MAX_KEY_NAME_BYTES} bytes without spaces, '+' or control characters"
    )]
    Name(String),
    /// The verifier key is not `name+id+base64`.
    #[error("verifier key is not <name>+<8 hex digits>+<base64 of type and key>")]
    Format,
    /// The signature type is neither 1 (Ed25519) nor 4 (Ed25519 cosignature).
    #[error("signature type {0:#04x} is not supported")]
    Kind(u8),
    /// The 32 bytes are no point of the curve, or one of small order.
    #[error("not a usable ed25519 public key")]
    Point,
    /// The id in the text belongs to another name or key.
    #[error("key id {got:08x} does not belong to this name and key, which have {expected:08x}")]
    Id {
        /// Id in the text.
        got: u32,
        /// Id computed from name, type and key.
        expected: u32,
    },
}

/// Name of a key, for example `fed.example/audit`.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct KeyName(String);

impl KeyName {
    /// The name as text.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for KeyName {
    type Err = KeyError;

    fn from_str(text: &str) -> Result<Self, KeyError> {
        let forbidden = |c: char| c.is_whitespace() || c.is_control() || c == '+';
        if text.is_empty() || text.len() > MAX_KEY_NAME_BYTES || text.contains(forbidden) {
            return Err(KeyError::Name(
                text.chars().take(MAX_KEY_NAME_BYTES).collect(),
            ));
        }
        Ok(Self(text.to_owned()))
    }
}

impl TryFrom<String> for KeyName {
    type Error = KeyError;

    fn try_from(text: String) -> Result<Self, KeyError> {
        text.parse()
    }
}

impl From<KeyName> for String {
    fn from(name: KeyName) -> Self {
        name.0
    }
}

impl fmt::Display for KeyName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// What a signature signs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum SignatureKind {
    /// The note's text; type byte 1.
    Ed25519,
    /// Time and text, by a witness (`cosignature/v1`); type byte 4.
    Cosignature,
}

impl SignatureKind {
    const fn byte(self) -> u8 {
        match self {
            Self::Ed25519 => 0x01,
            Self::Cosignature => 0x04,
        }
    }

    const fn from_byte(byte: u8) -> Result<Self, KeyError> {
        match byte {
            0x01 => Ok(Self::Ed25519),
            0x04 => Ok(Self::Cosignature),
            other => Err(KeyError::Kind(other)),
        }
    }
}

/// A public key with its name and use; as text `name+id+base64`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct VerifierKey {
    name: KeyName,
    kind: SignatureKind,
    key: VerifyingKey,
    id: u32,
}

impl VerifierKey {
    /// Names a public key.
    ///
    /// # Errors
    /// The key is a point of small order, under which forged signatures verify.
    pub fn new(name: KeyName, kind: SignatureKind, key: VerifyingKey) -> Result<Self, KeyError> {
        if key.is_weak() {
            return Err(KeyError::Point);
        }
        let id = key_id(&name, kind, &key);
        Ok(Self {
            name,
            kind,
            key,
            id,
        })
    }

    /// Name of the key.
    #[must_use]
    pub const fn name(&self) -> &KeyName {
        &self.name
    }

    /// What its signatures sign.
    #[must_use]
    pub const fn kind(&self) -> SignatureKind {
        self.kind
    }

    /// First four bytes of the hash of name, type and key; an identifier, not a fingerprint.
    #[must_use]
    pub const fn id(&self) -> u32 {
        self.id
    }

    /// The public key.
    #[must_use]
    pub const fn public_key(&self) -> &VerifyingKey {
        &self.key
    }

    pub(super) fn accepts(&self, message: &[u8], signature: &[u8; 64]) -> bool {
        self.key
            .verify_strict(message, &Signature::from_bytes(signature))
            .is_ok()
    }
}

impl fmt::Display for VerifierKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut bytes = vec![self.kind.byte()];
        bytes.extend_from_slice(self.key.as_bytes());
        write!(
            f,
            "{}+{:08x}+{}",
            self.name,
            self.id,
            STANDARD.encode(bytes)
        )
    }
}

impl FromStr for VerifierKey {
    type Err = KeyError;

    fn from_str(text: &str) -> Result<Self, KeyError> {
        let mut parts = text.splitn(3, '+');
        let (Some(name), Some(id), Some(key)) = (parts.next(), parts.next(), parts.next()) else {
            return Err(KeyError::Format);
        };
        let hex_digit = |c: char| c.is_ascii_digit() || ('a'..='f').contains(&c);
        if id.len() != 8 || !id.chars().all(hex_digit) {
            return Err(KeyError::Format);
        }
        let got = u32::from_str_radix(id, 16).map_err(|_| KeyError::Format)?;
        let bytes = STANDARD.decode(key).map_err(|_| KeyError::Format)?;
        let (kind, key) = bytes.split_first().ok_or(KeyError::Format)?;
        let kind = SignatureKind::from_byte(*kind)?;
        let key = <&[u8; 32]>::try_from(key).map_err(|_| KeyError::Format)?;
        let key = VerifyingKey::from_bytes(key).map_err(|_| KeyError::Point)?;
        let verifier = Self::new(name.parse()?, kind, key)?;
        if verifier.id != got {
            return Err(KeyError::Id {
                got,
                expected: verifier.id,
            });
        }
        Ok(verifier)
    }
}

impl TryFrom<String> for VerifierKey {
    type Error = KeyError;

    fn try_from(text: String) -> Result<Self, KeyError> {
        text.parse()
    }
}

impl From<VerifierKey> for String {
    fn from(key: VerifierKey) -> Self {
        key.to_string()
    }
}

/// A named signing key. One key signs for one name and one kind only.
pub struct NoteSigner {
    verifier: VerifierKey,
    key: SigningKey,
}

impl NoteSigner {
    /// Names a signing key; the copy held here is wiped on drop.
    ///
    /// # Errors
    /// The key is unusable.
    pub fn new(name: KeyName, kind: SignatureKind, key: &SigningKey) -> Result<Self, KeyError> {
        let verifier = VerifierKey::new(name, kind, key.verifying_key())?;
        Ok(Self {
            verifier,
            key: key.clone(),
        })
    }

    /// The public half.
    #[must_use]
    pub const fn verifier(&self) -> &VerifierKey {
        &self.verifier
    }

    pub(super) fn sign(&self, message: &[u8]) -> [u8; 64] {
        self.key.sign(message).to_bytes()
    }
}

impl fmt::Debug for NoteSigner {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "NoteSigner({}, secret redacted)", self.verifier)
    }
}

fn key_id(name: &KeyName, kind: SignatureKind, key: &VerifyingKey) -> u32 {
    let hash: [u8; 32] = Sha256::new()
        .chain_update(name.as_str())
        .chain_update([b'\n', kind.byte()])
        .chain_update(key.as_bytes())
        .finalize()
        .into();
    let [a, b, c, d, ..] = hash;
    u32::from_be_bytes([a, b, c, d])
}

#[cfg(test)]
mod tests {
    use super::*;

    const EXAMPLE: &str = "example.com/foo+530d903a+AekyeRrm56hApGFkyQR4ZCbV54Id2LKaANYcrnKv3U2k";

    #[test]
    fn the_verifier_key_of_the_specification_reads_and_prints() {
        let key: VerifierKey = EXAMPLE.parse().unwrap();
        assert_eq!(key.name().as_str(), "example.com/foo");
        assert_eq!(key.id(), 0x530d_903a);
        assert_eq!(key.kind(), SignatureKind::Ed25519);
        assert_eq!(key.to_string(), EXAMPLE);
    }

    #[test]
    fn deterministic_seeds_have_the_recorded_verifier_keys() {
        let seed =
            |first: u8| -> [u8; 32] { std::array::from_fn(|i| first + u8::try_from(i).unwrap()) };
        let signer = |name: &str, kind, first| {
            NoteSigner::new(
                name.parse().unwrap(),
                kind,
                &SigningKey::from_bytes(&seed(first)),
            )
            .unwrap()
        };
        assert_eq!(
            signer("fed.example/audit", SignatureKind::Ed25519, 0x00)
                .verifier()
                .to_string(),
            "fed.example/audit+8d167400+AQOhB7/zzhC+HXDdGOdLwJln5NYwm6UNXx3chmQSVTG4"
        );
        assert_eq!(
            signer("witness.example/w1", SignatureKind::Cosignature, 0x20)
                .verifier()
                .to_string(),
            "witness.example/w1+20324abe+BCmsuuFBvMrwsi4alNNNC8c2HlJtC/4SyJeUvJMilm3X"
        );
    }

    #[test]
    fn any_changed_character_of_a_verifier_key_is_refused() {
        for at in 0..EXAMPLE.len() {
            for replacement in ['A', 'b', '7', '+', ' '] {
                let mut text: Vec<char> = EXAMPLE.chars().collect();
                if text[at] == replacement {
                    continue;
                }
                text[at] = replacement;
                let text: String = text.into_iter().collect();
                assert!(text.parse::<VerifierKey>().is_err(), "{text}");
            }
        }
    }

    #[test]
    fn names_with_spaces_plus_or_control_characters_are_refused() {
        for name in [
            "",
            "a b",
            "a+b",
            "a\u{2003}b",
            "a\nb",
            "a\u{7f}",
            &"x".repeat(257),
        ] {
            assert!(name.parse::<KeyName>().is_err(), "{name:?}");
        }
    }

    #[test]
    fn a_point_of_small_order_is_refused() {
        let mut identity = [0_u8; 33];
        identity[0] = 1;
        identity[1] = 1;
        let text = format!("weak+00000000+{}", STANDARD.encode(identity));
        assert_eq!(text.parse::<VerifierKey>(), Err(KeyError::Point));
    }

    #[test]
    fn debug_of_a_signer_shows_no_secret() {
        let signer = NoteSigner::new(
            "a".parse().unwrap(),
            SignatureKind::Ed25519,
            &SigningKey::from_bytes(&[0xab; 32]),
        )
        .unwrap();
        let shown = format!("{signer:?}");
        assert!(
            !shown.contains("abab") && !shown.contains("171, 171"),
            "{shown}"
        );
        assert!(shown.contains("redacted"));
    }
}
