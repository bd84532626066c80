//! Three nodes and an aggregator as processes bring a round to a release; the same models and seed give the same targets.

use consilium_tests::{Consortium, is_released};

#[test]
fn three_processes_release_and_end_cleanly_and_targets_repeat() {
    let mut targets = Vec::new();
    for _ in 0..2 {
        let consortium = Consortium::new(1).unwrap();
        let cluster = &consortium.cluster;
        let mut aggregator = cluster.start_aggregator().unwrap();
        let mut nodes = consortium
            .names
            .clone()
            .map(|name| cluster.start_node(&name).unwrap());
        consortium.open_round(&[]).unwrap();

        let mut processes: Vec<_> = nodes.iter_mut().collect();
        processes.push(&mut aggregator);
        let round = consortium
            .wait_for("the round is released", &mut processes, is_released)
            .unwrap();
        assert_eq!(round["merged"], 2);
        for member in round["members"].as_array().unwrap() {
            assert_eq!(member["shards"], 3, "{member}");
            assert_eq!(member["adapters"], 2, "{member}");
            assert_eq!(member["evaluated"], true, "{member}");
        }
        targets.push(round["targets"].clone());

        let release = cluster.data_dir().join("releases/round-1");
        for file in [
            "README.md",
            "adapter_config.json",
            "adapter_model.safetensors",
            "model.sig",
            "release.tlog-proof",
            "report.json",
        ] {
            assert!(
                release.join(file).is_file(),
                "{file} is missing in the release"
            );
        }
        for node in &mut nodes {
            let status = node.terminate().unwrap();
            assert!(
                status.success(),
                "a node ended with {status}\n{}",
                consortium.logs()
            );
        }
        let status = aggregator.terminate().unwrap();
        assert!(
            status.success(),
            "the aggregator ended with {status}\n{}",
            consortium.logs()
        );
    }
    assert!(targets[0].is_string());
    assert_eq!(
        targets[0], targets[1],
        "the same contributions gave other targets"
    );
}
