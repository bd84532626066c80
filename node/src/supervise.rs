//! The worker as a child process: started again when it dies, stopped with SIGTERM and waited for.
//!
//! The child sees that its parent is gone and ends; nothing it does needs a clean end, because jobs and results are files
//! that are whole or absent.

use std::path::PathBuf;
use std::process::Stdio;
use std::time::Duration;

use consilium_protocol::quic::Tasks;
use rustix::process::{Pid, Signal, kill_process};
use tokio::process::{Child, Command};
use tokio::time::Instant;

use crate::agent::retry::Backoff;
use crate::config::Config;
use crate::error::NodeError;

/// Waits before the worker is started again.
const RESTART: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(60));
/// A worker that ran this long is taken for healthy: the waits begin anew.
const HEALTHY: Duration = Duration::from_secs(60);
/// How long the worker has to end by itself.
const GRACE: Duration = Duration::from_secs(10);

/// The command line of a child.
#[derive(Debug, Clone)]
pub(crate) struct WorkerProgram {
    program: PathBuf,
    arguments: Vec<std::ffi::OsString>,
    threads: Option<usize>,
}

impl WorkerProgram {
    /// This very program as the worker of `config`.
    pub(crate) fn this(config: &Config, log_format: &str) -> Result<Self, NodeError> {
        let program = std::env::current_exe().map_err(|source| NodeError::System {
            doing: "find this program",
            source,
        })?;
        let arguments = vec![
            "worker".into(),
            "--supervised".into(),
            "--log-format".into(),
            log_format.into(),
            "--config".into(),
            config.path.clone().into_os_string(),
        ];
        Ok(Self {
            program,
            arguments,
            threads: config.worker.threads.map(std::num::NonZeroUsize::get),
        })
    }

    fn start(&self) -> std::io::Result<Child> {
        let mut command = Command::new(&self.program);
        // One binary may act as several programs, by its first argument.
        command
            .arg0("consilium-node")
            .args(&self.arguments)
            .stdin(Stdio::null())
            .kill_on_drop(true);
        if let Some(threads) = self.threads {
            let threads = threads.to_string();
            command.env("RAYON_NUM_THREADS", &threads);
            command.env("CANDLE_NUM_THREADS", &threads);
        }
        command.spawn()
    }
}

/// Keeps a worker running until `tasks` are cancelled.
pub(crate) async fn keep_running(program: WorkerProgram, tasks: Tasks, seed: u64) {
    let mut backoff = Backoff::new(RESTART.0, RESTART.1, seed);
    loop {
        let started = Instant::now();
        match program.start() {
            Ok(mut child) => {
                tracing::info!(pid = child.id(), "worker started");
                tokio::select! {
                    () = tasks.cancelled() => {
                        stop(&mut child).await;
                        return;
                    }
                    ended = child.wait() => match ended {
                        Ok(status) => tracing::error!(%status, "the worker ended"),
                        Err(error) => tracing::error!(%error, "cannot wait for the worker"),
                    },
                }
            }
            Err(error) => tracing::error!(%error, "cannot start the worker"),
        }
        if started.elapsed() >= HEALTHY {
            backoff.reset();
        }
        let wait = backoff.next_wait();
        tracing::warn!(?wait, "the worker is started again");
        tokio::select! {
            () = tasks.cancelled() => return,
            () = tokio::time::sleep(wait) => {}
        }
    }
}

async fn stop(child: &mut Child) {
    let pid = child
        .id()
        .and_then(|id| Pid::from_raw(i32::try_from(id).ok()?));
    if let Some(pid) = pid {
        // Fails only if it has ended already.
        let _ = kill_process(pid, Signal::TERM);
    }
    match tokio::time::timeout(GRACE, child.wait()).await {
        Ok(_) => tracing::info!("worker stopped"),
        Err(_) => {
            tracing::warn!(grace = ?GRACE, "the worker did not end in time and is killed");
            let _ = child.kill().await;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shell(script: &str) -> WorkerProgram {
        WorkerProgram {
            program: "/bin/sh".into(),
            arguments: vec!["-c".into(), script.into()],
            threads: Some(3),
        }
    }

    #[tokio::test]
    async fn a_worker_that_dies_is_started_again_and_shutdown_waits_for_it() {
        let folder = tempfile::tempdir().unwrap();
        let log = folder.path().join("log");
        // Dies at once the first time; ends on SIGTERM the second time.
        let script = format!(
            "echo $RAYON_NUM_THREADS >> {0}; [ $(wc -l < {0}) -gt 1 ] || exit 9; \
             trap 'echo end >> {0}; exit 0' TERM; while :; do sleep 0.02; done",
            log.display()
        );
        let tasks = Tasks::new();
        tasks.spawn("worker", keep_running(shell(&script), tasks.clone(), 1));
        let lines = || std::fs::read_to_string(&log).unwrap_or_default();
        let started = Instant::now();
        while lines() != "3\n3\n" && started.elapsed() < Duration::from_secs(20) {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        // The trap is set right after the second line.
        tokio::time::sleep(Duration::from_millis(200)).await;
        assert!(tasks.shutdown(Duration::from_secs(20)).await.is_clean());
        assert_eq!(lines(), "3\n3\nend\n");
    }
}
