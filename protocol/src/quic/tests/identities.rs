//! Who may connect, how the handshake protects it, and what each side is told when it may not.

use std::error::Error as _;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use rcgen::ExtendedKeyUsagePurpose;
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use rustls::quic::{ClientConnection, ServerConnection, Version};
use rustls::{NamedGroup, ProtocolVersion, RootCertStore};

use tokio::time::timeout;

use super::{Authority, GRACE, LIMITS, Leaf, Pair, server};
use crate::RejectCode;
use crate::Role;
use crate::frame::ALPN;
use crate::quic::verify::FaultSlot;
use crate::quic::{
    Alert, CertificateFault, Client, Credentials, LinkError, MAX_BIDI_STREAMS, PeerError,
    ServerLimits, Tasks,
};

#[test]
fn the_handshake_is_tls13_post_quantum_mutual_and_leaves_no_ticket() {
    let authority = Authority::new();
    let slot = FaultSlot::default();
    let client = authority
        .credentials(&Leaf::new("node", "st-anna"))
        .client(&slot);
    let server = authority
        .credentials(&Leaf::new("aggregator", "operator"))
        .server(&slot);
    let name = ServerName::try_from("localhost").unwrap();
    let mut client =
        ClientConnection::new(Arc::new(client.unwrap()), Version::V1, name, vec![]).unwrap();
    let mut server = ServerConnection::new(Arc::new(server.unwrap()), Version::V1, vec![]).unwrap();
    let mut after = 0;
    // As many flights as a handshake has, and a few more for what may follow it.
    for _ in 0..12 {
        let done = !client.is_handshaking() && !server.is_handshaking();
        let (mut up, mut down) = (Vec::new(), Vec::new());
        client.write_hs(&mut up);
        server.read_hs(&up).unwrap();
        server.write_hs(&mut down);
        client.read_hs(&down).unwrap();
        after += if done { up.len() + down.len() } else { 0 };
    }
    assert!(!client.is_handshaking() && !server.is_handshaking());
    assert_eq!(after, 0, "bytes after the handshake: a session ticket");
    for side in [&**client, &**server] {
        let group = side.negotiated_key_exchange_group().unwrap().name();
        assert_eq!(group, NamedGroup::X25519MLKEM768);
        assert_eq!(side.protocol_version(), Some(ProtocolVersion::TLSv1_3));
        assert_eq!(side.alpn_protocol(), Some(ALPN));
        assert_eq!(side.peer_certificates().unwrap().len(), 1);
    }
    assert!(client.zero_rtt_keys().is_none() && server.zero_rtt_keys().is_none());
}

#[tokio::test]
async fn each_side_knows_the_other_by_its_certificate() {
    let pair = Pair::new().await;
    let (aggregator, node) = (pair.near.peer(), pair.far.peer());
    assert_eq!(aggregator.role, Role::Aggregator);
    assert_eq!(
        aggregator.to_string(),
        "consilium://demo/aggregator/operator"
    );
    assert_eq!(node.to_string(), "consilium://demo/node/st-anna");
}

/// What the server finds, and what the client is told in the end.
async fn refusals(aggregator: Credentials, node: Credentials) -> (LinkError, LinkError) {
    let (server, address) = server(aggregator, LIMITS);
    let client = Client::bind(node).unwrap();
    let accept = async { server.next().await.unwrap().finish().await.unwrap_err() };
    let dial = async {
        match client.connect(&address, "localhost").await {
            Ok(connection) => connection.closed().await,
            Err(error) => error,
        }
    };
    tokio::join!(accept, dial)
}

fn certificate(error: &LinkError) -> &CertificateFault {
    match error {
        LinkError::Peer(PeerError::Certificate(fault)) => fault,
        other => panic!("{other:?}"),
    }
}

fn alert(error: &LinkError) -> Alert {
    match error {
        LinkError::Peer(PeerError::Alert(alert)) => *alert,
        other => panic!("{other:?}"),
    }
}

#[tokio::test]
async fn a_node_of_another_authority_is_refused() {
    let ours = Authority::new();
    // One of another name, and one that took our name.
    for other in [Authority::named("other"), Authority::new()] {
        let node = other.credentials_under(&ours, &Leaf::new("node", "st-anna"));
        let aggregator = ours.credentials(&Leaf::new("aggregator", "operator"));
        let (found, told) = refusals(aggregator, node).await;
        assert_eq!(certificate(&found), &CertificateFault::UnknownAuthority);
        assert!(told.to_string().contains("another authority"), "{told}");
    }
}

#[tokio::test]
async fn an_expired_node_is_refused_and_learns_why() {
    let authority = Authority::new();
    let mut leaf = Leaf::new("node", "st-anna");
    leaf.last_year = 2020;
    let aggregator = authority.credentials(&Leaf::new("aggregator", "operator"));
    let (found, told) = refusals(aggregator, authority.credentials(&leaf)).await;
    assert!(found.to_string().contains("expired on Jan  1"), "{found}");
    assert!(found.to_string().contains("2020"), "{found}");
    assert_eq!(alert(&told), Alert(45));
    assert!(told.to_string().contains("expired"), "{told}");
}

/// A client that checks nothing but the authority; gives what it is told in the end.
async fn careless(authority: &Authority, leaf: Option<&Leaf>, address: &str) -> LinkError {
    let mut roots = RootCertStore::empty();
    let ca = CertificateDer::from_pem_slice(authority.pem().as_bytes());
    roots.add(ca.unwrap()).unwrap();
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let tls = rustls::ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])
        .unwrap()
        .with_root_certificates(roots);
    let mut tls = match leaf.map(|leaf| authority.issue(leaf)) {
        None => tls.with_no_client_auth(),
        Some((certificate, key)) => {
            let chain = vec![CertificateDer::from_pem_slice(certificate.as_bytes()).unwrap()];
            let key = PrivateKeyDer::from_pem_slice(key.as_bytes()).unwrap();
            tls.with_client_auth_cert(chain, key).unwrap()
        }
    };
    tls.alpn_protocols = vec![ALPN.to_vec()];
    let crypto = quinn::crypto::rustls::QuicClientConfig::try_from(tls).unwrap();
    let config = quinn::ClientConfig::new(Arc::new(crypto));
    let endpoint = quinn::Endpoint::client("127.0.0.1:0".parse().unwrap()).unwrap();
    let connecting = endpoint
        .connect_with(config, address.parse().unwrap(), "localhost")
        .unwrap();
    match connecting.await {
        Ok(connection) => connection.closed().await.into(),
        Err(error) => error.into(),
    }
}

async fn refusals_of_careless(leaf: Option<&Leaf>) -> (LinkError, LinkError) {
    let authority = Authority::new();
    let aggregator = authority.credentials(&Leaf::new("aggregator", "operator"));
    let (server, address) = server(aggregator, LIMITS);
    tokio::join!(
        async { server.next().await.unwrap().finish().await.unwrap_err() },
        careless(&authority, leaf, &address)
    )
}

#[tokio::test]
async fn a_client_without_certificate_is_refused_and_learns_why() {
    let (found, told) = refusals_of_careless(None).await;
    assert_eq!(certificate(&found), &CertificateFault::Missing);
    assert_eq!(alert(&told), Alert(116));
}

#[tokio::test]
async fn a_peer_of_another_role_or_consortium_or_none_is_told_that_it_is_the_identity() {
    let uri = |uri: &str| Leaf {
        uri: uri.to_owned(),
        ..Leaf::new("node", "st-anna")
    };
    for (leaf, reason) in [
        (
            uri("consilium://demo/aggregator/x"),
            "expected the role node",
        ),
        (
            uri("consilium://other/node/x"),
            "expected the consortium demo",
        ),
        (uri("https://example.org"), "does not say who it is"),
    ] {
        let (found, told) = refusals_of_careless(Some(&leaf)).await;
        assert!(found.to_string().contains(reason), "{found}");
        assert_eq!(told.rejection(), Some(RejectCode::Identity), "{told:?}");
        assert!(!told.is_retryable());
    }
}

#[tokio::test]
async fn a_server_that_is_not_the_aggregator_is_refused_before_anything_is_sent() {
    let authority = Authority::new();
    let leaf = |change: fn(&mut Leaf)| {
        let mut leaf = Leaf::new("aggregator", "operator");
        change(&mut leaf);
        leaf
    };
    let cases = [
        (
            leaf(|l| l.uri = "consilium://demo/node/x".to_owned()),
            "expected the role aggregator",
        ),
        (
            leaf(|l| l.uri = "consilium://other/aggregator/x".to_owned()),
            "expected the consortium demo",
        ),
        (
            leaf(|l| l.name = "elsewhere.example".to_owned()),
            "elsewhere.example",
        ),
        (leaf(|l| l.last_year = 2020), "expired on"),
        (
            leaf(|l| l.usages = vec![ExtendedKeyUsagePurpose::ClientAuth]),
            "another purpose",
        ),
    ];
    for (leaf, reason) in cases {
        let node = authority.credentials(&Leaf::new("node", "st-anna"));
        let (found, told) = refusals(authority.credentials(&leaf), node).await;
        assert!(told.to_string().contains(reason), "{told}");
        assert!(
            matches!(told, LinkError::Peer(PeerError::Certificate(_))),
            "{told:?}"
        );
        // The server learns that its certificate was the reason.
        alert(&found);
    }
    let other = Authority::new();
    let aggregator = other.credentials_under(&authority, &Leaf::new("aggregator", "operator"));
    let node = authority.credentials(&Leaf::new("node", "st-anna"));
    let (_, told) = refusals(aggregator, node).await;
    assert_eq!(certificate(&told), &CertificateFault::UnknownAuthority);
}

#[tokio::test(start_paused = true)]
async fn an_address_that_does_not_answer_is_given_up_after_ten_seconds() {
    let silent = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
    let address = silent.local_addr().unwrap().to_string();
    let node = Authority::new().credentials(&Leaf::new("node", "st-anna"));
    let client = Client::bind(node).unwrap();
    let begun = tokio::time::Instant::now();
    let error = client.connect(&address, "localhost").await.unwrap_err();
    assert!(error.to_string().contains(&address), "{error}");
    assert!(matches!(error, LinkError::Network(_)) && error.is_retryable());
    assert_eq!(begun.elapsed().as_secs(), 10);
}

#[tokio::test]
async fn a_node_opens_eight_streams_and_the_aggregator_none() {
    let pair = Pair::new().await;
    let mut streams = Vec::new();
    for _ in 0..MAX_BIDI_STREAMS {
        streams.push(pair.stream(b"!").await);
    }
    let (mut ninth, mut reverse) = (Box::pin(pair.near.open()), Box::pin(pair.far.open()));
    assert!(timeout(Duration::ZERO, &mut ninth).await.is_err());
    assert!(timeout(Duration::ZERO, &mut reverse).await.is_err());
    // QUIC announces room by the pair.
    streams.truncate(6);
    ninth.await.unwrap();
    assert!(timeout(Duration::ZERO, &mut reverse).await.is_err());
}

#[tokio::test]
async fn a_connection_too_many_is_told_to_come_later() {
    let authority = Authority::new();
    let aggregator = authority.credentials(&Leaf::new("aggregator", "operator"));
    let (server, address) = server(aggregator, ServerLimits { connections: 1 });
    let client = Client::bind(authority.credentials(&Leaf::new("node", "st-anna"))).unwrap();
    let tasks = Tasks::new();
    let mut connections = server.listen(&tasks);
    let _first = client.connect(&address, "localhost").await.unwrap();
    let _held = connections.next().await.unwrap();
    let second = client.connect(&address, "localhost").await.unwrap_err();
    assert_eq!(second.rejection(), Some(RejectCode::Busy), "{second:?}");
    assert!(tasks.shutdown(GRACE).await.is_clean());
}

#[tokio::test]
async fn strangers_are_kept_out_of_the_accept_loop_and_shutdown_ends_it() {
    let authority = Authority::new();
    let aggregator = authority.credentials(&Leaf::new("aggregator", "operator"));
    let (server, address) = server(aggregator, LIMITS);
    let tasks = Tasks::new();
    let mut connections = server.listen(&tasks);
    careless(&authority, None, &address).await;
    let client = Client::bind(authority.credentials(&Leaf::new("node", "st-anna"))).unwrap();
    let near = client.connect(&address, "localhost").await.unwrap();
    let far = connections.next().await.unwrap();
    assert_eq!(far.peer().institution.as_str(), "st-anna");
    assert!(tasks.shutdown(GRACE).await.is_clean());
    assert!(connections.next().await.is_none());
    server.close(RejectCode::ShuttingDown, GRACE).await;
    let end = near.closed().await;
    assert_eq!(end.rejection(), Some(RejectCode::ShuttingDown), "{end:?}");
    let refused = client.connect(&address, "localhost").await.unwrap_err();
    assert!(refused.is_retryable(), "{refused:?}");
}

#[test]
fn credentials_that_cannot_be_used_name_the_file_and_the_fault() {
    let authority = Authority::new();
    let (certificate, key) = authority.issue(&Leaf::new("node", "st-anna"));
    let (_, other_key) = authority.issue(&Leaf::new("node", "st-anna"));
    let ca = authority.pem();
    let cut = |text: &str| text.lines().take(3).collect::<Vec<_>>().join("\n");
    let good = [ca.clone(), certificate.clone(), key.clone()];
    let with = |index: usize, text: String| {
        let mut files = good.clone();
        files[index] = text;
        files
    };
    for (files, words) in [
        (
            with(0, String::new()),
            "ca.pem: expected a certificate in PEM, found none",
        ),
        (
            with(1, cut(&certificate)),
            "cert.pem: expected a certificate in PEM, found a section without its END line",
        ),
        (
            with(1, key),
            "cert.pem: expected a certificate in PEM, found none",
        ),
        (with(1, ca), "cert.pem"),
        (
            with(2, certificate.clone()),
            "key.pem: expected a private key in PEM, found none",
        ),
        (with(2, other_key), "key.pem is not the key of"),
    ] {
        let folder = tempfile::tempdir().unwrap();
        for (name, text) in ["ca.pem", "cert.pem", "key.pem"].iter().zip(&files) {
            std::fs::write(folder.path().join(name), text).unwrap();
        }
        let error = Credentials::load(folder.path()).unwrap_err();
        assert!(error.to_string().contains(words), "{error}");
    }
    let error = Credentials::load(Path::new("/nonexistent")).unwrap_err();
    assert_eq!(error.to_string(), "/nonexistent/ca.pem: cannot be read");
    assert!(error.source().is_some());
}

#[test]
fn debug_of_credentials_shows_no_secret() {
    let credentials = Authority::new().credentials(&Leaf::new("node", "st-anna"));
    assert_eq!(
        format!("{credentials:?}"),
        "Credentials(consilium://demo/node/st-anna, key redacted)"
    );
}
