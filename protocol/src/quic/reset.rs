//! Resets that a peer believes although the process that it talked to is gone (RFC 9000, section 10.3).
//!
//! What authenticates a reset is made of the aggregator's own private key, so that one that was killed and started again
//! answers packets of its old connections at once. Without it nodes wait until silence ends the connection.

use std::fmt;
use std::sync::Arc;

use aws_lc_rs::hmac;
use quinn::EndpointConfig;
use quinn_proto::HashedConnectionIdGenerator;
use sha2::{Digest as _, Sha256};
use zeroize::Zeroizing;

const DOMAIN: &[u8] = b"consilium/1 stateless reset";

/// The secret behind resets and connection ids, the same in every process with the same private key.
#[derive(Clone)]
pub(super) struct ResetSecret(Arc<Zeroizing<[u8; 32]>>);

impl fmt::Debug for ResetSecret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("ResetSecret(redacted)")
    }
}

impl ResetSecret {
    /// The secret of the holder of a private key, in DER.
    pub(super) fn of_key(der: &[u8]) -> Self {
        Self(Arc::new(derived(DOMAIN, der)))
    }

    /// An endpoint whose resets and connection ids outlive its process.
    pub(super) fn endpoint(&self) -> EndpointConfig {
        let token = derived(b"token", &**self.0);
        let ids = derived(b"connection ids", &**self.0);
        let mut key = [0; 8];
        key.copy_from_slice(ids.split_at(8).0);
        let key = u64::from_le_bytes(key);
        let mut config = EndpointConfig::new(Arc::new(hmac::Key::new(hmac::HMAC_SHA256, &*token)));
        // Packets whose connection id this generator did not make are dropped without an answer.
        config.cid_generator(move || Box::new(HashedConnectionIdGenerator::from_key(key)));
        config
    }
}

fn derived(label: &[u8], secret: &[u8]) -> Zeroizing<[u8; 32]> {
    let digest = Sha256::new().chain_update(label).chain_update(secret);
    Zeroizing::new(digest.finalize().into())
}
