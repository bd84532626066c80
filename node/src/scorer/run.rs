//! The scorer process.

use std::time::Duration;

use super::confine::confine;
use super::error::ScorerError;
use super::jobs::{Scorer, ScorerSettings};
use crate::process::Ending;
use crate::spool::Spool;
use crate::worker::WorkError;

/// Longest time until an idle scorer notices a signal.
const PATIENCE: Duration = Duration::from_millis(200);

/// Does the score jobs of the spool until SIGTERM or SIGINT; what was scored of the current job is kept.
///
/// # Errors
/// The spool or the settings cannot be used. A server that fails is no such error; the job's result says so.
pub fn run(settings: &ScorerSettings, end_with_parent: bool) -> Result<(), ScorerError> {
    let ending = Ending::watch(end_with_parent).map_err(|source| WorkError::Process {
        doing: "watch for signals",
        source,
    })?;
    let stop = || ending.is_due();
    // Before any thread is started, so that it holds for all of them.
    Spool::open(&settings.spool)?;
    let confined = confine(settings)?;
    let mut scorer = Scorer::new(settings)?;
    let (spool, url) = (scorer.spool().dir().display(), &settings.server.url);
    let kind = settings.server.kind;
    tracing::info!(%spool, %url, %kind, ?confined, "scorer waits for jobs");
    while !stop() {
        if !scorer.work(&stop)? {
            scorer.spool().wait_for_change(PATIENCE)?;
        }
    }
    tracing::info!("scorer ends");
    Ok(())
}
