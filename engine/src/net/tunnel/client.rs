//! Dialling through a tunnel: an endpoint of one connection, whose socket is a TCP connection.
//!
//! Invariants: the connection ends when its tunnel does, and the tunnel when its connection has; a sender waits while too
//! much waits to be written. Units: bytes. Called by `endpoint`.

use std::io::{self, IoSliceMut};
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use quinn::udp::{RecvMeta, Transmit};
use quinn::{AsyncUdpSocket, Connection, EndpointConfig, UdpPoller};
use rustls_pki_types::ServerName;
use tokio::net::TcpStream;
use tokio::sync::{mpsc, oneshot};
use tokio::task::JoinHandle;
use tokio_rustls::TlsConnector;

use super::{ALPN_TUNNEL, Limits, Outgoing, PACKETS_MAX, Packet, carry, marked, prepare, unmarked};
use crate::net::endpoint::CloseCode;

/// Packets that go into one call of the transport: more are split into few calls less.
const SEGMENTS_MAX: usize = 10;
/// How long a tunnel outlives its connection, so that the peer hears of the end.
const FAREWELL: Duration = Duration::from_millis(100);

/// A connection in a tunnel.
#[derive(Debug)]
pub(in crate::net) struct Tunnelled {
    pub(in crate::net) connection: Connection,
    /// Ends when the tunnel is closed.
    pub(in crate::net) carried: JoinHandle<()>,
}

/// Dials. `tls` is the configuration of the connection; that of the tunnel is the same with another protocol.
///
/// # Errors
/// When nobody answers, or either side refuses the other: `ConnectionError` where the connection inside says so.
pub(in crate::net) async fn connect(
    address: SocketAddr,
    name: &str,
    tls: rustls::ClientConfig,
    config: (EndpointConfig, quinn::ClientConfig),
    (packet_bytes_max, idle): (usize, Duration),
) -> Result<Tunnelled, io::Error> {
    let stream = TcpStream::connect(address).await?;
    prepare(&stream);
    let local = stream.local_addr()?;
    let mut outer = tls;
    outer.alpn_protocols = vec![ALPN_TUNNEL.to_vec()];
    let server = ServerName::try_from(name.to_owned()).map_err(io::Error::other)?;
    let stream = TlsConnector::from(Arc::new(outer)).connect(server, stream).await?;

    let far = marked(address, 1);
    let outgoing = Arc::new(Outgoing::default());
    let (deliver, packets) = mpsc::channel(PACKETS_MAX);
    let socket = TunnelSocket {
        outgoing: Arc::clone(&outgoing),
        packets: Mutex::new(packets),
        local: marked(local, 1),
    };
    let (tell, ended) = oneshot::channel();
    let limits = Limits { packet_bytes_max, idle };
    let carrying = Arc::clone(&outgoing);
    let carried = tokio::spawn(async move {
        let why = carry(stream, far, &carrying, &deliver, limits).await;
        // Nobody waits where the connection ended first.
        let _ = tell.send(why);
    });
    let (endpoint_config, client_config) = config;
    let runtime = Arc::new(quinn::TokioRuntime);
    let endpoint =
        quinn::Endpoint::new_with_abstract_socket(endpoint_config, None, Arc::new(socket), runtime)?;
    let connecting = endpoint.connect_with(client_config, far, name).map_err(io::Error::other)?;
    let mut ended = ended;
    let connection = tokio::select! {
        connected = connecting => connected.map_err(io::Error::other),
        why = &mut ended => Err(why_ended(why.unwrap_or(Ok(())))),
    };
    match connection {
        Ok(connection) => {
            tokio::spawn(watch(connection.clone(), outgoing, ended));
            Ok(Tunnelled { connection, carried })
        }
        Err(error) => {
            outgoing.close();
            Err(error)
        }
    }
}

fn why_ended(why: io::Result<()>) -> io::Error {
    why.err().unwrap_or_else(|| io::Error::new(io::ErrorKind::UnexpectedEof, "the other side closed it"))
}

/// Ends the one when the other has ended.
async fn watch(connection: Connection, outgoing: Arc<Outgoing>, ended: oneshot::Receiver<io::Result<()>>) {
    tokio::select! {
        _ = connection.closed() => {
            tokio::time::sleep(FAREWELL).await;
            outgoing.close();
        }
        why = ended => {
            let (address, error) = (unmarked(connection.remote_address()), why_ended(why.unwrap_or(Ok(()))));
            tracing::info!(%address, %error, "the TCP connection that carried a connection ended");
            CloseCode::Finished.close(&connection);
        }
    }
}

/// A tunnel as the socket of an endpoint.
#[derive(Debug)]
struct TunnelSocket {
    outgoing: Arc<Outgoing>,
    packets: Mutex<mpsc::Receiver<Packet>>,
    local: SocketAddr,
}

impl AsyncUdpSocket for TunnelSocket {
    fn create_io_poller(self: Arc<Self>) -> Pin<Box<dyn UdpPoller>> {
        Box::pin(Room(Arc::clone(&self.outgoing)))
    }

    fn try_send(&self, transmit: &Transmit<'_>) -> io::Result<()> {
        self.outgoing.push(transmit)
    }

    fn poll_recv(
        &self,
        context: &mut Context<'_>,
        buffers: &mut [IoSliceMut<'_>],
        meta: &mut [RecvMeta],
    ) -> Poll<io::Result<usize>> {
        let mut packets = self.packets.lock().unwrap_or_else(PoisonError::into_inner);
        // When the tunnel is over nothing comes any more; `watch` ends the connection.
        let count = ready!(poll_packets(&mut packets, context, buffers, meta));
        Poll::Ready(Ok(count))
    }

    fn local_addr(&self) -> io::Result<SocketAddr> {
        Ok(self.local)
    }

    fn max_transmit_segments(&self) -> usize {
        SEGMENTS_MAX
    }

    fn may_fragment(&self) -> bool {
        false
    }
}

/// Fills buffers with packets that came, one each; pending when there is none, and for ever once there can be none.
pub(super) fn poll_packets(
    packets: &mut mpsc::Receiver<Packet>,
    context: &mut Context<'_>,
    buffers: &mut [IoSliceMut<'_>],
    meta: &mut [RecvMeta],
) -> Poll<usize> {
    let mut count = 0;
    for (buffer, meta) in buffers.iter_mut().zip(meta) {
        let Poll::Ready(Some((addr, packet))) = packets.poll_recv(context) else { break };
        let len = packet.len().min(buffer.len());
        buffer[..len].copy_from_slice(&packet[..len]);
        *meta = RecvMeta { addr, len, stride: len, ecn: None, dst_ip: None };
        count += 1;
    }
    if count == 0 { Poll::Pending } else { Poll::Ready(count) }
}

/// Waits for room.
#[derive(Debug)]
struct Room(Arc<Outgoing>);

impl UdpPoller for Room {
    fn poll_writable(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.0.poll_room(context).map(Ok)
    }
}
