//! What the aggregator's log and store say about the round: bytes, weights, truncation, times.

use std::collections::BTreeMap;
use std::path::PathBuf;

use anyhow::{Context, Result};
use consilium_aggregator::fusion::ShardRouting;
use consilium_aggregator::log::Log;
use consilium_aggregator::release::judge;
use consilium_aggregator::store::Blobs;
use consilium_certs::{SigningIdentity, folder};
use consilium_examples::cluster::Cluster;
use consilium_examples::lab::rejection::in_words;
use consilium_examples::lab::traffic::{dense, packed};
use consilium_examples::report::{RoutingRow, Traffic};
use consilium_examples::world::{Domain, Kind as Line, World};
use consilium_node::worker::LoadedModel;
use consilium_protocol::artefact::Kind;
use consilium_protocol::charter::Charter;
use consilium_protocol::evaluation::Evaluation;
use consilium_protocol::event::{Entry, Event, Phase};
use consilium_protocol::manifest::Manifest;
use consilium_protocol::quic::chunk::Stride;
use consilium_protocol::reference::ReferenceSet;
use consilium_protocol::shard::Shard;
use consilium_protocol::transcript::key::SignatureKind;
use consilium_protocol::transcript::note::SignedNote;
use consilium_protocol::{ConsortiumId, Digest, InstitutionId, UnixMillis, limits};

/// Largest weight below which an item counts as a mixture.
const MIXED: f64 = 0.9;

/// A finished round.
pub(crate) struct Transcript {
    entries: Vec<Entry>,
    blobs: Blobs,
    manifest: Manifest,
}

impl Transcript {
    /// Opens and verifies the log of a stopped aggregator.
    pub(crate) fn read(cluster: &Cluster) -> Result<Self> {
        let identity =
            SigningIdentity::load(&cluster.aggregator_dir().join("identity/signing.key"))?;
        let consortium = ConsortiumId::new("demo")?;
        let name = folder::log_key_name(&consortium);
        let signer = identity.note_signer(&name, SignatureKind::Ed25519)?;
        let key = signer.verifier().clone();
        let log = Log::open(&cluster.data_dir().join("log"), signer)?;
        let entries: Vec<Entry> = log.entries().map(|(_, entry)| entry).collect();
        let blobs = Blobs::open(&cluster.data_dir())?;
        let opened = entries.iter().find_map(|entry| match entry.event {
            Event::Opened { manifest, .. } => Some(manifest),
            _ => None,
        });
        let note = blobs.read(
            &opened.context("no round was opened")?,
            limits::DOCUMENT as u64,
        )?;
        let note = SignedNote::parse(&note)?.verify(&[key])?;
        let manifest = Manifest::parse(note.text())?;
        Ok(Self {
            entries,
            blobs,
            manifest,
        })
    }

    /// The round's manifest.
    pub(crate) fn manifest(&self) -> &Manifest {
        &self.manifest
    }

    /// Every institution's shards in order.
    pub(crate) fn records(&self) -> Result<Vec<(InstitutionId, Vec<Shard>)>> {
        let mut shards: BTreeMap<InstitutionId, BTreeMap<u32, Shard>> = BTreeMap::new();
        for (who, kind, sequence, artefact) in self.accepted() {
            if kind == Kind::Records {
                let shard = Shard::parse(&self.blobs.read(&artefact, limits::SHARD)?)?;
                shards.entry(who).or_default().insert(sequence, shard);
            }
        }
        Ok(shards
            .into_iter()
            .map(|(who, shards)| (who, shards.into_values().collect()))
            .collect())
    }

    /// What each node sent, packed as it was sent, and what dense logits of its source would have been.
    pub(crate) fn traffic(
        &self,
        sources: &[PathBuf; 3],
        reference: &ReferenceSet,
    ) -> Result<Vec<Traffic>> {
        Domain::ALL
            .into_iter()
            .zip(sources)
            .map(|(node, source)| {
                let mut bytes = BTreeMap::new();
                for (who, kind, _, artefact) in self.accepted() {
                    if who.as_str() == node.name() {
                        let content = self.blobs.read(&artefact, limits::ARTEFACT)?;
                        *bytes.entry(kind).or_default() += packed(&content, stride(kind))?;
                    }
                }
                let of = |kind: Kind| bytes.get(&kind).copied().unwrap_or(0);
                Ok(Traffic {
                    node,
                    records: of(Kind::Records),
                    adapters: of(Kind::Adapter),
                    evaluation: of(Kind::Evaluation),
                    dense: dense(&LoadedModel::load(source)?, reference.items())?,
                })
            })
            .collect()
    }

    /// Mean routing weights by sort of item.
    pub(crate) fn routing(&self, world: &World) -> Result<Vec<RoutingRow>> {
        let document = self.entries.iter().find_map(|entry| match entry.event {
            Event::Fused { routing, .. } => Some(routing),
            _ => None,
        });
        // A round that screening ended has fused nothing.
        let Some(document) = document else {
            return Ok(Vec::new());
        };
        let shards: Vec<ShardRouting> =
            serde_json::from_slice(&self.blobs.read(&document, limits::ARTEFACT)?)?;
        let mut rows: BTreeMap<String, Sum> = BTreeMap::new();
        let items = shards.iter().flat_map(|shard| {
            shard
                .weights
                .iter()
                .map(|weights| (&shard.institutions, weights))
        });
        for (public, (institutions, weights)) in world.public.iter().zip(items) {
            let weights = Domain::ALL.map(|domain| {
                let at = institutions
                    .iter()
                    .position(|who| who.as_str() == domain.name());
                at.and_then(|at| weights.get(at))
                    .map_or(0.0, |&weight| f64::from(weight) / 65_536.0)
            });
            let owners = public
                .owners
                .iter()
                .map(|owner| weights[owner.index()])
                .sum();
            rows.entry(sort_of(public.kind, &public.owners))
                .or_default()
                .add(weights, owners);
        }
        Ok(rows
            .into_iter()
            .map(|(about, sum)| sum.row(about))
            .collect())
    }

    /// Relative truncation error of each merge.
    pub(crate) fn truncation(&self) -> Vec<f64> {
        self.entries
            .iter()
            .filter_map(|entry| match entry.event {
                Event::Merged { truncation_ppm, .. } => Some(f64::from(truncation_ppm) / 1e6),
                _ => None,
            })
            .collect()
    }

    /// Why the round ended without a release; none after one.
    pub(crate) fn rejected(&self, charter: &Charter) -> Result<Option<String>> {
        let found = self.entries.iter().find_map(|entry| match &entry.event {
            Event::Rejected { reason, blamed, .. } => Some((*reason, blamed)),
            _ => None,
        });
        let Some((reason, blamed)) = found else {
            return Ok(None);
        };
        let mut evaluations = BTreeMap::new();
        for (who, kind, _, artefact) in self.accepted() {
            if kind == Kind::Evaluation {
                let document = self.blobs.read(&artefact, limits::EVALUATION)?;
                evaluations.insert(who, Evaluation::parse(&document)?);
            }
        }
        let evaluations: Vec<_> = evaluations.into_iter().collect();
        let verdict = judge(charter, &evaluations, &[]);
        Ok(Some(in_words(reason, blamed, &verdict)))
    }

    /// The adapter of the last merge: what was judged, or would have been.
    pub(crate) fn candidate(&self) -> Result<Option<Vec<u8>>> {
        let last = self
            .entries
            .iter()
            .rev()
            .find_map(|entry| match entry.event {
                Event::Merged { adapter, .. } => Some(adapter),
                _ => None,
            });
        let read = |adapter| self.blobs.read(&adapter, limits::ARTEFACT);
        Ok(last.map(read).transpose()?)
    }

    /// Seconds of the round's phases, from the times in the log.
    pub(crate) fn phases(&self) -> Vec<(String, f64)> {
        let mut seconds: BTreeMap<(u8, &str), f64> = BTreeMap::new();
        let mut last: Option<UnixMillis> = None;
        for entry in &self.entries {
            let name = match &entry.event {
                Event::Opened { .. } => None,
                Event::Closed {
                    phase: Phase::Contribute,
                    ..
                } => Some((0, "round: score and send")),
                Event::Fused { .. } => Some((1, "round: fuse")),
                Event::Closed {
                    phase: Phase::Distil { .. },
                    ..
                } => Some((2, "round: distil")),
                Event::Merged { .. } => Some((3, "round: merge")),
                Event::Closed {
                    phase: Phase::Evaluate,
                    ..
                } => Some((4, "round: evaluate")),
                Event::Released { .. } | Event::Rejected { .. } => Some((5, "round: release")),
                _ => continue,
            };
            if let (Some(name), Some(last)) = (name, last) {
                *seconds.entry(name).or_default() += entry.at.since(last).as_secs_f64();
            }
            last = Some(entry.at);
        }
        seconds
            .into_iter()
            .map(|((_, name), seconds)| (name.to_owned(), seconds))
            .collect()
    }

    fn accepted(&self) -> impl Iterator<Item = (InstitutionId, Kind, u32, Digest)> + '_ {
        self.entries.iter().filter_map(|entry| match &entry.event {
            Event::Accepted {
                institution,
                kind,
                sequence,
                artefact,
                ..
            } => Some((institution.clone(), *kind, *sequence, *artefact)),
            _ => None,
        })
    }
}

/// How content of a kind is packed.
const fn stride(kind: Kind) -> Stride {
    match kind {
        Kind::Adapter => Stride::FLOATS,
        Kind::Records | Kind::Evaluation => Stride::BYTES,
    }
}

fn sort_of(kind: Line, owners: &[Domain]) -> String {
    match (kind, owners) {
        (Line::Fact, [one]) => format!("{one} facts, one owner"),
        (Line::Fact, _) => "facts with two owners".to_owned(),
        (Line::Rule, [one, ..]) => format!("{one} rule"),
        (Line::Narrative, [one]) => format!("{one} narrative"),
        (Line::Rule | Line::Narrative, _) => "shared narrative".to_owned(),
    }
}

#[derive(Default)]
struct Sum {
    items: u64,
    weights: [f64; 3],
    owners: f64,
    mixed: u64,
}

impl Sum {
    fn add(&mut self, weights: [f64; 3], owners: f64) {
        self.items += 1;
        for (sum, weight) in self.weights.iter_mut().zip(weights) {
            *sum += weight;
        }
        self.owners += owners;
        self.mixed += u64::from(weights.into_iter().fold(0.0, f64::max) < MIXED);
    }

    fn row(self, about: String) -> RoutingRow {
        let items = self.items.max(1) as f64;
        RoutingRow {
            about,
            items: self.items,
            weights: self.weights.map(|sum| sum / items),
            owners: self.owners / items,
            mixed: self.mixed as f64 / items,
        }
    }
}
