//! What the daemon tells about itself: the JSON of `GET /v1/status`, and the register of sessions behind it.
//!
//! Invariants: numbers of a session are at most one tick (250 ms) old; a session is listed from its acceptance until
//! it is over, then its sums live on in the totals. Units: bytes, seconds; `ratio` is plain payload per byte sent to
//! the target. Written by `relay` and `daemon`, read by the `status` command.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use serde::{Deserialize, Serialize};

/// The whole answer.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Status {
    /// The daemon's version.
    pub version: String,
    /// Its identity.
    pub peer: String,
    /// Where it listens.
    pub listen: String,
    /// Seconds since it started.
    pub uptime_seconds: u64,
    /// When its certificate expires, seconds since 1970.
    pub certificate_expires: u64,
    /// Memory budget for payload.
    pub memory_bytes: u64,
    /// What of it is promised to sessions.
    pub reserved_bytes: u64,
    /// zstd level now.
    pub level: i32,
    /// Whether the level follows link and processor.
    pub adaptive: bool,
    /// Compression threads.
    pub workers: usize,
    /// Round trip to the master target in microseconds; none while it is not known or the target cannot be reached.
    #[serde(default)]
    pub target_micros: Option<u32>,
    /// Why it cannot be reached.
    #[serde(default)]
    pub target_problem: Option<String>,
    /// How fast data may be sent to the targets now, in bytes per second; none for no limit.
    #[serde(default)]
    pub send_rate: Option<u64>,
    /// Sessions now.
    pub sessions: Vec<SessionStatus>,
    /// Sums since the start, running sessions included.
    pub totals: Totals,
}

/// Sums over sessions.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Totals {
    /// Sessions that began.
    pub sessions: u64,
    /// Sessions and disks refused for want of memory.
    pub refused: u64,
    /// Traffic.
    #[serde(flatten)]
    pub traffic: Traffic,
}

/// Bytes by direction, frame headers included, transport overhead not.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Traffic {
    /// Received from the agent.
    pub from_agent_bytes: u64,
    /// Handed to the transport towards the target.
    pub to_target_bytes: u64,
    /// Received from the target.
    pub from_target_bytes: u64,
    /// Handed to the transport towards the agent.
    pub to_agent_bytes: u64,
    /// Plain payload of what was received from the agent.
    pub plain_bytes: u64,
    /// Batches as sent to the target.
    pub batch_bytes: u64,
}

impl Traffic {
    /// Plain payload per byte of batches; `None` before anything was sent.
    #[must_use]
    pub fn ratio(&self) -> Option<f64> {
        (self.batch_bytes > 0).then(|| self.plain_bytes as f64 / self.batch_bytes as f64)
    }

    fn add(&mut self, other: &Self) {
        self.from_agent_bytes += other.from_agent_bytes;
        self.to_target_bytes += other.to_target_bytes;
        self.from_target_bytes += other.from_target_bytes;
        self.to_agent_bytes += other.to_agent_bytes;
        self.plain_bytes += other.plain_bytes;
        self.batch_bytes += other.batch_bytes;
    }
}

/// Where a session stands.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum SessionState {
    /// Waiting for the agent's HELLO.
    #[default]
    Accepted,
    /// Connecting to the target.
    Dialling,
    /// Frames pass.
    Relaying,
}

/// One session.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct SessionStatus {
    /// The agent.
    pub agent: String,
    /// Where it connects from.
    pub address: String,
    /// The target and its address, once connected.
    pub target: Option<String>,
    /// Where it stands.
    pub state: SessionState,
    /// Seconds since it began.
    pub since_seconds: u64,
    /// Credit cost of batches held and not yet handed to the transport.
    pub held_bytes: u64,
    /// The most that was.
    pub held_bytes_max: u64,
    /// Of the held bytes, those waiting for the transport.
    pub sending_bytes: u64,
    /// Windows of all its disks.
    pub window_bytes: u64,
    /// Send window towards the target.
    pub send_window_bytes: u64,
    /// Plain bytes per byte sent.
    pub ratio: Option<f64>,
    /// Traffic.
    #[serde(flatten)]
    pub traffic: Traffic,
    /// Its disks.
    pub disks: Vec<DiskStatus>,
}

/// One relayed disk.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiskStatus {
    /// The disk.
    pub disk: String,
    /// Plain payload received.
    pub plain_bytes: u64,
    /// Batches as sent to the target.
    pub batch_bytes: u64,
    /// Credit cost held.
    pub held_bytes: u64,
    /// Its window.
    pub window_bytes: u64,
    /// Plain bytes per second lately.
    pub bytes_per_second: Option<u64>,
}

/// The register.
#[derive(Debug, Default)]
pub struct Register {
    inner: Mutex<Inner>,
}

#[derive(Debug, Default)]
struct Inner {
    next: u64,
    live: BTreeMap<u64, SessionStatus>,
    ended: Totals,
}

impl Register {
    fn inner(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Lists a session.
    #[must_use]
    pub fn enter(self: &Arc<Self>, status: SessionStatus) -> Entry {
        let mut inner = self.inner();
        let number = inner.next;
        inner.next += 1;
        inner.ended.sessions += 1;
        inner.live.insert(number, status);
        Entry { register: Arc::clone(self), number }
    }

    /// Counts a refusal.
    pub fn count_refused(&self) {
        self.inner().ended.refused += 1;
    }

    /// How many sessions there are now.
    #[must_use]
    pub fn sessions(&self) -> u32 {
        u32::try_from(self.inner().live.len()).unwrap_or(u32::MAX)
    }

    /// Sessions now, and the totals.
    #[must_use]
    pub fn read(&self) -> (Vec<SessionStatus>, Totals) {
        let inner = self.inner();
        let mut totals = inner.ended;
        for session in inner.live.values() {
            totals.traffic.add(&session.traffic);
        }
        (inner.live.values().cloned().collect(), totals)
    }

    /// How full the windows of sessions with something to send are with what waits for the transport.
    #[must_use]
    pub fn output_permille(&self) -> u16 {
        let inner = self.inner();
        let sending = inner.live.values().filter(|session| session.sending_bytes > 0);
        let (waiting, windows) = sending.fold((0, 0), |(waiting, windows), session| {
            (waiting + session.sending_bytes, windows + session.window_bytes)
        });
        crate::recode::permille(waiting, windows)
    }
}

/// A listed session; taken off the list when dropped.
#[derive(Debug)]
pub struct Entry {
    register: Arc<Register>,
    number: u64,
}

impl Entry {
    /// Publishes what the session says of itself.
    pub fn publish(&self, status: SessionStatus) {
        self.register.inner().live.insert(self.number, status);
    }
}

impl Drop for Entry {
    fn drop(&mut self) {
        let mut inner = self.register.inner();
        if let Some(session) = inner.live.remove(&self.number) {
            inner.ended.traffic.add(&session.traffic);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn totals_count_running_and_ended_sessions_once() {
        let register = Arc::new(Register::default());
        let status = |plain_bytes| SessionStatus {
            traffic: Traffic { plain_bytes, batch_bytes: 10, ..Traffic::default() },
            ..SessionStatus::default()
        };
        let first = register.enter(status(0));
        let second = register.enter(status(0));
        first.publish(status(30));
        second.publish(status(5));
        drop(first);
        let (live, totals) = register.read();
        assert_eq!((live.len(), totals.sessions, totals.traffic.plain_bytes), (1, 2, 35));
        assert_eq!(totals.traffic.ratio(), Some(1.75));
    }

    #[test]
    fn the_answer_is_read_back_as_written() {
        let status = Status { sessions: vec![SessionStatus::default()], level: -3, ..Status::default() };
        let text = serde_json::to_string(&status).unwrap();
        assert_eq!(serde_json::from_str::<Status>(&text).unwrap(), status);
    }
}
