//! In mode adapters each site trains on its private text at home: adapters leave over QUIC, and nothing else but scores. A
//! site whose text is not named takes no part, and the round goes on without it.

use consilium_tests::{Consortium, is_released};

#[test]
fn a_round_on_private_text_is_released_from_adapters_alone() {
    let consortium = Consortium::new(5).unwrap();
    let round = consortium
        .run_round(&["mode=adapters", "max_weight=2"])
        .unwrap();
    assert_eq!(round["merged"], 2, "{round:#}");
    let expected = [("adapter", 0), ("adapter", 1), ("evaluation", 0)]
        .map(|(kind, n)| (kind.to_owned(), n, "adapters".to_owned()));
    for name in &consortium.names {
        assert_eq!(consortium.left(name).unwrap(), expected, "{name}");
    }
}

#[test]
fn a_site_without_private_text_takes_no_part_and_is_waited_for_until_the_deadline() {
    let consortium = Consortium::new(6).unwrap();
    let cluster = &consortium.cluster;
    let [clinic, bank, insurer] = &consortium.names;
    let config = cluster.node_config(insurer);
    let text = std::fs::read_to_string(&config).unwrap();
    let (kept, _) = text.split_once("[train]").unwrap();
    std::fs::write(&config, kept).unwrap();
    let mut aggregator = cluster.start_aggregator().unwrap();
    let mut nodes = consortium
        .names
        .clone()
        .map(|name| cluster.start_node(&name).unwrap());
    consortium
        .open_round(&[
            "mode=adapters",
            "deadlines.distil_seconds=8",
            "deadlines.evaluate_seconds=5",
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
        assert_eq!(member["adapters"], usize::from(came), "{member}");
    }
    assert!(consortium.left(insurer).unwrap().is_empty());
    for name in [clinic, bank] {
        assert_eq!(consortium.left(name).unwrap().len(), 2, "{name}");
    }
}
