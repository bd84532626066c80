//! Every file in `examples/config` is accepted by the program that reads it, and a key that it does not know is refused.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use consilium_certs::Authority;
use consilium_node::worker::commands::TrainFile;
use consilium_protocol::Clock as _;
use consilium_protocol::time::SystemClock;

type Load = fn(&Path) -> Result<(), String>;

const SAMPLES: [(&str, Load); 4] = [
    ("aggregator.toml", |path| {
        accepted(consilium_aggregator::config::Config::load(path))
    }),
    ("charter.toml", |path| {
        let demo = "demo".parse().unwrap();
        let authority = Authority::create(&demo, 1, SystemClock.now()).unwrap();
        accepted(authority.sign_charter(&fs::read_to_string(path).unwrap(), path))
    }),
    ("node.toml", |path| {
        accepted(consilium_node::config::Config::load(path))
    }),
    ("train.toml", |path| accepted(TrainFile::load(path))),
];

/// What a program would print, causes included.
fn accepted<T, E>(loaded: Result<T, E>) -> Result<(), String>
where
    E: std::error::Error + Send + Sync + 'static,
{
    loaded
        .map(|_| ())
        .map_err(|error| format!("{:#}", anyhow::Error::from(error)))
}

fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../examples/config")
}

#[test]
fn every_sample_is_what_its_program_reads() {
    let names: BTreeSet<String> = fs::read_dir(folder())
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    let known = SAMPLES.map(|(name, _)| name.to_owned());
    assert_eq!(names, BTreeSet::from(known), "a sample without a test");
    for (name, load) in SAMPLES {
        load(&folder().join(name)).unwrap();
    }
}

#[test]
fn an_unknown_key_is_refused_by_file_and_name_in_every_table() {
    let temporary = tempfile::tempdir().unwrap();
    for (name, load) in SAMPLES {
        let text = fs::read_to_string(folder().join(name)).unwrap();
        let lines: Vec<&str> = text.lines().collect();
        let headers = (0..lines.len()).filter(|&at| lines[at].starts_with('['));
        let path = temporary.path().join(name);
        for at in [0].into_iter().chain(headers.map(|at| at + 1)) {
            let mut changed = lines.clone();
            changed.insert(at, "surprise = 1");
            fs::write(&path, changed.join("\n")).unwrap();
            let refused = load(&path).expect_err("an unknown key was taken");
            assert!(refused.contains("surprise"), "{name}, line {at}: {refused}");
            assert!(refused.contains(name), "{name}, line {at}: {refused}");
        }
    }
}
