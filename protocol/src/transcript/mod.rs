//! Tamper-evident log in the C2SP formats: what the aggregator writes and anyone can check.
//!
//! Nothing here reads a file or a socket. The formats are [signed notes][n], [checkpoints][c],
//! [tiles][t], [cosignatures][w] and [log proofs][p] over the Merkle tree of [RFC 6962][r], so a log
//! directory can also be checked with tools that are not ours.
//!
//! [n]: https://c2sp.org/signed-note
//! [c]: https://c2sp.org/tlog-checkpoint
//! [t]: https://c2sp.org/tlog-tiles
//! [w]: https://c2sp.org/tlog-cosignature
//! [p]: https://c2sp.org/tlog-proof
//! [r]: https://www.rfc-editor.org/rfc/rfc6962#section-2.1

#![warn(clippy::indexing_slicing, clippy::arithmetic_side_effects)]

pub mod checkpoint;
pub mod key;
pub mod note;
pub mod proof;
pub mod tile;
pub mod tree;

pub use checkpoint::{Checkpoint, CheckpointError, VerifiedCheckpoint};
pub use key::{KeyError, KeyName, NoteSigner, SignatureKind, VerifierKey};
pub use note::{Author, NoteError, SignedNote, VerifiedNote};
pub use proof::{LogProof, ProofError};
pub use tile::{Tile, TileError, TileKind};
pub use tree::{Tree, TreeError};
