//! One seed: models at home, a round over QUIC, the arms it is compared with, and what all of them know.

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use consilium_aggregator::config::Config;
use consilium_aggregator::rounds::request::OpenRequest;
use consilium_examples::cluster::{Cluster, Process, Program, Site, Spec, wait_until};
use consilium_examples::lab::clock::{Clock, say};
use consilium_examples::lab::measure::measure;
use consilium_examples::lab::models::{train_pivot, train_source};
use consilium_examples::lab::parallel::{Job, in_parallel};
use consilium_examples::lab::trainer::{Trainer, items_of, permuted_targets, targets_of};
use consilium_examples::report::{Arm, ArmResult, SeedReport};
use consilium_examples::world::{Domain, Files, Sizes, World};
use consilium_node::worker::LoadedModel;
use consilium_node::worker::model::ModelConfig;
use consilium_protocol::manifest::{Manifest, Mode, Training};
use consilium_protocol::reference::ReferenceSet;
use consilium_protocol::{ConsortiumId, InstitutionId};

use crate::given::Given;
use crate::transcript::Transcript;

/// Longest wait for a round; nothing here takes a tenth of it.
const PATIENCE: Duration = Duration::from_secs(1800);

/// Steps of the arms' one trainer, of the same batch as a node's: half as many again, one after the other, as a node takes
/// over all inner rounds (8 x 30), and half of what the three nodes take together.
const ARM_STEPS: u64 = 360;
/// Peak rate of the arm on public labels, the best of `--tune 360 --seeds 1,2`: union bits .628, .611, .616 and 1.715 at 3e-3,
/// 6e-3, 1e-2 and 2e-2 on seed 1, and .628, .615 and .619 at the first three on seed 2.
const SFT_RATE: f64 = 6e-3;
/// Peak rate of the arm on all private text, by the same command: .503, .492, .516 and 1.668; .506, .496, .519 and 1.905.
const CENTRALISED_RATE: f64 = 6e-3;

/// Candidates may be this much worse than a site's own model on that site's own text, in thousandths: one small pivot
/// learns three domains.
const GATE_BOUND_PERMILLE: u32 = 500;

/// Everything on disk that a run has made before the round.
struct Prepared {
    world: World,
    files: Files,
    pivot: PathBuf,
    sources: [PathBuf; 3],
}

/// Runs one seed below `folder`.
pub(crate) fn seed(seed: u64, given: &Given, folder: &Path) -> Result<SeedReport> {
    let mut clock = Clock::start();
    say(&format!("seed {seed}"));
    let prepared = prepare(seed, given, folder, &mut clock)?;
    let (cluster, transcript) = round(&prepared, folder, &mut clock)?;
    let (charter, ..) = Config::load(&cluster.aggregator_config())?.charter()?;
    let rejected = transcript.rejected(&charter)?;
    if let Some(why) = &rejected {
        say(&format!("           nothing is released: {why}"));
    }
    let adapter = match &rejected {
        Some(_) => transcript.candidate()?,
        None => Some(released(&cluster, &transcript)?),
    };
    let arms = arms(&prepared, &transcript, adapter.as_deref(), &mut clock)?;
    let traffic = transcript.traffic(&prepared.sources, &reference(&prepared)?)?;
    let routing = transcript.routing(&prepared.world)?;
    let truncation = transcript.truncation();
    for (name, seconds) in transcript.phases() {
        clock.note(&name, seconds);
    }
    let (phases, seconds) = clock.finish();
    Ok(SeedReport {
        seed,
        rejected,
        arms,
        traffic,
        routing,
        truncation,
        phases,
        seconds,
    })
}

fn reference(prepared: &Prepared) -> Result<ReferenceSet> {
    Ok(ReferenceSet::parse(&std::fs::read(
        &prepared.files.public,
    )?)?)
}

fn prepare(seed: u64, given: &Given, folder: &Path, clock: &mut Clock) -> Result<Prepared> {
    clock.begin("generating private and public text");
    let world = World::generate(seed, &Sizes::default());
    let files = world.write_files(&folder.join("text"))?;
    let models = folder.join("models");
    clock.begin("training three sources at home, and the pivot on public text");
    let mut jobs: Vec<Job<'_, ()>> = Vec::new();
    let pivot = given.pivot().map_or_else(
        || {
            let folder = models.join("pivot");
            let (world, target) = (&world, folder.clone());
            jobs.push(Box::new(move || train_pivot(world, &target)));
            folder
        },
        Path::to_owned,
    );
    let sources = Domain::ALL.map(|domain| {
        given.source(domain).map_or_else(
            || {
                let folder = models.join(domain.name());
                let (world, target) = (&world, folder.clone());
                jobs.push(Box::new(move || {
                    let at = domain.index();
                    train_source(world, &world.institutions[at].private, at, &target)
                }));
                folder
            },
            Path::to_owned,
        )
    });
    in_parallel(jobs)?;
    clock.end("sources and pivot");
    Ok(Prepared {
        world,
        files,
        pivot,
        sources,
    })
}

/// The round itself: four programs on loopback, from opening to release.
fn round(prepared: &Prepared, folder: &Path, clock: &mut Clock) -> Result<(Cluster, Transcript)> {
    clock.begin("starting an aggregator and three nodes");
    let me = std::env::current_exe()?;
    let sites = Domain::ALL
        .into_iter()
        .map(|domain| {
            let source = prepared
                .sources
                .get(domain.index())
                .cloned()
                .unwrap_or_default();
            let holdout = prepared
                .files
                .holdout
                .get(domain.index())
                .cloned()
                .unwrap_or_default();
            Ok(Site {
                name: InstitutionId::new(domain.name())?,
                source,
                holdout,
                capacity: 1,
                train_data: None,
            })
        })
        .collect::<Result<Vec<_>>>()?;
    let spec = Spec {
        consortium: ConsortiumId::new("demo")?,
        quorum: 2,
        gate_bound_permille: GATE_BOUND_PERMILLE,
        pivot: prepared.pivot.clone(),
        reference: prepared.files.public.clone(),
        sites: sites.clone(),
        modes: vec![Mode::Unified],
        threads: 1,
    };
    let cluster = Cluster::prepare(
        &folder.join("consortium"),
        spec,
        Program::new(me.clone(), "consilium-aggregator"),
        Program::new(me, "consilium-node"),
    )?;
    let mut aggregator = cluster.start_aggregator()?;
    let mut nodes = sites
        .iter()
        .map(|site| cluster.start_node(&site.name))
        .collect::<Result<Vec<_>>>()?;
    clock.begin("round: score, fuse, distil, merge, evaluate");
    let settings = settings(prepared)?;
    let settings = settings
        .iter()
        .flat_map(|setting| ["--set", setting.as_str()]);
    let open: Vec<&str> = ["round", "open"].into_iter().chain(settings).collect();
    cluster.operator(&open)?;
    follow(&cluster, &mut aggregator, &mut nodes)?;
    clock.end("round, over QUIC");
    for node in &mut nodes {
        ensure!(
            node.terminate()?.success(),
            "a node did not end cleanly: {}",
            node.log().display()
        );
    }
    ensure!(
        aggregator.terminate()?.success(),
        "the aggregator did not end cleanly"
    );
    let transcript = Transcript::read(&cluster)?;
    Ok((cluster, transcript))
}

/// What the operator asks for beside the defaults. A pivot whose head is its embedding has no head to be trained whole.
fn settings(prepared: &Prepared) -> Result<Vec<String>> {
    let mut settings = vec![format!("seed={}", prepared.world.seed)];
    if ModelConfig::load(&prepared.pivot)?.tied {
        settings.push("training.modules_to_save=[\"embed_tokens\"]".to_owned());
    }
    Ok(settings)
}

/// Waits for the release, or until there will be none, and says what goes on.
fn follow(cluster: &Cluster, aggregator: &mut Process, nodes: &mut [Process]) -> Result<()> {
    let mut last = String::new();
    wait_until("the round is over", PATIENCE, || {
        aggregator.ensure_running()?;
        for node in &mut *nodes {
            node.ensure_running()?;
        }
        let path = cluster.data_dir().join("status.json");
        let status: serde_json::Value = serde_json::from_slice(&std::fs::read(path)?)?;
        let round = &status["round"];
        let phase = round["phase"].as_str().unwrap_or_default().to_owned();
        if phase != last {
            say(&format!("           {phase}"));
            last = phase;
        }
        Ok(round["release"].is_string() || round["rejected"].is_string())
    })
}

fn arms(
    prepared: &Prepared,
    transcript: &Transcript,
    adapter: Option<&[u8]>,
    clock: &mut Clock,
) -> Result<Vec<ArmResult>> {
    clock.begin("training the arms that the round is compared with");
    let world = &prepared.world;
    let manifest = transcript.manifest();
    let reference = reference(prepared)?;
    let permuted = permuted_targets(manifest, &reference, &transcript.records()?, world.seed)?;
    let permuted = targets_of(&reference, manifest.shard_items, &permuted)?;
    let training = OpenRequest::default().training;
    let trainer = |rate| Trainer {
        pivot: &prepared.pivot,
        training: &training,
        steps: ARM_STEPS,
        rate,
        seed: world.seed,
    };
    let private = items_of(world.institutions.iter().flat_map(|site| &site.private));
    let arm = |arm, model: &LoadedModel| {
        Ok(ArmResult {
            arm,
            scores: measure(model, world)?,
        })
    };
    let mut jobs: Vec<Job<'_, ArmResult>> = vec![
        Box::new(|| arm(Arm::Sft, &trainer(SFT_RATE).on_labels(reference.items())?)),
        Box::new(|| {
            arm(
                Arm::Centralised,
                &trainer(CENTRALISED_RATE).on_labels(&private)?,
            )
        }),
        Box::new(|| {
            let trainer = trainer(round_rate(&training));
            arm(
                Arm::Permuted,
                &trainer.on_targets(reference.items(), &permuted)?,
            )
        }),
        Box::new(|| arm(Arm::PivotBefore, &LoadedModel::load(&prepared.pivot)?)),
    ];
    if let Some(adapter) = adapter {
        jobs.push(Box::new(move || {
            arm(Arm::Fused, &fused(prepared, manifest, adapter)?)
        }));
    }
    for domain in Domain::ALL {
        let folder = prepared
            .sources
            .get(domain.index())
            .context("a source for each domain")?;
        jobs.push(Box::new(move || {
            arm(Arm::Source(domain), &LoadedModel::load(folder)?)
        }));
    }
    let results = in_parallel(jobs)?;
    clock.end("arms and measurements");
    Ok(results)
}

/// How the arms beside the fused one were trained, for the report.
pub(crate) fn training() -> String {
    let round = OpenRequest::default().training;
    let node = round.inner_rounds * round.local_steps;
    format!(
        "SFT, centralised and permuted: one trainer of {ARM_STEPS} steps under the round's adapters and batches, where a \
         node of the round takes {node} and three nodes {}; peak rates {SFT_RATE}, {CENTRALISED_RATE} and the round's {}, \
         the first two each the best of a grid (--tune).",
        3 * node,
        round_rate(&round),
    )
}

fn round_rate(training: &Training) -> f64 {
    f64::from(training.learning_rate_micros) / 1e6
}

/// The adapter that was released, read from the release folder.
fn released(cluster: &Cluster, transcript: &Transcript) -> Result<Vec<u8>> {
    let release = format!("releases/round-{}", transcript.manifest().round);
    let path = cluster
        .data_dir()
        .join(release)
        .join("adapter_model.safetensors");
    std::fs::read(&path).with_context(|| path.display().to_string())
}

/// The pivot with an adapter of the round.
fn fused(prepared: &Prepared, manifest: &Manifest, adapter: &[u8]) -> Result<LoadedModel> {
    use consilium_node::worker::train::distill::{Distiller, Settings};
    let pivot = LoadedModel::load(&prepared.pivot)?;
    let mut student = Distiller::new(pivot, Settings::of(&manifest.training, manifest.seed)?)?;
    student.set_start(adapter)?;
    Ok(student.into_student())
}
