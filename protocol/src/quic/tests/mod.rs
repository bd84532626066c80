//! Real sockets on the loopback interface, with certificates made on the spot.

mod chunks;
mod frames;
mod identities;
mod strangers;
mod throughput;
mod transfers;

use std::net::{Ipv4Addr, SocketAddr};
use std::path::Path;
use std::time::Duration;

use rcgen::string::Ia5String;
use rcgen::{
    BasicConstraints, CertificateParams, CertifiedIssuer, DnType, ExtendedKeyUsagePurpose, IsCa,
    KeyPair, SanType, date_time_ymd,
};

use super::*;
use crate::limits;

pub(super) const GRACE: Duration = Duration::from_secs(5);
pub(super) const LIMITS: ServerLimits = ServerLimits { connections: 16 };

pub(super) const CHUNK: u64 = limits::CHUNK as u64;

pub(super) struct Authority(CertifiedIssuer<'static, KeyPair>);

/// What a test certificate says; everything is right unless changed.
pub(super) struct Leaf {
    pub(super) uri: String,
    pub(super) name: String,
    pub(super) last_year: i32,
    pub(super) usages: Vec<ExtendedKeyUsagePurpose>,
}

impl Leaf {
    pub(super) fn new(role: &str, institution: &str) -> Self {
        Self {
            uri: format!("consilium://demo/{role}/{institution}"),
            name: "localhost".to_owned(),
            last_year: 2999,
            usages: vec![
                ExtendedKeyUsagePurpose::ClientAuth,
                ExtendedKeyUsagePurpose::ServerAuth,
            ],
        }
    }
}

impl Authority {
    pub(super) fn new() -> Self {
        Self::named("authority")
    }

    pub(super) fn named(name: &str) -> Self {
        let mut params = CertificateParams::default();
        params.distinguished_name.push(DnType::CommonName, name);
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        params.not_before = date_time_ymd(2000, 1, 1);
        params.not_after = date_time_ymd(2999, 1, 1);
        let key = KeyPair::generate().unwrap();
        Self(CertifiedIssuer::self_signed(params, key).unwrap())
    }

    /// PEM of a certificate and its key.
    pub(super) fn issue(&self, leaf: &Leaf) -> (String, String) {
        let mut params = CertificateParams::default();
        params.subject_alt_names = vec![
            SanType::URI(Ia5String::try_from(leaf.uri.as_str()).unwrap()),
            SanType::DnsName(Ia5String::try_from(leaf.name.as_str()).unwrap()),
        ];
        params.extended_key_usages = leaf.usages.clone();
        params.not_before = date_time_ymd(2000, 1, 1);
        params.not_after = date_time_ymd(leaf.last_year, 1, 1);
        let key = KeyPair::generate().unwrap();
        let certificate = params.signed_by(&key, &self.0).unwrap();
        (certificate.pem(), key.serialize_pem())
    }

    /// Credentials of a leaf of ours that trusts `authority`.
    pub(super) fn credentials_under(&self, authority: &Self, leaf: &Leaf) -> Credentials {
        let (certificate, key) = self.issue(leaf);
        let pem = |path, text| Pem {
            path: Path::new(path),
            text,
        };
        Credentials::from_pem(
            pem("ca.pem", authority.0.pem().as_bytes()),
            pem("cert.pem", certificate.as_bytes()),
            pem("key.pem", key.as_bytes()),
        )
        .unwrap()
    }

    pub(super) fn credentials(&self, leaf: &Leaf) -> Credentials {
        self.credentials_under(self, leaf)
    }

    pub(super) fn pem(&self) -> String {
        self.0.pem()
    }
}

pub(super) fn server(credentials: Credentials, limits: ServerLimits) -> (Server, String) {
    let any = SocketAddr::from((Ipv4Addr::LOCALHOST, 0));
    let server = Server::bind(any, credentials, limits).unwrap();
    let address = server.local_address().unwrap().to_string();
    (server, address)
}

/// Both ends of a connection that works.
pub(super) struct Pair {
    pub(super) server: Server,
    pub(super) address: String,
    pub(super) client: Client,
    pub(super) near: Connection,
    pub(super) far: Connection,
}

impl Pair {
    pub(super) async fn new() -> Self {
        let authority = Authority::new();
        let aggregator = authority.credentials(&Leaf::new("aggregator", "operator"));
        let node = authority.credentials(&Leaf::new("node", "st-anna"));
        let (server, address) = server(aggregator, LIMITS);
        let client = Client::bind(node).unwrap();
        let (near, far) = join(&server, &address, &client).await;
        Self {
            server,
            address,
            client,
            near,
            far,
        }
    }

    /// Another connection of the same client.
    pub(super) async fn again(&mut self) {
        (self.near, self.far) = join(&self.server, &self.address, &self.client).await;
    }

    /// Both ends of a new stream on which the client has sent `first`.
    pub(super) async fn stream(&self, first: &[u8]) -> (Stream, Stream) {
        let mut near = self.near.open().await.unwrap();
        near.send.write_all(first).await.unwrap();
        (near, self.far.accept().await.unwrap())
    }
}

async fn join(server: &Server, address: &str, client: &Client) -> (Connection, Connection) {
    let (near, far) = tokio::join!(client.connect(address, "localhost"), async {
        server.next().await.unwrap().finish().await
    });
    (near.unwrap(), far.unwrap())
}

/// Bytes that do not compress, the same for the same length.
pub(super) fn noise(length: usize) -> Vec<u8> {
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    (0..length)
        .map(|_| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            state.to_le_bytes()[3]
        })
        .collect()
}

pub(super) fn quiet(_: u64) {}

pub(super) fn impatient() -> Pace {
    Pace {
        header: Duration::from_millis(30),
        window: Duration::from_millis(60),
        floor: 1 << 30,
        answer: Duration::from_millis(30),
    }
}
