//! The lanes of a session over real QUIC: what the reader tells when the session is over.

#![expect(clippy::unwrap_used, reason = "a failed step is a failed test")]

#[path = "tls_matrix/support.rs"]
mod support;

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use quinn::Connection;
use reprotect_engine::format::frame::{Frame, FrameKind};
use reprotect_engine::format::message::{ErrorCode, Message};
use reprotect_engine::net::endpoint::{Accepted, CloseCode, Server, TransportSettings, bind_server};
use reprotect_engine::net::identity::Role;
use reprotect_engine::net::lanes::{self, Arrival, LaneReader, LaneWriter};
use reprotect_engine::net::shaper::Shaper;
use reprotect_engine::net::tls;
use reprotect_engine::net::trust::PeerRule;
use reprotect_engine::proto::{Lane, Outgoing};
use reprotect_engine::units::DiskId;
use support::{Site, dialer, loopback};

/// Longer than anything here takes; only a hang reaches it.
const PATIENCE: Duration = Duration::from_secs(30);
/// Long enough for whoever reads to see the end of a lane before the end of the connection.
const PAUSE: Duration = Duration::from_millis(100);

type End = (LaneReader, LaneWriter<()>, Connection);

/// Both ends of one session: who dialled, who accepted. The server lives as long as it is held.
async fn session(site: &Site) -> (End, End, Arc<Server>) {
    let (near, far) = (site.identity(Role::Agent), site.identity(Role::ProcessServer));
    let tls = site.server_tls(&far, &[Role::Agent]);
    let settings = TransportSettings::default();
    let server = Arc::new(bind_server(loopback(), tls, Arc::clone(&site.revocations), settings).unwrap());
    let rule = PeerRule::of_site("berlin", &[Role::ProcessServer]);
    let tls = tls::client_config(&near, Arc::clone(&site.trust), rule).unwrap();
    let address = server.local_address().unwrap();
    let dial = async {
        let peer = dialer().connect(address, tls, Some(far.own().peer), &site.revocations).await.unwrap();
        let (reader, mut writer, _) = lanes::dialled(&peer.connection).await.unwrap();
        writer.send(hello(), ());
        (reader, writer, peer.connection)
    };
    let accept = async {
        let Some(Accepted::Peer(peer)) = server.accept().await else { panic!("a peer dialled") };
        let (reader, writer, _) = lanes::accepted(&peer.connection).await.unwrap();
        (reader, writer, peer.connection)
    };
    let (dialled, accepted) = tokio::join!(dial, accept);
    (dialled, accepted, server)
}

/// Any frame: the control lane exists for the other end once something was written to it.
fn hello() -> Outgoing {
    Outgoing::control(Message::error(DiskId::NONE, ErrorCode::Upstream, "hello").encode())
}

/// What the reader tells at the end, after `frames` frames.
async fn over(reader: &mut LaneReader, frames: usize) -> String {
    for _ in 0..frames {
        let arrival = tokio::time::timeout(PATIENCE, reader.next()).await.unwrap();
        assert!(matches!(arrival, Arrival::Frame(..)), "{arrival:?}");
    }
    match tokio::time::timeout(PATIENCE, reader.next()).await.unwrap() {
        Arrival::Over(error) => error.to_string(),
        frame @ Arrival::Frame(..) => panic!("{frame:?}"),
    }
}

#[tokio::test]
async fn a_peer_that_leaves_is_heard_out_though_its_lane_ends_before_its_connection() {
    let site = Site::new();
    let ((mut reader, _writer, _near), (_, mut writer, far), _server) = session(&site).await;
    writer.send(hello(), ());
    drop(writer);
    let leave = async {
        tokio::time::sleep(PAUSE).await;
        CloseCode::ShuttingDown.close(&far);
    };
    let (told, ()) = tokio::join!(over(&mut reader, 1), leave);
    assert!(told.contains("shutting down"), "{told}");
}

#[tokio::test]
async fn a_connection_that_is_closed_at_once_says_why() {
    let site = Site::new();
    // Which of the readers sees the end first is a race: try it often enough to meet both.
    for _ in 0..50 {
        let ((mut reader, _writer, _near), (_, _far_writer, far), _server) = session(&site).await;
        CloseCode::ShuttingDown.close(&far);
        let told = over(&mut reader, 0).await;
        assert!(told.contains("shutting down"), "{told}");
    }
}

#[tokio::test]
async fn a_peer_that_only_finishes_its_lane_ends_the_session_all_the_same() {
    let site = Site::new();
    let ((mut reader, _writer, _near), (_, mut writer, far), _server) = session(&site).await;
    writer.send(hello(), ());
    drop(writer);
    let told = over(&mut reader, 1).await;
    assert!(told.contains("gave no reason"), "{told}");
    assert!(far.close_reason().is_none());
}

const DISK: DiskId = DiskId([1; 16]);

fn data(lane: Lane, bytes: usize) -> Outgoing {
    let kind = if matches!(lane, Lane::Delta(_)) { FrameKind::Batch } else { FrameKind::Bulk };
    Outgoing { lane, frame: Frame::new(kind, Bytes::from(vec![7; bytes])) }
}

async fn next_kind(reader: &mut LaneReader) -> FrameKind {
    match tokio::time::timeout(PATIENCE, reader.next()).await.unwrap() {
        Arrival::Frame(kind, _) => kind,
        Arrival::Over(error) => panic!("{error}"),
    }
}

#[tokio::test]
async fn data_wait_for_their_rate_and_what_is_urgent_does_not() {
    let site = Site::new();
    let ((_, mut writer, _near), (mut reader, ..), _server) = session(&site).await;
    next_kind(&mut reader).await;
    // A mebibyte would take a week.
    let shaper = Arc::new(Shaper::new(Some(2)));
    writer.shape(Arc::clone(&shaper));
    writer.send(data(Lane::Delta(DISK), 1 << 20), ());
    writer.send(data(Lane::Bulk(DISK), 1 << 20), ());
    for _ in 0..3 {
        writer.send(hello(), ());
        assert_eq!(next_kind(&mut reader).await, FrameKind::Error);
    }
    // Another rate holds at once, for what is on its way, too.
    shaper.set_rate(None);
    let mut kinds = [next_kind(&mut reader).await, next_kind(&mut reader).await];
    kinds.sort_by_key(|kind| *kind as u8);
    let mut expected = [FrameKind::Batch, FrameKind::Bulk];
    expected.sort_by_key(|kind| *kind as u8);
    assert_eq!(kinds, expected);
}
