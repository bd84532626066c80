//! Keys that a server asks for, and certificates that it shows.

use std::fs;
use std::sync::Arc;

use consilium_node::scorer::{Scorer, ServerKind};
use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair};
use rustls::ServerConfig;

use crate::Site;
use crate::fake::{Fake, Fault};

#[test]
fn the_key_is_sent_and_never_shown() {
    let site = Site::new();
    let mut fake = Fake::new(ServerKind::Vllm, site.model(), Fault::None);
    fake.key = Some("s3cret-of-the-site");
    let server = fake.start();
    let problem = site.score(&mut site.scorer(&server, 20)).unwrap_err();
    assert!(
        problem.contains("401") && problem.contains("key_file"),
        "{problem}"
    );
    let mut settings = site.settings(&server, 20);
    settings.server.key_file = Some(site.at("key"));
    fs::write(site.at("key"), "wrong-key-of-the-site\n").unwrap();
    let mut scorer = Scorer::new(&settings).unwrap();
    let problem = site.score(&mut scorer).unwrap_err();
    let shown = format!("{scorer:?} {problem}");
    assert!(
        problem.contains("401") && !shown.contains("wrong-key"),
        "{shown}"
    );
    fs::write(site.at("key"), "s3cret-of-the-site\n").unwrap();
    site.score(&mut Scorer::new(&settings).unwrap()).unwrap();
    fs::write(site.at("key"), "two words").unwrap();
    let error = Scorer::new(&settings).unwrap_err().to_string();
    assert!(
        error.contains("one line") && !error.contains("words"),
        "{error}"
    );
}

/// An authority's certificate as PEM, and a server's configuration with a leaf of it for 127.0.0.1.
fn authority() -> (String, ServerConfig) {
    let mut params = CertificateParams::new(Vec::new()).unwrap();
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let key = KeyPair::generate().unwrap();
    let pem = params.self_signed(&key).unwrap().pem();
    let issuer = Issuer::new(params, key);
    let key = KeyPair::generate().unwrap();
    let leaf = CertificateParams::new(vec!["127.0.0.1".to_owned()]).unwrap();
    let leaf = leaf.signed_by(&key, &issuer).unwrap();
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let config = ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(
            vec![leaf.der().clone()],
            key.serialize_der().try_into().unwrap(),
        )
        .unwrap();
    (pem, config)
}

#[test]
fn a_certificate_is_accepted_from_the_named_authority_alone() {
    let site = Site::new();
    let (pem, config) = authority();
    let (other, _) = authority();
    let server = Fake::new(ServerKind::Vllm, site.model(), Fault::None).start_tls(config);
    fs::write(site.at("ca.pem"), other).unwrap();
    let settings = site.settings(&server, 20);
    let problem = site
        .score(&mut Scorer::new(&settings).unwrap())
        .unwrap_err();
    assert!(problem.contains("source_server.ca"), "{problem}");
    assert_eq!(
        server.count(),
        0,
        "nothing was said before the certificate was checked"
    );
    fs::write(site.at("ca.pem"), pem).unwrap();
    site.score(&mut Scorer::new(&settings).unwrap()).unwrap();
    fs::write(site.at("ca.pem"), "no certificate").unwrap();
    let problem = Scorer::new(&settings).unwrap_err().to_string();
    assert!(
        problem.contains("ca.pem") && problem.contains("CERTIFICATE"),
        "{problem}"
    );
}
