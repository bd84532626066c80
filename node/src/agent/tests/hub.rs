//! A scripted aggregator: a real log, real transfers, one member.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use consilium_protocol::artefact::Kind;
use consilium_protocol::contribution::{Roster, Statement};
use consilium_protocol::event::{Entry, Event, TargetIndex};
use consilium_protocol::manifest::Manifest;
use consilium_protocol::message::{Hello, Logged, Part, Receipt, Status, Task, Upload, Welcome};
use consilium_protocol::quic::chunk::Stride;
use consilium_protocol::quic::{
    Connection, Pace, Request, Stream, Tasks, receive_upload, serve_download,
};
use consilium_protocol::transcript::tree::leaf_hash;
use consilium_protocol::transcript::{
    Checkpoint, LogProof, NoteSigner, SignedNote, Tree, VerifiedCheckpoint,
};
use consilium_protocol::{Digest, RejectCode, RoundId, UnixMillis};
use tokio::sync::watch;

use crate::agent::testing;

const PACE: Pace = Pace {
    header: Duration::from_secs(5),
    window: Duration::from_secs(5),
    floor: 1,
    answer: Duration::from_secs(5),
};

pub(super) struct Hub {
    pub(super) signer: NoteSigner,
    pub(super) roster: Roster,
    pub(super) charter: Digest,
    pub(super) blobs: PathBuf,
    pub(super) tree: Tree,
    pub(super) entries: Vec<Vec<u8>>,
    pub(super) open: Option<Open>,
    pub(super) accepted: BTreeMap<(Kind, u32), usize>,
    pub(super) uploads: Vec<Statement>,
    pub(super) served: BTreeSet<Digest>,
    /// Closes the connection instead of sending the next receipt.
    pub(super) drop_next_receipt: bool,
    pub(super) status: watch::Sender<Option<Status>>,
}

pub(super) struct Open {
    manifest: Manifest,
    digest: Digest,
    opened: usize,
    fused: usize,
    merged: Vec<usize>,
    ended: usize,
}

impl Hub {
    pub(super) fn log(&mut self, round: RoundId, event: Event) -> usize {
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

    pub(super) fn checkpoint(&self) -> VerifiedCheckpoint {
        let checkpoint = Checkpoint {
            origin: self.signer.verifier().name().clone(),
            size: self.tree.size(),
            root: self.tree.root(),
        };
        let note = checkpoint.sign(&self.signer).unwrap();
        VerifiedCheckpoint::verify(note, self.signer.verifier(), &[]).unwrap()
    }

    pub(super) fn logged(&self, index: usize) -> Logged {
        let position = u64::try_from(index).unwrap();
        let proof = LogProof::new(&self.tree, position, &self.checkpoint()).unwrap();
        Logged {
            entry: self.entries[index].clone(),
            proof: proof.to_string(),
        }
    }

    pub(super) fn put(&self, bytes: &[u8]) -> Digest {
        let digest = Digest::of(bytes);
        std::fs::write(self.blobs.join(digest.to_string()), bytes).unwrap();
        digest
    }

    pub(super) fn open(&mut self, manifest: Manifest) -> Digest {
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

    pub(super) fn accept(&mut self, upload: &Upload) -> usize {
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
    pub(super) fn go_on(&mut self, (kind, sequence): (Kind, u32), artefact: Digest) {
        let open = self.open.as_ref().unwrap();
        let (round, shards) = (open.manifest.round, open.manifest.shards());
        match kind {
            Kind::Records => {
                if (0..shards).all(|shard| self.accepted.contains_key(&(kind, shard))) {
                    let shards = (0..shards).map(|shard| self.put(&shard.to_le_bytes()));
                    let index = TargetIndex {
                        shards: shards.collect(),
                        withheld: Vec::new(),
                        key: None,
                    };
                    let targets = self.put(&serde_json::to_vec(&index).unwrap());
                    let routing = Digest::of(b"routing");
                    let fused = self.log(
                        round,
                        Event::Fused {
                            targets,
                            routing,
                            report: None,
                        },
                    );
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

    pub(super) fn publish(&self) {
        let open = self.open.as_ref().unwrap();
        let shares_records = open.manifest.mode.shares_records();
        let missing: Vec<u32> = (0..open.manifest.shards())
            .filter(|shard| !self.accepted.contains_key(&(Kind::Records, *shard)))
            .collect();
        let inner = u32::try_from(open.merged.len()).unwrap();
        let task = if shares_records && !missing.is_empty() {
            Task::Score { shards: missing }
        } else if !shares_records && inner < open.manifest.training.inner_rounds {
            Task::Train {
                inner,
                start: self.logged(open.merged.last().copied().unwrap_or(open.opened)),
            }
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

pub(super) async fn serve(connection: Connection, hub: Arc<Mutex<Hub>>, incoming: PathBuf) {
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

pub(super) async fn control(mut stream: Stream, hello: &Hello, hub: &Mutex<Hub>) {
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

pub(super) async fn take(
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
