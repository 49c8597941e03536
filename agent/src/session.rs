//! One session with a master target: the protocol core between the lanes and the machine's threads.
//!
//! Invariants: a peer that stays silent in the handshake is given up, and so is one of which nothing comes any more while
//! there is another to go to; whatever is ready is taken in one go before
//! frames are made, so that a burst costs one turn; a refusal is told apart from a loss, because only a person can
//! mend it. Called by `daemon`, which dials again when it returns.

use std::sync::Arc;
use std::time::{Duration, Instant};

use reprotect_engine::error::{Answer, Severity};
use reprotect_engine::format::frame::FrameKind;
use reprotect_engine::format::message::ErrorCode;
use reprotect_engine::limits::HANDSHAKE_NANOS_MAX;
use reprotect_engine::net::endpoint::{CloseCode, PeerConnection};
use reprotect_engine::net::identity::Role;
use reprotect_engine::net::lanes::{Arrival, LaneReader, LaneWriter};
use reprotect_engine::net::silence::Silence;
use reprotect_engine::net::standby::Probing;
use reprotect_engine::net::tunnel::Way;
use reprotect_engine::proto::agent::AgentEvent;
use reprotect_engine::proto::{Outgoing, ProtoError};
use reprotect_engine::units::DiskId;
use tokio::sync::mpsc;

use crate::config::Compress;
use crate::machine::Machine;
use crate::rota::Ended;
use crate::upstreams::{Ready, Upstreams};

/// How often status, level and everything timed is looked at.
const TICK: Duration = Duration::from_millis(100);
/// Events of one kind taken in one turn at most, so that none starves another.
const BURST: usize = 64;
/// Ticks in a row without a sign of life from the peer after which another is used. The transport would take 5 s.
const SILENT_TICKS: u32 = 10;
/// Ticks between two probes of the peer.
const PROBE_TICKS: u32 = 10;
/// How long the connection's own reason is waited for after a lane ended.
const REASON_WAIT: Duration = Duration::from_millis(200);

/// The session's connection.
struct Link<'a> {
    peer: PeerConnection,
    address: &'a str,
    reader: LaneReader,
    writer: LaneWriter<usize>,
    written: mpsc::UnboundedReceiver<usize>,
    unwritten_bytes: usize,
    relayed: bool,
    compress: bool,
    silence: Silence,
    probing: Probing,
    ticks: u32,
}

impl Link<'_> {
    fn send(&mut self, outgoing: Outgoing) {
        let bytes = outgoing.frame.encoded_bytes();
        self.unwritten_bytes += bytes;
        self.writer.send(outgoing, bytes);
    }
}

impl Machine {
    /// Runs one session over `ready`, dialled as `address`, to its end.
    pub(crate) async fn run_session(
        &mut self,
        ready: Ready,
        upstreams: &mut Upstreams,
        address: &str,
        session: [u8; 16],
    ) -> Ended {
        let (peer, probing, (reader, writer, written)) = ready.into_parts();
        let relayed = peer.peer.role == Role::ProcessServer;
        let mut link = Link {
            peer,
            address,
            reader,
            writer,
            written,
            unwritten_bytes: 0,
            relayed,
            compress: self.compresses(relayed),
            silence: Silence::default(),
            probing,
            ticks: 0,
        };
        link.writer.shape(Arc::clone(&self.shaper));
        self.core.handle_connected(session);
        let ended = self.drive(&mut link, upstreams).await;
        self.end_session();
        self.publish(link.compress);
        self.status().send_modify(|status| {
            status.connected = false;
            status.problem = Some(ended.reason().to_owned());
        });
        CloseCode::Finished.close(&link.peer.connection);
        ended
    }

    fn compresses(&self, relayed: bool) -> bool {
        match self.plan().settings.compress {
            Compress::Source => true,
            Compress::Auto => !relayed,
            Compress::Relay | Compress::Off => false,
        }
    }

    async fn drive(&mut self, link: &mut Link<'_>, upstreams: &mut Upstreams) -> Ended {
        let mut tick = tokio::time::interval(TICK);
        tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        let began = Instant::now();
        let mut ready = false;
        loop {
            if let Some(disk) = self.advance(link)
                && upstreams.has_room_elsewhere(link.address, Instant::now())
            {
                return Ended::Moved(format!("{} has no room for disk {disk}", link.address));
            }
            tokio::select! {
                arrival = link.reader.next() => match arrival {
                    Arrival::Frame(FrameKind::Load, body) => {
                        // One that answers with garbage is found by what it sends next.
                        let _ = link.probing.handle_load(&body, Instant::now());
                    }
                    Arrival::Frame(kind, body) => {
                        if let Err(error) = self.core.handle_frame(kind, &body) {
                            return judge(&error);
                        }
                    }
                    Arrival::Over(error) => return lost(&link.peer, error.to_string()).await,
                },
                Some(bytes) = link.written.recv() => {
                    link.unwritten_bytes -= bytes;
                    while let Ok(bytes) = link.written.try_recv() {
                        link.unwritten_bytes -= bytes;
                    }
                }
                Some((disk, news)) = self.inputs.reads.recv() => self.handle_from_disk(disk, news),
                Some(done) = self.inputs.done.recv() => self.handle_done(done),
                Some(opened) = self.inputs.opened.recv() => self.handle_opened(opened),
                Some(order) = self.inputs.orders.recv() => self.handle_mark_order(order),
                Some((point, news)) = self.inputs.freezes.recv() => self.handle_freeze_news(point, news),
                Some(news) = self.inputs.capture.recv() => self.handle_capture(news),
                Ok(()) = self.plans.changed() => {
                    let stopped = self.replan();
                    upstreams.configure(&self.plan().upstream);
                    self.tell_upstreams(upstreams);
                    link.compress = self.compresses(link.relayed);
                    if !self.plan().upstream.iter().any(|address| address == link.address) {
                        return Ended::Replanned(format!("`upstream` does not name {} any more", link.address));
                    }
                    if stopped {
                        return Ended::Replanned("reloaded: disks that were stopped are tried again".to_owned());
                    }
                }
                _ = tick.tick() => {
                    if !ready && began.elapsed() >= Duration::from_nanos(HANDSHAKE_NANOS_MAX) {
                        return Ended::Lost(format!("{} did not answer the handshake in time", link.address));
                    }
                    if let Some(ended) = self.watch_peer(link, upstreams) {
                        return ended;
                    }
                    self.handle_tick();
                    self.shaper.set_rate(self.plan().settings.send_rate.now());
                    self.status().send_if_modified(|status| {
                        let is_new = status.send_rate != self.shaper.rate();
                        status.send_rate = self.shaper.rate();
                        is_new
                    });
                    self.adapt_level(link.compress, link.unwritten_bytes as u64);
                    self.publish(link.compress);
                }
            }
            self.take_more();
            if !ready && self.core.is_ready() {
                ready = true;
                self.connected(link);
            }
        }
    }

    /// What came meanwhile from the machine's own threads, without another turn of the loop for each.
    fn take_more(&mut self) {
        for _ in 0..BURST {
            let Ok((disk, news)) = self.inputs.reads.try_recv() else { break };
            self.handle_from_disk(disk, news);
        }
        for _ in 0..BURST {
            let Ok(done) = self.inputs.done.try_recv() else { break };
            self.handle_done(done);
        }
    }

    /// Brings what the status says of the upstreams up to date.
    pub(crate) fn tell_upstreams(&self, upstreams: &Upstreams) {
        self.status().send_modify(|status| {
            status.upstreams = upstreams.describe();
            status.moves = upstreams.moves();
        });
    }

    /// Whether the session goes on with this peer; with a choice only.
    fn watch_peer(&mut self, link: &mut Link<'_>, upstreams: &mut Upstreams) -> Option<Ended> {
        if !upstreams.has_choice() {
            return None;
        }
        if link.silence.look(&link.peer.connection) >= SILENT_TICKS {
            return Some(Ended::Lost(format!("nothing came from {} for 1 s", link.address)));
        }
        let now = Instant::now();
        if let Some(reason) = upstreams.advise(link.address, &link.probing, now) {
            return Some(Ended::Moved(reason));
        }
        if link.ticks.is_multiple_of(PROBE_TICKS) {
            // One that was not answered yet tells by its age that the peer is slow.
            if link.probing.waits_since().is_none() {
                let probe = link.probing.ask(now);
                link.send(probe);
            }
            self.tell_upstreams(upstreams);
        }
        link.ticks = link.ticks.wrapping_add(1);
        None
    }

    /// The peer believes us: the session counts.
    fn connected(&self, link: &Link<'_>) {
        self.status().send_modify(|status| {
            status.connected = true;
            status.sessions += 1;
            status.upstream = Some(link.peer.place());
            status.over_tcp = link.peer.way() == Way::Tcp;
            status.upstream_role = Some(link.peer.peer.role.to_string());
            status.problem = None;
        });
    }

    /// Does all that the core wants done now; answers a disk that the relay has no room for.
    fn advance(&mut self, link: &mut Link<'_>) -> Option<DiskId> {
        let mut homeless = None;
        while let Some(event) = self.core.poll_event() {
            if let AgentEvent::Stopped { disk, code: ErrorCode::Limit, .. } = &event
                && link.relayed
            {
                homeless = Some(*disk);
            }
            self.handle_event(event, link.compress);
        }
        while let Some(outgoing) = self.core.poll_transmit() {
            link.send(outgoing);
        }
        homeless
    }
}

fn judge(error: &ProtoError) -> Ended {
    let text = error.to_string();
    if error.severity() == Severity::Stop {
        Ended::Refused(format!("{text}; look at the master target's log"))
    } else {
        Ended::Lost(text)
    }
}

/// A lane ended: the connection tells why, if it is over or about to be.
async fn lost(peer: &PeerConnection, reason: String) -> Ended {
    // When it stays open, only the lane was refused; the reason at hand must do.
    let _ = tokio::time::timeout(REASON_WAIT, peer.connection.closed()).await;
    peer.refusal().map_or(Ended::Lost(reason), Ended::Refused)
}
