//! The agent against a scripted aggregator over loopback, with real certificates, log, and transfers.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use consilium_certs::folder::log_key_name;
use consilium_certs::{Authority, LeafProfile, Overwrite, Role};
use consilium_protocol::artefact::{Kind, folder_digest};
use consilium_protocol::charter::{Charter, Member};
use consilium_protocol::contribution::{Roster, Statement};
use consilium_protocol::event::{Entry, Event, TargetIndex};
use consilium_protocol::manifest::{Manifest, Mode};
use consilium_protocol::message::{Hello, Logged, Part, Receipt, Status, Task, Upload, Welcome};
use consilium_protocol::quic::chunk::Stride;
use consilium_protocol::quic::{
    Connection, Pace, Request, Server, ServerLimits, Stream, Tasks, receive_upload, serve_download,
};
use consilium_protocol::time::SystemClock;
use consilium_protocol::transcript::tree::leaf_hash;
use consilium_protocol::transcript::{
    Checkpoint, LogProof, NoteSigner, SignatureKind, SignedNote, Tree, VerifiedCheckpoint,
};
use consilium_protocol::{Digest, InstitutionId, RejectCode, RoundId, UnixMillis};
use tokio::sync::watch;

use super::ledger::{self, Chain};
use super::trust::TrustError;
use super::{AgentError, LEDGER, testing};
use crate::config::{Config, Policy};
use crate::spool::{Job, Outcome, Spool};

const PATIENCE: Duration = Duration::from_secs(60);
const PACE: Pace = Pace {
    header: Duration::from_secs(5),
    window: Duration::from_secs(5),
    floor: 1,
    answer: Duration::from_secs(5),
};

/// Folders of a hub and a clinic, and what the hub knows.
struct World {
    folder: tempfile::TempDir,
    config: Config,
    manifest: Manifest,
    hub: Arc<Mutex<Hub>>,
}

struct Hub {
    signer: NoteSigner,
    roster: Roster,
    charter: Digest,
    blobs: PathBuf,
    tree: Tree,
    entries: Vec<Vec<u8>>,
    open: Option<Open>,
    accepted: BTreeMap<(Kind, u32), usize>,
    uploads: Vec<Statement>,
    served: BTreeSet<Digest>,
    /// Closes the connection instead of sending the next receipt.
    drop_next_receipt: bool,
    status: watch::Sender<Option<Status>>,
}

struct Open {
    manifest: Manifest,
    digest: Digest,
    opened: usize,
    fused: usize,
    merged: Vec<usize>,
    ended: usize,
}

impl Hub {
    fn log(&mut self, round: RoundId, event: Event) -> usize {
        let entry = Entry {
            version: 1,
            consortium: "demo".parse().unwrap(),
            round,
            at: UnixMillis(1),
            event,
        };
        let bytes = entry.to_bytes().unwrap();
        self.tree.push(leaf_hash(&bytes));
        self.entries.push(bytes);
        self.entries.len() - 1
    }

    fn checkpoint(&self) -> VerifiedCheckpoint {
        let checkpoint = Checkpoint {
            origin: self.signer.verifier().name().clone(),
            size: self.tree.size(),
            root: self.tree.root(),
        };
        let note = checkpoint.sign(&self.signer).unwrap();
        VerifiedCheckpoint::verify(note, self.signer.verifier(), &[]).unwrap()
    }

    fn logged(&self, index: usize) -> Logged {
        let position = u64::try_from(index).unwrap();
        let proof = LogProof::new(&self.tree, position, &self.checkpoint()).unwrap();
        Logged {
            entry: self.entries[index].clone(),
            proof: proof.to_string(),
        }
    }

    fn put(&self, bytes: &[u8]) -> Digest {
        let digest = Digest::of(bytes);
        std::fs::write(self.blobs.join(digest.to_string()), bytes).unwrap();
        digest
    }

    fn open(&mut self, manifest: Manifest) -> Digest {
        let note = SignedNote::sign(manifest.to_text().unwrap(), &self.signer).unwrap();
        let digest = self.put(note.to_string().as_bytes());
        let start = self.put(&testing::adapter(&manifest, 0));
        let event = Event::Opened {
            manifest: digest,
            start,
        };
        let opened = self.log(manifest.round, event);
        self.open = Some(Open {
            manifest,
            digest,
            opened,
            fused: 0,
            merged: Vec::new(),
            ended: 0,
        });
        self.publish();
        digest
    }

    fn accept(&mut self, upload: &Upload) -> usize {
        let open = self.open.as_ref().unwrap();
        let (round, binding) = (open.manifest.round, open.manifest.binding(open.digest));
        let verified = upload
            .statement
            .clone()
            .verify(&self.roster, &binding)
            .unwrap();
        let statement = verified.body().clone();
        let slot = (statement.kind, statement.sequence);
        if let Some(known) = self.accepted.get(&slot) {
            return *known;
        }
        let event = Event::Accepted {
            institution: statement.institution,
            kind: statement.kind,
            sequence: statement.sequence,
            artefact: statement.artefact,
            signature: hex::encode(verified.signature()),
            ledger: upload.ledger,
        };
        let index = self.log(round, event);
        self.accepted.insert(slot, index);
        self.go_on(slot, statement.artefact);
        index
    }

    /// What follows from a contribution: fusion, merge, release.
    fn go_on(&mut self, (kind, sequence): (Kind, u32), artefact: Digest) {
        let open = self.open.as_ref().unwrap();
        let (round, shards) = (open.manifest.round, open.manifest.shards());
        match kind {
            Kind::Records => {
                if (0..shards).all(|shard| self.accepted.contains_key(&(kind, shard))) {
                    let shards = (0..shards).map(|shard| self.put(&shard.to_le_bytes()));
                    let index = TargetIndex {
                        shards: shards.collect(),
                    };
                    let targets = self.put(&serde_json::to_vec(&index).unwrap());
                    let routing = Digest::of(b"routing");
                    let fused = self.log(round, Event::Fused { targets, routing });
                    self.open.as_mut().unwrap().fused = fused;
                }
            }
            Kind::Adapter => {
                let merged = self.log(
                    round,
                    Event::Merged {
                        inner: sequence,
                        adapter: artefact,
                        momentum: Digest::of(b"momentum"),
                        truncation_ppm: 0,
                    },
                );
                self.open.as_mut().unwrap().merged.push(merged);
            }
            Kind::Evaluation => {
                let event = Event::Released {
                    release: Digest::of(b"release"),
                    report: Digest::of(b"report"),
                };
                let ended = self.log(round, event);
                self.open.as_mut().unwrap().ended = ended;
            }
        }
        self.publish();
    }

    fn publish(&self) {
        let open = self.open.as_ref().unwrap();
        let missing: Vec<u32> = (0..open.manifest.shards())
            .filter(|shard| !self.accepted.contains_key(&(Kind::Records, *shard)))
            .collect();
        let inner = u32::try_from(open.merged.len()).unwrap();
        let task = if !missing.is_empty() {
            Task::Score { shards: missing }
        } else if inner < open.manifest.training.inner_rounds {
            Task::Distil {
                inner,
                start: self.logged(open.merged.last().copied().unwrap_or(open.opened)),
                targets: self.logged(open.fused),
                part: Part {
                    seed: 5,
                    from: 0,
                    to: open.manifest.items,
                },
            }
        } else if open.ended == 0 {
            Task::Evaluate {
                candidate: self.logged(*open.merged.last().unwrap()),
            }
        } else {
            Task::Finished {
                outcome: self.logged(open.ended),
            }
        };
        self.status.send_replace(Some(Status {
            round: Some(self.logged(open.opened)),
            task,
        }));
    }
}

impl World {
    fn new() -> Self {
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
            modes: vec![Mode::Unified],
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

    fn spool(&self) -> Spool {
        Spool::open(&self.config.spool).unwrap()
    }

    fn ledger(&self) -> Vec<ledger::Event> {
        let chain = Chain::read(&self.spool().state_path(LEDGER)).unwrap();
        chain.lines.into_iter().map(|line| line.event).collect()
    }

    /// Starts the hub and a worker that makes artefacts at once.
    fn start(&mut self, tasks: &Tasks) {
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

    async fn until_finished(&self) {
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

async fn wait_until(mut condition: impl FnMut() -> bool) {
    for _ in 0..3000 {
        if condition() {
            return;
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    panic!("does not come true");
}

fn outcome(spool: &Spool, manifest: &Manifest, job: &Job) -> Outcome {
    let bytes = match job {
        Job::Score(job) => {
            assert!(spool.read_blob(&job.reference, 1 << 20).is_ok());
            testing::shard(manifest, job.shard)
        }
        Job::Distil(job) => {
            for blob in job.targets.iter().chain([&job.start, &job.reference]) {
                spool.check_blob(blob).unwrap();
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

async fn serve(connection: Connection, hub: Arc<Mutex<Hub>>, incoming: PathBuf) {
    let streams = Tasks::new();
    while let Ok(mut stream) = connection.accept().await {
        let (connection, hub, incoming) = (connection.clone(), Arc::clone(&hub), incoming.clone());
        streams.spawn("stream", async move {
            match stream.request().await {
                Ok(Request::Hello(hello)) => control(stream, &hello, &hub).await,
                Ok(Request::Upload(upload)) => {
                    take(stream, &upload, &connection, &hub, &incoming).await;
                }
                Ok(Request::Download(request)) => {
                    let blobs = hub.lock().unwrap().blobs.clone();
                    let path = blobs.join(request.digest.to_string());
                    if !path.exists() {
                        let _ = stream.reject(RejectCode::NotFound).await;
                        return;
                    }
                    let mut progress = |_| ();
                    let sent = serve_download(
                        stream,
                        &request,
                        &path,
                        Stride::BYTES,
                        &PACE,
                        &mut progress,
                    );
                    if sent.await.is_ok() {
                        hub.lock().unwrap().served.insert(request.digest);
                    }
                }
                Err(_) => {}
            }
        });
    }
    streams.shutdown(Duration::ZERO).await;
}

async fn control(mut stream: Stream, hello: &Hello, hub: &Mutex<Hub>) {
    let (welcome, mut status) = {
        let hub = hub.lock().unwrap();
        let consistency = hub.tree.consistency(hello.log_size, hub.tree.size());
        let welcome = Welcome {
            version: 1,
            charter: hub.charter,
            checkpoint: hub.checkpoint().note().to_string(),
            consistency: consistency.unwrap_or_default(),
        };
        (welcome, hub.status.subscribe())
    };
    if stream.send(&welcome).await.is_err() {
        return;
    }
    loop {
        let now = status.borrow_and_update().clone();
        if let Some(now) = now
            && stream.send(&now).await.is_err()
        {
            return;
        }
        if status.changed().await.is_err() {
            return;
        }
    }
}

async fn take(
    mut stream: Stream,
    upload: &Upload,
    connection: &Connection,
    hub: &Mutex<Hub>,
    incoming: &Path,
) {
    let statement = upload.statement.claim().clone();
    hub.lock().unwrap().uploads.push(statement.clone());
    let partial = incoming.join(statement.artefact.to_string());
    let received = receive_upload(&mut stream, upload, &partial, &PACE, &mut |_| ()).await;
    let Ok(complete) = received else { return };
    let (accepted, dropped) = {
        let mut hub = hub.lock().unwrap();
        complete
            .publish(&hub.blobs.join(statement.artefact.to_string()))
            .unwrap();
        let index = hub.accept(upload);
        (
            hub.logged(index),
            std::mem::take(&mut hub.drop_next_receipt),
        )
    };
    if dropped {
        connection.close(RejectCode::ShuttingDown);
        return;
    }
    let _ = stream.send(&Receipt { accepted }).await;
    stream.finish();
}

async fn run(world: &World, tasks: &Tasks) -> Result<(), AgentError> {
    super::run(&world.config, Arc::new(SystemClock), tasks).await
}

/// A round from opening to release, with a receipt that gets lost on the way.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_round_is_worked_through_and_everything_that_left_stands_in_the_ledger() {
    let (mut world, tasks) = (World::new(), Tasks::new());
    world.start(&tasks);
    {
        let mut hub = world.hub.lock().unwrap();
        hub.drop_next_receipt = true;
        hub.open(world.manifest.clone());
    }
    let (agent, node) = (run(&world, &tasks), async {
        world.until_finished().await;
        // While the agent runs no second one may.
        let second = run(&world, &Tasks::new()).await;
        assert!(matches!(second, Err(AgentError::Locked(_))));
        tasks.shutdown(Duration::from_secs(10)).await
    });
    let (ended, report) = tokio::join!(agent, node);
    ended.unwrap();
    assert!(report.panicked.is_empty(), "{report:?}");

    let uploads = world.hub.lock().unwrap().uploads.clone();
    let mut slots: Vec<_> = uploads.iter().map(|s| (s.kind, s.sequence)).collect();
    slots.sort();
    slots.dedup();
    let expected = [
        (Kind::Records, 0),
        (Kind::Records, 1),
        (Kind::Adapter, 0),
        (Kind::Adapter, 1),
        (Kind::Evaluation, 0),
    ];
    assert_eq!(slots, expected);
    let events = world.ledger();
    for (kind, sequence) in expected {
        let released: Vec<Digest> = events
            .iter()
            .filter_map(|event| match event {
                ledger::Event::Released { slot, artefact, .. }
                    if (slot.kind, slot.sequence) == (kind, sequence) =>
                {
                    Some(*artefact)
                }
                _ => None,
            })
            .collect();
        let sent = uploads
            .iter()
            .find(|s| (s.kind, s.sequence) == (kind, sequence))
            .map(|s| s.artefact);
        assert_eq!(released, Vec::from_iter(sent), "{kind:?} {sequence}");
    }
    let acknowledged = events
        .iter()
        .filter(|event| matches!(event, ledger::Event::Acknowledged { .. }))
        .count();
    // That of the lost receipt too: the same bytes were sent once more for it.
    assert_eq!(acknowledged, expected.len());
    assert_eq!(uploads.len(), expected.len() + 1);
    let recipients = events.iter().filter_map(|event| match event {
        ledger::Event::Released { recipient, .. } => Some(recipient.as_str()),
        _ => None,
    });
    assert!(
        recipients
            .into_iter()
            .all(|to| to == "consilium://demo/aggregator/hub")
    );
    assert!(
        world
            .spool()
            .read_state(super::LAST_OUTCOME, 1 << 16)
            .unwrap()
            .is_some()
    );
}

/// One manifest after the other that must not be worked on, then a good one.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_stays_idle_in_rounds_that_it_refuses() {
    let (mut world, tasks) = (World::new(), Tasks::new());
    world.start(&tasks);
    let good = world.manifest.clone();
    let stranger: InstitutionId = "bank".parse().unwrap();
    let refused = [
        Manifest {
            pivot: Digest::of(b"another"),
            ..good.clone()
        },
        Manifest {
            charter: Digest::of(b"another"),
            ..good.clone()
        },
        Manifest {
            symbols: 17,
            ..good.clone()
        },
        Manifest {
            items: 4,
            ..good.clone()
        },
        Manifest {
            members: vec![stranger],
            ..good.clone()
        },
    ];
    let agent = run(&world, &tasks);
    let script = async {
        let mut round = 0;
        for manifest in refused {
            round += 1;
            let manifest = Manifest {
                round: RoundId(round),
                ..manifest
            };
            let digest = world.hub.lock().unwrap().open(manifest);
            wait_until(|| world.hub.lock().unwrap().served.contains(&digest)).await;
        }
        let last = Manifest {
            round: RoundId(round + 1),
            ..good
        };
        world.hub.lock().unwrap().open(last);
        world.until_finished().await;
        tasks.shutdown(Duration::from_secs(10)).await;
        round + 1
    };
    let (ended, last) = tokio::join!(agent, script);
    ended.unwrap();
    let uploads = world.hub.lock().unwrap().uploads.clone();
    assert!(uploads.len() >= 5);
    for upload in uploads {
        assert_eq!(upload.round, RoundId(last), "{upload:?}");
    }
}

/// A round that the site's policy refuses costs no work and sends nothing.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn policy_is_asked_before_any_job_is_made() {
    let (mut world, tasks) = (World::new(), Tasks::new());
    world.start(&tasks);
    world.config.policy = Policy {
        max_symbols: 8,
        ..world.config.policy
    };
    let digest = world.hub.lock().unwrap().open(world.manifest.clone());
    let script = async {
        wait_until(|| world.hub.lock().unwrap().served.contains(&digest)).await;
        // Long enough for a job to appear, if one would.
        tokio::time::sleep(Duration::from_millis(500)).await;
        tasks.shutdown(Duration::from_secs(10)).await;
    };
    let (ended, ()) = tokio::join!(run(&world, &tasks), script);
    ended.unwrap();
    assert!(world.spool().jobs_in_order().unwrap().is_empty());
    assert!(world.hub.lock().unwrap().uploads.is_empty());
    assert_eq!(world.ledger().len(), 1);
}

/// The hub forgets what it logged and begins anew, as after a restored backup or with two faces.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_log_that_is_no_continuation_ends_the_agent() {
    let (mut world, tasks) = (World::new(), Tasks::new());
    world.start(&tasks);
    world.hub.lock().unwrap().open(world.manifest.clone());
    let first = Tasks::new();
    let script = async {
        world.until_finished().await;
        first.shutdown(Duration::from_secs(10)).await;
    };
    let (ended, ()) = tokio::join!(run(&world, &first), script);
    ended.unwrap();
    {
        let mut hub = world.hub.lock().unwrap();
        let kept: Vec<_> = hub.entries.drain(1..).collect();
        hub.tree = Tree::new();
        let first = leaf_hash(&hub.entries[0]);
        hub.tree.push(first);
        for entry in kept {
            // One entry less, another one changed.
            hub.tree.push(leaf_hash(&[entry.as_slice(), b" "].concat()));
        }
    }
    let ended = tokio::time::timeout(PATIENCE, run(&world, &Tasks::new())).await;
    let error = ended.expect("goes on with a forked log").unwrap_err();
    assert!(
        matches!(error, AgentError::Trust(TrustError::Fork { .. })),
        "{error}"
    );
    tasks.shutdown(Duration::from_secs(10)).await;
}
