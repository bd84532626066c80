//! Memory does not grow with the size of an adapter: from its validation over the merge to the release.
//!
//! Peaks are those of processes of their own (`VmHWM`), which this test starts from its own program.

#![cfg(test)]

use std::fs::{self, File};
use std::io::{BufWriter, Write as _};
use std::path::Path;
use std::process::Command;

use consilium_aggregator::config::ReleaseConfig;
use consilium_aggregator::release::ReleaseKey;
use consilium_aggregator::rounds::request::{self, Given, OpenRequest};
use consilium_aggregator::rounds::{Bench, SoFar};
use consilium_aggregator::server::validate::{self, Checks};
use consilium_aggregator::store::Blobs;
use consilium_protocol::artefact::Kind;
use consilium_protocol::charter::Charter;
use consilium_protocol::contribution::Statement;
use consilium_protocol::evaluation::{Evaluation, Score};
use consilium_protocol::event::Event;
use consilium_protocol::manifest::{Manifest, Mode};
use consilium_protocol::reference::ReferenceSet;
use consilium_protocol::round::{Round, Work};
use consilium_protocol::{ConsortiumId, Digest, InstitutionId, RoundId};
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};

const CHILD: &str = "CONSILIUM_TEST_MEMORY";
const MEMBERS: [&str; 3] = ["bank", "clinic", "insurer"];
const RANK: usize = 4;
const WIDTH: usize = 4096;
/// Layers of the small adapter: 128 KiB of factors each, and 24 rows, 384 KiB, of the module that is trained whole.
const LAYERS: usize = 12;
/// What the peak may grow by for an adapter four times as large; that adapter is longer by more than twice this.
const BOUND: u64 = 8 << 20;

#[test]
fn four_times_the_adapter_needs_no_more_memory() {
    if let Ok(arguments) = std::env::var(CHILD) {
        let (layers, folder) = arguments.split_once(' ').unwrap();
        return go_through_a_round(layers.parse().unwrap(), Path::new(folder));
    }
    let [small, large] = [LAYERS, 4 * LAYERS].map(|layers| {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("adapter");
        write_adapter(&path, layers, 1);
        let bytes = fs::metadata(&path).unwrap().len();
        let output = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "four_times_the_adapter_needs_no_more_memory"])
            .arg("--nocapture")
            .env(CHILD, format!("{layers} {}", folder.path().display()))
            .output()
            .unwrap();
        let said = String::from_utf8_lossy(&output.stdout).into_owned();
        assert!(
            output.status.success(),
            "{said}{}",
            String::from_utf8_lossy(&output.stderr)
        );
        let peak = said.split_once("peak ").unwrap().1;
        let peak: u64 = peak.split_whitespace().next().unwrap().parse().unwrap();
        println!("adapters of {bytes} bytes: peak {peak} bytes");
        (bytes, peak)
    });
    assert!(large.0 - small.0 > 2 * BOUND, "{} {}", small.0, large.0);
    assert!(large.1 < small.1 + BOUND, "{small:?} {large:?}");
}

fn go_through_a_round(layers: usize, folder: &Path) {
    let bench = bench(folder);
    let store = |seed: u64| {
        let path = folder.join("upload");
        write_adapter(&path, layers, seed);
        path
    };
    let digest_of = |path: &Path| Digest::of_reader(File::open(path).unwrap()).unwrap();
    let keep = |path: &Path| {
        let digest = digest_of(path);
        bench.blobs.adopt(path, digest).unwrap();
        digest
    };
    let start = keep(&folder.join("adapter"));
    let manifest = manifest(bench.charter.clone());
    let checks = Checks {
        manifest: manifest.clone().into(),
        start,
    };
    let round = Round::open(manifest, Digest::of(b"manifest"));
    let mut adapters = Vec::new();
    for (seed, who) in (2..).zip(MEMBERS) {
        let path = store(seed);
        let statement = Statement {
            consortium: round.manifest().consortium.clone(),
            round: round.manifest().round,
            manifest: round.digest(),
            institution: id(who),
            kind: Kind::Adapter,
            sequence: 0,
            artefact: digest_of(&path),
        };
        validate::contribution(&bench, &checks, &statement, &path).unwrap();
        adapters.push((id(who), keep(&path), 1));
    }
    let perform = |work: &Work| bench.perform(&round, work, &SoFar::default()).unwrap();
    let merge = |inner, start, momentum| {
        let event = perform(&Work::Merge {
            inner,
            start,
            momentum,
            adapters: adapters.clone(),
        });
        match event {
            Event::Merged {
                adapter, momentum, ..
            } => (adapter, momentum),
            other => panic!("{other:?}"),
        }
    };
    let (merged, momentum) = merge(0, start, None);
    let (candidate, _) = merge(1, merged, Some(momentum));
    let evaluation = bench.blobs.put_bytes(&evaluation()).unwrap();
    let event = perform(&Work::Judge {
        candidate,
        evaluations: MEMBERS.map(|who| (id(who), evaluation)).into(),
    });
    assert!(matches!(event, Event::Released { .. }), "{event:?}");
    println!("peak {}", peak());
}

/// The most memory that this process had, in bytes.
fn peak() -> u64 {
    let status = fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|line| line.starts_with("VmHWM:"));
    let kibibytes = line.unwrap().split_whitespace().nth(1).unwrap();
    1024 * kibibytes.parse::<u64>().unwrap()
}

/// A safetensors file, written without holding it: `layers` matrices of rank [`RANK`] and one module to save.
fn write_adapter(path: &Path, layers: usize, seed: u64) {
    let mut tensors = Vec::new();
    for layer in 0..layers {
        let name = format!("base_model.model.model.layers.{layer}.self_attn.q_proj");
        tensors.push((format!("{name}.lora_A.weight"), [RANK, WIDTH]));
        tensors.push((format!("{name}.lora_B.weight"), [WIDTH, RANK]));
    }
    let whole = "base_model.model.lm_head.weight".to_owned();
    tensors.push((whole, [layers * 24, WIDTH]));
    let mut offset = 0;
    let entries: Vec<String> = tensors
        .iter()
        .map(|(name, [rows, columns])| {
            let from = offset;
            offset += rows * columns * 4;
            format!(
                "\"{name}\":{{\"dtype\":\"F32\",\"shape\":[{rows},{columns}],\
                \"data_offsets\":[{from},{offset}]}}"
            )
        })
        .collect();
    let header = format!("{{{}}}", entries.join(","));
    let mut file = BufWriter::new(File::create(path).unwrap());
    file.write_all(&(header.len() as u64).to_le_bytes())
        .unwrap();
    file.write_all(header.as_bytes()).unwrap();
    let mut draws = ChaCha8Rng::seed_from_u64(seed);
    for _ in 0..offset / (4 * WIDTH) {
        let row: Vec<u8> = (0..WIDTH)
            .flat_map(|_| {
                let value = u16::try_from(draws.next_u32() >> 16).unwrap();
                ((f32::from(value) / 32_768.0 - 1.0) / 64.0).to_le_bytes()
            })
            .collect();
        file.write_all(&row).unwrap();
    }
    file.into_inner().unwrap();
}

fn bench(folder: &Path) -> Bench {
    Bench {
        blobs: Blobs::open(folder).unwrap(),
        charter: Charter {
            consortium: ConsortiumId::new("north").unwrap(),
            log_key: String::new(),
            modes: vec![Mode::Unified],
            quorum: 3,
            max_symbols: 16,
            gate_bound_permille: 250,
            members: Vec::new(),
        },
        reference: ReferenceSet::parse(b"{\"target\":\"ab\"}\n").unwrap(),
        releases: folder.join("releases"),
        release: ReleaseConfig::default(),
        release_key: ReleaseKey::open(&folder.join("release.key")).unwrap(),
    }
}

fn evaluation() -> Vec<u8> {
    let score = |bits_per_byte| Score {
        bits_per_byte,
        accuracy: None,
    };
    let evaluation = Evaluation {
        candidate: score(0.5),
        pivot: score(0.9),
        source: Some(score(0.6)),
    };
    evaluation.to_bytes().unwrap()
}

fn id(name: &str) -> InstitutionId {
    InstitutionId::new(name).unwrap()
}

fn manifest(charter: Charter) -> Manifest {
    let mut request = OpenRequest::default();
    request.training.rank = u32::try_from(RANK).unwrap();
    request.training.target_modules = vec!["q_proj".to_owned()];
    request.training.modules_to_save = vec!["lm_head".to_owned()];
    let given = Given {
        charter,
        charter_digest: Digest::of(b"charter"),
        round: RoundId(1),
        pivot: Digest::of(b"pivot"),
        reference: Digest::of(b"reference"),
        items: 1,
        previous_release: None,
    };
    request::manifest(request, given)
}
