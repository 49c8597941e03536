//! QUIC packets in TLS over TCP, for sites that drop UDP: the same connections, one layer below.
//!
//! A tunnel is one TCP connection to the port number that QUIC has over UDP, with TLS of its own, in which each packet has
//! two bytes of length (big endian) before it. Above it nothing differs: the same handshake, certificates, streams and
//! limits. Its packets come from an address that no UDP packet can have: the peer's, as IPv6, marked by a flow label that
//! numbers the tunnel. So one endpoint serves both.
//!
//! Invariants: what waits to be written is bounded, and a packet is never longer than the transport's largest; packets of
//! a tunnel keep their order; whoever gets no answer over UDP tries TCP, whoever is refused does not. TLS of the tunnel
//! gives nobody rights: peers are believed by the handshake inside. Units: bytes. Called by `endpoint` only.

mod client;
mod server;

use std::io;
use std::net::{IpAddr, SocketAddr, SocketAddrV6};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use bytes::{Buf as _, BufMut as _, Bytes, BytesMut};
use quinn::udp::Transmit;
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::sync::mpsc;
use tokio::time::Instant;

pub(super) use client::{Tunnelled, connect};
pub(super) use server::{Listening, listen};

/// ALPN of a tunnel.
const ALPN_TUNNEL: &[u8] = b"reprotect-tunnel/1";
/// Bytes that wait to be written: with so many, a sender waits or loses packets, and what is urgent waits behind them.
const WAITING_BYTES_MAX: usize = 256 << 10;
/// Bytes that are taken from these at a time.
const TAKEN_BYTES_MAX: usize = 64 << 10;
/// Bytes that the system holds unsent: what is urgent waits behind them.
const UNSENT_BYTES_MAX: u32 = 128 << 10;
/// Packets that were read and not taken yet.
const PACKETS_MAX: usize = 256;
const READ_BYTES: usize = 64 << 10;
const LENGTH_BYTES: usize = 2;

/// What whoever finds a connection in a tunnel is told to do.
pub const UDP_REMEDY: &str =
    "let UDP through on this port number, both ways: over TCP everything works, and costs more";

/// How the packets of a connection travel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    /// As they are.
    Udp,
    /// In a tunnel.
    Tcp,
}

/// The way of packets from or to an address.
#[must_use]
pub fn way(address: SocketAddr) -> Way {
    if tunnel_of(address).is_some() { Way::Tcp } else { Way::Udp }
}

/// An address as its peer knows it, whichever way its packets travel.
#[must_use]
pub fn unmarked(address: SocketAddr) -> SocketAddr {
    if tunnel_of(address).is_some() {
        SocketAddr::new(address.ip().to_canonical(), address.port())
    } else {
        address
    }
}

/// The address that packets of a tunnel come from.
fn marked(address: SocketAddr, tunnel: u32) -> SocketAddr {
    let ip = match address.ip() {
        IpAddr::V4(ip) => ip.to_ipv6_mapped(),
        IpAddr::V6(ip) => ip,
    };
    SocketAddr::V6(SocketAddrV6::new(ip, address.port(), tunnel, 0))
}

/// The number of the tunnel of an address; the system marks none.
fn tunnel_of(address: SocketAddr) -> Option<u32> {
    match address {
        SocketAddr::V6(address) => Some(address.flowinfo()).filter(|tunnel| *tunnel != 0),
        SocketAddr::V4(_) => None,
    }
}

/// A packet, and where it came from.
type Packet = (SocketAddr, Bytes);

/// What a tunnel may do.
#[derive(Clone, Copy, Debug)]
struct Limits {
    packet_bytes_max: usize,
    /// Without a packet for so long it is over.
    idle: Duration,
}

/// Packets on their way into a tunnel.
#[derive(Debug, Default)]
struct Outgoing(Mutex<Waiting>);

#[derive(Debug, Default)]
struct Waiting {
    bytes: BytesMut,
    is_closed: bool,
    writer: Option<Waker>,
    senders: Vec<Waker>,
}

impl Outgoing {
    fn lock(&self) -> MutexGuard<'_, Waiting> {
        // A panic elsewhere leaves whole packets.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Adds packets; those of a tunnel that is over are lost, as a network loses them.
    ///
    /// # Errors
    /// `WouldBlock` when too much waits already.
    fn push(&self, transmit: &Transmit<'_>) -> io::Result<()> {
        let mut waiting = self.lock();
        if waiting.is_closed {
            return Ok(());
        }
        if waiting.bytes.len() >= WAITING_BYTES_MAX {
            return Err(io::ErrorKind::WouldBlock.into());
        }
        let longest = transmit.segment_size.unwrap_or(transmit.contents.len()).max(1);
        for packet in transmit.contents.chunks(longest) {
            // What is longer than its length can say is longer than any packet may be.
            let Ok(length) = u16::try_from(packet.len()) else { continue };
            waiting.bytes.put_u16(length);
            waiting.bytes.put_slice(packet);
        }
        if let Some(writer) = waiting.writer.take() {
            writer.wake();
        }
        Ok(())
    }

    /// Whether packets may be added.
    fn poll_room(&self, context: &Context<'_>) -> Poll<()> {
        let mut waiting = self.lock();
        if waiting.is_closed || waiting.bytes.len() < WAITING_BYTES_MAX {
            return Poll::Ready(());
        }
        if !waiting.senders.iter().any(|waker| waker.will_wake(context.waker())) {
            waiting.senders.push(context.waker().clone());
        }
        Poll::Pending
    }

    /// What waits, or the first part of it; `None` when the tunnel is closed and nothing does.
    fn poll_take(&self, context: &Context<'_>) -> Poll<Option<Bytes>> {
        let mut waiting = self.lock();
        if !waiting.bytes.is_empty() {
            let taken = waiting.bytes.len().min(TAKEN_BYTES_MAX);
            let bytes = waiting.bytes.split_to(taken).freeze();
            waiting.senders.drain(..).for_each(Waker::wake);
            return Poll::Ready(Some(bytes));
        }
        if waiting.is_closed {
            return Poll::Ready(None);
        }
        waiting.writer = Some(context.waker().clone());
        Poll::Pending
    }

    /// Nothing is added any more; what waits is still written.
    fn close(&self) {
        let mut waiting = self.lock();
        waiting.is_closed = true;
        let Waiting { writer, senders, .. } = &mut *waiting;
        writer.take().into_iter().chain(senders.drain(..)).for_each(Waker::wake);
    }
}

/// Prepares a TCP connection for packets. Without effect where the system refuses: it is slower then.
fn prepare(stream: &TcpStream) {
    let _ = stream.set_nodelay(true);
    let _ = socket2::SockRef::from(stream).set_tcp_notsent_lowat(UNSENT_BYTES_MAX);
}

/// Carries packets both ways until the tunnel is closed here or there; answers why.
async fn carry<S: AsyncRead + AsyncWrite>(
    stream: S,
    address: SocketAddr,
    outgoing: &Outgoing,
    incoming: &mpsc::Sender<Packet>,
    limits: Limits,
) -> io::Result<()> {
    let (mut reader, mut writer) = tokio::io::split(stream);
    let write = async {
        while let Some(bytes) = std::future::poll_fn(|context| outgoing.poll_take(context)).await {
            writer.write_all(&bytes).await?;
            writer.flush().await?;
        }
        writer.shutdown().await
    };
    let read = async {
        let mut bytes = BytesMut::with_capacity(READ_BYTES);
        let mut ends_at = Instant::now() + limits.idle;
        loop {
            bytes.reserve(READ_BYTES);
            let read = tokio::time::timeout_at(ends_at, reader.read_buf(&mut bytes)).await;
            match read {
                Ok(Ok(0)) => return Ok(()),
                Ok(Ok(_)) => {}
                Ok(Err(error)) => return Err(error),
                Err(_) => return Err(io::Error::new(io::ErrorKind::TimedOut, "nothing came for a while")),
            }
            while let Some(packet) = next_packet(&mut bytes, limits.packet_bytes_max)? {
                if incoming.send((address, packet)).await.is_err() {
                    return Ok(()); // the endpoint is gone
                }
                // A packet, not a byte of one.
                ends_at = Instant::now() + limits.idle;
            }
        }
    };
    let ended = tokio::select! {
        ended = write => ended,
        ended = read => ended,
    };
    outgoing.close();
    ended
}

/// Takes the next packet, if all of it is there.
fn next_packet(bytes: &mut BytesMut, longest: usize) -> io::Result<Option<Bytes>> {
    let Some(&[high, low]) = bytes.get(..LENGTH_BYTES) else { return Ok(None) };
    let length = usize::from(u16::from_be_bytes([high, low]));
    if length == 0 || length > longest {
        let what = format!("a packet of {length} bytes, where 1 to {longest} are allowed");
        return Err(io::Error::new(io::ErrorKind::InvalidData, what));
    }
    if bytes.len() < LENGTH_BYTES + length {
        return Ok(None);
    }
    bytes.advance(LENGTH_BYTES);
    Ok(Some(bytes.split_to(length).freeze()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn transmit(contents: &[u8], segment_size: Option<usize>) -> Transmit<'_> {
        let destination = marked("192.0.2.1:7".parse().unwrap(), 1);
        Transmit { destination, ecn: None, contents, segment_size, src_ip: None }
    }

    #[test]
    fn an_address_says_its_way_and_is_the_peers_own_without_the_mark() {
        for text in ["192.0.2.1:7444", "[2001:db8::1]:7444"] {
            let address: SocketAddr = text.parse().unwrap();
            assert_eq!((way(address), unmarked(address)), (Way::Udp, address));
            let tunnelled = marked(address, 9);
            assert_eq!((way(tunnelled), unmarked(tunnelled)), (Way::Tcp, address));
            assert_ne!(tunnelled, marked(address, 10), "two tunnels of one peer");
        }
    }

    #[test]
    fn packets_come_out_as_they_went_in_wherever_the_stream_is_cut() {
        let outgoing = Outgoing::default();
        outgoing.push(&transmit(&[1; 2500], Some(1200))).unwrap();
        outgoing.push(&transmit(&[2; 3], None)).unwrap();
        let context = Context::from_waker(Waker::noop());
        let Poll::Ready(Some(stream)) = outgoing.poll_take(&context) else { panic!("nothing waits") };
        for step in [1, 2, 3, 1201, 1202, 5000] {
            let (mut bytes, mut packets) = (BytesMut::new(), Vec::new());
            for part in stream.chunks(step) {
                bytes.put_slice(part);
                while let Some(packet) = next_packet(&mut bytes, 1200).unwrap() {
                    packets.push(packet.to_vec());
                }
            }
            assert_eq!(packets, [vec![1; 1200], vec![1; 1200], vec![1; 100], vec![2; 3]]);
        }
    }

    #[test]
    fn a_length_that_no_packet_has_ends_the_tunnel() {
        for (length, longest) in [(0_u16, 1200), (1201, 1200), (u16::MAX, 8900)] {
            let mut bytes = BytesMut::from(&length.to_be_bytes()[..]);
            let error = next_packet(&mut bytes, longest).unwrap_err();
            assert!(error.to_string().contains(&format!("{length} bytes")), "{error}");
        }
    }

    #[test]
    fn what_waits_is_bounded_until_it_is_taken_and_lost_once_it_is_closed() {
        let (outgoing, context) = (Outgoing::default(), Context::from_waker(Waker::noop()));
        let packet = vec![7; 8900];
        while outgoing.push(&transmit(&packet, None)).is_ok() {}
        assert!(outgoing.lock().bytes.len() < WAITING_BYTES_MAX + 2 * 8902);
        assert!(outgoing.poll_room(&context).is_pending());
        let take = |outgoing: &Outgoing| match outgoing.poll_take(&context) {
            Poll::Ready(bytes) => bytes.map(|bytes| bytes.len()),
            Poll::Pending => panic!("nothing waits"),
        };
        assert_eq!(take(&outgoing), Some(TAKEN_BYTES_MAX));
        assert!(outgoing.poll_room(&context).is_ready());
        outgoing.push(&transmit(&packet, None)).unwrap();
        outgoing.close();
        let waits = outgoing.lock().bytes.len();
        outgoing.push(&transmit(&packet, None)).unwrap();
        let mut taken = 0;
        while let Some(bytes) = take(&outgoing) {
            taken += bytes;
        }
        assert_eq!(taken, waits, "what came behind the end is lost, nothing else");
    }
}
