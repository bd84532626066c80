//! The worker process.

use std::num::NonZeroUsize;
use std::time::Duration;

use super::error::WorkError;
use super::jobs::{Folders, Worker};
use crate::config::Memory;
use crate::process::Ending;

/// Longest time until an idle worker notices a signal.
const PATIENCE: Duration = Duration::from_millis(200);

/// How the process runs.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct RunOptions {
    /// Threads of the computations; all cores if absent.
    pub threads: Option<NonZeroUsize>,
    /// Where models compute, and how the pivot is held while an adapter of it is trained.
    pub memory: Memory,
    /// End when the process that started this one is gone, as a child of the agent should.
    pub end_with_parent: bool,
}

/// Does the jobs of the spool until SIGTERM or SIGINT, which end the process after the current step: the job keeps its
/// place and is done again by the next worker.
///
/// # Errors
/// The spool cannot be used, or the device that was chosen is not there. A job that fails is no such error; its result says so.
pub fn run(folders: Folders, options: RunOptions) -> Result<(), WorkError> {
    let ending = Ending::watch(options.end_with_parent).map_err(|source| WorkError::Process {
        doing: "watch for signals",
        source,
    })?;
    let device = options.memory.device.found()?;
    let threads = options.threads.map_or(0, NonZeroUsize::get);
    let pool = rayon::ThreadPoolBuilder::new()
        .num_threads(threads)
        .build()
        .map_err(|error| WorkError::Process {
            doing: "start threads",
            source: std::io::Error::other(error),
        })?;
    let stop = || ending.is_due();
    pool.install(|| {
        let mut worker = Worker::new(folders, &stop)?.with_memory(options.memory);
        let threads = rayon::current_num_threads();
        tracing::info!(spool = %worker.spool().dir().display(), threads, ?device, "worker waits for jobs");
        while !stop() {
            if !worker.work()? {
                worker.spool().wait_for_change(PATIENCE)?;
            }
        }
        tracing::info!("worker ends");
        Ok(())
    })
}
