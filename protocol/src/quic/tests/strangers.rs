//! What a peer gets before it has shown who it is: a Retry, and ten seconds.

use std::net::{Ipv4Addr, SocketAddr};
use std::time::Duration;

use tokio::net::UdpSocket;
use tokio::time::{Instant, timeout};

use super::{Authority, LIMITS, Leaf, server};
use crate::quic::error::NetworkError;
use crate::quic::{Client, Handshake, LinkError, Server, Tasks};

/// Type bits of a QUIC v1 long header (RFC 9000, 17.2).
const RETRY: u8 = 0xf0;
const PATIENCE: Duration = Duration::from_secs(10);

/// A server, and the datagrams of a client that cannot reach it by itself.
struct Wire {
    server: Server,
    address: SocketAddr,
    /// The client's idea of the server.
    relay: UdpSocket,
    _dialling: Tasks,
}

impl Wire {
    async fn new() -> Self {
        let authority = Authority::new();
        let (server, address) = server(
            authority.credentials(&Leaf::new("aggregator", "operator")),
            LIMITS,
        );
        let client = Client::bind(authority.credentials(&Leaf::new("node", "st-anna"))).unwrap();
        let relay = socket().await;
        let dialled = relay.local_addr().unwrap().to_string();
        let dialling = Tasks::new();
        dialling.spawn("dial", async move {
            // Nobody answers to the end.
            let _ = client.connect(&dialled, "localhost").await;
        });
        Self {
            server,
            address: address.parse().unwrap(),
            relay,
            _dialling: dialling,
        }
    }

    /// The client's first Initial packet once it has the token of a Retry that was sent to `front`.
    async fn initial_with_token(&self, front: &UdpSocket) -> Vec<u8> {
        let (initial, client) = receive(&self.relay).await;
        let retry = self.answer(front, &initial).await.unwrap();
        assert_eq!(retry[0] & RETRY, RETRY, "{:#04x}", retry[0]);
        assert!(
            retry.len() < initial.len(),
            "{} bytes for {}: a forged address could be flooded",
            retry.len(),
            initial.len()
        );
        self.relay.send_to(&retry, client).await.unwrap();
        loop {
            let (datagram, _) = receive(&self.relay).await;
            if has_token(&datagram) {
                return datagram;
            }
        }
    }

    /// Sends to the server from `socket`; its first answer, unless it starts a handshake.
    async fn answer(&self, socket: &UdpSocket, datagram: &[u8]) -> Result<Vec<u8>, Handshake> {
        socket.send_to(datagram, self.address).await.unwrap();
        tokio::select! {
            (answer, _) = receive(socket) => Ok(answer),
            handshake = self.server.next() => Err(handshake.unwrap()),
        }
    }
}

/// Whether an Initial packet (RFC 9000, 17.2.2) carries a token.
fn has_token(datagram: &[u8]) -> bool {
    let destination = usize::from(datagram[5]);
    let source = usize::from(datagram[6 + destination]);
    datagram[7 + destination + source] != 0
}

async fn socket() -> UdpSocket {
    UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap()
}

async fn receive(socket: &UdpSocket) -> (Vec<u8>, SocketAddr) {
    let mut datagram = vec![0; 2048];
    let received = timeout(PATIENCE, socket.recv_from(&mut datagram)).await;
    let (length, from) = received.expect("a datagram").unwrap();
    datagram.truncate(length);
    (datagram, from)
}

#[tokio::test]
async fn an_address_that_was_not_validated_gets_a_retry_and_no_handshake() {
    let wire = Wire::new().await;
    let front = socket().await;
    // The token of the Retry counts only where it was sent.
    let with_token = wire.initial_with_token(&front).await;
    let thief = socket().await;
    let stolen = wire.answer(&thief, &with_token).await.unwrap();
    assert!(stolen.len() < with_token.len());
    let handshake = wire.answer(&front, &with_token).await.unwrap_err();
    assert_eq!(handshake.remote_address(), front.local_addr().unwrap());
}

#[tokio::test]
async fn a_peer_that_falls_silent_in_its_handshake_is_given_up_after_ten_seconds() {
    let wire = Wire::new().await;
    let front = socket().await;
    let initial = wire.initial_with_token(&front).await;
    let handshake = wire.answer(&front, &initial).await.unwrap_err();
    // Nothing of the client comes through any more. The clock jumps from timer to timer.
    tokio::time::pause();
    let begun = Instant::now();
    let error = handshake.finish().await.unwrap_err();
    assert!(
        matches!(
            &error,
            LinkError::Network(NetworkError::Handshake { address, .. })
                if *address == front.local_addr().unwrap()
        ),
        "{error:?}"
    );
    let waited = begun.elapsed();
    assert!(
        (Duration::from_secs(10)..Duration::from_secs(11)).contains(&waited),
        "{waited:?}"
    );
}
