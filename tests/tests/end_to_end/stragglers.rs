//! A round goes on without a member that never comes, waits for a late one, and takes in one that joins in the middle.

use consilium_tests::{Consortium, is_released};

#[test]
fn a_late_node_counts_and_one_that_never_comes_is_not_waited_for_beyond_the_deadline() {
    let consortium = Consortium::new(2).unwrap();
    let cluster = &consortium.cluster;
    let [clinic, bank, insurer] = &consortium.names;
    let mut aggregator = cluster.start_aggregator().unwrap();
    let mut first = cluster.start_node(clinic).unwrap();
    consortium
        .open_round(&["deadlines.contribute_seconds=20"])
        .unwrap();
    consortium
        .wait_for(
            "the first node's records are in",
            &mut [&mut aggregator, &mut first],
            |round| {
                round["members"]
                    .as_array()
                    .unwrap()
                    .iter()
                    .any(|member| member["shards"] == 3)
            },
        )
        .unwrap();
    let mut late = cluster.start_node(bank).unwrap();

    let round = consortium
        .wait_for(
            "the round is released",
            &mut [&mut aggregator, &mut first, &mut late],
            is_released,
        )
        .unwrap();
    for member in round["members"].as_array().unwrap() {
        let came = member["institution"] != insurer.as_str();
        assert_eq!(member["shards"] == 3, came, "{member}");
        assert_eq!(member["evaluated"], came, "{member}");
    }
}

#[test]
fn a_node_that_joins_in_the_middle_distils_and_evaluates() {
    let consortium = Consortium::new(3).unwrap();
    let cluster = &consortium.cluster;
    let [clinic, bank, insurer] = &consortium.names;
    let mut aggregator = cluster.start_aggregator().unwrap();
    let mut first = cluster.start_node(clinic).unwrap();
    let mut second = cluster.start_node(bank).unwrap();
    let settings = [
        "deadlines.contribute_seconds=10",
        "training.inner_rounds=30",
    ];
    consortium.open_round(&settings).unwrap();
    consortium
        .wait_for(
            "an inner round is merged",
            &mut [&mut aggregator, &mut first, &mut second],
            |round| round["merged"].as_u64().unwrap() > 0,
        )
        .unwrap();
    let mut third = cluster.start_node(insurer).unwrap();
    let round = consortium
        .wait_for(
            "the round is released",
            &mut [&mut aggregator, &mut first, &mut second, &mut third],
            is_released,
        )
        .unwrap();
    let members = round["members"].as_array().unwrap();
    let joined = members
        .iter()
        .find(|member| member["institution"] == insurer.as_str())
        .unwrap();
    assert_eq!(joined["shards"], 0, "its records came too late: {joined}");
    let adapters = joined["adapters"].as_u64().unwrap();
    assert!((1..30).contains(&adapters), "{joined}");
    assert_eq!(joined["evaluated"], true, "{joined}");
}
