//! Folders of a hub and a clinic, and a worker that makes artefacts at once.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use consilium_certs::folder::log_key_name;
use consilium_certs::{Authority, LeafProfile, Overwrite};
use consilium_protocol::Role;
use consilium_protocol::artefact::folder_digest;
use consilium_protocol::charter::{Charter, Member};
use consilium_protocol::manifest::{Manifest, Mode};
use consilium_protocol::message::{Status, Task};
use consilium_protocol::quic::{Server, ServerLimits, Tasks};
use consilium_protocol::time::SystemClock;
use consilium_protocol::transcript::{SignatureKind, Tree};
use consilium_protocol::{Digest, InstitutionId, UnixMillis};
use tokio::sync::watch;

use super::hub::{Hub, serve};
use crate::agent::ledger::{self, Chain};
use crate::agent::{LEDGER, testing};
use crate::config::Config;
use crate::spool::{Job, Lesson, Outcome, Spool};

pub(super) const PATIENCE: Duration = Duration::from_secs(60);

/// Folders of a hub and a clinic, and what the hub knows.
pub(super) struct World {
    pub(super) folder: tempfile::TempDir,
    pub(super) config: Config,
    pub(super) manifest: Manifest,
    pub(super) hub: Arc<Mutex<Hub>>,
}

impl World {
    pub(super) fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let at = |name: &str| folder.path().join(name);
        let (node, hub) = (at("node"), at("hub"));
        let consortium = "demo".parse().unwrap();
        let now = UnixMillis(consilium_protocol::Clock::now(&SystemClock).0);
        let authority = Authority::create(&consortium, 1, now).unwrap();
        let profile = LeafProfile {
            role: Role::Aggregator,
            institution: "hub".parse().unwrap(),
            dns: vec!["localhost".to_owned()],
            ip: Vec::new(),
            days: 1,
        };
        let hub_key = authority
            .issue_into(&profile, &hub, now, Overwrite::Refuse)
            .unwrap();
        let clinic: InstitutionId = "clinic".parse().unwrap();
        let profile = LeafProfile::node(clinic.clone());
        let node_key = authority
            .issue_into(&profile, &node.join("identity"), now, Overwrite::Refuse)
            .unwrap();
        let signer = hub_key
            .note_signer(&log_key_name(&consortium), SignatureKind::Ed25519)
            .unwrap();
        let charter = Charter {
            consortium,
            log_key: signer.verifier().to_string(),
            modes: vec![Mode::Unified, Mode::Pairwise, Mode::Adapters],
            quorum: 1,
            max_symbols: 16,
            gate_bound_permille: 50,
            members: vec![Member {
                institution: clinic,
                key: node_key.public_hex(),
            }],
        };
        let path = node.join("charter.note");
        let note = authority
            .sign_charter(&charter.to_text().unwrap(), &path)
            .unwrap()
            .to_string();
        std::fs::write(&path, &note).unwrap();
        let model = |name: &str| {
            std::fs::create_dir_all(node.join(name)).unwrap();
            let config = r#"{"hidden_size": 128}"#;
            std::fs::write(node.join(name).join("config.json"), config).unwrap();
        };
        model("pivot");
        model("source");
        std::fs::create_dir_all(at("blobs")).unwrap();
        std::fs::create_dir_all(at("incoming")).unwrap();
        let pivot = [(
            "config.json".to_owned(),
            Digest::of(br#"{"hidden_size": 128}"#),
        )];
        let manifest = Manifest {
            charter: Digest::of(note.as_bytes()),
            pivot: folder_digest(&pivot),
            ..testing::manifest()
        };
        let hub = Hub {
            signer,
            roster: charter.roster(),
            charter: manifest.charter,
            blobs: at("blobs"),
            tree: Tree::new(),
            entries: Vec::new(),
            open: None,
            accepted: BTreeMap::new(),
            uploads: Vec::new(),
            served: BTreeSet::new(),
            drop_next_receipt: false,
            status: watch::channel(None).0,
        };
        hub.put(testing::REFERENCE);
        let text = crate::config::template(
            &"demo".parse().unwrap(),
            &"clinic".parse().unwrap(),
            "127.0.0.1:1",
        );
        let config = Config::parse(&text, &node.join("node.toml")).unwrap();
        let config = Config {
            server_name: "localhost".to_owned(),
            ..config
        };
        Self {
            folder,
            config,
            manifest,
            hub: Arc::new(Mutex::new(hub)),
        }
    }

    pub(super) fn spool(&self) -> Spool {
        Spool::open(&self.config.spool).unwrap()
    }

    pub(super) fn ledger(&self) -> Vec<ledger::Event> {
        let chain = Chain::read(&self.spool().state_path(LEDGER)).unwrap();
        chain.lines.into_iter().map(|line| line.event).collect()
    }

    /// Starts the hub and a worker that makes artefacts at once.
    pub(super) fn start(&mut self, tasks: &Tasks) {
        let address = SocketAddr::from((Ipv4Addr::LOCALHOST, 0));
        let credentials =
            consilium_protocol::quic::Credentials::load(&self.folder.path().join("hub")).unwrap();
        let server = Server::bind(address, credentials, ServerLimits { connections: 8 }).unwrap();
        self.config.aggregator.port = server.local_address().unwrap().port();
        let mut connections = server.listen(tasks);
        let (hub, inner) = (Arc::clone(&self.hub), tasks.clone());
        let incoming = self.folder.path().join("incoming");
        tasks.spawn("hub", async move {
            // Owned here, so that the socket lives as long as the hub.
            let _server = server;
            while let Some(connection) = connections.next().await {
                let (hub, incoming) = (Arc::clone(&hub), incoming.clone());
                let tasks = inner.clone();
                inner.spawn("connection", async move {
                    tokio::select! {
                        () = tasks.cancelled() => {}
                        () = serve(connection, hub, incoming) => {}
                    }
                });
            }
        });
        let (spool, manifest, inner) = (self.spool(), self.manifest.clone(), tasks.clone());
        tasks.spawn("worker", async move {
            while !inner.token().is_cancelled() {
                while let Some((id, job)) = spool.next_job().unwrap() {
                    spool
                        .finish(&id, &outcome(&spool, &manifest, &job))
                        .unwrap();
                }
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        });
    }

    pub(super) async fn until_finished(&self) {
        let mut status = self.hub.lock().unwrap().status.subscribe();
        let finished = |status: &Option<Status>| {
            status
                .as_ref()
                .is_some_and(|status| matches!(status.task, Task::Finished { .. }))
        };
        let ended = tokio::time::timeout(PATIENCE, status.wait_for(finished)).await;
        ended.expect("the round does not end").unwrap();
        let spool = self.spool();
        wait_until(|| spool.jobs_in_order().unwrap().is_empty()).await;
    }
}

pub(super) async fn wait_until(mut condition: impl FnMut() -> bool) {
    for _ in 0..3000 {
        if condition() {
            return;
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    panic!("does not come true");
}

pub(super) fn outcome(spool: &Spool, manifest: &Manifest, job: &Job) -> Outcome {
    let bytes = match job {
        Job::Score(job) => {
            assert!(spool.read_blob(&job.reference, 1 << 20).is_ok());
            testing::shard(manifest, job.shard)
        }
        Job::Distil(job) => {
            let (records, rival) = match &job.lesson {
                Lesson::Fused { records, rival, .. } => (Some(records), rival.as_ref()),
                Lesson::Own { records, rival } => (Some(records), Some(rival)),
                Lesson::Public { records } => (Some(records), None),
                Lesson::Private => (None, None),
            };
            let of_records = records.iter().flat_map(|records| &records.shards);
            let of_records = of_records.chain(records.map(|records| &records.reference));
            let adapters = rival.map(|rival| &rival.adapter).into_iter();
            for blob in of_records.chain(adapters).chain([&job.start]) {
                spool.check_blob(blob).unwrap();
            }
            if let Lesson::Own { records, .. } = &job.lesson {
                let own = (0..manifest.shards())
                    .map(|shard| Digest::of(&testing::shard(manifest, shard)));
                assert_eq!(records.shards, own.collect::<Vec<_>>());
            }
            testing::adapter(manifest, u8::try_from(job.inner).unwrap() + 1)
        }
        Job::Evaluate(job) => {
            spool.check_blob(&job.candidate).unwrap();
            testing::evaluation()
        }
    };
    Outcome::Done {
        artefact: spool.put_blob(&bytes).unwrap(),
        seconds: 0.1,
        notes: BTreeMap::new(),
    }
}
