//! Who dials, who accepts, and the limits of a connection.

use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};
use std::sync::Arc;
use std::time::Duration;

use quinn::crypto::rustls::{QuicClientConfig, QuicServerConfig};
use quinn::{
    ConnectionError, IdleTimeout, TokioRuntime, TransportConfig, ValidationTokenConfig, VarInt,
};
use rustls::pki_types::{CertificateDer, ServerName};
use tokio::sync::mpsc;
use tokio::time::timeout;

use super::error::{LinkError, LocalError, NetworkError, PeerError, alert};
use super::frame::Stream;
use super::identity::{self, IdentityError};
use super::tasks::Tasks;
use super::tls::{Credentials, CredentialsError};
use super::verify::{CertificateFault, FaultSlot, check};
use crate::identity::{PeerIdentity, Role};
use crate::reject::RejectCode;

/// Streams that a node may have open at once: control, and transfers. Room is announced again when two have ended, so
/// at least seven can be open.
pub const MAX_BIDI_STREAMS: u32 = 8;

const HANDSHAKE: Duration = Duration::from_secs(10);
const IDLE_MILLIS: u32 = 30_000;
const KEEP_ALIVE: Duration = Duration::from_secs(10);
const CONNECTION_WINDOW: u32 = 16 << 20;
const STREAM_WINDOW: u32 = 4 << 20;
/// Bytes sent and not yet acknowledged that one connection may hold in memory.
const SEND_WINDOW: u64 = 8 << 20;
const MAX_INCOMING: usize = 256;
const INCOMING_BUFFER: u64 = 64 << 10;
const INCOMING_BUFFER_TOTAL: u64 = 8 << 20;
/// Authenticated connections that wait for the program to take them.
const BACKLOG: usize = 16;
const CERTIFICATE_REQUIRED: u8 = 116;

/// A connection to a peer whose certificate was checked. Clones share it; it closes with the last one.
#[derive(Debug, Clone)]
pub struct Connection {
    inner: quinn::Connection,
    peer: PeerIdentity,
}

impl Connection {
    /// Who is at the other end.
    #[must_use]
    pub const fn peer(&self) -> &PeerIdentity {
        &self.peer
    }

    /// Where the other end is.
    #[must_use]
    pub fn remote_address(&self) -> SocketAddr {
        self.inner.remote_address()
    }

    /// Opens a stream; waits while [`MAX_BIDI_STREAMS`] are open. Only nodes may. The peer learns of it with the first
    /// message.
    ///
    /// # Errors
    /// The connection is lost, or the aggregator refused our certificate after our side of the handshake had ended.
    pub async fn open(&self) -> Result<Stream, LinkError> {
        Ok(Stream::new(self.inner.open_bi().await?))
    }

    /// The next stream that the peer opens.
    ///
    /// # Errors
    /// The connection is lost.
    pub async fn accept(&self) -> Result<Stream, LinkError> {
        Ok(Stream::new(self.inner.accept_bi().await?))
    }

    /// Closes the connection and all of its streams at once, with a reason that the peer sees.
    pub fn close(&self, code: RejectCode) {
        self.inner.close(u32::from(code.number()).into(), b"");
    }

    /// Closes the connection at once; nothing was wrong.
    pub fn close_quietly(&self) {
        self.inner.close(VarInt::from_u32(0), b"");
    }

    /// Waits until the connection is lost, and says why.
    pub async fn closed(&self) -> LinkError {
        self.inner.closed().await.into()
    }
}

/// The dialling side: a node.
#[derive(Debug)]
pub struct Client {
    endpoint: quinn::Endpoint,
    credentials: Credentials,
    transport: Arc<TransportConfig>,
}

impl Client {
    /// Binds a socket for outgoing connections.
    ///
    /// # Errors
    /// No socket can be bound.
    pub fn bind(credentials: Credentials) -> Result<Self, LinkError> {
        let any = SocketAddr::from((Ipv6Addr::UNSPECIFIED, 0));
        let any4 = SocketAddr::from((Ipv4Addr::UNSPECIFIED, 0));
        // A machine without IPv6 has no socket of that family.
        let endpoint = quinn::Endpoint::client(any)
            .or_else(|_| quinn::Endpoint::client(any4))
            .map_err(|source| LocalError::Bind {
                address: any4,
                source,
            })?;
        Ok(Self {
            endpoint,
            credentials,
            transport: Arc::new(client_transport()),
        })
    }

    /// Dials the aggregator of our consortium at `host` (`name:port` or `address:port`), whose certificate must be for
    /// `server_name`. Tries every address of the name.
    ///
    /// In TLS 1.3 the aggregator judges our certificate after this returns: a refusal shows in the first reply.
    ///
    /// # Errors
    /// No address answers, or the peer is not the aggregator.
    pub async fn connect(&self, host: &str, server_name: &str) -> Result<Connection, LinkError> {
        ServerName::try_from(server_name)
            .map_err(|_| LocalError::ServerName(server_name.to_owned()))?;
        let unresolved = |source| NetworkError::Resolve {
            host: host.to_owned(),
            source,
        };
        let addresses = tokio::net::lookup_host(host)
            .await
            .map_err(|source| unresolved(Some(source)))?;
        let mut last = unresolved(None).into();
        for address in addresses {
            match self.dial(address, server_name).await {
                Ok(connection) => return Ok(connection),
                Err(error) => last = error,
            }
        }
        Err(last)
    }

    /// Closes all connections and waits until the peers were told, for at most `grace`.
    pub async fn close(&self, grace: Duration) {
        close(&self.endpoint, 0, grace).await;
    }

    async fn dial(&self, address: SocketAddr, name: &str) -> Result<Connection, LinkError> {
        let fault = FaultSlot::default();
        let tls = self
            .credentials
            .client(&fault)
            .map_err(LocalError::Credentials)?;
        let crypto = QuicClientConfig::try_from(tls).map_err(|_| no_initial_suite())?;
        let mut config = quinn::ClientConfig::new(Arc::new(crypto));
        config.transport_config(Arc::clone(&self.transport));
        let connecting = self
            .endpoint
            .connect_with(config, address, name)
            .map_err(LocalError::Dial)?;
        let inner = handshake(connecting, address, &fault).await?;
        let peer = peer_of(&inner)?;
        Ok(Connection { inner, peer })
    }
}

/// Limits of a server that depend on the consortium's size.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ServerLimits {
    /// Connections at once, those in their handshake included: members and 16 more.
    pub connections: usize,
}

/// The accepting side: the aggregator.
#[derive(Debug, Clone)]
pub struct Server {
    endpoint: quinn::Endpoint,
    credentials: Credentials,
    config: quinn::ServerConfig,
    limits: ServerLimits,
}

impl Server {
    /// Binds the socket that nodes dial. Port 0 picks one, see [`Self::local_address`].
    ///
    /// # Errors
    /// The address cannot be bound, or TLS refuses the credentials.
    pub fn bind(
        address: SocketAddr,
        credentials: Credentials,
        limits: ServerLimits,
    ) -> Result<Self, LinkError> {
        let bind = |source| LocalError::Bind { address, source };
        let config = server_config(&credentials, &FaultSlot::default())?;
        let socket = UdpSocket::bind(address).map_err(bind)?;
        let endpoint = quinn::Endpoint::new(
            credentials.reset().endpoint(),
            Some(config.clone()),
            socket,
            Arc::new(TokioRuntime),
        )
        .map_err(bind)?;
        Ok(Self {
            endpoint,
            credentials,
            config,
            limits,
        })
    }

    /// The address actually bound.
    ///
    /// # Errors
    /// The socket is gone.
    pub fn local_address(&self) -> Result<SocketAddr, LinkError> {
        Ok(self.endpoint.local_addr().map_err(|_| LocalError::Closed)?)
    }

    /// Accepts until the tasks are cancelled. Handshakes run beside each other; those that fail are logged.
    #[must_use]
    pub fn listen(&self, tasks: &Tasks) -> Connections {
        let (sender, receiver) = mpsc::channel(BACKLOG);
        let (server, inner) = (self.clone(), tasks.clone());
        tasks.spawn("accept connections", async move {
            loop {
                let handshake = tokio::select! {
                    () = inner.cancelled() => break,
                    handshake = server.next() => handshake,
                };
                let Some(handshake) = handshake else { break };
                let (sender, token) = (sender.clone(), inner.token().clone());
                inner.spawn("handshake", async move {
                    tokio::select! {
                        () = token.cancelled() => {}
                        () = deliver(handshake, sender) => {}
                    }
                });
            }
        });
        Connections(receiver)
    }

    /// The next handshake that may start: its address is validated, and there is room. None once closed.
    pub async fn next(&self) -> Option<Handshake> {
        loop {
            let incoming = self.endpoint.accept().await?;
            if !incoming.remote_address_validated() && incoming.may_retry() {
                // Fails only if it may not retry.
                let _ = incoming.retry();
            } else if self.endpoint.open_connections() >= self.limits.connections {
                tracing::warn!(remote = %incoming.remote_address(), "too many connections");
                incoming.refuse();
            } else {
                return Some(Handshake {
                    incoming,
                    server: self.clone(),
                });
            }
        }
    }

    /// Takes no more connections, closes all with `code`, and waits until the peers were told, for at most `grace`.
    pub async fn close(&self, code: RejectCode, grace: Duration) {
        close(&self.endpoint, code.number(), grace).await;
    }
}

/// A connection that has yet to prove who it is.
#[derive(Debug)]
pub struct Handshake {
    incoming: quinn::Incoming,
    server: Server,
}

impl Handshake {
    /// Where it comes from.
    #[must_use]
    pub fn remote_address(&self) -> SocketAddr {
        self.incoming.remote_address()
    }

    /// Runs the handshake, for at most 10 s, and checks that the peer is a node of our consortium. Another peer is told
    /// [`RejectCode::Identity`].
    ///
    /// # Errors
    /// The peer does not pass, or is lost.
    pub async fn finish(self) -> Result<Connection, LinkError> {
        let Self { incoming, server } = self;
        let address = incoming.remote_address();
        let fault = FaultSlot::default();
        let tls = quic_server(&server.credentials, &fault)?;
        let mut config = server.config.clone();
        config.crypto = Arc::new(tls);
        let connecting = incoming.accept_with(Arc::new(config))?;
        let inner = handshake(connecting, address, &fault).await?;
        let checked = peer_of(&inner).and_then(|peer| {
            check(&peer, Role::Node, server.credentials.identity())
                .map_err(PeerError::Certificate)?;
            Ok(peer)
        });
        match checked {
            Ok(peer) => Ok(Connection { inner, peer }),
            Err(error) => {
                inner.close(u32::from(RejectCode::Identity.number()).into(), b"");
                Err(error)
            }
        }
    }
}

/// Connections of nodes of our consortium, as they come.
#[derive(Debug)]
pub struct Connections(mpsc::Receiver<Connection>);

impl Connections {
    /// The next connection; none once the tasks are cancelled or the server is closed.
    pub async fn next(&mut self) -> Option<Connection> {
        self.0.recv().await
    }
}

async fn deliver(handshake: Handshake, sender: mpsc::Sender<Connection>) {
    let remote = handshake.remote_address();
    match handshake.finish().await {
        Ok(connection) => {
            if let Err(unwanted) = sender.send(connection).await {
                unwanted.0.close(RejectCode::ShuttingDown);
            }
        }
        Err(error) => {
            let error = &error as &dyn std::error::Error;
            tracing::warn!(%remote, error, "connection refused");
        }
    }
}

async fn handshake(
    connecting: quinn::Connecting,
    address: SocketAddr,
    fault: &FaultSlot,
) -> Result<quinn::Connection, LinkError> {
    let late = NetworkError::Handshake {
        address,
        within: HANDSHAKE,
    };
    match timeout(HANDSHAKE, connecting).await {
        Ok(Ok(connection)) => Ok(connection),
        Err(_) | Ok(Err(ConnectionError::TimedOut)) => Err(late.into()),
        Ok(Err(error)) => Err(explain(error, fault)),
    }
}

/// The verifier knows more than the number that QUIC reports.
fn explain(error: ConnectionError, fault: &FaultSlot) -> LinkError {
    if let Some(fault) = fault.take() {
        return PeerError::Certificate(fault).into();
    }
    if let ConnectionError::TransportError(failure) = &error
        && alert(failure.code).is_some_and(|alert| alert.0 == CERTIFICATE_REQUIRED)
    {
        return PeerError::Certificate(CertificateFault::Missing).into();
    }
    error.into()
}

fn peer_of(connection: &quinn::Connection) -> Result<PeerIdentity, LinkError> {
    let chain = connection
        .peer_identity()
        .and_then(|any| any.downcast::<Vec<CertificateDer<'static>>>().ok());
    let peer = chain
        .as_deref()
        .and_then(|chain| chain.first())
        .ok_or(IdentityError::Certificate)
        .and_then(|leaf| identity::of_certificate(leaf))
        .map_err(CertificateFault::Identity);
    Ok(peer.map_err(PeerError::Certificate)?)
}

async fn close(endpoint: &quinn::Endpoint, code: u16, grace: Duration) {
    endpoint.close(u32::from(code).into(), b"");
    // A peer that is gone cannot be told; the grace period bounds the attempt.
    let _ = timeout(grace, endpoint.wait_idle()).await;
}

fn quic_server(
    credentials: &Credentials,
    fault: &FaultSlot,
) -> Result<QuicServerConfig, LinkError> {
    let tls = credentials.server(fault).map_err(LocalError::Credentials)?;
    Ok(QuicServerConfig::try_from(tls).map_err(|_| no_initial_suite())?)
}

fn no_initial_suite() -> LocalError {
    let error = rustls::Error::General("no cipher suite for QUIC".to_owned());
    LocalError::Credentials(CredentialsError::Tls(error))
}

fn server_config(
    credentials: &Credentials,
    fault: &FaultSlot,
) -> Result<quinn::ServerConfig, LinkError> {
    let crypto = quic_server(credentials, fault)?;
    let mut config = quinn::ServerConfig::with_crypto(Arc::new(crypto));
    let mut tokens = ValidationTokenConfig::default();
    tokens.sent(0);
    config
        .transport_config(Arc::new(server_transport()))
        .validation_token_config(tokens)
        .migration(false)
        .max_incoming(MAX_INCOMING)
        .incoming_buffer_size(INCOMING_BUFFER)
        .incoming_buffer_size_total(INCOMING_BUFFER_TOTAL);
    Ok(config)
}

fn server_transport() -> TransportConfig {
    let mut config = transport();
    config.max_concurrent_bidi_streams(MAX_BIDI_STREAMS.into());
    config
}

fn client_transport() -> TransportConfig {
    let mut config = transport();
    // The aggregator opens no stream.
    config
        .max_concurrent_bidi_streams(0_u32.into())
        .keep_alive_interval(Some(KEEP_ALIVE));
    config
}

fn transport() -> TransportConfig {
    let mut config = TransportConfig::default();
    config
        .max_concurrent_uni_streams(0_u32.into())
        .receive_window(CONNECTION_WINDOW.into())
        .stream_receive_window(STREAM_WINDOW.into())
        .send_window(SEND_WINDOW)
        .max_idle_timeout(Some(IdleTimeout::from(VarInt::from_u32(IDLE_MILLIS))))
        .datagram_receive_buffer_size(None)
        .ack_frequency_config(None);
    config
}
