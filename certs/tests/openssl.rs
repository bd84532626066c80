//! Keys and certificates are what OpenSSL takes them for.

#![cfg(test)]

use std::path::Path;
use std::process::{Command, Output};

use consilium_certs::{Authority, LeafProfile, Overwrite, leaf, pem};
use consilium_protocol::time::SystemClock;
use consilium_protocol::{Clock as _, ConsortiumId, InstitutionId};

fn openssl(folder: &Path, args: &[&str]) -> Output {
    Command::new("openssl")
        .current_dir(folder)
        .args(args)
        .output()
        .unwrap_or_else(|error| {
            panic!("cannot run openssl ({error}); install it, on Debian with: apt install openssl")
        })
}

fn text(output: Output) -> String {
    assert!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
    String::from_utf8(output.stdout).unwrap()
}

fn institution(name: &str) -> InstitutionId {
    InstitutionId::new(name).unwrap()
}

fn authority(folder: &Path) -> Authority {
    let consortium = ConsortiumId::new("demo").unwrap();
    let authority = Authority::create(&consortium, 10, SystemClock.now()).unwrap();
    authority.save(folder, Overwrite::Refuse).unwrap();
    authority
}

fn issue(authority: &Authority, folder: &Path, name: &str, profile: &LeafProfile) {
    let credentials = authority.issue(profile, SystemClock.now()).unwrap();
    let path = |end: &str| folder.join(format!("{name}.{end}"));
    pem::write_public(&path("pem"), &credentials.certificate, Overwrite::Refuse).unwrap();
    pem::write_secret(&path("key"), &credentials.key.to_pem(), Overwrite::Refuse).unwrap();
}

#[test]
fn openssl_accepts_the_chain_for_its_purpose_only() {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    let authority = authority(folder);
    issue(
        &authority,
        folder,
        "node",
        &LeafProfile::node(institution("st-anna")),
    );
    let names = vec!["fusion.example.org".to_owned()];
    let ip = vec!["127.0.0.1".parse().unwrap()];
    issue(
        &authority,
        folder,
        "agg",
        &LeafProfile::aggregator(institution("op"), names, ip),
    );

    let verify = |purpose, more: &[&str], file| {
        let mut args = vec![
            "verify",
            "-x509_strict",
            "-CAfile",
            "ca.pem",
            "-purpose",
            purpose,
        ];
        args.extend(more);
        args.push(file);
        openssl(folder, &args)
    };
    assert_eq!(text(verify("sslclient", &[], "node.pem")), "node.pem: OK\n");
    assert!(!verify("sslserver", &[], "node.pem").status.success());
    for name in [
        ["-verify_hostname", "fusion.example.org"],
        ["-verify_ip", "127.0.0.1"],
    ] {
        assert_eq!(text(verify("sslserver", &name, "agg.pem")), "agg.pem: OK\n");
    }
    assert!(!verify("sslclient", &[], "agg.pem").status.success());
    let other = ["-verify_hostname", "other.example.org"];
    assert!(!verify("sslserver", &other, "agg.pem").status.success());
}

#[test]
fn openssl_reads_curve_usage_and_identity() {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    let authority = authority(folder);
    issue(
        &authority,
        folder,
        "node",
        &LeafProfile::node(institution("st-anna")),
    );
    let node = text(openssl(
        folder,
        &["x509", "-in", "node.pem", "-noout", "-text"],
    ));
    for part in [
        "ASN1 OID: prime256v1",
        "ecdsa-with-SHA256",
        "URI:consilium://demo/node/st-anna",
        "TLS Web Client Authentication",
        "CA:FALSE",
        "Subject: O = demo, CN = st-anna",
    ] {
        assert!(node.contains(part), "{part:?} is missing in\n{node}");
    }
    assert!(!node.contains("TLS Web Server Authentication"), "{node}");
    let mut usage = node
        .lines()
        .skip_while(|line| !line.contains("X509v3 Key Usage: critical"));
    assert_eq!(usage.nth(1).map(str::trim), Some("Digital Signature"));

    let ca = text(openssl(
        folder,
        &["x509", "-in", "ca.pem", "-noout", "-text"],
    ));
    for part in [
        "CA:TRUE, pathlen:0",
        "Certificate Sign, CRL Sign",
        "ASN1 OID: prime256v1",
    ] {
        assert!(ca.contains(part), "{part:?} is missing in\n{ca}");
    }
}

#[test]
fn openssl_reads_both_kinds_of_key() {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    let authority = authority(folder);
    issue(
        &authority,
        folder,
        "node",
        &LeafProfile::node(institution("st-anna")),
    );
    let of_key = text(openssl(folder, &["pkey", "-in", "node.key", "-pubout"]));
    let of_certificate = text(openssl(
        folder,
        &["x509", "-in", "node.pem", "-noout", "-pubkey"],
    ));
    assert_eq!(of_key, of_certificate);
    let signing = text(openssl(
        folder,
        &["pkey", "-in", "authority.key", "-noout", "-text_pub"],
    ));
    assert!(signing.contains("ED25519 Public-Key"), "{signing}");
    let hex: String = signing
        .lines()
        .filter(|line| line.starts_with(' '))
        .flat_map(|line| line.chars().filter(char::is_ascii_hexdigit))
        .collect();
    let key = authority.verifier_key().public_key();
    let expected: String = key
        .as_bytes()
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect();
    assert_eq!(hex, expected);
}

#[test]
fn openssl_accepts_a_request_and_the_certificate_that_answers_it() {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    let authority = authority(folder);
    let profile = LeafProfile::node(institution("bank-9"));
    let key = consilium_certs::TlsKey::generate().unwrap();
    let request = leaf::request(authority.consortium(), &profile, &key).unwrap();
    let path = folder.join("request.pem");
    pem::write_public(&path, &request, Overwrite::Refuse).unwrap();
    let shown = openssl(
        folder,
        &["req", "-in", "request.pem", "-verify", "-noout", "-text"],
    );
    assert!(text(shown).contains("URI:consilium://demo/node/bank-9"));
    let certificate = authority
        .sign_request(&request, &path, &profile, SystemClock.now())
        .unwrap();
    pem::write_public(&folder.join("cert.pem"), &certificate, Overwrite::Refuse).unwrap();
    let verified = openssl(
        folder,
        &["verify", "-x509_strict", "-CAfile", "ca.pem", "cert.pem"],
    );
    assert_eq!(text(verified), "cert.pem: OK\n");
    pem::write_secret(&folder.join("key.pem"), &key.to_pem(), Overwrite::Refuse).unwrap();
    assert_eq!(
        text(openssl(folder, &["pkey", "-in", "key.pem", "-pubout"])),
        text(openssl(
            folder,
            &["x509", "-in", "cert.pem", "-noout", "-pubkey"]
        ))
    );
}
