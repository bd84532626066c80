//! The one door through which tasks start, so that shutdown can wait for all of them.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::task::AbortHandle;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

/// Tasks of one program; clones share them.
#[derive(Debug, Clone, Default)]
pub struct Tasks {
    tracker: TaskTracker,
    token: CancellationToken,
    register: Arc<Mutex<Register>>,
}

/// How a shutdown went.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Shutdown {
    /// Names of the tasks that did not end within the grace period and were stopped, sorted.
    pub unfinished: Vec<String>,
    /// Names of the tasks that panicked since the start, in order.
    pub panicked: Vec<String>,
}

impl Shutdown {
    /// Whether every task ended by itself.
    #[must_use]
    pub fn is_clean(&self) -> bool {
        *self == Self::default()
    }
}

#[derive(Debug, Default)]
struct Register {
    next: u64,
    running: BTreeMap<u64, (String, AbortHandle)>,
    panicked: Vec<String>,
}

impl Tasks {
    /// No tasks yet.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Starts a task. It should end soon after [`Self::cancelled`]. A panic is logged and kept for the report.
    #[expect(clippy::disallowed_methods, reason = "this is the door")]
    pub fn spawn(
        &self,
        name: impl Into<String>,
        future: impl Future<Output = ()> + Send + 'static,
    ) {
        let name = name.into();
        let register = Arc::clone(&self.register);
        // Held until the task is in the register, so that it cannot leave before it came.
        let mut guard = lock(&self.register);
        let id = guard.next;
        guard.next = id.wrapping_add(1);
        let task = tokio::spawn(self.tracker.track_future(future));
        guard.running.insert(id, (name, task.abort_handle()));
        drop(guard);
        self.tracker.spawn(async move {
            let ended = task.await;
            let mut register = lock(&register);
            let Some((name, _)) = register.running.remove(&id) else {
                return;
            };
            if ended.is_err_and(|error| error.is_panic()) {
                tracing::error!(task = %name, "task panicked");
                register.panicked.push(name);
            }
        });
    }

    /// Completes when the program is to end.
    pub async fn cancelled(&self) {
        self.token.cancelled().await;
    }

    /// The token behind [`Self::cancelled`]; a child of it cuts a part of the tasks.
    #[must_use]
    pub const fn token(&self) -> &CancellationToken {
        &self.token
    }

    /// Tells every task to end, waits for them, and stops those that take longer than `grace`.
    pub async fn shutdown(&self, grace: Duration) -> Shutdown {
        self.token.cancel();
        self.tracker.close();
        let mut unfinished = Vec::new();
        if tokio::time::timeout(grace, self.tracker.wait())
            .await
            .is_err()
        {
            for (name, task) in lock(&self.register).running.values() {
                tracing::warn!(task = %name, "task did not end in time and is stopped");
                unfinished.push(name.clone());
                task.abort();
            }
            self.tracker.wait().await;
        }
        unfinished.sort();
        let panicked = lock(&self.register).panicked.clone();
        Shutdown {
            unfinished,
            panicked,
        }
    }
}

fn lock(register: &Mutex<Register>) -> MutexGuard<'_, Register> {
    register.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicUsize, Ordering};

    const LONG: Duration = Duration::from_secs(3600);

    #[tokio::test]
    async fn shutdown_waits_for_what_tasks_still_have_to_do() {
        let tasks = Tasks::new();
        let finished = Arc::new(AtomicUsize::new(0));
        for index in 0..10 {
            let (inner, finished) = (tasks.clone(), Arc::clone(&finished));
            tasks.spawn(format!("worker {index}"), async move {
                inner.cancelled().await;
                for _ in 0..100 {
                    tokio::task::yield_now().await;
                }
                finished.fetch_add(1, Ordering::SeqCst);
            });
        }
        assert!(tasks.shutdown(LONG).await.is_clean());
        assert_eq!(finished.load(Ordering::SeqCst), 10);
    }

    #[tokio::test(start_paused = true)]
    async fn a_task_that_does_not_end_is_named_and_stopped() {
        let tasks = Tasks::new();
        tasks.spawn("stubborn", std::future::pending());
        let inner = tasks.clone();
        tasks.spawn("polite", async move { inner.cancelled().await });
        let report = tasks.shutdown(Duration::from_secs(5)).await;
        assert_eq!(report.unfinished, ["stubborn"]);
    }

    #[tokio::test]
    async fn a_panic_is_reported_and_the_others_go_on() {
        let tasks = Tasks::new();
        let inner = tasks.clone();
        tasks.spawn("healthy", async move { inner.cancelled().await });
        tasks.spawn("faulty", async { panic!("expected by the test") });
        let report = tasks.shutdown(LONG).await;
        assert_eq!(report.panicked, ["faulty"]);
        assert!(report.unfinished.is_empty());
    }
}
