//! The listening end of tunnels: TCP connections whose packets join those of a UDP socket.
//!
//! Invariants: a connection that shows no TLS of ours in time is dropped, and no more are looked at together than the
//! transport's settings allow; so many tunnels exist at most; a tunnel whose far end does not read loses packets, as a
//! slow path does, and holds up nobody. Units: bytes. Called by `endpoint`.

use std::collections::HashMap;
use std::io::{self, IoSliceMut};
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll};
use std::time::Duration;

use quinn::udp::{RecvMeta, Transmit};
use quinn::{AsyncUdpSocket, UdpPoller};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};
use tokio::task::AbortHandle;
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;

use super::client::poll_packets;
use super::{ALPN_TUNNEL, Limits, Outgoing, PACKETS_MAX, Packet, carry, marked, prepare, tunnel_of};
use crate::net::ALPN_ENROLL;
use crate::net::endpoint::{Believed, TransportSettings};
use crate::net::identity::PeerIdentity;
use crate::net::revocations::Revocations;

/// Of the tunnels that may exist, this part is for those that show no certificate: they enrol, where that can be.
const STRANGERS_PART: usize = 8;
/// So long a tunnel without a certificate lasts.
const STRANGER_LIFE: Duration = Duration::from_secs(60);
/// Longest wait for TLS while many are waited for: those that never mean to finish lose their places sooner.
const HURRIED: Duration = Duration::from_secs(2);
/// How long the tunnels of a revoked peer outlive its connections.
const FAREWELL: Duration = Duration::from_secs(1);
/// How long nothing is accepted after the system refused, for want of descriptors for example.
const REFUSED_PAUSE: Duration = Duration::from_millis(100);

/// The tunnels that exist, by number.
#[derive(Debug, Default)]
struct Tunnels(Mutex<(u32, HashMap<u32, Arc<Outgoing>>)>);

impl Tunnels {
    fn lock(&self) -> MutexGuard<'_, (u32, HashMap<u32, Arc<Outgoing>>)> {
        // A panic elsewhere leaves whole entries.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A new one, and its number: never zero, and none that is in use.
    fn enter(&self) -> (u32, Arc<Outgoing>) {
        let (newest, tunnels) = &mut *self.lock();
        loop {
            *newest = newest.wrapping_add(1).max(1);
            if !tunnels.contains_key(newest) {
                let outgoing = Arc::new(Outgoing::default());
                tunnels.insert(*newest, Arc::clone(&outgoing));
                return (*newest, outgoing);
            }
        }
    }

    fn leave(&self, number: u32) {
        self.lock().1.remove(&number);
    }
}

/// Leaves a tunnel out when it is over, however that came.
struct Leaving<'a> {
    tunnels: &'a Tunnels,
    number: u32,
}

impl Drop for Leaving<'_> {
    fn drop(&mut self) {
        self.tunnels.leave(self.number);
    }
}

/// A UDP socket and tunnels, as one socket.
#[derive(Debug)]
pub(in crate::net) struct Junction {
    udp: Arc<dyn AsyncUdpSocket>,
    tunnels: Arc<Tunnels>,
    packets: Mutex<mpsc::Receiver<Packet>>,
    /// Who is asked first changes, so that neither waits for the other.
    tunnels_first: AtomicBool,
}

impl AsyncUdpSocket for Junction {
    fn create_io_poller(self: Arc<Self>) -> Pin<Box<dyn UdpPoller>> {
        Arc::clone(&self.udp).create_io_poller()
    }

    fn try_send(&self, transmit: &Transmit<'_>) -> io::Result<()> {
        let Some(number) = tunnel_of(transmit.destination) else { return self.udp.try_send(transmit) };
        let outgoing = self.tunnels.lock().1.get(&number).cloned();
        // What finds no room, or no tunnel, is lost: the transport sends it again, more slowly.
        let _ = outgoing.map(|outgoing| outgoing.push(transmit));
        Ok(())
    }

    fn poll_recv(
        &self,
        context: &mut Context<'_>,
        buffers: &mut [IoSliceMut<'_>],
        meta: &mut [RecvMeta],
    ) -> Poll<io::Result<usize>> {
        let tunnels_first = self.tunnels_first.fetch_not(Ordering::Relaxed);
        for asks_tunnels in [tunnels_first, !tunnels_first] {
            let received = if asks_tunnels {
                let mut packets = self.packets.lock().unwrap_or_else(PoisonError::into_inner);
                poll_packets(&mut packets, context, buffers, meta).map(Ok)
            } else {
                self.udp.poll_recv(context, buffers, meta)
            };
            if received.is_ready() {
                return received;
            }
        }
        Poll::Pending
    }

    fn local_addr(&self) -> io::Result<SocketAddr> {
        self.udp.local_addr()
    }

    fn max_transmit_segments(&self) -> usize {
        self.udp.max_transmit_segments()
    }

    fn max_receive_segments(&self) -> usize {
        self.udp.max_receive_segments()
    }

    fn may_fragment(&self) -> bool {
        self.udp.may_fragment()
    }
}

/// The listener; it ends when this is dropped.
#[derive(Debug)]
pub(in crate::net) struct Listening {
    tls: Arc<Mutex<Arc<rustls::ServerConfig>>>,
    task: AbortHandle,
}

impl Listening {
    /// Uses another configuration from now on.
    pub(in crate::net) fn replace_tls(&self, tls: rustls::ServerConfig) {
        *self.tls.lock().unwrap_or_else(PoisonError::into_inner) = outer(tls);
    }
}

impl Drop for Listening {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// The configuration of the tunnel itself.
fn outer(mut tls: rustls::ServerConfig) -> Arc<rustls::ServerConfig> {
    tls.alpn_protocols = vec![ALPN_TUNNEL.to_vec()];
    Arc::new(tls)
}

/// Joins what comes through `listener` with `udp`. Must be called inside a tokio runtime.
///
/// # Errors
/// When the listener cannot be used.
pub(in crate::net) fn listen(
    listener: std::net::TcpListener,
    udp: Arc<dyn AsyncUdpSocket>,
    tls: rustls::ServerConfig,
    settings: &TransportSettings,
    revocations: Arc<Revocations>,
) -> io::Result<(Arc<Junction>, Listening)> {
    listener.set_nonblocking(true)?;
    let listener = TcpListener::from_std(listener)?;
    let (deliver, packets) = mpsc::channel(PACKETS_MAX);
    let enrols = tls.alpn_protocols.iter().any(|protocol| protocol == ALPN_ENROLL);
    let strangers = if enrols { (settings.connections_max / STRANGERS_PART).max(1) } else { 0 };
    let (tunnels, tls) = (Arc::new(Tunnels::default()), Arc::new(Mutex::new(outer(tls))));
    let gate = Gate {
        tunnels: Arc::clone(&tunnels),
        tls: Arc::clone(&tls),
        looked_at: Arc::new(Semaphore::new(settings.unfinished_handshakes_max)),
        looked_at_max: settings.unfinished_handshakes_max,
        believed: Arc::default(),
        strangers: Arc::new(Semaphore::new(strangers)),
        settings: settings.clone(),
        revocations,
        handshake_timeout: settings.handshake_timeout,
        limits: Limits {
            packet_bytes_max: settings.udp_payload_bytes_max.into(),
            idle: settings.idle_timeout,
        },
        deliver,
    };
    let task = tokio::spawn(gate.accept_all(listener)).abort_handle();
    let packets = Mutex::new(packets);
    let junction = Junction { udp, tunnels, packets, tunnels_first: AtomicBool::new(false) };
    Ok((Arc::new(junction), Listening { tls, task }))
}

/// Decides about incoming TCP connections.
#[derive(Clone)]
struct Gate {
    tunnels: Arc<Tunnels>,
    tls: Arc<Mutex<Arc<rustls::ServerConfig>>>,
    /// Places for those whose TLS is not done.
    looked_at: Arc<Semaphore>,
    looked_at_max: usize,
    /// The tunnels of those that showed a certificate, as many of each as of connections.
    believed: Arc<Believed>,
    /// Places for those that did not.
    strangers: Arc<Semaphore>,
    settings: TransportSettings,
    revocations: Arc<Revocations>,
    handshake_timeout: Duration,
    limits: Limits,
    deliver: mpsc::Sender<Packet>,
}

impl Gate {
    async fn accept_all(self, listener: TcpListener) {
        loop {
            // Those that find no place wait in the system's queue.
            let Ok(place) = Arc::clone(&self.looked_at).acquire_owned().await else { return };
            match listener.accept().await {
                Ok((stream, address)) => {
                    tokio::spawn(self.clone().tunnel(stream, address, place));
                }
                Err(error) => {
                    tracing::debug!(%error, "a TCP connection could not be accepted");
                    tokio::time::sleep(REFUSED_PAUSE).await;
                }
            }
        }
    }

    async fn tunnel(self, stream: TcpStream, address: SocketAddr, place: OwnedSemaphorePermit) {
        prepare(&stream);
        let tls = Arc::clone(&self.tls.lock().unwrap_or_else(PoisonError::into_inner));
        let accepting = TlsAcceptor::from(tls).accept(stream);
        let is_crowded = self.looked_at.available_permits() < self.looked_at_max / 4 * 3;
        let patience = if is_crowded { HURRIED.min(self.handshake_timeout) } else { self.handshake_timeout };
        let stream = match tokio::time::timeout(patience, accepting).await {
            Ok(Ok(stream)) => stream,
            Ok(Err(error)) => return tracing::debug!(%address, %error, "no tunnel: TLS failed"),
            Err(_) => return tracing::debug!(%address, "no tunnel: TLS not finished in time"),
        };
        let session = stream.get_ref().1;
        if session.alpn_protocol() != Some(ALPN_TUNNEL) {
            return tracing::debug!(%address, "no tunnel: another protocol");
        }
        let peer = session.peer_certificates().and_then(<[_]>::first).map(PeerIdentity::from_certificate);
        match peer {
            Some(Ok(peer)) if self.believed.enter(&peer, &self.settings) => {
                drop(place);
                tokio::select! {
                    () = self.carried(stream, address) => {}
                    () = self.gone(&peer) => {}
                }
                self.believed.leave(peer.peer);
            }
            Some(_) => tracing::warn!(%address, "a tunnel was refused: too many of this peer or in all"),
            None => {
                let Ok(_held) = Arc::clone(&self.strangers).try_acquire_owned() else {
                    return tracing::debug!(%address, "a tunnel without a certificate was refused");
                };
                drop(place);
                let _ = tokio::time::timeout(STRANGER_LIFE, self.carried(stream, address)).await;
            }
        }
    }

    /// Ends when a peer is revoked, and its connections had the time to say so.
    async fn gone(&self, peer: &PeerIdentity) {
        self.revocations.revoked(peer).await;
        tokio::time::sleep(FAREWELL).await;
    }

    async fn carried(&self, stream: TlsStream<TcpStream>, address: SocketAddr) {
        let (number, outgoing) = self.tunnels.enter();
        let far = marked(address, number);
        let _leaving = Leaving { tunnels: &self.tunnels, number };
        let ended = carry(stream, far, &outgoing, &self.deliver, self.limits).await;
        tracing::debug!(%address, ?ended, "a tunnel ended");
    }
}
