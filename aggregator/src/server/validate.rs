//! Whether a contribution's bytes are what its slot takes. Everything is checked before it is stored; fusion trusts it.

use std::path::Path;
use std::sync::Arc;

use consilium_protocol::artefact::Kind;
use consilium_protocol::contribution::Statement;
use consilium_protocol::evaluation::Evaluation;
use consilium_protocol::manifest::Manifest;
use consilium_protocol::shard::Shard;
use consilium_protocol::{Digest, RejectCode};

use crate::fusion::{self, FusionError, Origin};
use crate::rounds::Bench;

/// What the open round says about its contributions.
#[derive(Debug, Clone)]
pub struct Checks {
    /// The manifest.
    pub manifest: Arc<Manifest>,
    /// An adapter of the shapes that every adapter must have.
    pub start: Digest,
}

/// Checks one contribution, which lies in `file`. Records and evaluations are read into memory, as their kinds' limits
/// allow; an adapter piece by piece.
///
/// # Errors
/// The code for the peer; the reason is in our log.
pub fn contribution(
    bench: &Bench,
    checks: &Checks,
    statement: &Statement,
    file: &Path,
) -> Result<(), RejectCode> {
    let refuse = |code: RejectCode, problem: &dyn std::fmt::Display| {
        tracing::warn!(institution = %statement.institution, kind = statement.kind.name(),
            sequence = statement.sequence, %problem, "contribution does not pass");
        code
    };
    let content = |problem: &dyn std::fmt::Display| refuse(RejectCode::Content, problem);
    let read = || std::fs::read(file).map_err(|error| refuse(RejectCode::Storage, &error));
    let (manifest, institution) = (&checks.manifest, &statement.institution);
    match statement.kind {
        Kind::Records => {
            let shard = Shard::parse(&read()?).map_err(|error| content(&error))?;
            if shard.header.reference != manifest.reference {
                let problem = &"made from another reference set";
                return Err(refuse(RejectCode::WrongReference, problem));
            }
            let index = statement.sequence;
            fusion::check_shard(manifest, &bench.reference, index, institution, &shard)
                .map_err(|error| content(&error))
        }
        Kind::Adapter => {
            let start = bench.blobs.path(&checks.start);
            match fusion::check_adapter(&manifest.training, &start, institution, file) {
                Ok(_) => Ok(()),
                // What fails here is ours: the sender's file is at fault only for what it says.
                Err(
                    error @ (FusionError::Io { .. }
                    | FusionError::Format {
                        origin: Origin::Start,
                        ..
                    }),
                ) => Err(refuse(RejectCode::Storage, &error)),
                Err(error) => Err(content(&error)),
            }
        }
        Kind::Evaluation => Evaluation::parse(&read()?)
            .map(|_| ())
            .map_err(|error| content(&error)),
    }
}
