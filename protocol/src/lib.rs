//! Wire types, signing, round rules, log and ledger formats of Consilium.
//!
//! Without features this crate is pure: bytes, time and seeds come in as arguments, values go out, and nothing here opens
//! a file or a socket. Feature `quic` adds the async shell that both programs share.

#![forbid(unsafe_code)]

pub mod artefact;
pub mod charter;
pub mod codec;
pub mod contribution;
pub mod decoys;
pub mod evaluation;
pub mod event;
pub mod frame;
pub mod identity;
pub mod ids;
pub mod limits;
pub mod manifest;
pub mod message;
#[cfg(feature = "quic")]
pub mod quic;
pub mod reference;
pub mod reject;
pub mod round;
pub mod shard;
pub mod time;
pub mod transcript;

pub use identity::{PeerIdentity, Role};
pub use ids::{ConsortiumId, Digest, InstitutionId, RoundId};
pub use reject::RejectCode;
pub use time::{Clock, UnixMillis};
