//! A scripted node: speaks the real protocol, makes up its numbers.

use std::cell::RefCell;
use std::fs;
use std::ops::Range;
use std::path::PathBuf;
use std::time::Duration;

use consilium_certs::{SigningIdentity, folder};
use consilium_kernels::code;
use consilium_protocol::artefact::Kind;
use consilium_protocol::contribution::{Statement, Unverified};
use consilium_protocol::evaluation::{Evaluation, Score};
use consilium_protocol::event::{Event, TargetIndex};
use consilium_protocol::manifest::SymbolSpace;
use consilium_protocol::message::{Hello, Logged, Status, Task, Upload, Welcome};
use consilium_protocol::quic::chunk::Stride;
use consilium_protocol::quic::{
    Client, Connection, Credentials, LinkError, Pace, Stream, Wait, download, upload,
};
use consilium_protocol::reference::ReferenceSet;
use consilium_protocol::shard::{Header, Shard, Symbols};
use consilium_protocol::transcript::{LogProof, VerifiedCheckpoint, VerifierKey, tree};
use consilium_protocol::{ConsortiumId, Digest, InstitutionId, frame, limits};
use safetensors::SafeTensors;
use safetensors::tensor::TensorView;

use crate::consortium::{Consortium, REFERENCE};

const PATIENCE: Duration = Duration::from_secs(20);

/// What a node remembers of the log between connections.
pub(crate) type Seen = Option<(u64, Digest)>;

pub(crate) struct Node {
    pub(crate) name: InstitutionId,
    consortium: ConsortiumId,
    key: SigningIdentity,
    log: VerifierKey,
    scratch: PathBuf,
    _client: Client,
    pub(crate) connection: Connection,
    control: Stream,
    pub(crate) seen: Seen,
    /// What it says that a candidate has on its holdout, in bits per byte.
    pub(crate) measures: f64,
    /// Item of the reference set that it did not expect.
    pub(crate) surprised: Option<u64>,
    status: Option<Status>,
    receipts: RefCell<Vec<Vec<u8>>>,
}

impl Node {
    /// Dials, greets, and checks that the log only grew since it was `seen`.
    pub(crate) async fn join(
        consortium: &Consortium,
        name: &str,
        capacity: u32,
        seen: Seen,
    ) -> Self {
        let (client, connection) = dial(consortium, name).await;
        let mut control = connection.open().await.unwrap();
        let greeting = hello(consortium, name, capacity, seen.map_or(0, |(size, _)| size));
        control.send(&greeting).await.unwrap();
        let welcome: Welcome = control.expect(Wait::Due).await.unwrap();
        let checkpoint =
            VerifiedCheckpoint::open(welcome.checkpoint.as_bytes(), &consortium.log, &[]).unwrap();
        let now = checkpoint.checkpoint();
        if let Some((size, root)) = seen {
            tree::verify_consistency(size, now.size, &welcome.consistency, &root, &now.root)
                .unwrap();
        }
        let identity = consortium.path(name);
        Self {
            name: InstitutionId::new(name).unwrap(),
            consortium: consortium.name.clone(),
            key: SigningIdentity::load(&identity.join(folder::SIGNING_KEY)).unwrap(),
            log: consortium.log.clone(),
            scratch: identity.join("artefact"),
            _client: client,
            connection,
            control,
            seen: Some((now.size, now.root)),
            measures: 0.8,
            surprised: None,
            status: None,
            receipts: RefCell::default(),
        }
    }

    /// Entries of the receipts on this connection.
    pub(crate) fn receipts(&self) -> Vec<Vec<u8>> {
        self.receipts.borrow().clone()
    }

    /// The newest status for which `wanted` holds; earlier ones are passed over.
    pub(crate) async fn until(&mut self, wanted: impl Fn(&Task) -> bool) -> Task {
        loop {
            if let Some(status) = &self.status
                && wanted(&status.task)
            {
                return status.task.clone();
            }
            let status: Status = self
                .control
                .expect(Wait::Within(PATIENCE))
                .await
                .unwrap_or_else(|error| panic!("{}: {error}; last {:?}", self.name, self.status));
            if let Some(opened) = &status.round {
                self.check(opened);
            }
            self.status = Some(status);
        }
    }

    /// Does what the round wants until it has ended or `stop` says so; what was asked then.
    pub(crate) async fn play(&mut self, stop: impl Fn(&Task) -> bool) -> Task {
        loop {
            let task = self.until(|task| *task != Task::Wait).await;
            if stop(&task) {
                return task;
            }
            match &task {
                Task::Finished { .. } | Task::Wait => return task,
                Task::Score { shards } => {
                    for shard in shards {
                        self.hand_over(Kind::Records, *shard, &self.records(*shard))
                            .await
                            .unwrap();
                    }
                }
                Task::Distil {
                    inner,
                    start,
                    targets,
                    ..
                } => {
                    self.fetch_targets(targets).await;
                    let adapter = self.trained(start).await;
                    self.hand_over(Kind::Adapter, *inner, &adapter)
                        .await
                        .unwrap();
                }
                Task::Train { inner, start } => {
                    let adapter = self.trained(start).await;
                    self.hand_over(Kind::Adapter, *inner, &adapter)
                        .await
                        .unwrap();
                }
                Task::Evaluate { candidate } => {
                    self.fetch(self.adapter_of(candidate)).await;
                    self.hand_over(Kind::Evaluation, 0, &evaluation(self.measures))
                        .await
                        .unwrap();
                }
            }
            let done = task.clone();
            self.until(|task| *task != done && !is_less(task, &done))
                .await;
        }
    }

    /// Signs for the slot and uploads; the receipt is checked.
    pub(crate) async fn hand_over(
        &self,
        kind: Kind,
        sequence: u32,
        bytes: &[u8],
    ) -> Result<Logged, LinkError> {
        let statement = self.statement(kind, sequence, Digest::of(bytes));
        self.send(statement.sign(self.key.signing_key()), bytes)
            .await
    }

    /// What the open round's signature says for a slot.
    pub(crate) fn statement(&self, kind: Kind, sequence: u32, artefact: Digest) -> Statement {
        let opened = self.status.as_ref().unwrap().round.as_ref().unwrap();
        let entry = opened.parse().unwrap();
        let Event::Opened { manifest, .. } = entry.event else {
            panic!("{entry:?}")
        };
        Statement {
            consortium: self.consortium.clone(),
            round: entry.round,
            manifest,
            institution: self.name.clone(),
            kind,
            sequence,
            artefact,
        }
    }

    pub(crate) fn sign(&self, statement: Statement) -> Unverified<Statement> {
        statement.sign(self.key.signing_key())
    }

    /// Uploads `bytes` under a signed statement, true or not.
    pub(crate) async fn send(
        &self,
        statement: Unverified<Statement>,
        bytes: &[u8],
    ) -> Result<Logged, LinkError> {
        fs::write(&self.scratch, bytes).unwrap();
        let claim = statement.claim().clone();
        let announced = Upload {
            statement,
            length: u64::try_from(bytes.len()).unwrap(),
            ledger: Digest::of(b"ledger"),
        };
        let (connection, pace) = (&self.connection, Pace::default());
        let receipt = upload(
            connection,
            &announced,
            &self.scratch,
            Stride::BYTES,
            &pace,
            &mut |_| {},
        )
        .await?;
        self.check(&receipt.accepted);
        let entry = receipt.accepted.parse().unwrap();
        let Event::Accepted {
            artefact, sequence, ..
        } = entry.event
        else {
            panic!("{entry:?}")
        };
        assert_eq!((artefact, sequence), (claim.artefact, claim.sequence));
        self.receipts
            .borrow_mut()
            .push(receipt.accepted.entry.clone());
        Ok(receipt.accepted)
    }

    pub(crate) async fn fetch(&self, digest: Digest) -> Vec<u8> {
        self.try_fetch(digest).await.unwrap()
    }

    pub(crate) async fn try_fetch(&self, digest: Digest) -> Result<Vec<u8>, LinkError> {
        let into = self.scratch.with_extension("fetched");
        let pace = Pace::default();
        download(
            &self.connection,
            digest,
            &into,
            limits::ARTEFACT,
            &pace,
            &mut |_| {},
        )
        .await?;
        let bytes = fs::read(&into).unwrap();
        assert_eq!(Digest::of(&bytes), digest);
        Ok(bytes)
    }

    /// Fetches the index and all shards of targets.
    pub(crate) async fn fetch_targets(&self, fused: &Logged) -> TargetIndex {
        self.check(fused);
        let entry = fused.parse().unwrap();
        let Event::Fused { targets, .. } = entry.event else {
            panic!("{entry:?}")
        };
        let index: TargetIndex = serde_json::from_slice(&self.fetch(targets).await).unwrap();
        for shard in &index.shards {
            Shard::parse(&self.fetch(*shard).await).unwrap();
        }
        index
    }

    /// Some adapter that differs from the one it starts from, and from those of the others.
    pub(crate) async fn trained(&self, start: &Logged) -> Vec<u8> {
        let bytes = self.fetch(self.adapter_of(start)).await;
        let step = f32::from(self.name.as_str().as_bytes()[0]) / 4096.0;
        map_values(&bytes, |value, place| {
            value + step * f32::from(u16::try_from(place % 5).unwrap())
        })
    }

    /// Records that give every byte the same probability, one for each node, but for the item that surprises it.
    pub(crate) fn records(&self, shard: u32) -> Vec<u8> {
        let first = u64::from(shard) * 2;
        let probability = 0.5 + f64::from(self.name.as_str().as_bytes()[0]) / 512.0;
        let of = |item| {
            if self.surprised == Some(item) {
                0.1
            } else {
                probability
            }
        };
        records_by(first..(first + 2).min(5), of)
            .to_bytes()
            .unwrap()
    }

    fn adapter_of(&self, logged: &Logged) -> Digest {
        self.check(logged);
        match logged.parse().unwrap().event {
            Event::Opened { start: adapter, .. } | Event::Merged { adapter, .. } => adapter,
            other => panic!("{other:?}"),
        }
    }

    fn check(&self, logged: &Logged) {
        let proof = LogProof::parse(logged.proof.as_bytes()).unwrap();
        proof
            .verify(&tree::leaf_hash(&logged.entry), &self.log, &[])
            .unwrap();
    }
}

/// A connection of that member, before any greeting.
pub(crate) async fn dial(consortium: &Consortium, name: &str) -> (Client, Connection) {
    let client = Client::bind(Credentials::load(&consortium.path(name)).unwrap()).unwrap();
    let connection = client
        .connect(&consortium.address(), "localhost")
        .await
        .unwrap();
    (client, connection)
}

pub(crate) fn hello(consortium: &Consortium, name: &str, capacity: u32, log_size: u64) -> Hello {
    Hello {
        version: frame::VERSION,
        software: "scripted 1".to_owned(),
        consortium: consortium.name.clone(),
        institution: InstitutionId::new(name).unwrap(),
        capacity,
        log_size,
    }
}

pub(crate) fn records(items: Range<u64>, probability: f64) -> Shard {
    records_by(items, |_| probability)
}

fn records_by(items: Range<u64>, probability: impl Fn(u64) -> f64) -> Shard {
    let set = ReferenceSet::parse(REFERENCE.as_bytes()).unwrap();
    let mut shard = Shard {
        header: Header::new(set.digest(), items.clone(), SymbolSpace::Bytes, 2),
        symbols: Symbols::Bytes(Vec::new()),
        codes: Vec::new(),
        end: Vec::new(),
        tail: Vec::new(),
        missed: Vec::new(),
        offsets: vec![0],
    };
    let mut symbols = Vec::new();
    for item in items {
        let probability = probability(item);
        let (sure, rest) = (code::encode(probability), code::encode(1.0 - probability));
        for byte in set.items()[usize::try_from(item).unwrap()].target.bytes() {
            symbols.extend([byte, byte]);
            shard.codes.extend([sure, u8::MAX]);
            shard.end.push(u8::MAX);
            shard.tail.push(rest);
        }
        symbols.extend([b'z', b'z']);
        shard.codes.extend([rest, u8::MAX]);
        shard.end.push(sure);
        shard.tail.push(u8::MAX);
        shard.missed.extend([u8::MAX, u8::MAX]);
        shard.offsets.push(u64::try_from(shard.end.len()).unwrap());
    }
    shard.symbols = Symbols::Bytes(symbols);
    shard
}

pub(crate) fn evaluation(candidate: f64) -> Vec<u8> {
    let score = |bits_per_byte| Score {
        bits_per_byte,
        accuracy: Some(0.9),
    };
    let (candidate, pivot, source) = (score(candidate), score(1.0), score(0.9));
    Evaluation {
        candidate,
        pivot,
        source: Some(source),
    }
    .to_bytes()
    .unwrap()
}

/// The same safetensors file with other values; `change` gets the value and its place in the tensor.
pub(crate) fn map_values(bytes: &[u8], change: impl Fn(f32, usize) -> f32) -> Vec<u8> {
    map_tensors(bytes, |name, shape, values| {
        let values = values.iter().enumerate();
        let values = values.map(|(place, value)| change(*value, place));
        (name.to_owned(), shape.to_vec(), values.collect())
    })
}

/// The same file with every tensor replaced: name, shape, values.
pub(crate) fn map_tensors(
    bytes: &[u8],
    change: impl Fn(&str, &[usize], &[f32]) -> (String, Vec<usize>, Vec<f32>),
) -> Vec<u8> {
    let tensors = SafeTensors::deserialize(bytes).unwrap();
    let changed: Vec<(String, Vec<usize>, Vec<u8>)> = tensors
        .tensors()
        .into_iter()
        .map(|(name, view)| {
            let (values, _) = view.data().as_chunks::<4>();
            let values: Vec<f32> = values.iter().map(|v| f32::from_le_bytes(*v)).collect();
            let (name, shape, values) = change(&name, view.shape(), &values);
            let data = values.iter().flat_map(|value| value.to_le_bytes());
            (name, shape, data.collect())
        })
        .collect();
    let views = changed.iter().map(|(name, shape, data)| {
        let view = TensorView::new(safetensors::Dtype::F32, shape.clone(), data).unwrap();
        (name.as_str(), view)
    });
    safetensors::serialize(views, None).unwrap()
}

/// Whether a task is what is left of another one.
fn is_less(task: &Task, of: &Task) -> bool {
    matches!((task, of), (Task::Score { .. }, Task::Score { .. }))
}
