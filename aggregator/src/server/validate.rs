//! Whether a contribution's bytes are what its slot takes. Everything is checked before it is stored; fusion trusts it.

use std::sync::Arc;

use consilium_protocol::artefact::Kind;
use consilium_protocol::contribution::Statement;
use consilium_protocol::evaluation::Evaluation;
use consilium_protocol::manifest::Manifest;
use consilium_protocol::shard::Shard;
use consilium_protocol::{Digest, RejectCode, limits};

use crate::fusion;
use crate::rounds::Bench;

/// What the open round says about its contributions.
#[derive(Debug, Clone)]
pub struct Checks {
    /// The manifest.
    pub manifest: Arc<Manifest>,
    /// An adapter of the shapes that every adapter must have.
    pub start: Digest,
}

/// Checks one contribution.
///
/// # Errors
/// The code for the peer; the reason is in our log.
pub fn contribution(
    bench: &Bench,
    checks: &Checks,
    statement: &Statement,
    bytes: &[u8],
) -> Result<(), RejectCode> {
    let refuse = |code: RejectCode, problem: &dyn std::fmt::Display| {
        tracing::warn!(institution = %statement.institution, kind = statement.kind.name(),
            sequence = statement.sequence, %problem, "contribution does not pass");
        code
    };
    match statement.kind {
        Kind::Records => {
            let shard = Shard::parse(bytes).map_err(|error| refuse(RejectCode::Content, &error))?;
            if shard.header.reference != checks.manifest.reference {
                return Err(refuse(
                    RejectCode::WrongReference,
                    &"made from another reference set",
                ));
            }
            let (manifest, index) = (&checks.manifest, statement.sequence);
            fusion::check_shard(
                manifest,
                &bench.reference,
                index,
                &statement.institution,
                &shard,
            )
            .map_err(|error| refuse(RejectCode::Content, &error))
        }
        Kind::Adapter => {
            let start = bench
                .blobs
                .read(&checks.start, limits::ARTEFACT)
                .map_err(|error| refuse(RejectCode::Storage, &error))?;
            fusion::check_adapter(
                &checks.manifest.training,
                &start,
                &statement.institution,
                bytes,
            )
            .map(|_| ())
            .map_err(|error| refuse(RejectCode::Content, &error))
        }
        Kind::Evaluation => Evaluation::parse(bytes)
            .map(|_| ())
            .map_err(|error| refuse(RejectCode::Content, &error)),
    }
}
