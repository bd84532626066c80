//! What the files of a node say about it; needs no running agent.

use std::fs::{File, TryLockError};

use consilium_protocol::event::Entry;
use consilium_protocol::limits;
use consilium_protocol::transcript::{Checkpoint, SignedNote};
use serde_json::{Value, json};

use crate::agent::ledger::{Chain, Event};
use crate::agent::{self, trust};
use crate::config::Config;
use crate::error::NodeError;
use crate::reply::Reply;
use crate::spool::{Outcome, Spool};

/// The state of the node in `config`.
pub(crate) fn of(config: &Config) -> Result<Reply, NodeError> {
    let spool = Spool::open(&config.spool)?;
    let chain = Chain::read(&spool.state_path(agent::LEDGER))?;
    let (mut artefacts, mut bytes, mut acknowledged) = (0_u64, 0_u64, 0_u64);
    for line in &chain.lines {
        match &line.event {
            Event::Released { bytes: more, .. } => {
                artefacts = artefacts.saturating_add(1);
                bytes = bytes.saturating_add(*more);
            }
            Event::Acknowledged { .. } => acknowledged = acknowledged.saturating_add(1),
            Event::Began { .. } | Event::Refused { .. } => {}
        }
    }
    let mut jobs = Vec::new();
    for (id, _) in spool.jobs_in_order()? {
        let state = match spool.outcome(&id)? {
            None => "pending",
            Some(Outcome::Done { .. }) => "done",
            Some(Outcome::Failed { .. }) => "failed",
        };
        jobs.push(Value::from(format!("{id} {state}")));
    }
    let entry_limit = u64::try_from(limits::LOG_ENTRY).unwrap_or(u64::MAX);
    let last = spool
        .read_state(agent::LAST_OUTCOME, entry_limit)?
        .and_then(|bytes| Entry::parse(&bytes).ok())
        .map(|entry| json!({"round": entry.round, "at": entry.at, "event": entry.event}));
    Ok(Reply::done("")
        .with("institution", config.institution.as_str())
        .with("consortium", config.consortium.as_str())
        .with("aggregator", config.aggregator.to_string())
        .with(
            "agent",
            if is_locked(&spool) {
                "running"
            } else {
                "stopped"
            },
        )
        .with("log_size", log_size(&spool)?)
        .with("ledger_lines", chain.lines.len())
        .with("ledger_head", chain.head.to_string())
        .with("artefacts_released", artefacts)
        .with("bytes_released", bytes)
        .with("artefacts_acknowledged", acknowledged)
        .with("last_round", last)
        .with("job", jobs))
}

fn is_locked(spool: &Spool) -> bool {
    File::open(spool.state_path(agent::LOCK))
        .is_ok_and(|file| matches!(file.try_lock_shared(), Err(TryLockError::WouldBlock)))
}

fn log_size(spool: &Spool) -> Result<Option<u64>, NodeError> {
    let limit = u64::try_from(limits::DOCUMENT).unwrap_or(u64::MAX);
    let note = spool.read_state(trust::CHECKPOINT, limit)?;
    // The agent checks its signature; this only shows it.
    Ok(note
        .and_then(|note| SignedNote::parse(&note).ok())
        .and_then(|note| Checkpoint::parse_text(note.unverified_text()).ok())
        .map(|checkpoint| checkpoint.size))
}
