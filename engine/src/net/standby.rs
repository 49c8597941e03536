//! A connection without a session: kept to a peer that may be needed, so that it is there at once and its worth is known.
//!
//! [`Standing`] is the asking end: it probes and measures, and becomes a session's lanes when it is wanted.
//! [`stand_by`] is the answering end: it tells how this peer stands until the other begins a session.
//!
//! Invariants: standing by reserves nothing at the answering end beyond the connection; a peer that neither probes nor
//! begins for [`SILENCE_MAX`] is let go, and one that does not read its answers is not read; round trips are measured through the peer's own loop, so that a peer which is
//! stuck is slow. Asked by the agent and the process server, answered by the process server and the master target.

use std::time::{Duration, Instant};

use bytes::Bytes;
use tokio::sync::mpsc;
use tokio::time::timeout;

use super::endpoint::PeerConnection;
use super::lanes::{self, Arrival, LaneError, LaneReader, LaneWriter};
use crate::format::frame::FrameKind;
use crate::format::message::Message;
use crate::format::standby::{Load, Probe};
use crate::proto::Outgoing;

/// A peer that stands by sends something at least this often.
pub const SILENCE_MAX: Duration = Duration::from_secs(30);
/// Answers that may wait for a peer to read them.
const UNREAD_MAX: usize = 16;
/// Round trips of which the shortest counts: what is longer was the machines' load, not the way.
const ROUND_TRIPS: usize = 5;

/// The lanes of a connection: reader, writer, and what comes back when a frame was handed to the transport.
pub type Lanes<T> = (LaneReader, LaneWriter<T>, mpsc::UnboundedReceiver<T>);

/// Answers probes with `load` until the peer sends something else, which is given back; `token` makes what the writer
/// gives back for an answer.
///
/// # Errors
/// When the connection ends first, or the peer is silent for too long.
pub async fn stand_by<T: Send + 'static>(
    (reader, writer, written): &mut Lanes<T>,
    token: impl Fn() -> T,
    load: impl Fn(Probe) -> Load,
) -> Result<(FrameKind, Bytes), LaneError> {
    let mut unread = 0;
    loop {
        let arrival = tokio::select! {
            Some(_) = written.recv() => {
                unread -= 1;
                continue;
            }
            arrival = timeout(SILENCE_MAX, reader.next()), if unread < UNREAD_MAX => arrival,
            error = writer.closed(), if unread >= UNREAD_MAX => return Err(error),
        };
        match arrival {
            Ok(Arrival::Frame(FrameKind::Probe, body)) => {
                writer.send(answer(&body, &load)?, token());
                unread += 1;
            }
            Ok(Arrival::Frame(kind, body)) => return Ok((kind, body)),
            Ok(Arrival::Over(error)) => return Err(error),
            Err(_) => return Err(LaneError::Ended("it began nothing and asked nothing for 30 s".to_owned())),
        }
    }
}

/// The answer to a probe.
///
/// # Errors
/// When `body` is none.
pub fn answer(body: &Bytes, load: impl Fn(Probe) -> Load) -> Result<Outgoing, LaneError> {
    match Message::decode(FrameKind::Probe, body)? {
        Message::Probe(probe) => Ok(Outgoing::control(Message::Load(load(probe)).encode())),
        other => unreachable!("a frame of kind PROBE was read as {other:?}"),
    }
}

/// Probes of one peer and what came of them.
#[derive(Debug, Default)]
pub struct Probing {
    next_token: u64,
    asked: Option<(u64, Instant)>,
    round_trips: [Option<Duration>; ROUND_TRIPS],
    load: Option<Load>,
}

impl Probing {
    /// The next probe, sent `now`; one that was not answered is given up.
    pub fn ask(&mut self, now: Instant) -> Outgoing {
        self.next_token += 1;
        self.asked = Some((self.next_token, now));
        Outgoing::control(Message::Probe(Probe { token: self.next_token }).encode())
    }

    /// Since when the newest probe waits for its answer.
    #[must_use]
    pub fn waits_since(&self) -> Option<Instant> {
        self.asked.map(|(_, at)| at)
    }

    /// Takes a LOAD that came `now`; answers whether it belongs to the newest probe.
    ///
    /// # Errors
    /// When `body` is none.
    pub fn handle_load(&mut self, body: &Bytes, now: Instant) -> Result<bool, LaneError> {
        let Message::Load(load) = Message::decode(FrameKind::Load, body)? else { return Ok(false) };
        let Some((_, at)) = self.asked.take_if(|(token, _)| *token == load.token) else { return Ok(false) };
        let place = (load.token % ROUND_TRIPS as u64) as usize;
        if let Some(round_trip) = self.round_trips.get_mut(place) {
            *round_trip = Some(now.saturating_duration_since(at));
        }
        self.load = Some(load);
        Ok(true)
    }

    /// The shortest of the last round trips.
    #[must_use]
    pub fn round_trip(&self) -> Option<Duration> {
        self.round_trips.iter().flatten().min().copied()
    }

    /// How the peer stood at its last answer.
    #[must_use]
    pub const fn load(&self) -> Option<Load> {
        self.load
    }
}

/// A connection that stands by, at the end that dialled.
#[derive(Debug)]
pub struct Standing<T> {
    /// The peer.
    pub peer: PeerConnection,
    /// What is known of it.
    pub probing: Probing,
    lanes: Lanes<T>,
}

impl<T: Send + Default + 'static> Standing<T> {
    /// Opens the lanes of a connection this end dialled.
    ///
    /// # Errors
    /// When the connection is gone.
    pub async fn open(peer: PeerConnection) -> Result<Self, LaneError> {
        let lanes = lanes::dialled(&peer.connection).await?;
        Ok(Self { peer, probing: Probing::default(), lanes })
    }

    /// Probes once and waits for the answer, at most `limit`. Safe to drop at the await: the answer is then taken by the
    /// next call, or by the session.
    ///
    /// # Errors
    /// When the connection ends, or the peer does not answer as it should.
    pub async fn probe(&mut self, limit: Duration) -> Result<Load, LaneError> {
        let outgoing = self.probing.ask(Instant::now());
        self.lanes.1.send(outgoing, T::default());
        match timeout(limit, self.answered()).await {
            Ok(answered) => answered,
            Err(_) => Err(LaneError::Ended("it did not answer a probe in time".to_owned())),
        }
    }

    async fn answered(&mut self) -> Result<Load, LaneError> {
        let (reader, _, written) = &mut self.lanes;
        loop {
            let arrival = tokio::select! {
                Some(_) = written.recv() => continue,
                arrival = reader.next() => arrival,
            };
            match arrival {
                Arrival::Frame(FrameKind::Load, body) => {
                    if self.probing.handle_load(&body, Instant::now())?
                        && let Some(load) = self.probing.load()
                    {
                        return Ok(load);
                    }
                }
                Arrival::Frame(FrameKind::Error, body) => {
                    let text = match Message::decode(FrameKind::Error, &body)? {
                        Message::Error(_, text) => text,
                        _ => String::new(),
                    };
                    return Err(LaneError::Ended(text));
                }
                Arrival::Frame(..) => {
                    return Err(LaneError::Ended("it answered a probe with something else".to_owned()));
                }
                Arrival::Over(error) => return Err(error),
            }
        }
    }

    /// Ends the standing: peer, what is known of it, and lanes are a session's now.
    #[must_use]
    pub fn into_parts(self) -> (PeerConnection, Probing, Lanes<T>) {
        (self.peer, self.probing, self.lanes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn load_of(token: u64) -> Bytes {
        let load = Load { token, target_micros: 0, sessions: 1, room_permille: 1000, accepts: true };
        Message::Load(load).encode().body()
    }

    #[test]
    fn an_answer_counts_once_and_for_its_own_probe_only() {
        let (mut probing, begin) = (Probing::default(), Instant::now());
        let after = |ms| begin + Duration::from_millis(ms);
        drop(probing.ask(begin));
        drop(probing.ask(after(100)));
        assert!(!probing.handle_load(&load_of(1), after(110)).unwrap(), "the first was given up");
        assert!(probing.handle_load(&load_of(2), after(130)).unwrap());
        assert!(!probing.handle_load(&load_of(2), after(140)).unwrap());
        assert_eq!(probing.round_trip(), Some(Duration::from_millis(30)));
        assert!(probing.waits_since().is_none());
    }

    #[test]
    fn the_shortest_of_the_last_round_trips_counts() {
        let (mut probing, begin) = (Probing::default(), Instant::now());
        let mut shortest = Vec::new();
        for (count, millis) in [9, 3, 5, 6, 7, 8, 9].into_iter().enumerate() {
            drop(probing.ask(begin));
            let at = begin + Duration::from_millis(millis);
            assert!(probing.handle_load(&load_of(count as u64 + 1), at).unwrap());
            shortest.push(probing.round_trip().unwrap().as_millis());
        }
        assert_eq!(shortest, [9, 3, 3, 3, 3, 3, 5]);
    }
}
