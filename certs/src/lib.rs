//! Consortium certificate authority, node certificates and signing keys.
//!
//! Two kinds of key, made where they are used: a P-256 key with a certificate for TLS, and an
//! ed25519 key that signs what a site hands over. Private keys are PKCS#8 PEM files of mode 0600.
//!
//! Folders have fixed file names, see [`folder`]:
//!
//! | authority | member | holds |
//! |---|---|---|
//! | `ca.pem` | `ca.pem` | certificate of the consortium's authority |
//! | `ca.key` | | its P-256 key |
//! | `authority.key` | | the authority's ed25519 key, which signs the charter |
//! | `authority.pub` | `authority.pub` | its C2SP verifier key, `<consortium>/authority+...` |
//! | | `cert.pem` | the member's certificate |
//! | | `key.pem` | its P-256 key |
//! | | `request.pem` | the request that `cert.pem` answers, where the key was made at the site |
//! | | `signing.key` | the member's ed25519 key |
//! | | `signing.pub` | its public half, 64 hexadecimal digits, as the charter lists it |
//!
//! A certificate names its holder by a SAN URI, `consilium://<consortium>/<role>/<institution>`, see
//! [`consilium_protocol::PeerIdentity`].

#![forbid(unsafe_code)]

mod args;
pub mod authority;
pub mod cli;
pub mod error;
pub mod folder;
pub mod identity;
pub mod inspect;
pub mod leaf;
pub mod pem;
mod reply;

pub use authority::Authority;
pub use error::CertsError;
pub use folder::Member;
pub use identity::SigningIdentity;
pub use leaf::{Credentials, LeafProfile, TlsKey};
pub use pem::Overwrite;
