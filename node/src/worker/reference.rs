//! The reference set of the running round, parsed once.

use std::sync::Arc;

use consilium_protocol::reference::ReferenceSet;
use consilium_protocol::{Digest, limits};

use super::error::WorkError;
use crate::spool::Spool;

/// The set that the last job needed; the next one nearly always needs the same.
#[derive(Debug, Default)]
pub(crate) struct ReferenceCache(Option<Arc<ReferenceSet>>);

impl ReferenceCache {
    /// The set of this digest, from the spool where it is not the last one.
    ///
    /// # Errors
    /// The spool has no such blob, or it is no reference set.
    pub(crate) fn read(
        &mut self,
        spool: &Spool,
        digest: &Digest,
    ) -> Result<Arc<ReferenceSet>, WorkError> {
        if let Some(reference) = &self.0
            && reference.digest() == *digest
        {
            return Ok(Arc::clone(reference));
        }
        let bytes = spool.read_blob(digest, limits::ARTEFACT)?;
        let reference = Arc::new(ReferenceSet::parse(&bytes)?);
        self.0 = Some(Arc::clone(&reference));
        Ok(reference)
    }
}
