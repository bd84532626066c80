//! The async shell that node and aggregator share: mutual TLS over QUIC, frames, and transfers of artefacts.
//!
//! [`Client`] dials, [`Server`] accepts; both give a [`Connection`] whose peer is known by its certificate. Each request
//! has a [`Stream`] of its own. Policy (who may do what, what is stored) belongs to the callers.

pub mod chunk;
mod endpoint;
mod error;
mod exchange;
mod frame;
mod identity;
mod partial;
mod reset;
mod tasks;
mod tls;
mod transfer;
mod verify;

pub use endpoint::{
    Client, Connection, Connections, Handshake, MAX_BIDI_STREAMS, Server, ServerLimits,
};
pub use error::{Alert, LinkError, LocalError, NetworkError, PeerError};
pub use exchange::{download, partial_path, receive_upload, serve_download, upload};
pub use frame::{DEADLINE, Request, Stream, Wait};
pub use identity::IdentityError;
pub use partial::{Complete, Partial};
pub use tasks::{Shutdown, Tasks};
pub use tls::{Credentials, CredentialsError, Pem};
pub use transfer::{Pace, Progress, receive_content, send_content};
pub use verify::CertificateFault;

#[cfg(test)]
mod tests;
