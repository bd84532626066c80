//! A consortium of real processes with models that fit a test: random, two layers, a few hundred tokens.

#![forbid(unsafe_code)]

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use consilium_examples::cluster::{Cluster, Process, Program, Site, Spec, wait_until};
use consilium_examples::world::{Domain, Sizes, World};
use consilium_node::worker::LoadedModel;
use consilium_node::worker::commands;
use consilium_node::worker::model::ModelConfig;
use consilium_node::worker::tokenizer::{Tokenizer, train_bpe};
use consilium_protocol::manifest::Mode;
use consilium_protocol::{ConsortiumId, InstitutionId};
use serde_json::Value;

/// Longest wait for anything in a test.
pub const PATIENCE: Duration = Duration::from_secs(120);

/// Settings of a round that takes seconds: the manifest's defaults, smaller.
pub const SMALL: [&str; 7] = [
    "symbols=4",
    "shard_items=24",
    "training.inner_rounds=2",
    "training.local_steps=2",
    "training.rows=2",
    "training.rank=4",
    "training.alpha=8",
];

/// A consortium of three on disk, its folder removed at the end.
#[derive(Debug)]
pub struct Consortium {
    /// Its files and programs.
    pub cluster: Cluster,
    /// Its members.
    pub names: [InstitutionId; 3],
    /// The setting of a round in the pivot's tokens, where all sources have its tokenizer.
    pub token_space: String,
    _folder: tempfile::TempDir,
}

impl Consortium {
    /// Makes text, models, certificates and configuration from a seed.
    ///
    /// # Errors
    /// A file cannot be written, or a program cannot be built.
    pub fn new(seed: u64) -> Result<Self> {
        Self::make(seed, false)
    }

    /// As [`Self::new`], of sources that have the pivot's tokenizer, and a reference set that says its tokens.
    ///
    /// # Errors
    /// As [`Self::new`].
    pub fn of_one_tokenizer(seed: u64) -> Result<Self> {
        Self::make(seed, true)
    }

    fn make(seed: u64, is_shared: bool) -> Result<Self> {
        let folder = tempfile::tempdir()?;
        let root = folder.path();
        let sizes = Sizes {
            private_lines: 120,
            public_items: 60,
            true_answers_permille: 0,
            holdout_items: 12,
            test_lines: 10,
            rule_questions: 1,
        };
        let world = World::generate(seed, &sizes);
        let files = world.write_files(&root.join("text"))?;
        let public: Vec<&str> = world
            .public
            .iter()
            .map(|public| public.item.target.as_str())
            .collect();
        let pivot = root.join("pivot");
        let shared = Arc::new(train_bpe(public.iter().copied(), 280)?);
        model(&shared, seed, &pivot)?;
        let mut sites = Vec::new();
        for (at, domain) in Domain::ALL.into_iter().enumerate() {
            let institution = world.institutions.get(at).context("three institutions")?;
            let private = institution.private.iter().map(String::as_str);
            let source = root.join("sources").join(domain.name());
            let tokenizer = if is_shared {
                Arc::clone(&shared)
            } else {
                Arc::new(train_bpe(private, 270 + 10 * at)?)
            };
            model(&tokenizer, seed + 1 + at as u64, &source)?;
            let holdout = files.holdout.get(at).context("three holdouts")?.clone();
            sites.push(Site {
                name: InstitutionId::new(domain.name())?,
                source,
                holdout,
                capacity: 1,
                train_data: Some(files.private.get(at).context("three texts")?.clone()),
            });
        }
        let (mut reference, mut token_space) = (files.public, String::new());
        if is_shared {
            let with_tokens = root.join("tokens.jsonl");
            let model = pivot.as_path().into();
            let space = commands::tokens(&model, &reference, &with_tokens)?;
            token_space = format!("symbol_space={}", serde_json::to_string(&space)?);
            reference = with_tokens;
        }
        let names = Domain::ALL.map(Domain::name).map(InstitutionId::new);
        let [Ok(clinic), Ok(bank), Ok(insurer)] = names else {
            bail!("a domain is no identifier")
        };
        let spec = Spec {
            consortium: ConsortiumId::new("demo")?,
            quorum: 2,
            // Random models say nothing about quality; these tests are about the round.
            gate_bound_permille: 100_000,
            pivot,
            reference,
            sites,
            modes: vec![Mode::Unified, Mode::Pairwise, Mode::Adapters],
            threads: 1,
        };
        let programs = binaries()?;
        let aggregator = Program::new(
            programs.join("consilium-aggregator"),
            "consilium-aggregator",
        );
        let node = Program::new(programs.join("consilium-node"), "consilium-node");
        let cluster = Cluster::prepare(&root.join("consortium"), spec, aggregator, node)?;
        Ok(Self {
            cluster,
            names: [clinic, bank, insurer],
            token_space,
            _folder: folder,
        })
    }

    /// Opens a small round with more settings of its own.
    ///
    /// # Errors
    /// The aggregator refuses.
    pub fn open_round(&self, settings: &[&str]) -> Result<()> {
        let mut arguments = vec!["round", "open"];
        for setting in SMALL.iter().chain(settings) {
            arguments.extend(["--set", *setting]);
        }
        self.cluster.operator(&arguments).map(|_| ())
    }

    /// What a site's own ledger says has left, in order: kind, sequence and mode of the round.
    ///
    /// # Errors
    /// The ledger cannot be read, or a line is none.
    pub fn left(&self, name: &InstitutionId) -> Result<Vec<(String, u64, String)>> {
        let path = self.cluster.site_dir(name).join("spool/state/ledger.jsonl");
        let text = std::fs::read_to_string(&path).context("a node without a ledger")?;
        let mut left = Vec::new();
        for line in text.lines() {
            let line: Value = serde_json::from_str(line)?;
            let event = &line["event"];
            if event["type"] == "released" {
                let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
                let slot = &event["slot"];
                let sequence = slot["sequence"].as_u64().unwrap_or(u64::MAX);
                left.push((text(&slot["kind"]), sequence, text(&event["mode"])));
            }
        }
        Ok(left)
    }

    /// Runs a small round with more settings of its own to its release, with all members, and returns it.
    ///
    /// # Errors
    /// The round does not end in a release, or a process fails.
    pub fn run_round(&self, settings: &[&str]) -> Result<Value> {
        let mut aggregator = self.cluster.start_aggregator()?;
        let mut nodes = self
            .names
            .iter()
            .map(|name| self.cluster.start_node(name))
            .collect::<Result<Vec<_>>>()?;
        self.open_round(settings)?;
        let mut processes: Vec<_> = nodes.iter_mut().collect();
        processes.push(&mut aggregator);
        let round = self.wait_for("the round is released", &mut processes, is_released)?;
        for process in nodes.iter_mut().chain([&mut aggregator]) {
            let status = process.terminate()?;
            ensure!(
                status.success(),
                "a process ended with {status}\n{}",
                self.logs()
            );
        }
        Ok(round)
    }

    /// The newest round as `status --json` shows it.
    ///
    /// # Errors
    /// The command fails.
    pub fn round(&self) -> Result<Value> {
        Ok(self.cluster.status()?["round"].take())
    }

    /// Waits until the round is as wanted; every process must stay alive meanwhile.
    ///
    /// # Errors
    /// It does not become so in time, or a process ends.
    pub fn wait_for(
        &self,
        what: &str,
        processes: &mut [&mut Process],
        mut wanted: impl FnMut(&Value) -> bool,
    ) -> Result<Value> {
        let mut found = Value::Null;
        wait_until(what, PATIENCE, || {
            for process in &mut *processes {
                process.ensure_running()?;
            }
            found = self.round()?;
            Ok(wanted(&found))
        })
        .with_context(|| format!("the round was last seen as {found:#}\n{}", self.logs()))?;
        Ok(found)
    }

    /// The ends of all logs, for a failed test's message.
    #[must_use]
    pub fn logs(&self) -> String {
        let mut text = String::new();
        for entry in self
            .cluster
            .root()
            .join("logs")
            .read_dir()
            .into_iter()
            .flatten()
            .flatten()
        {
            let log = std::fs::read_to_string(entry.path()).unwrap_or_default();
            let lines: Vec<&str> = log.lines().collect();
            let tail = lines
                .get(lines.len().saturating_sub(15)..)
                .unwrap_or_default();
            text += &format!("== {}\n{}\n", entry.path().display(), tail.join("\n"));
        }
        text
    }
}

/// Whether a round has been released.
#[must_use]
pub fn is_released(round: &Value) -> bool {
    round["release"].is_string()
}

fn model(tokenizer: &Arc<Tokenizer>, seed: u64, folder: &Path) -> Result<()> {
    let config = ModelConfig::llama(tokenizer.size(), 32, 2, 2, 64);
    std::fs::create_dir_all(folder)?;
    LoadedModel::random(Arc::clone(tokenizer), config, seed)?.save(folder)?;
    Ok(())
}

/// The folder of the programs, built once per test process with the profile of the test.
///
/// # Errors
/// They cannot be built.
pub fn binaries() -> Result<PathBuf> {
    static FOLDER: OnceLock<PathBuf> = OnceLock::new();
    if let Some(folder) = FOLDER.get() {
        return Ok(folder.clone());
    }
    let test = std::env::current_exe()?;
    let folder = test
        .ancestors()
        .nth(2)
        .context("a test runs from target/<profile>/deps")?;
    let mut build = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    // With tests beside them, one of a package that has dev-dependencies of its own, these are the programs that `cargo test`
    // has built. Without, what they depend on would have other features, and much would be built twice.
    build.args(["build", "--quiet", "--workspace", "--bins"]);
    build.args(["--test", "end_to_end", "--test", "vectors"]);
    if folder.ends_with("release") {
        build.arg("--release");
    }
    build.current_dir(env!("CARGO_MANIFEST_DIR"));
    let status = build
        .status()
        .context("cannot run cargo to build the programs under test")?;
    ensure!(
        status.success(),
        "the programs under test cannot be built: {status}"
    );
    Ok(FOLDER.get_or_init(|| folder.to_path_buf()).clone())
}
