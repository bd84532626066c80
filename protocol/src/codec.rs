//! The one encoder and the one decoder of messages, and the sole caller of bincode.
//!
//! A message is refused before anything is allocated when it is longer than its kind allows, and after decoding when
//! bytes are left over or a field is out of range. Whatever is hashed or signed is the received bytes, never a
//! re-encoding.

#![warn(clippy::indexing_slicing, clippy::arithmetic_side_effects)]

use bincode::config::{Configuration, Fixint, Limit, LittleEndian};
use bincode::{Decode, Encode};

use crate::limits;

/// Why bytes are no message.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum CodecError {
    /// Longer than this kind may be.
    #[error("message of {length} bytes, at most {limit} are allowed")]
    TooLong {
        /// Bytes received.
        length: usize,
        /// Bytes allowed.
        limit: usize,
    },
    /// Bytes after the end of the message.
    #[error("{0} bytes follow the message")]
    Trailing(usize),
    /// Not an encoding of this type.
    #[error("malformed message: {0}")]
    Malformed(String),
    /// Well formed, but a field is out of range.
    #[error("invalid message: {0}")]
    Invalid(String),
}

/// A type that travels in a frame.
pub trait Wire: Encode + Decode<()> {
    /// Longest encoding in bytes, at most [`limits::FRAME`].
    const LIMIT: usize;

    /// Checks ranges that the type does not.
    ///
    /// # Errors
    /// A sentence that names the field.
    fn validate(&self) -> Result<(), String> {
        Ok(())
    }
}

fn configuration() -> Configuration<LittleEndian, Fixint, Limit<{ limits::FRAME }>> {
    bincode::config::standard()
        .with_fixed_int_encoding()
        .with_limit::<{ limits::FRAME }>()
}

/// Encodes a message of our own making.
///
/// # Errors
/// [`CodecError::TooLong`] if it would exceed its limit, [`CodecError::Invalid`] if a field is out of range.
#[expect(
    clippy::disallowed_methods,
    reason = "this module holds the one configuration"
)]
pub fn encode<T: Wire>(message: &T) -> Result<Vec<u8>, CodecError> {
    message.validate().map_err(CodecError::Invalid)?;
    let bytes = bincode::encode_to_vec(message, configuration())
        .map_err(|error| CodecError::Malformed(error.to_string()))?;
    if bytes.len() > T::LIMIT {
        return Err(CodecError::TooLong {
            length: bytes.len(),
            limit: T::LIMIT,
        });
    }
    Ok(bytes)
}

/// Decodes exactly one message.
///
/// # Errors
/// Every way in which `bytes` is not one valid message of this kind.
#[expect(
    clippy::disallowed_methods,
    reason = "this module holds the one configuration"
)]
pub fn decode<T: Wire>(bytes: &[u8]) -> Result<T, CodecError> {
    if bytes.len() > T::LIMIT {
        return Err(CodecError::TooLong {
            length: bytes.len(),
            limit: T::LIMIT,
        });
    }
    let (message, used): (T, usize) = bincode::decode_from_slice(bytes, configuration())
        .map_err(|error| CodecError::Malformed(error.to_string()))?;
    if used != bytes.len() {
        return Err(CodecError::Trailing(bytes.len().saturating_sub(used)));
    }
    message.validate().map_err(CodecError::Invalid)?;
    Ok(message)
}
