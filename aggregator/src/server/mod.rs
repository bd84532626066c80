//! The network side: who may talk, what they may hand over, what they may fetch.

mod session;
mod upload;
pub mod validate;

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};

use consilium_protocol::Role;
use consilium_protocol::charter::Charter;
use consilium_protocol::contribution::Roster;
use consilium_protocol::quic::{Connection, Pace, Server, Tasks};
use consilium_protocol::{ConsortiumId, Digest, InstitutionId, RejectCode};

use crate::rounds::{Bench, Driver};

/// Live connections of one institution; a node reconnecting after a broken link needs a second one.
const CONNECTIONS_PER_MEMBER: usize = 2;

/// What all sessions share.
#[derive(Debug, Clone)]
pub struct Shared {
    /// Our consortium.
    pub consortium: ConsortiumId,
    /// Public keys of the members.
    pub roster: Arc<Roster>,
    /// Digest of the signed charter.
    pub charter: Digest,
    /// Owner of log and round.
    pub driver: Driver,
    /// Store, reference set and charter.
    pub bench: Arc<Bench>,
    /// How slow a peer may be.
    pub pace: Pace,
    connections: Arc<Mutex<BTreeMap<InstitutionId, usize>>>,
}

impl Shared {
    /// State of a server that has no connections yet.
    #[must_use]
    pub fn new(charter: &Charter, digest: Digest, driver: Driver, bench: Arc<Bench>) -> Self {
        Self {
            consortium: charter.consortium.clone(),
            roster: Arc::new(charter.roster()),
            charter: digest,
            driver,
            bench,
            pace: Pace::default(),
            connections: Arc::default(),
        }
    }

    /// Counts a connection in, if the certificate's holder is a member and has not too many.
    fn admit(&self, connection: &Connection) -> Result<Seat, RejectCode> {
        let peer = connection.peer();
        if peer.role != Role::Node || peer.consortium != self.consortium {
            return Err(RejectCode::Identity);
        }
        if !self.roster.contains_key(&peer.institution) {
            return Err(RejectCode::NotMember);
        }
        let mut connections = self
            .connections
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        let live = connections.entry(peer.institution.clone()).or_default();
        if *live >= CONNECTIONS_PER_MEMBER {
            return Err(RejectCode::Busy);
        }
        *live = live.saturating_add(1);
        Ok(Seat {
            institution: peer.institution.clone(),
            shared: self.clone(),
        })
    }
}

/// A counted connection; dropping it counts it out.
#[derive(Debug)]
struct Seat {
    institution: InstitutionId,
    shared: Shared,
}

impl Drop for Seat {
    fn drop(&mut self) {
        let mut connections = self
            .shared
            .connections
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        if let Some(live) = connections.get_mut(&self.institution) {
            *live = live.saturating_sub(1);
        }
    }
}

/// Accepts connections until the tasks are told to end.
pub async fn serve(server: Server, shared: Shared, tasks: Tasks) {
    let mut connections = server.listen(&tasks);
    loop {
        let connection = tokio::select! {
            () = tasks.cancelled() => break,
            connection = connections.next() => connection,
        };
        let Some(connection) = connection else { break };
        match shared.admit(&connection) {
            Ok(seat) => {
                let name = format!("session of {}", connection.peer().institution);
                let (shared, inner) = (shared.clone(), tasks.clone());
                tasks.spawn(name, async move {
                    session::run(connection, &shared, &inner).await;
                    drop(seat);
                });
            }
            Err(code) => {
                tracing::warn!(peer = %connection.peer().institution, %code, "connection refused");
                connection.close(code);
            }
        }
    }
}
