//! UDP sockets as QUIC wants them: large kernel buffers, and offloaded sends that the kernel can take.
//!
//! Invariant: one offloaded send (several equal packets in one system call) never exceeds what one UDP message may
//! hold. quinn puts up to ten packets into it whatever their size; above 6,550 bytes per packet the kernel refuses
//! that, quinn takes it for loss, and its search for the largest packet falls back to 1,200 bytes: measured, four
//! times the CPU. Bounding the number of packets by the largest possible packet keeps jumbo frames usable.
//! Units: bytes. Called by `endpoint` only.

use std::io::{self, IoSliceMut};
use std::net::{SocketAddr, UdpSocket};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use quinn::udp::{RecvMeta, Transmit};
use quinn::{AsyncUdpSocket, Runtime, TokioRuntime, UdpPoller};
use rustix::net::sockopt;

/// Most bytes of one UDP message over IPv4 (65,535 less IP and UDP headers); IPv6 allows a little more.
const MESSAGE_BYTES_MAX: usize = 65_507;

/// Binds `address` with buffers of `buffer_bytes`, for packets of at most `payload_bytes_max`.
pub(super) fn bind(
    address: SocketAddr,
    buffer_bytes: usize,
    payload_bytes_max: u16,
) -> io::Result<Arc<dyn AsyncUdpSocket>> {
    let socket = UdpSocket::bind(address)?;
    enlarge_buffers(&socket, buffer_bytes);
    let inner = TokioRuntime.wrap_udp_socket(socket)?;
    let segments_max = (MESSAGE_BYTES_MAX / usize::from(payload_bytes_max.max(1))).max(1);
    Ok(Arc::new(BoundedOffload { inner, segments_max }))
}

/// Asks for large buffers: beyond the system's limit where we may (CAP_NET_ADMIN), else as far as it goes. Smaller
/// ones only cost speed, so a refusal is told and is no error.
fn enlarge_buffers(socket: &UdpSocket, bytes: usize) {
    let receive = sockopt::set_socket_recv_buffer_size_force(socket, bytes)
        .or_else(|_| sockopt::set_socket_recv_buffer_size(socket, bytes));
    let send = sockopt::set_socket_send_buffer_size_force(socket, bytes)
        .or_else(|_| sockopt::set_socket_send_buffer_size(socket, bytes));
    // The kernel reports twice what it grants.
    let got = sockopt::socket_recv_buffer_size(socket).unwrap_or(0) / 2;
    if receive.is_err() || send.is_err() || got < bytes {
        tracing::info!(
            asked_bytes = bytes,
            got_bytes = got,
            "UDP buffers are smaller than asked for; raise net.core.rmem_max and net.core.wmem_max for full speed"
        );
    }
}

/// quinn's own socket with fewer packets per offloaded send.
#[derive(Debug)]
struct BoundedOffload {
    inner: Arc<dyn AsyncUdpSocket>,
    segments_max: usize,
}

impl AsyncUdpSocket for BoundedOffload {
    fn create_io_poller(self: Arc<Self>) -> Pin<Box<dyn UdpPoller>> {
        Arc::clone(&self.inner).create_io_poller()
    }

    fn try_send(&self, transmit: &Transmit<'_>) -> io::Result<()> {
        self.inner.try_send(transmit)
    }

    fn poll_recv(
        &self,
        context: &mut Context<'_>,
        buffers: &mut [IoSliceMut<'_>],
        meta: &mut [RecvMeta],
    ) -> Poll<io::Result<usize>> {
        self.inner.poll_recv(context, buffers, meta)
    }

    fn local_addr(&self) -> io::Result<SocketAddr> {
        self.inner.local_addr()
    }

    fn max_transmit_segments(&self) -> usize {
        self.inner.max_transmit_segments().min(self.segments_max)
    }

    fn max_receive_segments(&self) -> usize {
        self.inner.max_receive_segments()
    }

    fn may_fragment(&self) -> bool {
        self.inner.may_fragment()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn an_offloaded_send_always_fits_one_message() {
        for payload in [1200_u16, 1452, 6500, 6551, 8900, 16_384, 65_507, u16::MAX] {
            let socket = bind("127.0.0.1:0".parse().unwrap(), 64 << 10, payload).unwrap();
            let segments = socket.max_transmit_segments();
            assert!(segments >= 1);
            assert!(segments == 1 || segments * usize::from(payload) <= MESSAGE_BYTES_MAX, "{payload}");
        }
    }
}
