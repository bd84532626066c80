//! Signed notes: text, a blank line, signature lines. <https://c2sp.org/signed-note>

use std::fmt;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;

use super::key::{KeyError, KeyName, NoteSigner, SignatureKind, VerifierKey};
use crate::limits;

/// Longest note in bytes, signatures included.
pub const MAX_NOTE_BYTES: usize = limits::DOCUMENT;

/// Most signature lines: every member may be a witness. The specification asks for at least 16.
pub const MAX_SIGNATURES: usize = limits::MEMBERS;

/// Longest decoded signature, key id included; leaves room for ML-DSA-44.
pub const MAX_SIGNATURE_BYTES: usize = 8192;

/// Why a note was refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum NoteError {
    /// Beyond [`MAX_NOTE_BYTES`].
    #[error("note has {0} bytes, at most {MAX_NOTE_BYTES} are accepted")]
    TooLong(usize),
    /// Not UTF-8, a control character, or no newline at the end of the text.
    #[error(
        "note text must be UTF-8 without control characters (tabs and CR included) and end in a newline"
    )]
    Text,
    /// There is no blank line with signature lines after it.
    #[error("note has no signatures")]
    Unsigned,
    /// Beyond [`MAX_SIGNATURES`].
    #[error("note has more than {MAX_SIGNATURES} signatures")]
    TooManySignatures,
    /// A line after the blank line is not `— name base64`.
    #[error("line {0} after the text is not a signature line")]
    SignatureLine(usize),
    /// A known key's signature does not match the text.
    #[error("signature by {0} is wrong")]
    BadSignature(KeyName),
    /// None of the known keys signed.
    #[error("signed by none of the known keys")]
    UnknownSigners,
    /// The first line names another kind of document.
    #[error("document begins with {got:?}, expected {expected:?}")]
    WrongKind {
        /// First line, cut to 64 characters.
        got: String,
        /// First line asked for.
        expected: String,
    },
    /// A cosignature time beyond 2^63 - 1.
    #[error("cosignature time {0} is out of range")]
    Time(u64),
    /// A key of another kind was given: cosignatures need a cosignature key.
    #[error("key {0} makes another kind of signature")]
    WrongKey(KeyName),
    /// A key or its name.
    #[error(transparent)]
    Key(#[from] KeyError),
}

/// One signature line.
#[derive(Debug, Clone, PartialEq, Eq)]
struct SignatureLine {
    name: KeyName,
    key_id: u32,
    signature: Vec<u8>,
}

/// A note whose form was checked and whose signatures were not.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SignedNote {
    text: String,
    signatures: Vec<SignatureLine>,
}

impl SignedNote {
    /// Signs a text, which must end in a newline.
    ///
    /// # Errors
    /// The text does not fit a note, or the key is a cosignature key.
    pub fn sign(text: impl Into<String>, signer: &NoteSigner) -> Result<Self, NoteError> {
        let text = text.into();
        check_text(&text)?;
        let mut note = Self {
            text,
            signatures: Vec::new(),
        };
        note.add_signature(signer)?;
        Ok(note)
    }

    /// Signs the text `<kind>\n<body>`: a document that says what it is.
    ///
    /// # Errors
    /// As [`Self::sign`].
    pub fn sign_document(kind: &str, body: &str, signer: &NoteSigner) -> Result<Self, NoteError> {
        Self::sign(format!("{kind}\n{body}"), signer)
    }

    /// Adds one more signature over the text.
    ///
    /// # Errors
    /// The key is a cosignature key, or the note is full.
    pub fn add_signature(&mut self, signer: &NoteSigner) -> Result<(), NoteError> {
        let key = signer.verifier();
        if key.kind() != SignatureKind::Ed25519 {
            return Err(NoteError::WrongKey(key.name().clone()));
        }
        let signature = signer.sign(self.text.as_bytes()).to_vec();
        self.push(key, signature)
    }

    /// Adds a witness's cosignature at `seconds` since 1970. Only a checkpoint may be cosigned, and
    /// only after its consistency was verified.
    ///
    /// # Errors
    /// The key is no cosignature key, the time is out of range, or the note is full.
    pub(super) fn cosign(&mut self, signer: &NoteSigner, seconds: u64) -> Result<(), NoteError> {
        let key = signer.verifier();
        if key.kind() != SignatureKind::Cosignature {
            return Err(NoteError::WrongKey(key.name().clone()));
        }
        let message = cosigned_message(&self.text, seconds)?;
        let mut signature = seconds.to_be_bytes().to_vec();
        signature.extend_from_slice(&signer.sign(message.as_bytes()));
        self.push(key, signature)
    }

    /// Reads a note.
    ///
    /// # Errors
    /// It is not a well-formed note, or exceeds a limit.
    pub fn parse(bytes: &[u8]) -> Result<Self, NoteError> {
        if bytes.len() > MAX_NOTE_BYTES {
            return Err(NoteError::TooLong(bytes.len()));
        }
        let whole = str::from_utf8(bytes).map_err(|_| NoteError::Text)?;
        check_text(whole)?;
        let (text, lines) = whole.rsplit_once("\n\n").ok_or(NoteError::Unsigned)?;
        let lines = lines.strip_suffix('\n').ok_or(NoteError::Unsigned)?;
        let mut signatures = Vec::new();
        for (number, line) in (1..).zip(lines.split('\n')) {
            if signatures.len() == MAX_SIGNATURES {
                return Err(NoteError::TooManySignatures);
            }
            signatures.push(parse_line(line).ok_or(NoteError::SignatureLine(number))?);
        }
        Ok(Self {
            text: format!("{text}\n"),
            signatures,
        })
    }

    /// The text, not yet trusted: for finding out which key to ask for, and for showing.
    #[must_use]
    pub fn unverified_text(&self) -> &str {
        &self.text
    }

    /// Checks the signatures of `known` keys; lines of other keys are ignored.
    ///
    /// # Errors
    /// A known key's signature is wrong, or no known key signed.
    pub fn verify(self, known: &[VerifierKey]) -> Result<VerifiedNote, NoteError> {
        let mut authors = Vec::<Author>::new();
        for line in &self.signatures {
            let matching = known
                .iter()
                .filter(|key| *key.name() == line.name && key.id() == line.key_id);
            for key in matching {
                let time = check_signature(key, &self.text, &line.signature)
                    .ok_or_else(|| NoteError::BadSignature(line.name.clone()))?;
                if !authors.iter().any(|author| author.key == *key) {
                    authors.push(Author {
                        key: key.clone(),
                        time,
                    });
                }
            }
        }
        if authors.is_empty() {
            return Err(NoteError::UnknownSigners);
        }
        Ok(VerifiedNote {
            note: self,
            authors,
        })
    }

    fn push(&mut self, key: &VerifierKey, signature: Vec<u8>) -> Result<(), NoteError> {
        if self.signatures.len() >= MAX_SIGNATURES {
            return Err(NoteError::TooManySignatures);
        }
        self.signatures.push(SignatureLine {
            name: key.name().clone(),
            key_id: key.id(),
            signature,
        });
        Ok(())
    }
}

impl fmt::Display for SignedNote {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{}", self.text)?;
        for line in &self.signatures {
            let mut blob = line.key_id.to_be_bytes().to_vec();
            blob.extend_from_slice(&line.signature);
            writeln!(f, "— {} {}", line.name, STANDARD.encode(blob))?;
        }
        Ok(())
    }
}

/// A known key that signed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Author {
    /// The key.
    pub key: VerifierKey,
    /// Seconds since 1970 that a cosignature states.
    pub time: Option<u64>,
}

/// A note signed by at least one known key.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VerifiedNote {
    note: SignedNote,
    authors: Vec<Author>,
}

impl VerifiedNote {
    /// The signed text with its last newline.
    #[must_use]
    pub fn text(&self) -> &str {
        &self.note.text
    }

    /// What follows the first line, which must be `kind`.
    ///
    /// # Errors
    /// The first line is another one.
    pub fn body(&self, kind: &str) -> Result<&str, NoteError> {
        match self.note.text.split_once('\n') {
            Some((first, body)) if first == kind => Ok(body),
            first => Err(NoteError::WrongKind {
                got: first
                    .map(|(line, _)| line.chars().take(64).collect())
                    .unwrap_or_default(),
                expected: kind.to_owned(),
            }),
        }
    }

    /// Known keys that signed, each once, in the order of their lines.
    #[must_use]
    pub fn authors(&self) -> &[Author] {
        &self.authors
    }

    /// Whether this key signed.
    #[must_use]
    pub fn is_signed_by(&self, key: &VerifierKey) -> bool {
        self.authors.iter().any(|author| author.key == *key)
    }

    /// The note itself, with signatures of unknown keys.
    #[must_use]
    pub const fn note(&self) -> &SignedNote {
        &self.note
    }
}

fn check_text(text: &str) -> Result<(), NoteError> {
    if text.len() > MAX_NOTE_BYTES {
        return Err(NoteError::TooLong(text.len()));
    }
    if !text.ends_with('\n') || text.bytes().any(|byte| byte < 0x20 && byte != b'\n') {
        return Err(NoteError::Text);
    }
    Ok(())
}

fn parse_line(line: &str) -> Option<SignatureLine> {
    let (name, blob) = line.strip_prefix("— ")?.split_once(' ')?;
    // Base64 is a third longer than its bytes: the bound holds before anything is allocated.
    if blob.len() > MAX_SIGNATURE_BYTES.saturating_mul(4) / 3 {
        return None;
    }
    let blob = STANDARD.decode(blob).ok()?;
    let (id, signature) = blob.split_first_chunk::<4>()?;
    if signature.is_empty() {
        return None;
    }
    Some(SignatureLine {
        name: name.parse().ok()?,
        key_id: u32::from_be_bytes(*id),
        signature: signature.to_vec(),
    })
}

/// `None` if the signature is wrong; otherwise the time it states, if its kind has one.
fn check_signature(key: &VerifierKey, text: &str, signature: &[u8]) -> Option<Option<u64>> {
    match key.kind() {
        SignatureKind::Ed25519 => {
            let signature = signature.try_into().ok()?;
            key.accepts(text.as_bytes(), signature).then_some(None)
        }
        SignatureKind::Cosignature => {
            let (seconds, signature) = signature.split_first_chunk::<8>()?;
            let seconds = u64::from_be_bytes(*seconds);
            let message = cosigned_message(text, seconds).ok()?;
            let signature = signature.try_into().ok()?;
            key.accepts(message.as_bytes(), signature)
                .then_some(Some(seconds))
        }
    }
}

fn cosigned_message(text: &str, seconds: u64) -> Result<String, NoteError> {
    if i64::try_from(seconds).is_err() {
        return Err(NoteError::Time(seconds));
    }
    Ok(format!("cosignature/v1\ntime {seconds}\n{text}"))
}

#[cfg(test)]
mod tests {
    use ed25519_dalek::SigningKey;
    use proptest::prelude::*;

    use super::*;

    const KEY: &str = "example.com/foo+530d903a+AekyeRrm56hApGFkyQR4ZCbV54Id2LKaANYcrnKv3U2k";
    const NOTE: &str = "This is an example message.\n\n— example.com/foo \
        Uw2QOkn8srV1yJGh2VYRlL1Tnagv1YEq6TfXppzi2ONncAlTgK7Ztg1ERYNZXsYjOBH3mFXmRKuwHjG1Yu72IneyaQM=\n";

    fn signer(name: &str, seed: u8) -> NoteSigner {
        let key = SigningKey::from_bytes(&[seed; 32]);
        NoteSigner::new(name.parse().unwrap(), SignatureKind::Ed25519, &key).unwrap()
    }

    fn verify(bytes: &[u8], keys: &[VerifierKey]) -> Result<VerifiedNote, NoteError> {
        SignedNote::parse(bytes)?.verify(keys)
    }

    #[test]
    fn the_note_of_the_specification_verifies_and_prints() {
        let note = verify(NOTE.as_bytes(), &[KEY.parse().unwrap()]).unwrap();
        assert_eq!(note.text(), "This is an example message.\n");
        assert_eq!(note.note().to_string(), NOTE);
    }

    #[test]
    fn every_mutation_of_one_byte_is_refused() {
        let keys = [KEY.parse().unwrap()];
        for at in 0..NOTE.len() {
            for mask in [1, 2, 4, 8, 16, 32, 64, 128, 255] {
                let mut bytes = NOTE.as_bytes().to_vec();
                bytes[at] ^= mask;
                assert!(verify(&bytes, &keys).is_err(), "byte {at} xor {mask:#04x}");
            }
        }
        for end in 0..NOTE.len() {
            assert!(
                verify(&NOTE.as_bytes()[..end], &keys).is_err(),
                "cut at {end}"
            );
        }
        assert!(verify(format!("{NOTE}\n").as_bytes(), &keys).is_err());
    }

    #[test]
    fn unknown_signatures_are_ignored_and_a_bad_known_one_refuses_the_note() {
        let (first, second, third) = (signer("a", 1), signer("b", 2), signer("c", 3));
        let mut note = SignedNote::sign("text\n", &first).unwrap();
        note.add_signature(&second).unwrap();
        let keys = [second.verifier().clone()];
        let verified = note.clone().verify(&keys).unwrap();
        assert_eq!(
            verified.authors(),
            [Author {
                key: keys[0].clone(),
                time: None
            }]
        );
        assert!(!verified.is_signed_by(first.verifier()));
        assert_eq!(
            note.clone().verify(&[third.verifier().clone()]),
            Err(NoteError::UnknownSigners)
        );
        note.signatures[0].signature[5] ^= 1;
        note.clone().verify(&keys).unwrap();
        let both = [first.verifier().clone(), second.verifier().clone()];
        assert_eq!(
            note.verify(&both),
            Err(NoteError::BadSignature("a".parse().unwrap()))
        );
    }

    #[test]
    fn a_key_of_the_same_name_is_another_key() {
        let note = SignedNote::sign("text\n", &signer("a", 1)).unwrap();
        let other = signer("a", 2);
        assert_eq!(
            note.verify(&[other.verifier().clone()]),
            Err(NoteError::UnknownSigners)
        );
    }

    #[test]
    fn sixteen_signatures_are_read_and_more_than_the_limit_are_not() {
        let mut note = SignedNote::sign("text\n", &signer("k0", 1)).unwrap();
        for number in 1..16 {
            note.add_signature(&signer(&format!("k{number}"), 1))
                .unwrap();
        }
        assert_eq!(
            SignedNote::parse(note.to_string().as_bytes()).unwrap(),
            note
        );
        let line = note.to_string().lines().last().unwrap().to_owned();
        let flood = format!("text\n\n{}", format!("{line}\n").repeat(MAX_SIGNATURES + 1));
        assert_eq!(
            SignedNote::parse(flood.as_bytes()),
            Err(NoteError::TooManySignatures)
        );
        let long = vec![b'a'; MAX_NOTE_BYTES + 1];
        assert_eq!(
            SignedNote::parse(&long),
            Err(NoteError::TooLong(long.len()))
        );
    }

    #[test]
    fn blank_lines_inside_the_text_belong_to_the_text() {
        let key = signer("a", 1);
        let note = SignedNote::sign("one\n\n\n— not a signature\n\ntwo\n", &key).unwrap();
        let read = SignedNote::parse(note.to_string().as_bytes()).unwrap();
        assert_eq!(read, note);
        read.verify(&[key.verifier().clone()]).unwrap();
    }

    #[test]
    fn a_document_says_what_it_is() {
        let key = signer("a", 1);
        let note = SignedNote::sign_document("consilium/charter/1", "x = 1\n", &key).unwrap();
        let note = note.verify(&[key.verifier().clone()]).unwrap();
        assert_eq!(note.body("consilium/charter/1").unwrap(), "x = 1\n");
        assert!(matches!(
            note.body("consilium/manifest/1"),
            Err(NoteError::WrongKind { .. })
        ));
    }

    #[test]
    fn texts_that_no_note_can_carry_are_not_signed() {
        for text in ["", "no newline", "tab\there\n", "carriage\r\n"] {
            assert_eq!(
                SignedNote::sign(text, &signer("a", 1)),
                Err(NoteError::Text),
                "{text:?}"
            );
        }
    }

    proptest! {
        #[test]
        fn printing_and_reading_is_identity(text in "([^\\x00-\\x1f]|\\n){0,80}\\n", seed: u8) {
            let key = signer("fed.example/x", seed);
            let note = SignedNote::sign(text, &key).unwrap();
            let read = SignedNote::parse(note.to_string().as_bytes()).unwrap();
            prop_assert_eq!(&read, &note);
            prop_assert!(read.verify(&[key.verifier().clone()]).is_ok());
        }

        #[test]
        fn arbitrary_bytes_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            let _ = SignedNote::parse(&bytes);
        }
    }
}
