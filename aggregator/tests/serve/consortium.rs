//! Authority, charter, files and the program itself, in a folder of its own.

use std::fs::{self, File};
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Output, Stdio};
use std::time::Duration;

use consilium_certs::{Authority, LeafProfile, Overwrite, folder};
use consilium_protocol::charter::{Charter, Member};
use consilium_protocol::event::Entry;
use consilium_protocol::manifest::Mode;
use consilium_protocol::time::{Clock, SystemClock};
use consilium_protocol::transcript::key::SignatureKind;
use consilium_protocol::transcript::{VerifiedCheckpoint, VerifierKey, tile};
use consilium_protocol::{ConsortiumId, InstitutionId};
use safetensors::tensor::{Dtype, TensorView};
use tempfile::TempDir;

pub(crate) const REFERENCE: &str = "{\"target\":\"ab\"}\n{\"target\":\"cxxd\",\"unlabeled\":[[1,3]]}\n\
    {\"target\":\"e\"}\n{\"context\":\"f\",\"target\":\"gh\"}\n{\"target\":\"ijk\"}\n";
pub(crate) const SHARDS: u32 = 3;

/// Manifest settings for a pivot and a reference set this small.
const SMALL: [&str; 7] = [
    "symbols=2",
    "shard_items=2",
    "training.rank=2",
    "training.alpha=4",
    "training.target_modules=[\"q_proj\"]",
    "training.modules_to_save=[\"embed_tokens\"]",
    "training.inner_rounds=2",
];
const PATIENCE: Duration = Duration::from_secs(20);
const POLL: Duration = Duration::from_millis(20);

pub(crate) struct Consortium {
    root: TempDir,
    server: Option<Child>,
    pub(crate) name: ConsortiumId,
    pub(crate) log: VerifierKey,
}

impl Consortium {
    /// `strangers` have certificates but do not stand in the charter.
    pub(crate) fn new(members: &[&str], strangers: &[&str], quorum: u32) -> Self {
        let root = tempfile::tempdir().unwrap();
        let name = ConsortiumId::new("north").unwrap();
        let now = SystemClock.now();
        let authority = Authority::create(&name, 1, now).unwrap();
        let at = |folder: &str| root.path().join(folder);
        let operator = LeafProfile::aggregator(
            InstitutionId::new("operator").unwrap(),
            vec!["localhost".to_owned()],
            vec![Ipv4Addr::LOCALHOST.into()],
        );
        let log = authority
            .issue_into(&operator, &at("operator"), now, Overwrite::Refuse)
            .unwrap()
            .note_signer(&folder::log_key_name(&name), SignatureKind::Ed25519)
            .unwrap()
            .verifier()
            .clone();
        let mut charter = Charter {
            consortium: name.clone(),
            log_key: log.to_string(),
            modes: vec![Mode::Unified, Mode::Pairwise, Mode::Adapters],
            quorum,
            max_symbols: 16,
            gate_bound_permille: 100,
            members: Vec::new(),
        };
        for who in members.iter().chain(strangers) {
            let institution = InstitutionId::new(who).unwrap();
            let profile = LeafProfile::node(institution.clone());
            let key = authority
                .issue_into(&profile, &at(who), now, Overwrite::Refuse)
                .unwrap()
                .public_hex();
            if members.contains(who) {
                charter.members.push(Member { institution, key });
            }
        }
        let path = at("charter.signed");
        let signed = authority
            .sign_charter(&charter.to_text().unwrap(), &path)
            .unwrap();
        fs::write(&path, signed.to_string()).unwrap();
        fs::write(at("reference.jsonl"), REFERENCE).unwrap();
        write_pivot(&at("pivot"));
        let config = "consortium = \"north\"\nlisten = \"127.0.0.1:0\"\ndata_dir = \"data\"\n\
            identity = \"operator\"\ncharter = \"charter.signed\"\npivot = \"pivot\"\n\
            reference = \"reference.jsonl\"\n";
        fs::write(at("aggregator.toml"), config).unwrap();
        Self {
            root,
            server: None,
            name,
            log,
        }
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.root.path().join(name)
    }

    /// Starts the program and waits until it listens.
    pub(crate) async fn start(&mut self) {
        let address = self.path("data/address");
        let _ = fs::remove_file(&address);
        let log = File::options()
            .create(true)
            .append(true)
            .open(self.path("server.log"))
            .unwrap();
        let mut command = self.command(&["serve"]);
        self.server = Some(command.stdout(Stdio::null()).stderr(log).spawn().unwrap());
        let mut waited = Duration::ZERO;
        while !fs::read_to_string(&address).is_ok_and(|text| text.ends_with('\n')) {
            let ended = self.server.as_mut().unwrap().try_wait().unwrap();
            assert!(ended.is_none() && waited < PATIENCE, "{}", self.said());
            tokio::time::sleep(POLL).await;
            waited += POLL;
        }
    }

    pub(crate) fn address(&self) -> String {
        let text = fs::read_to_string(self.path("data/address")).unwrap();
        text.trim_end().to_owned()
    }

    /// As a power cut would end it, but for the disk's cache.
    pub(crate) fn kill(&mut self) {
        let mut server = self.server.take().unwrap();
        server.kill().unwrap();
        server.wait().unwrap();
    }

    /// SIGTERM; how the program ended.
    pub(crate) async fn stop(&mut self) -> ExitStatus {
        let mut server = self.server.take().unwrap();
        let pid = rustix::process::Pid::from_child(&server);
        rustix::process::kill_process(pid, rustix::process::Signal::TERM).unwrap();
        let mut waited = Duration::ZERO;
        loop {
            if let Some(status) = server.try_wait().unwrap() {
                return status;
            }
            assert!(waited < PATIENCE, "still running; {}", self.said());
            tokio::time::sleep(POLL).await;
            waited += POLL;
        }
    }

    /// Runs a command of the program to its end.
    pub(crate) fn run(&self, arguments: &[&str]) -> Output {
        self.command(arguments).output().unwrap()
    }

    /// Opens a small round; `settings` beyond [`SMALL`] win.
    pub(crate) fn open_round(&self, settings: &[&str]) {
        self.open_round_with(&[], settings);
    }

    /// The same with more options.
    pub(crate) fn open_round_with(&self, options: &[&str], settings: &[&str]) {
        let mut arguments = vec!["round", "open"];
        arguments.extend(options);
        for setting in SMALL.iter().chain(settings) {
            arguments.extend(["--set", setting]);
        }
        let output = self.run(&arguments);
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{said}; {}", self.said());
    }

    /// Entries of the log as they lie on disk, checked against the checkpoint's size.
    pub(crate) fn entries(&self) -> Vec<Entry> {
        let folder = self.path("data/log");
        let checkpoint = fs::read(folder.join("checkpoint")).unwrap();
        let checkpoint = VerifiedCheckpoint::open(&checkpoint, &self.log, &[]).unwrap();
        let size = usize::try_from(checkpoint.checkpoint().size).unwrap();
        assert!(size < 256, "one bundle is read here");
        let bundle = fs::read(folder.join(format!("tile/entries/000.p/{size}"))).unwrap();
        let entries = tile::read_entries(&bundle).unwrap();
        assert_eq!(entries.len(), size);
        entries
            .into_iter()
            .map(|bytes| Entry::parse(bytes).unwrap())
            .collect()
    }

    fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_consilium-aggregator"));
        command
            .args(arguments)
            .arg("--config")
            .arg(self.path("aggregator.toml"))
            .stdin(Stdio::null());
        command
    }

    /// What the server said, for a failing test.
    pub(crate) fn said(&self) -> String {
        fs::read_to_string(self.path("server.log")).unwrap_or_default()
    }
}

impl Drop for Consortium {
    fn drop(&mut self) {
        if let Some(server) = &mut self.server {
            let _ = server.kill();
            let _ = server.wait();
        }
        if std::thread::panicking() {
            eprintln!("{}", self.said());
        }
    }
}

fn write_pivot(folder: &Path) {
    fs::create_dir(folder).unwrap();
    fs::write(folder.join("config.json"), "{}").unwrap();
    fs::write(folder.join("tokenizer.json"), "{}").unwrap();
    let values = |count: u16| -> Vec<u8> {
        (0..count)
            .flat_map(|value| (f32::from(value) / 64.0).to_le_bytes())
            .collect()
    };
    let (embedding, projection) = (values(32), values(16));
    let tensors = [
        ("model.embed_tokens.weight", vec![8, 4], &embedding),
        (
            "model.layers.0.self_attn.q_proj.weight",
            vec![4, 4],
            &projection,
        ),
        (
            "model.layers.1.self_attn.q_proj.weight",
            vec![4, 4],
            &projection,
        ),
    ]
    .map(|(name, shape, data)| (name, TensorView::new(Dtype::F32, shape, data).unwrap()));
    let bytes = safetensors::serialize(tensors, None).unwrap();
    fs::write(folder.join("model.safetensors"), bytes).unwrap();
}
