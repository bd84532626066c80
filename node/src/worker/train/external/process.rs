//! The command as a process group that ends with the run, whatever it started itself.

use std::ffi::OsString;
use std::fs::File;
use std::io::{Read as _, Seek as _, SeekFrom};
use std::os::unix::process::CommandExt as _;
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc;
use std::time::Duration;

use consilium_protocol::Clock as _;
use consilium_protocol::time::SystemClock;
use rustix::process::{Pid, Signal, kill_process_group, test_kill_process_group};

use super::ExternalError;
use crate::config::ExternalCommand;
use crate::worker::error::WorkError;

/// Steps in which the process is looked at.
const STEP: Duration = Duration::from_millis(50);
/// How long the group has to end: by itself, and then once it was killed.
const GRACE: Duration = Duration::from_secs(10);
/// Bytes at the end of the log of which lines are quoted.
const TAIL: u64 = 4096;
/// Lines that are quoted.
const LINES: usize = 20;

/// Runs the command to a good end.
///
/// # Errors
/// It cannot be started, fails, takes too long, or `stop` says so.
pub(super) fn run(
    command: &ExternalCommand,
    environment: Vec<(&'static str, OsString)>,
    log: &Path,
    stop: &dyn Fn() -> bool,
) -> Result<(), WorkError> {
    let file = |doing| {
        move |source| ExternalError::File {
            doing,
            path: log.to_owned(),
            source,
        }
    };
    let output = File::create(log).map_err(file("write"))?;
    let errors = output.try_clone().map_err(file("write"))?;
    let Some((program, arguments)) = command.command.split_first() else {
        return Err(super::refuse("train.external.command", "names no program").into());
    };
    let child = Command::new(program)
        .args(arguments)
        .envs(environment)
        .stdin(Stdio::null())
        .stdout(output)
        .stderr(errors)
        .process_group(0)
        .spawn()
        .map_err(|source| ExternalError::Start {
            program: program.clone(),
            source,
        })?;
    let mut group = Group(child);
    let started = SystemClock.now();
    loop {
        if let Some(status) = group.ended().map_err(file("wait for the writer of"))? {
            if status.success() {
                return Ok(());
            }
            return Err(ExternalError::Failed {
                program: program.clone(),
                status,
                log: log.to_owned(),
                last: last_lines(log),
            }
            .into());
        }
        if stop() {
            group.end();
            return Err(WorkError::Stopped);
        }
        if SystemClock.now().since(started) > command.timeout {
            group.end();
            return Err(ExternalError::Timeout {
                program: program.clone(),
                hours: command.timeout.as_secs_f64() / 3600.0,
                log: log.to_owned(),
                last: last_lines(log),
            }
            .into());
        }
        pause();
    }
}

/// A process and all that it started; none outlives this value.
struct Group(Child);

impl Group {
    fn ended(&mut self) -> std::io::Result<Option<ExitStatus>> {
        self.0.try_wait()
    }

    /// The group's number: that of its first process.
    fn id(&self) -> Option<Pid> {
        i32::try_from(self.0.id()).ok().and_then(Pid::from_raw)
    }

    fn signal(&self, signal: Signal) {
        if let Some(id) = self.id() {
            // Fails only if all of it has ended already.
            let _ = kill_process_group(id, signal);
        }
    }

    /// Asks it to end, and then makes it.
    fn end(&mut self) {
        self.signal(Signal::TERM);
        wait_until(|| !matches!(self.ended(), Ok(None)));
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        // Also after a good end: what the command left running would hold the devices. As long as anything of the group
        // runs, its number is nobody else's.
        self.signal(Signal::KILL);
        let _ = self.0.wait();
        // What its children started ends a little later, and where nobody collects orphans stays listed though it ended.
        wait_until(|| {
            self.id()
                .is_none_or(|id| test_kill_process_group(id).is_err())
        });
    }
}

/// Waits for something to hold, at most as long as a group has to end.
fn wait_until(mut holds: impl FnMut() -> bool) {
    let began = SystemClock.now();
    while !holds() && SystemClock.now().since(began) < GRACE {
        pause();
    }
}

/// Waits without a clock: on a channel on which nothing is sent.
fn pause() {
    let (_sender, nothing) = mpsc::channel::<()>();
    let _ = nothing.recv_timeout(STEP);
}

fn last_lines(log: &Path) -> String {
    let read = || {
        let mut file = File::open(log)?;
        let length = file.metadata()?.len();
        file.seek(SeekFrom::Start(length.saturating_sub(TAIL)))?;
        let mut bytes = Vec::new();
        file.take(TAIL).read_to_end(&mut bytes)?;
        Ok::<_, std::io::Error>(bytes)
    };
    let bytes = read().unwrap_or_default();
    let text = String::from_utf8_lossy(&bytes);
    let lines: Vec<&str> = text.lines().collect();
    let first = lines.len().saturating_sub(LINES);
    lines.get(first..).unwrap_or_default().join("\n")
}
