//! An aggregator that is killed in any phase goes on where it was: nothing acknowledged is lost, nothing counts twice.

use consilium_tests::{Consortium, is_released};

type Reached<'a> = &'a dyn Fn(&serde_json::Value) -> bool;

#[test]
fn a_killed_aggregator_resumes_the_round_and_nodes_find_it_again() {
    let consortium = Consortium::new(4).unwrap();
    let cluster = &consortium.cluster;
    let mut aggregator = cluster.start_aggregator().unwrap();
    let mut nodes = consortium
        .names
        .clone()
        .map(|name| cluster.start_node(&name).unwrap());
    consortium.open_round(&["training.inner_rounds=6"]).unwrap();

    let contributed = |round: &serde_json::Value| {
        round["members"]
            .as_array()
            .unwrap()
            .iter()
            .any(|member| member["shards"] != 0)
    };
    let merged = |round: &serde_json::Value| round["merged"].as_u64().unwrap() >= 2;
    let phases: [(&str, Reached<'_>); 2] = [
        ("records are coming in", &contributed),
        ("two inner rounds are merged", &merged),
    ];
    for (what, reached) in phases {
        let mut processes: Vec<_> = nodes.iter_mut().collect();
        processes.push(&mut aggregator);
        let before = consortium.wait_for(what, &mut processes, reached).unwrap();
        aggregator.kill().unwrap();
        aggregator = cluster.start_aggregator().unwrap();
        let after = consortium.round().unwrap();
        assert_eq!(after["manifest"], before["manifest"]);
        assert!(
            after["merged"].as_u64() >= before["merged"].as_u64(),
            "{before} then {after}"
        );
        for (before, after) in before["members"]
            .as_array()
            .unwrap()
            .iter()
            .zip(after["members"].as_array().unwrap())
        {
            assert!(
                after["shards"].as_u64() >= before["shards"].as_u64(),
                "{before} then {after}"
            );
        }
    }
    let mut processes: Vec<_> = nodes.iter_mut().collect();
    processes.push(&mut aggregator);
    let round = consortium
        .wait_for("the round is released", &mut processes, is_released)
        .unwrap();
    // The server that was started anew says so, before silence would end the old connections.
    for node in &nodes {
        let log = std::fs::read_to_string(node.log()).unwrap();
        assert!(log.contains("the peer has restarted"), "{log}");
        assert!(!log.contains("the connection went silent"), "{log}");
    }
    for member in round["members"].as_array().unwrap() {
        assert_eq!(member["shards"], 3, "{member}");
        assert!(member["adapters"].as_u64().unwrap() <= 6, "{member}");
    }
}
