//! Dialling: over UDP, and through a tunnel over TCP where UDP does not get through.
//!
//! Invariants: TCP is tried when nothing has come over UDP for a while, sooner where that was so the last time, and UDP is
//! always tried, too: whichever is there first is used. A peer that refuses over UDP is not asked again over TCP; over TCP
//! somebody else may have the port, so a refusal there counts only when UDP has ended as well. Both end in the same time. Units:
//! `Duration`s. Called by the three programs and by enrolment.

use std::collections::HashSet;
use std::io;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use quinn::crypto::rustls::QuicClientConfig;
use quinn::{ClientConfig, Connection, TransportConfig, VarInt};

use crate::net::endpoint::{
    CloseCode, EndpointError, PeerConnection, TransportSettings, believe, bind, endpoint, endpoint_config,
    peer_identity, refusal_of_tunnel,
};
use crate::net::identity::server_name;
use crate::net::revocations::Revocations;
use crate::net::tunnel::{self, Tunnelled};
use crate::units::PeerId;

/// UDP has so long alone; two round trips to the other side of the earth.
const HEAD_START: Duration = Duration::from_secs(1);
/// … and so long where it was TCP that got through the last time.
const HEAD_START_DOUBTED: Duration = Duration::from_millis(100);

/// An endpoint for dialling. One serves any number of connections.
#[derive(Debug)]
pub struct Dialer {
    endpoint: quinn::Endpoint,
    settings: TransportSettings,
    transport: Arc<TransportConfig>,
    tcp: Mutex<OverTcp>,
}

/// What is known of dialling over TCP.
#[derive(Debug, Default)]
struct OverTcp {
    /// Whom it reached and UDP did not, the last time.
    addresses: HashSet<SocketAddr>,
    /// What goes on, or did until lately.
    tunnels: Vec<Tunnelled>,
}

impl Dialer {
    /// A socket on `local` (usually the unspecified address and port 0). Must be called inside a tokio runtime.
    ///
    /// # Errors
    /// When the address cannot be had or a setting is out of range.
    pub fn bind(local: SocketAddr, settings: TransportSettings) -> Result<Self, EndpointError> {
        let transport = Arc::new(settings.transport()?);
        let error = |action, source| EndpointError::Socket { action, address: local, source };
        let socket = bind(local, &settings).map_err(|source| error("use UDP", source))?;
        let endpoint = endpoint(socket, None, &settings)?.map_err(|source| error("use UDP", source))?;
        Ok(Self { endpoint, settings, transport, tcp: Mutex::default() })
    }

    /// Dials with a configuration of `tls::client_config`. TLS 1.3 lets a client finish before the server has judged
    /// its certificate: a refusal shows as a closed connection right after.
    ///
    /// # Errors
    /// When nobody answers in time, or either side refuses the other.
    pub async fn connect(
        &self,
        address: SocketAddr,
        tls: rustls::ClientConfig,
        expected: Option<PeerId>,
        revocations: &Arc<Revocations>,
    ) -> Result<PeerConnection, EndpointError> {
        let connection = self.connect_raw(address, tls, expected).await?;
        let Some(peer) = peer_identity(&connection) else {
            CloseCode::NoCertificate.close(&connection);
            return Err(EndpointError::Unidentified(address));
        };
        Ok(believe(connection, peer, revocations))
    }

    /// Dials without watching the peer's standing: enrolment.
    pub(crate) async fn connect_raw(
        &self,
        address: SocketAddr,
        tls: rustls::ClientConfig,
        expected: Option<PeerId>,
    ) -> Result<Connection, EndpointError> {
        let name = expected.map_or_else(|| "any.reprotect.internal".to_owned(), server_name);
        let was_tcp = self.lock().addresses.contains(&address);
        let head_start = if was_tcp { HEAD_START_DOUBTED } else { HEAD_START };
        let over_udp = self.over_udp(address, tls.clone(), &name);
        let over_tcp = async {
            tokio::time::sleep(head_start).await;
            self.over_tcp(address, tls, &name, self.settings.handshake_timeout.saturating_sub(head_start))
                .await
        };
        tokio::pin!(over_udp, over_tcp);
        let (mut waits_for_udp, mut tcp_error) = (true, None);
        loop {
            tokio::select! {
                biased;
                connected = &mut over_udp, if waits_for_udp => match connected {
                    Ok(Some(connection)) => {
                        self.lock().addresses.remove(&address);
                        return Ok(connection);
                    }
                    Ok(None) => waits_for_udp = false,
                    Err(error) => return Err(error),
                },
                connected = &mut over_tcp, if tcp_error.is_none() => match connected? {
                    Ok(tunnelled) => {
                        let connection = tunnelled.connection.clone();
                        let mut tcp = self.lock();
                        if tcp.addresses.insert(address) {
                            tracing::warn!(%address, "UDP does not get through; TCP is used, which costs more");
                        }
                        tcp.tunnels.retain(|tunnelled| !tunnelled.carried.is_finished());
                        tcp.tunnels.push(tunnelled);
                        return Ok(connection);
                    }
                    // Who refuses may be somebody else, who has this port number over TCP only.
                    Err(error) => tcp_error = Some(error),
                },
            }
            if let Some(error) = tcp_error.as_ref().filter(|_| !waits_for_udp) {
                let (tcp, refusal) = (error.to_string(), refusal_of_tunnel(error));
                return Err(EndpointError::TimedOut { address, tcp, refusal });
            }
        }
    }

    /// `None` when nobody answered.
    async fn over_udp(
        &self,
        address: SocketAddr,
        tls: rustls::ClientConfig,
        name: &str,
    ) -> Result<Option<Connection>, EndpointError> {
        let connecting = self
            .endpoint
            .connect_with(self.config(tls)?, address, name)
            .map_err(|source| EndpointError::Dial { address, source })?;
        match tokio::time::timeout(self.settings.handshake_timeout, connecting).await {
            Ok(Ok(connection)) => Ok(Some(connection)),
            Ok(Err(quinn::ConnectionError::TimedOut)) | Err(_) => Ok(None),
            Ok(Err(source)) => Err(EndpointError::Connection { address, source }),
        }
    }

    async fn over_tcp(
        &self,
        address: SocketAddr,
        tls: rustls::ClientConfig,
        name: &str,
        patience: Duration,
    ) -> Result<io::Result<Tunnelled>, EndpointError> {
        let config = (endpoint_config(&self.settings)?, self.config(tls.clone())?);
        let limits = (self.settings.udp_payload_bytes_max.into(), self.settings.idle_timeout);
        let connecting = tunnel::connect(address, name, tls, config, limits);
        let connected = tokio::time::timeout(patience, connecting).await;
        Ok(connected.unwrap_or_else(|_| Err(io::Error::new(io::ErrorKind::TimedOut, "no answer in time"))))
    }

    fn config(&self, tls: rustls::ClientConfig) -> Result<ClientConfig, EndpointError> {
        let mut config = ClientConfig::new(Arc::new(QuicClientConfig::try_from(tls)?));
        config.transport_config(Arc::clone(&self.transport));
        Ok(config)
    }

    fn lock(&self) -> MutexGuard<'_, OverTcp> {
        // A panic elsewhere leaves whole entries.
        self.tcp.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Closes every connection and waits until the peers know.
    pub async fn close(&self) {
        let tunnels = std::mem::take(&mut self.lock().tunnels);
        for tunnelled in &tunnels {
            CloseCode::ShuttingDown.close(&tunnelled.connection);
        }
        self.endpoint.close(VarInt::from_u32(CloseCode::ShuttingDown.code()), b"shutting down");
        self.endpoint.wait_idle().await;
        for tunnelled in tunnels {
            // It ends by itself shortly after its connection; a panic of it is no reason to wait.
            let _ = tunnelled.carried.await;
        }
    }
}
