//! Worker and scorer as child processes: started again when they die, stopped with SIGTERM and waited for.
//!
//! A child sees that its parent is gone and ends; nothing it does needs a clean end, because jobs and results are files
//! that are whole or absent.

use std::ffi::OsString;
use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use consilium_protocol::quic::Tasks;
use rustix::process::{Pid, Signal, kill_process};
use tokio::process::{Child, Command};
use tokio::time::Instant;

use crate::agent::retry::Backoff;
use crate::config::Config;
use crate::error::NodeError;
use crate::scorer::ServerSettings;

/// Waits before a child is started again.
const RESTART: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(60));
/// A child that ran this long is taken for healthy: the waits begin anew.
const HEALTHY: Duration = Duration::from_secs(60);
/// How long a child has to end by itself.
const GRACE: Duration = Duration::from_secs(10);

/// Variables of the environment that a scorer gets; none names a file, and none a proxy.
const SCORER_ENVIRONMENT: [&str; 3] = ["RUST_LOG", "NO_COLOR", "RUST_BACKTRACE"];

/// The command line of a child.
#[derive(Debug, Clone)]
pub(crate) struct ChildProgram {
    name: &'static str,
    program: PathBuf,
    arguments: Vec<OsString>,
    threads: Option<usize>,
    /// The only variables of this process's environment that the child gets; all without it.
    environment: Option<&'static [&'static str]>,
}

/// This very program as the worker of `config`, and as its scorer where the source is behind a server.
pub(crate) fn children_of(
    config: &Config,
    log_format: &str,
) -> Result<Vec<ChildProgram>, NodeError> {
    let program = std::env::current_exe().map_err(|source| NodeError::System {
        doing: "find this program",
        source,
    })?;
    let mut children = vec![worker_of(config, &program, log_format)];
    if let Some(server) = &config.source_server {
        children.push(scorer_of(config, server, &program, log_format));
    }
    Ok(children)
}

fn worker_of(config: &Config, program: &Path, log_format: &str) -> ChildProgram {
    let arguments = [
        "worker",
        "--supervised",
        "--log-format",
        log_format,
        "--config",
    ];
    let mut arguments: Vec<OsString> = arguments.map(OsString::from).to_vec();
    arguments.push(config.path.clone().into_os_string());
    ChildProgram {
        name: "worker",
        program: program.to_owned(),
        arguments,
        threads: config.worker.threads.map(NonZeroUsize::get),
        environment: None,
    }
}

/// The scorer learns spool, source and server; not even the file that names private data.
fn scorer_of(
    config: &Config,
    server: &ServerSettings,
    program: &Path,
    log_format: &str,
) -> ChildProgram {
    let arguments = ["scorer", "--supervised", "--log-format", log_format];
    let mut arguments: Vec<OsString> = arguments.map(OsString::from).to_vec();
    let source = config.source.resolve_or_folder();
    for (option, path) in [("--spool", &config.spool), ("--source", &source)] {
        arguments.extend([option.into(), path.clone().into_os_string()]);
    }
    if config.source_chat_template {
        arguments.push("--chat-template".into());
    }
    arguments.extend(server.arguments());
    ChildProgram {
        name: "scorer",
        program: program.to_owned(),
        arguments,
        threads: None,
        environment: Some(&SCORER_ENVIRONMENT),
    }
}

impl ChildProgram {
    /// What it is.
    pub(crate) const fn name(&self) -> &'static str {
        self.name
    }

    fn start(&self) -> std::io::Result<Child> {
        let mut command = Command::new(&self.program);
        // One binary may act as several programs, by its first argument.
        command
            .arg0("consilium-node")
            .args(&self.arguments)
            .stdin(Stdio::null())
            .kill_on_drop(true);
        if let Some(names) = self.environment {
            let kept = names
                .iter()
                .filter_map(|name| Some((name, std::env::var_os(name)?)));
            command.env_clear().envs(kept);
        }
        if let Some(threads) = self.threads {
            let threads = threads.to_string();
            command.env("RAYON_NUM_THREADS", &threads);
            command.env("CANDLE_NUM_THREADS", &threads);
        }
        command.spawn()
    }
}

/// Keeps a child running until `tasks` are cancelled.
pub(crate) async fn keep_running(program: ChildProgram, tasks: Tasks, seed: u64) {
    let mut backoff = Backoff::new(RESTART.0, RESTART.1, seed);
    loop {
        let started = Instant::now();
        match program.start() {
            Ok(mut child) => {
                tracing::info!(child = program.name, pid = child.id(), "started");
                tokio::select! {
                    () = tasks.cancelled() => {
                        stop(program.name, &mut child).await;
                        return;
                    }
                    ended = child.wait() => match ended {
                        Ok(status) => tracing::error!(child = program.name, %status, "ended"),
                        Err(error) => tracing::error!(child = program.name, %error, "cannot wait for it"),
                    },
                }
            }
            Err(error) => tracing::error!(child = program.name, %error, "cannot start"),
        }
        if started.elapsed() >= HEALTHY {
            backoff.reset();
        }
        let wait = backoff.next_wait();
        tracing::warn!(child = program.name, ?wait, "is started again");
        tokio::select! {
            () = tasks.cancelled() => return,
            () = tokio::time::sleep(wait) => {}
        }
    }
}

async fn stop(name: &str, child: &mut Child) {
    let pid = child
        .id()
        .and_then(|id| Pid::from_raw(i32::try_from(id).ok()?));
    if let Some(pid) = pid {
        // Fails only if it has ended already.
        let _ = kill_process(pid, Signal::TERM);
    }
    match tokio::time::timeout(GRACE, child.wait()).await {
        Ok(_) => tracing::info!(child = name, "stopped"),
        Err(_) => {
            tracing::warn!(child = name, grace = ?GRACE, "did not end in time and is killed");
            let _ = child.kill().await;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shell(script: &str) -> ChildProgram {
        ChildProgram {
            name: "worker",
            program: "/bin/sh".into(),
            arguments: vec!["-c".into(), script.into()],
            threads: Some(3),
            environment: None,
        }
    }

    /// The whole command line, and what the child's environment says.
    fn scorer(text: &str) -> ChildProgram {
        let text = crate::config::template(
            &consilium_protocol::ConsortiumId::new("demo").unwrap(),
            &consilium_protocol::InstitutionId::new("clinic").unwrap(),
            "127.0.0.1:4433",
        ) + text;
        let text = text.replace(
            "# source_chat_template = false",
            "source_chat_template = true",
        );
        let config = Config::parse(&text, Path::new("/site/private/node.toml")).unwrap();
        let mut children = children_of(&config, "text").unwrap();
        assert_eq!(children.len(), 2);
        children.remove(1)
    }

    #[test]
    fn a_scorer_is_told_of_spool_source_and_server_and_of_no_other_file() {
        use clap::Parser as _;

        let child = scorer(
            "[source_server]\nkind = \"vllm\"\nurl = \"http://127.0.0.1:1\"\nmodel = \"big\"\n\
             top = 64\nkey_file = \"key\"\n",
        );
        let paths: Vec<_> = child
            .arguments
            .iter()
            .filter_map(|argument| argument.to_str()?.strip_prefix("/site/private/"))
            .collect();
        assert_eq!(paths, ["spool", "source", "key"]);
        let line = std::iter::once("consilium-node".into()).chain(child.arguments);
        let parsed = crate::args::Cli::try_parse_from(line).unwrap();
        let crate::args::Command::Scorer(args) = parsed.command else {
            panic!("no scorer")
        };
        let settings = args.settings().unwrap();
        assert_eq!((settings.server.top, args.supervised), (64, true));
        assert!(settings.chat_template);
        assert_eq!(
            settings.server.key_file.unwrap(),
            Path::new("/site/private/key")
        );
    }

    #[tokio::test]
    async fn a_scorer_gets_neither_a_proxy_nor_a_file_from_the_environment() {
        let folder = tempfile::tempdir().unwrap();
        let log = folder.path().join("log");
        let script = format!("env > {}", log.display());
        let child = ChildProgram {
            environment: Some(&SCORER_ENVIRONMENT),
            threads: None,
            ..shell(&script)
        };
        assert!(std::env::var_os("HOME").is_some());
        assert!(child.start().unwrap().wait().await.unwrap().success());
        let text = std::fs::read_to_string(&log).unwrap();
        for line in text.lines() {
            let (name, _) = line.split_once('=').unwrap();
            let shell = ["PWD", "SHLVL", "_", "OLDPWD"];
            assert!(
                SCORER_ENVIRONMENT.contains(&name) || shell.contains(&name),
                "{line}"
            );
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
