//! The program does what its help says, with the exit status that scripts rely on.

#![cfg(test)]

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::process::{Command, Output};

use consilium_certs::Member;
use serde_json::Value;

fn run(folder: &Path, line: &str) -> Output {
    Command::new(env!("CARGO_BIN_EXE_consilium-certs"))
        .current_dir(folder)
        .args(line.split_whitespace())
        .output()
        .unwrap()
}

fn ok(folder: &Path, line: &str) -> String {
    let output = run(folder, line);
    let talk = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{line}: {talk}");
    String::from_utf8(output.stdout).unwrap()
}

/// Exit status and stderr of a command that must fail.
fn refused(folder: &Path, line: &str) -> (i32, String) {
    let output = run(folder, line);
    assert!(!output.status.success(), "{line} succeeded");
    (
        output.status.code().unwrap(),
        String::from_utf8(output.stderr).unwrap(),
    )
}

fn value<'a>(stdout: &'a str, name: &str) -> &'a str {
    let line = stdout
        .lines()
        .find_map(|line| line.strip_prefix(&format!("{name}: ")));
    line.unwrap_or_else(|| panic!("no {name} in {stdout}"))
}

fn mode(path: &Path) -> u32 {
    path.metadata().unwrap().permissions().mode() & 0o7777
}

fn consortium() -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    ok(folder.path(), "init --consortium demo --out ca");
    folder
}

#[test]
fn a_consortium_is_set_up_and_its_members_verify() {
    let folder = consortium();
    let folder = folder.path();
    let issued = ok(
        folder,
        "issue node --institution st-anna --authority ca --out st-anna",
    );
    assert_eq!(value(&issued, "identity"), "consilium://demo/node/st-anna");
    let line = "issue aggregator --institution op --ip 127.0.0.1 --dns localhost";
    let issued = ok(folder, &format!("{line} --authority ca --out op"));
    assert!(value(&issued, "log_key").starts_with("demo/log+"));
    for member in ["st-anna", "op"] {
        ok(folder, &format!("verify --authority ca {member}/cert.pem"));
        ok(
            folder,
            &format!("verify --authority {member} {member}/cert.pem"),
        );
        let loaded = Member::load(&folder.join(member)).unwrap();
        assert_eq!(loaded.identity.institution.as_str(), member);
        let public = fs::read_to_string(folder.join(member).join("signing.pub")).unwrap();
        assert_eq!(public.trim_end(), loaded.signing.public_hex());
    }
    for secret in [
        "ca/ca.key",
        "ca/authority.key",
        "st-anna/key.pem",
        "op/signing.key",
    ] {
        assert_eq!(mode(&folder.join(secret)), 0o600, "{secret}");
    }
    assert_eq!(mode(&folder.join("ca")), 0o700);
}

#[test]
fn the_key_of_a_request_never_leaves_the_site() {
    let folder = consortium();
    let folder = folder.path();
    ok(
        folder,
        "request node --institution bank-9 --consortium demo --out site",
    );
    fs::create_dir(folder.join("post")).unwrap();
    fs::copy(
        folder.join("site/request.pem"),
        folder.join("post/request.pem"),
    )
    .unwrap();
    let sign = "sign node --institution bank-9 --request post/request.pem --authority ca";
    ok(folder, &format!("{sign} --out post"));
    for file in ["cert.pem", "ca.pem", "authority.pub"] {
        fs::copy(
            folder.join("post").join(file),
            folder.join("site").join(file),
        )
        .unwrap();
    }
    assert!(!folder.join("post/key.pem").exists());
    let member = Member::load(&folder.join("site")).unwrap();
    assert_eq!(member.identity.to_string(), "consilium://demo/node/bank-9");

    let (status, talk) = refused(
        folder,
        &format!("{} --out post", sign.replace("bank-9", "evil")),
    );
    assert_eq!(status, 4, "{talk}");
    let again = "request node --institution bank-9 --consortium demo --out site";
    assert_eq!(refused(folder, again).0, 2);
    let before = fs::read(folder.join("site/key.pem")).unwrap();
    ok(folder, &format!("{again} --keep-key"));
    assert_eq!(fs::read(folder.join("site/key.pem")).unwrap(), before);
}

#[test]
fn nothing_is_overwritten_without_force_and_a_signing_key_never() {
    let folder = consortium();
    let folder = folder.path();
    let issue = "issue node --institution st-anna --authority ca --out st-anna";
    ok(folder, issue);
    let read = |name: &str| fs::read(folder.join(name)).unwrap();
    let (key, signing, ca) = (
        read("st-anna/key.pem"),
        read("st-anna/signing.key"),
        read("ca/ca.key"),
    );
    let (status, talk) = refused(folder, issue);
    assert_eq!(status, 2);
    assert!(
        talk.contains("st-anna/key.pem") && talk.contains("--force"),
        "{talk}"
    );
    assert_eq!(refused(folder, "init --consortium demo --out ca").0, 2);
    assert_eq!(
        (read("st-anna/key.pem"), read("ca/ca.key")),
        (key.clone(), ca)
    );
    ok(folder, &format!("{issue} --force"));
    assert_ne!(read("st-anna/key.pem"), key);
    assert_eq!(read("st-anna/signing.key"), signing);
    Member::load(&folder.join("st-anna")).unwrap();
}

#[test]
fn keys_that_do_not_belong_together_are_refused() {
    let folder = consortium();
    let folder = folder.path();
    ok(folder, "init --consortium demo --out rival");
    let issue = "issue node --institution a --authority ca --out";
    ok(folder, &format!("{issue} a"));
    ok(folder, &format!("{issue} b"));
    fs::copy(folder.join("b/key.pem"), folder.join("a/key.pem")).unwrap();
    let mismatch = Member::load(&folder.join("a")).unwrap_err().to_string();
    assert!(
        mismatch.contains("a/key.pem is not the key of"),
        "{mismatch}"
    );
    for file in ["ca.key", "authority.key"] {
        let kept = fs::read(folder.join("ca").join(file)).unwrap();
        fs::copy(
            folder.join("rival").join(file),
            folder.join("ca").join(file),
        )
        .unwrap();
        let (status, talk) = refused(folder, &format!("{issue} c"));
        assert_eq!(status, 4, "{talk}");
        assert!(talk.contains(&format!("ca/{file}")), "{talk}");
        fs::write(folder.join("ca").join(file), kept).unwrap();
    }
}

#[test]
fn keys_open_to_others_are_refused_with_the_fix() {
    let folder = consortium();
    let folder = folder.path();
    ok(folder, "identity new --out me.key");
    let shown = ok(folder, "identity show me.key --name demo/log");
    assert_eq!(value(&shown, "public_key").len(), 64);
    assert!(value(&shown, "verifier_key").starts_with("demo/log+"));
    for (file, line) in [
        ("me.key", "identity show me.key"),
        (
            "ca/ca.key",
            "issue node --institution a --authority ca --out a",
        ),
        (
            "ca/authority.key",
            "issue node --institution a --authority ca --out a",
        ),
    ] {
        let path = folder.join(file);
        fs::set_permissions(&path, fs::Permissions::from_mode(0o644)).unwrap();
        let (status, talk) = refused(folder, line);
        assert_eq!(status, 4, "{talk}");
        assert!(talk.contains(&format!("chmod 600 {file}")), "{talk}");
        fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).unwrap();
    }
}

#[test]
fn verify_says_no_with_status_one_and_json_says_why() {
    let folder = consortium();
    let folder = folder.path();
    ok(folder, "init --consortium demo --out rival");
    ok(
        folder,
        "issue node --institution a --authority rival --out a",
    );
    let output = run(folder, "verify --authority ca a/cert.pem --json");
    assert_eq!(output.status.code(), Some(1));
    let reply: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(reply["status"], "no");
    assert_eq!(reply["code"], "CERT-WRONG-AUTHORITY");
    assert_eq!(reply["data"]["uri"][0], "consilium://demo/node/a");
    let shown: Value = serde_json::from_str(&ok(folder, "show a/cert.pem --json")).unwrap();
    assert_eq!(shown["status"], "ok");
    assert_eq!(shown["data"]["extended_key_usage"][0], "clientAuth");
    assert_eq!(shown["data"]["spki_sha256"], reply["data"]["spki_sha256"]);
}

#[test]
fn bad_usage_and_bad_files_name_the_culprit() {
    let folder = consortium();
    let folder = folder.path();
    fs::write(folder.join("junk.pem"), "junk").unwrap();
    for (line, word) in [
        ("", "Usage"),
        ("init --consortium Demo --out x", "identifier"),
        (
            "issue aggregator --institution op --authority ca --out op",
            "--dns",
        ),
        (
            "issue node --institution a --days 0 --authority ca --out a",
            "1 to 825",
        ),
        (
            "issue node --institution a --authority nowhere --out a",
            "nowhere/ca.pem",
        ),
        ("show junk.pem", "junk.pem"),
        ("show missing.pem", "missing.pem"),
        ("verify --authority ca junk.pem", "junk.pem"),
        ("identity show ca/ca.key", "ed25519"),
    ] {
        let (status, talk) = refused(folder, line);
        assert_eq!(status, 2, "{line}: {talk}");
        assert!(talk.contains(word), "{line}: {talk}");
    }
    assert!(!folder.join("a").exists());
}

#[test]
fn a_signed_charter_verifies_and_an_altered_one_does_not() {
    let folder = consortium();
    let folder = folder.path();
    let node = ok(
        folder,
        "issue node --institution st-anna --authority ca --out st-anna",
    );
    let op = ok(
        folder,
        "issue aggregator --institution op --dns localhost --authority ca --out op",
    );
    let charter = format!(
        "# Agreed in Vienna.\nconsortium = \"demo\"\nlog_key = \"{}\"\nmodes = [\"unified\"]\nquorum = 1\n\
         max_symbols = 16\ngate_bound_permille = 20\n\n[[members]]\ninstitution = \"st-anna\"\nkey = \"{}\"\n",
        value(&op, "log_key"),
        value(&node, "public_key")
    );
    fs::write(folder.join("charter.toml"), &charter).unwrap();
    let sign = "charter sign --authority ca --charter charter.toml --out charter.signed";
    ok(folder, sign);
    let signed = fs::read_to_string(folder.join("charter.signed")).unwrap();
    assert!(
        signed.starts_with("consilium/charter/1\n# Agreed in Vienna.\n"),
        "{signed}"
    );
    assert!(signed.contains("\n— demo/authority "), "{signed}");
    let good = ok(folder, "charter verify --authority st-anna charter.signed");
    assert_eq!(value(&good, "members"), "st-anna");

    fs::write(
        folder.join("bad.signed"),
        signed.replace("quorum = 1", "quorum = 2"),
    )
    .unwrap();
    assert_eq!(
        refused(folder, "charter verify --authority ca bad.signed").0,
        1
    );
    ok(folder, "init --consortium demo --out rival");
    assert_eq!(
        refused(folder, "charter verify --authority rival charter.signed").0,
        1
    );

    for (from, to, word) in [
        ("\"demo\"", "\"rival\"", "consortium"),
        ("demo/log+", "demo/log-", "log_key"),
        ("quorum = 1", "quorum = 9", "quorum"),
        ("quorum", "qorum", "qorum"),
    ] {
        fs::write(folder.join("charter.toml"), charter.replace(from, to)).unwrap();
        let (status, talk) = refused(folder, &format!("{sign} --force"));
        assert_eq!(status, 2, "{talk}");
        assert!(
            talk.contains("charter.toml") && talk.contains(word),
            "{talk}"
        );
    }
}
