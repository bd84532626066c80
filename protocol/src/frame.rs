//! Frames of the control and transfer streams: a fixed header, then one encoded message.
//!
//! ```text
//! magic "CNSL" | version u16 | kind u16 | length u32 | SHA-256 of the body, 32 bytes | body
//! ```
//!
//! Integers are little-endian. The header is 44 bytes.

#![warn(clippy::indexing_slicing, clippy::arithmetic_side_effects)]

use crate::ids::Digest;
use crate::limits;

/// First bytes of every frame.
pub const MAGIC: [u8; 4] = *b"CNSL";
/// Protocol version spoken by this build.
pub const VERSION: u16 = 1;
/// Oldest version this build still understands.
pub const OLDEST_VERSION: u16 = 1;
/// Bytes of a header.
pub const HEADER: usize = 44;
/// ALPN protocol name.
pub const ALPN: &[u8] = b"consilium/1";

/// Why bytes are no frame.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum FrameError {
    /// Not our protocol.
    #[error("the stream does not speak this protocol")]
    Magic,
    /// A version outside of the supported range.
    #[error("protocol version {0} is not supported")]
    Version(u16),
    /// A body longer than any message may be.
    #[error("frame body of {length} bytes, at most {limit} are allowed")]
    TooLong {
        /// Announced bytes.
        length: usize,
        /// Allowed bytes.
        limit: usize,
    },
    /// Another kind of message than the one that may come here.
    #[error("frame of kind {got}, expected {expected}")]
    Kind {
        /// Kind in the header.
        got: u16,
        /// Kind that may come here.
        expected: u16,
    },
    /// The body does not have the announced digest.
    #[error("frame body does not match its digest")]
    Digest,
}

/// A checked frame header.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FrameHeader {
    /// Kind of the message, see [`crate::message`].
    pub kind: u16,
    /// Bytes of the body.
    pub length: usize,
    /// Digest of the body.
    pub digest: Digest,
}

impl FrameHeader {
    /// The header of `body`.
    #[must_use]
    pub fn new(kind: u16, body: &[u8]) -> Self {
        Self {
            kind,
            length: body.len(),
            digest: Digest::of(body),
        }
    }

    /// The 44 bytes that precede the body.
    #[must_use]
    pub fn to_bytes(&self) -> [u8; HEADER] {
        let mut bytes = [0; HEADER];
        let length = u32::try_from(self.length).unwrap_or(u32::MAX);
        let parts = MAGIC
            .into_iter()
            .chain(VERSION.to_le_bytes())
            .chain(self.kind.to_le_bytes())
            .chain(length.to_le_bytes())
            .chain(*self.digest.as_bytes());
        for (slot, byte) in bytes.iter_mut().zip(parts) {
            *slot = byte;
        }
        bytes
    }

    /// Reads a header and checks everything that can be checked before the body arrives.
    ///
    /// # Errors
    /// The first field that is wrong.
    pub fn parse(bytes: &[u8; HEADER]) -> Result<Self, FrameError> {
        let [m0, m1, m2, m3, v0, v1, k0, k1, l0, l1, l2, l3, digest @ ..] = *bytes;
        if [m0, m1, m2, m3] != MAGIC {
            return Err(FrameError::Magic);
        }
        let version = u16::from_le_bytes([v0, v1]);
        if !(OLDEST_VERSION..=VERSION).contains(&version) {
            return Err(FrameError::Version(version));
        }
        let length = usize::try_from(u32::from_le_bytes([l0, l1, l2, l3])).unwrap_or(usize::MAX);
        if length > limits::FRAME {
            return Err(FrameError::TooLong {
                length,
                limit: limits::FRAME,
            });
        }
        Ok(Self {
            kind: u16::from_le_bytes([k0, k1]),
            length,
            digest: Digest::from_bytes(digest),
        })
    }

    /// Checks a received body against this header.
    ///
    /// # Errors
    /// [`FrameError::Digest`] if one bit differs.
    pub fn check(&self, body: &[u8]) -> Result<(), FrameError> {
        if body.len() == self.length && Digest::of(body) == self.digest {
            Ok(())
        } else {
            Err(FrameError::Digest)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_header_reads_back_and_every_damaged_byte_is_noticed() {
        let body = b"body of the frame";
        let header = FrameHeader::new(7, body);
        let bytes = header.to_bytes();
        assert_eq!(FrameHeader::parse(&bytes), Ok(header));
        for index in 0..HEADER {
            let mut damaged = bytes;
            damaged[index] ^= 1;
            let noticed = match FrameHeader::parse(&damaged) {
                Err(_) => true,
                Ok(parsed) => parsed.check(body).is_err() || parsed.kind != 7,
            };
            assert!(noticed, "byte {index}");
        }
    }
}
