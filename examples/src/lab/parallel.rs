//! Independent work on all cores, one thread each: small models gain nothing from sharing a matrix product.

use std::num::NonZeroUsize;
use std::sync::Mutex;

use anyhow::{Context, Result};

/// Something to do once.
pub type Job<'a, T> = Box<dyn FnOnce() -> Result<T> + Send + 'a>;

/// Does the jobs, as many at a time as there are cores; results in the order of the jobs.
///
/// # Errors
/// The first job that failed.
pub fn in_parallel<T: Send>(jobs: Vec<Job<'_, T>>) -> Result<Vec<T>> {
    let threads = std::thread::available_parallelism().map_or(1, NonZeroUsize::get);
    let results: Vec<Mutex<Option<Result<T>>>> = jobs.iter().map(|_| Mutex::new(None)).collect();
    let queue = Mutex::new(jobs.into_iter().enumerate());
    let work = || -> Result<()> {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(1).build()?;
        loop {
            let next = queue.lock().ok().and_then(|mut queue| queue.next());
            let Some((at, job)) = next else { return Ok(()) };
            let result = pool.install(job);
            if let Some(mut slot) = results.get(at).and_then(|slot| slot.lock().ok()) {
                *slot = Some(result);
            }
        }
    };
    std::thread::scope(|scope| {
        let workers: Vec<_> = (0..threads).map(|_| scope.spawn(work)).collect();
        workers.into_iter().try_for_each(|worker| {
            worker
                .join()
                .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        })
    })?;
    results
        .into_iter()
        .map(|slot| {
            slot.into_inner()
                .ok()
                .flatten()
                .context("a job was left undone")?
        })
        .collect()
}
