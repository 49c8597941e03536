//! One session with a master target: the protocol core between the lanes and the machine's threads.
//!
//! Invariants: a peer that stays silent in the handshake is given up; whatever is ready is taken in one go before
//! frames are made, so that a burst costs one turn; a refusal is told apart from a loss, because only a person can
//! mend it. Called by `daemon`, which dials again when it returns.

use std::time::{Duration, Instant};

use reprotect_engine::error::{Answer, Severity};
use reprotect_engine::limits::HANDSHAKE_NANOS_MAX;
use reprotect_engine::net::endpoint::PeerConnection;
use reprotect_engine::net::identity::Role;
use reprotect_engine::net::lanes::{self, Arrival, LaneReader, LaneWriter};
use reprotect_engine::proto::ProtoError;
use tokio::sync::mpsc;

use crate::config::Compress;
use crate::dial::Ended;
use crate::machine::Machine;

/// How often status, level and everything timed is looked at.
const TICK: Duration = Duration::from_millis(100);
/// Events of one kind taken in one turn at most, so that none starves another.
const BURST: usize = 64;
/// How long the connection's own reason is waited for after a lane ended.
const REASON_WAIT: Duration = Duration::from_millis(200);

/// The session's connection.
struct Link<'a> {
    peer: &'a PeerConnection,
    address: &'a str,
    reader: LaneReader,
    writer: LaneWriter<usize>,
    written: mpsc::UnboundedReceiver<usize>,
    unwritten_bytes: usize,
    relayed: bool,
    compress: bool,
}

impl Machine {
    /// Runs one session with `peer`, dialled as `address`, to its end.
    pub async fn run_session(&mut self, peer: &PeerConnection, address: &str, session: [u8; 16]) -> Ended {
        let ended = match lanes::dialled::<usize>(&peer.connection).await {
            Ok((reader, writer, written)) => {
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
                };
                self.core.handle_connected(session);
                let ended = self.drive(&mut link).await;
                self.end_session();
                self.publish(link.compress);
                ended
            }
            Err(error) => lost(peer, error.to_string()).await,
        };
        self.status().send_modify(|status| {
            status.connected = false;
            status.problem = Some(ended.reason().to_owned());
        });
        ended
    }

    fn compresses(&self, relayed: bool) -> bool {
        match self.plan().settings.compress {
            Compress::Source => true,
            Compress::Auto => !relayed,
            Compress::Relay | Compress::Off => false,
        }
    }

    async fn drive(&mut self, link: &mut Link<'_>) -> Ended {
        let mut tick = tokio::time::interval(TICK);
        tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        let began = Instant::now();
        let mut ready = false;
        loop {
            self.advance(link);
            tokio::select! {
                arrival = link.reader.next() => match arrival {
                    Arrival::Frame(kind, body) => {
                        if let Err(error) = self.core.handle_frame(kind, &body) {
                            return judge(&error);
                        }
                    }
                    Arrival::Over(error) => return lost(link.peer, error.to_string()).await,
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
                    self.handle_tick();
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

    /// The peer believes us: the session counts.
    fn connected(&self, link: &Link<'_>) {
        self.status().send_modify(|status| {
            status.connected = true;
            status.sessions += 1;
            status.upstream = Some(link.peer.connection.remote_address().to_string());
            status.upstream_role = Some(link.peer.peer.role.to_string());
            status.problem = None;
        });
    }

    /// Does all that the core wants done now.
    fn advance(&mut self, link: &mut Link<'_>) {
        while let Some(event) = self.core.poll_event() {
            self.handle_event(event, link.compress);
        }
        while let Some(outgoing) = self.core.poll_transmit() {
            let bytes = outgoing.frame.encoded_bytes();
            link.unwritten_bytes += bytes;
            link.writer.send(outgoing, bytes);
        }
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
