//! Members whose sources have the pivot's tokenizer exchange records of its tokens: scored, fused by minCE and distilled over
//! QUIC to a release. One whose source has another tokenizer takes no part in it, and says so.

use std::path::{Path, PathBuf};

use consilium_protocol::manifest::SymbolSpace;
use consilium_protocol::shard::Shard;
use consilium_tests::{Consortium, is_released};

/// Shards of records or targets below a folder.
fn shards(folder: &Path) -> Vec<Shard> {
    let mut found = Vec::new();
    for entry in folder.read_dir().unwrap() {
        let path: PathBuf = entry.unwrap().path();
        if path.is_dir() {
            found.extend(shards(&path));
        } else {
            found.extend(Shard::parse(&std::fs::read(&path).unwrap()).ok());
        }
    }
    found
}

#[test]
fn a_round_in_token_space_is_released() {
    let consortium = Consortium::of_one_tokenizer(8).unwrap();
    let settings = [consortium.token_space.as_str(), "fusion.rule=min_ce"];
    let round = consortium.run_round(&settings).unwrap();
    assert_eq!(round["merged"], 2, "{round:#}");
    for member in round["members"].as_array().unwrap() {
        assert_eq!(member["shards"], 3, "{member}");
        assert_eq!(member["adapters"], 2, "{member}");
        assert_eq!(member["evaluated"], true, "{member}");
    }
    let mut expected: Vec<_> = [("records", 0), ("records", 1), ("records", 2)].to_vec();
    expected.extend([("adapter", 0), ("adapter", 1), ("evaluation", 0)]);
    for name in &consortium.names {
        let mut left = consortium.left(name).unwrap();
        left[..3].sort();
        let left: Vec<_> = left
            .iter()
            .map(|(kind, n, _)| (kind.as_str(), *n))
            .collect();
        assert_eq!(left, expected, "{name}");
    }
    let shards = shards(&consortium.cluster.data_dir().join("blobs"));
    assert_eq!(shards.len(), 12, "three of each member and the targets");
    for shard in &shards {
        assert!(matches!(shard.header.space, SymbolSpace::Tokens { .. }));
        assert!(
            shard
                .end
                .iter()
                .chain(&shard.missed)
                .all(|&code| code == 255)
        );
    }
    let release = consortium.cluster.data_dir().join("releases/round-1");
    assert!(release.join("adapter_model.safetensors").is_file());
}

#[test]
fn a_source_of_another_tokenizer_takes_no_part_and_the_round_goes_on() {
    let consortium = Consortium::of_one_tokenizer(9).unwrap();
    let other = Consortium::new(9).unwrap();
    let [_, _, insurer] = &consortium.names;
    let own = |consortium: &Consortium| {
        let text = std::fs::read_to_string(consortium.cluster.node_config(insurer)).unwrap();
        let line = text
            .lines()
            .find(|line| line.starts_with("source = "))
            .unwrap();
        (text.clone(), line.to_owned())
    };
    let ((text, mine), (_, theirs)) = (own(&consortium), own(&other));
    let text = text.replace(&mine, &theirs);
    std::fs::write(consortium.cluster.node_config(insurer), text).unwrap();

    let cluster = &consortium.cluster;
    let mut aggregator = cluster.start_aggregator().unwrap();
    let mut nodes = consortium
        .names
        .clone()
        .map(|name| cluster.start_node(&name).unwrap());
    consortium
        .open_round(&[
            &consortium.token_space,
            "fusion.rule=min_ce",
            "deadlines.contribute_seconds=15",
            "training.inner_rounds=1",
        ])
        .unwrap();
    let mut processes: Vec<_> = nodes.iter_mut().collect();
    processes.push(&mut aggregator);
    let round = consortium
        .wait_for("the round is released", &mut processes, is_released)
        .unwrap();
    for member in round["members"].as_array().unwrap() {
        let came = member["institution"] != insurer.as_str();
        assert_eq!(member["shards"], 3 * usize::from(came), "{member}");
    }
    let records = |(kind, ..): &(String, u64, String)| kind == "records";
    assert!(!consortium.left(insurer).unwrap().iter().any(records));
    let log = cluster.root().join("logs");
    let log = std::fs::read_to_string(log.join(format!("{insurer}.log"))).unwrap();
    assert!(
        log.contains("tokenizer.json of the source has digest"),
        "{log}"
    );
}
