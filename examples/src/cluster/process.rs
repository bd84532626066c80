//! A program of ours as a child process: its output goes to a file, and it never outlives its owner.

use std::ffi::OsStr;
use std::fs::{self, File};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

const POLL: Duration = Duration::from_millis(20);

/// How to start a program.
#[derive(Debug, Clone)]
pub struct Program {
    path: PathBuf,
    name: &'static str,
}

impl Program {
    /// The binary at `path`, which acts as the program `name` by its first argument.
    #[must_use]
    pub const fn new(path: PathBuf, name: &'static str) -> Self {
        Self { path, name }
    }

    /// A command line that starts with the program's name.
    #[must_use]
    pub fn command(&self) -> Command {
        let mut command = Command::new(&self.path);
        command.arg0(self.name).stdin(Stdio::null());
        command
    }

    /// Starts it; what it says is appended to `<logs>/<label>.log`.
    ///
    /// # Errors
    /// The log cannot be opened, or the program not started.
    pub fn spawn<'a>(
        &self,
        label: &str,
        arguments: impl IntoIterator<Item = &'a OsStr>,
        logs: &Path,
    ) -> Result<Process> {
        fs::create_dir_all(logs)?;
        let log = logs.join(format!("{label}.log"));
        let file = File::options().create(true).append(true).open(&log)?;
        let child = self
            .command()
            .args(arguments)
            .stdout(file.try_clone()?)
            .stderr(file)
            .spawn()
            .with_context(|| format!("cannot start {} as {}", self.path.display(), self.name))?;
        Ok(Process {
            child,
            label: label.to_owned(),
            log,
        })
    }
}

/// A running program.
#[derive(Debug)]
pub struct Process {
    child: Child,
    label: String,
    log: PathBuf,
}

impl Process {
    /// Its process id.
    #[must_use]
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// Where its output goes.
    #[must_use]
    pub fn log(&self) -> &Path {
        &self.log
    }

    /// Complains, with the end of its log, if it has ended.
    ///
    /// # Errors
    /// It has ended.
    pub fn ensure_running(&mut self) -> Result<()> {
        if let Some(status) = self.child.try_wait()? {
            let text = fs::read_to_string(&self.log).unwrap_or_default();
            let lines: Vec<&str> = text.lines().collect();
            let tail = lines
                .get(lines.len().saturating_sub(20)..)
                .unwrap_or_default()
                .join("\n");
            bail!(
                "{} has ended ({status}); the end of {}:\n{tail}",
                self.label,
                self.log.display()
            );
        }
        Ok(())
    }

    /// Sends SIGTERM and waits for the end.
    ///
    /// # Errors
    /// It is still there after a minute.
    pub fn terminate(&mut self) -> Result<ExitStatus> {
        if let Some(pid) = i32::try_from(self.child.id())
            .ok()
            .and_then(rustix::process::Pid::from_raw)
            && self.child.try_wait()?.is_none()
        {
            rustix::process::kill_process(pid, rustix::process::Signal::TERM)?;
        }
        self.wait(Duration::from_secs(60))
    }

    /// Kills it at once, as a power cut would.
    ///
    /// # Errors
    /// It cannot be waited for.
    pub fn kill(&mut self) -> Result<ExitStatus> {
        self.child.kill()?;
        Ok(self.child.wait()?)
    }

    /// Waits for the end.
    ///
    /// # Errors
    /// It is still there after `limit`.
    pub fn wait(&mut self, limit: Duration) -> Result<ExitStatus> {
        let mut status = None;
        wait_until(&format!("{} ends", self.label), limit, || {
            status = self.child.try_wait()?;
            Ok(status.is_some())
        })?;
        status.context("the process has ended without a status")
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        if matches!(self.child.try_wait(), Ok(None)) {
            let _ = self.child.kill();
            let _ = self.child.wait();
        }
    }
}

/// Asks again and again until `condition` holds.
///
/// # Errors
/// It does not hold within `limit`, or cannot be told.
#[expect(
    clippy::disallowed_methods,
    reason = "other processes are watched from outside; the condition, not the pause, decides"
)]
pub fn wait_until(
    what: &str,
    limit: Duration,
    mut condition: impl FnMut() -> Result<bool>,
) -> Result<()> {
    let start = Instant::now();
    while !condition()? {
        if start.elapsed() > limit {
            bail!("waited {} s in vain until {what}", limit.as_secs());
        }
        std::thread::sleep(POLL);
    }
    Ok(())
}
