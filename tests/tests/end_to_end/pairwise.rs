//! In mode pairwise each site distils its own model into the pivot at home: adapters leave over QUIC, records never do.

use consilium_tests::Consortium;

/// Whether the header of a safetensors file names a column that only shards of records have.
fn is_shard(bytes: &[u8]) -> bool {
    let mut places = bytes.windows(8).take(4096);
    places.any(|window| window == b"\"missed\"")
}

#[test]
fn a_round_is_released_from_adapters_alone() {
    let consortium = Consortium::new(4).unwrap();
    let round = consortium
        .run_round(&[
            "mode=pairwise",
            "training.cross_entropy_permille=500",
            r#"training.distillation={"loss":"infigfusion","symbols":6,"temperature_permille":1000,"graph_permille":500}"#,
        ])
        .unwrap();
    assert_eq!(round["merged"], 2, "{round:#}");
    assert!(round["targets"].is_null(), "{round:#}");
    for member in round["members"].as_array().unwrap() {
        assert_eq!(member["shards"], 0, "{member}");
        assert_eq!(member["adapters"], 2, "{member}");
        assert_eq!(member["evaluated"], true, "{member}");
    }
    // The sites' own ledgers, and what the aggregator has, say the same.
    let expected = [("adapter", 0), ("adapter", 1), ("evaluation", 0)]
        .map(|(kind, n)| (kind.to_owned(), n, "pairwise".to_owned()));
    for name in &consortium.names {
        assert_eq!(consortium.left(name).unwrap(), expected, "{name}");
    }
    let blobs = consortium.cluster.data_dir().join("blobs");
    let mut files = 0;
    for entry in walk(&blobs) {
        files += 1;
        let bytes = std::fs::read(&entry).unwrap();
        assert!(
            !is_shard(&bytes),
            "{} is a shard of records",
            entry.display()
        );
    }
    assert!(files > 6, "{files} blobs");
}

fn walk(folder: &std::path::Path) -> Vec<std::path::PathBuf> {
    let mut files = Vec::new();
    for entry in folder.read_dir().unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            files.extend(walk(&path));
        } else {
            files.push(path);
        }
    }
    files
}
