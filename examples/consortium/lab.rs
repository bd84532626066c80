//! scratch
mod arms;
mod measure;
mod models;
use anyhow::Result;
use consilium_examples::{report::Arm, world::*};
use consilium_kernels::RecordShape;
use consilium_node::worker::{LoadedModel, score::score_shard, train::targets::Targets};
use consilium_protocol::{manifest::*, reference::ReferenceSet, *};
use std::path::PathBuf;
use std::time::Instant;
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;
fn pool<T: Send>(f: impl FnOnce() -> T + Send) -> T {
    rayon::ThreadPoolBuilder::new()
        .num_threads(1)
        .build()
        .unwrap()
        .install(f)
}
fn main() -> Result<()> {
    let seed: u64 = std::env::args().nth(1).unwrap().parse()?;
    let mode = std::env::args().nth(2).unwrap_or_default();
    let dir = PathBuf::from(format!("/work/lab/seed-{seed}"));
    let world = World::generate(seed, &Sizes::default());
    std::fs::create_dir_all(&dir)?;
    let files = world.write_files(&dir)?;
    let t = Instant::now();
    if !dir.join("pivot/model.safetensors").exists() {
        std::thread::scope(|s| {
            let (w, d) = (&world, &dir);
            let a = s.spawn(move || {
                pool(|| models::train_source(w, 0, &d.join("source-0")).unwrap());
                eprintln!("source {:.1}", t.elapsed().as_secs_f64());
                pool(|| models::train_source(w, 1, &d.join("source-1")).unwrap());
            });
            s.spawn(move || {
                pool(|| models::train_source(w, 2, &d.join("source-2")).unwrap());
                pool(|| models::train_pivot(w, &d.join("pivot")).unwrap());
            });
            a.join().unwrap();
        });
        eprintln!("models {:.1}", t.elapsed().as_secs_f64());
    }
    let reference = ReferenceSet::parse(&std::fs::read(&files.public)?)?;
    let shape = RecordShape {
        k: 16,
        fill_permille: 995,
    };
    let n = reference.items().len() as u64;
    let request = consilium_aggregator::rounds::request::OpenRequest::default().training;
    let manifest = Manifest {
        consortium: ConsortiumId::new("demo")?,
        round: RoundId(1),
        mode: Mode::Unified,
        charter: Digest::of(b""),
        pivot: Digest::of(b""),
        reference: reference.digest(),
        items: n,
        symbol_space: SymbolSpace::Bytes,
        symbols: 16,
        fill_permille: 995,
        shard_items: 8192,
        fusion: FusionRule::Softmax { sharpness: 20 },
        training: request,
        members: Domain::ALL
            .iter()
            .map(|d| InstitutionId::new(d.name()).unwrap())
            .collect::<std::collections::BTreeSet<_>>()
            .into_iter()
            .collect(),
        quorum: 2,
        deadlines: Deadlines {
            contribute_seconds: 1,
            distil_seconds: 1,
            evaluate_seconds: 1,
        },
        seed,
        previous_release: None,
    };
    let t = Instant::now();
    let mut shards = vec![];
    for (i, d) in Domain::ALL.iter().enumerate() {
        let m = LoadedModel::load(&dir.join(format!("source-{i}")))?;
        let s = pool(|| score_shard(&m, &reference, 0..n, &shape, &mut ()))?;
        eprintln!(
            "score {} {:?} branches/token {:.3} bpb {:.3} {:.1}s",
            d,
            s.stats,
            s.stats.branches_per_token(),
            s.stats.bits_per_byte(),
            t.elapsed().as_secs_f64()
        );
        shards.push((InstitutionId::new(d.name())?, vec![s.shard]));
    }
    shards.sort_by(|a, b| a.0.cmp(&b.0));
    let flat: Vec<_> = shards
        .iter()
        .map(|(w, s)| (w.clone(), s[0].clone()))
        .collect();
    let t = Instant::now();
    let fused = consilium_aggregator::fusion::fuse_shard(&manifest, &reference, 0, &flat)?;
    eprintln!("fuse {:.2}s", t.elapsed().as_secs_f64());
    let gather = |shard: &consilium_protocol::shard::Shard| {
        let bytes = shard.to_bytes().unwrap();
        Targets::gather(&reference, &(0..n).collect::<Vec<_>>(), 8192, |_| {
            Ok(bytes.clone())
        })
    };
    let targets = gather(&fused.targets)?;
    let control = arms::permuted_targets(&manifest, &reference, &shards, seed)?;
    let control = gather(&control[0])?;
    let private = arms::union_of_private_text(&world);
    let show = |name: &str, m: &LoadedModel, secs: f64| {
        let r = measure::measure(Arm::Fused, m, &world).unwrap();
        println!(
            "seed {seed} {name}: union {:.4} ({:.3} {:.3} {:.3}) facts {:.3} one {:.3} two {:.3} rules A {:.2} B {:.2} C {:.2}  [{secs:.1}s]",
            r.union(),
            r.bits[0],
            r.bits[1],
            r.bits[2],
            r.facts().rate().unwrap(),
            r.one_owner.rate().unwrap(),
            r.two_owners.rate().unwrap(),
            r.rules[0].rate().unwrap(),
            r.rules[1].rate().unwrap(),
            r.rules[2].rate().unwrap()
        );
    };
    if mode.contains('b') {
        for i in 0..3 {
            show(
                &format!("source-{i}"),
                &LoadedModel::load(&dir.join(format!("source-{i}")))?,
                0.0,
            );
        }
        show("pivot", &LoadedModel::load(&dir.join("pivot"))?, 0.0);
    }
    let pivot = dir.join("pivot");
    let steps: u64 = std::env::var("STEPS")
        .ok()
        .map_or(360, |s| s.parse().unwrap());
    let rate: f64 = std::env::var("RATE")
        .ok()
        .map_or(0.01, |s| s.parse().unwrap());
    let tr = arms::Trainer {
        pivot: &pivot,
        training: &manifest.training,
        steps,
        rate,
        seed,
    };
    let (tr, reference_ref, targets_ref, control_ref, private_ref, show) =
        (&tr, &reference, &targets, &control, &private, &show);
    let mut jobs: Vec<Box<dyn FnOnce() + Send>> = vec![];
    if mode.contains('s') {
        jobs.push(Box::new(move || {
            let t = Instant::now();
            let m = pool(|| tr.on_labels(reference_ref.items()).unwrap());
            show(
                &format!("sft {steps} {rate}"),
                &m,
                t.elapsed().as_secs_f64(),
            );
        }));
    }
    if mode.contains('f') {
        jobs.push(Box::new(move || {
            let t = Instant::now();
            let m = pool(|| tr.on_targets(reference_ref.items(), targets_ref).unwrap());
            show(
                &format!("fused {steps} {rate}"),
                &m,
                t.elapsed().as_secs_f64(),
            );
        }));
    }
    if mode.contains('c') {
        jobs.push(Box::new(move || {
            let t = Instant::now();
            let m = pool(|| tr.on_labels(private_ref).unwrap());
            show(
                &format!("central {steps} {rate}"),
                &m,
                t.elapsed().as_secs_f64(),
            );
        }));
    }
    if mode.contains('p') {
        jobs.push(Box::new(move || {
            let t = Instant::now();
            let m = pool(|| tr.on_targets(reference_ref.items(), control_ref).unwrap());
            show(
                &format!("permuted {steps} {rate}"),
                &m,
                t.elapsed().as_secs_f64(),
            );
        }));
    }
    let queue = std::sync::Mutex::new(jobs);
    std::thread::scope(|s| {
        for _ in 0..2 {
            s.spawn(|| {
                loop {
                    let Some(job) = queue.lock().unwrap().pop() else {
                        break;
                    };
                    job();
                }
            });
        }
    });
    Ok(())
}
