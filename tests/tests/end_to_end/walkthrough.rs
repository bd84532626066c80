//! What `examples/running.md` tells a newcomer to type, typed into a shell, ends with a release.

use std::fs;
use std::net::UdpSocket;
use std::path::Path;
use std::process::Command;

/// Seconds after which the shell and all it started are ended.
const PATIENCE: &str = "300";

#[test]
fn the_commands_of_the_page_lead_to_a_release() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    let page = fs::read_to_string(root.join("examples/running.md")).unwrap();
    let blocks: Vec<&str> = page
        .split("```sh\n")
        .skip(1)
        .map(|block| block.split("```").next().unwrap())
        .collect();
    assert!(blocks.len() >= 6, "the page has lost its commands");

    // Port 4433 may be taken on this machine.
    let free = UdpSocket::bind("127.0.0.1:0").unwrap();
    let port = free.local_addr().unwrap().port().to_string();
    drop(free);
    let folder = tempfile::tempdir().unwrap();
    let samples = folder.path().join("samples");
    fs::create_dir(&samples).unwrap();
    for entry in fs::read_dir(root.join("examples/config")).unwrap() {
        let entry = entry.unwrap();
        let text = fs::read_to_string(entry.path()).unwrap();
        fs::write(samples.join(entry.file_name()), text.replace("4433", &port)).unwrap();
    }

    let programs = consilium_tests::binaries().unwrap();
    let path = std::env::join_paths(
        std::iter::once(programs).chain(std::env::split_paths(&std::env::var_os("PATH").unwrap())),
    );
    let output = Command::new("timeout")
        .args([PATIENCE, "bash", "-euo", "pipefail", "-c"])
        .arg(format!("trap 'kill $(jobs -p)' ERR\n{}", blocks.concat()).replace("4433", &port))
        .current_dir(folder.path())
        .env("PATH", path.unwrap())
        .env("samples", &samples)
        .output()
        .unwrap();
    let logs = ["hub", "clinic", "bank"].map(|party| {
        let log = fs::read_to_string(folder.path().join(party).join("log")).unwrap_or_default();
        format!("== {party}\n{log}")
    });
    assert!(
        output.status.success(),
        "{}\n{}{}",
        output.status,
        String::from_utf8_lossy(&output.stderr),
        logs.concat()
    );
    let stdout = String::from_utf8(output.stdout).unwrap();
    assert!(stdout.contains("adapter_model.safetensors"), "{stdout}");
    let both = stdout.matches("artefacts_acknowledged: 6").count();
    assert_eq!(
        both, 2,
        "records, four adapters and an evaluation each: {stdout}"
    );
}
