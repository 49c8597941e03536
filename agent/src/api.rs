//! What the agent's admin interface says: the JSON that daemon and commands exchange, version 1.
//!
//! Invariants: fields are only added; counters run from the daemon's start; bytes are plain numbers. Used by `daemon`
//! and `commands`.

use serde::{Deserialize, Serialize};

use crate::health::{HealthEvent, LadderStep};

/// A protected disk.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct DiskInfo {
    /// Its UUID.
    pub disk: String,
    /// Its path on this machine.
    pub source: String,
    /// Size in bytes.
    pub size_bytes: u64,
    /// `offered`, `copying`, `comparing`, `scanning`, `synced`, `incomplete` (synced, except what cannot be read), `growing` (its target is to become as large), `paused`
    /// (nothing of it can be read; it is tried again), `stopped` (a person must look) or `disconnected`.
    pub state: String,
    /// Bytes settled by the running walk; the size when none runs.
    pub settled_bytes: u64,
    /// Bytes read from the disk.
    pub read_bytes: u64,
    /// Plain bytes handed to the transport; sent again counts again.
    pub plain_bytes_sent: u64,
    /// Bytes of batches handed to the transport.
    pub wire_bytes_sent: u64,
    /// Durable sequence.
    pub durable: u64,
    /// Last sequence given.
    pub last: u64,
    /// How changes are found: `window`, `bitmap` or `scan`, and why not better.
    #[serde(default)]
    pub capture: String,
    /// How often live capture missed something, so that the disk was compared.
    #[serde(default)]
    pub unaccounted: u64,
    /// Sequences that the target lost after it had called them durable, and got again without a compare.
    #[serde(default)]
    pub lost_at_target: u64,
    /// Scan rounds whose mark is durable.
    pub scan_rounds: u64,
    /// Everything that was written to the disk before is durable at the target, milliseconds since the UNIX epoch; zero for
    /// none.
    pub durable_as_of_ms: u64,
    /// The age of that: what would be lost with the machine now. None as long as the target holds no whole state.
    #[serde(default)]
    pub rpo_ms: Option<u64>,
    /// Whether every write is a recovery point at the moment.
    #[serde(default)]
    pub streaming: bool,
    /// Payload in memory: read, compressed, queued, or sent and not yet acknowledged by the transport.
    #[serde(default)]
    pub held_bytes: u64,
    /// The most it was.
    #[serde(default)]
    pub held_bytes_peak: u64,
    /// What it may be.
    #[serde(default)]
    pub held_bytes_max: u64,
    /// What of it could not be read and is not at the target, in bytes.
    #[serde(default)]
    pub unread_bytes: u64,
    /// In how many ranges.
    #[serde(default)]
    pub unread_ranges: u64,
    /// The first of them, at most 64.
    #[serde(default)]
    pub unread: Vec<ByteRange>,
    /// What is wrong, if anything.
    pub problem: Option<String>,
}

/// A peer this agent may use.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct UpstreamInfo {
    /// As configured.
    pub address: String,
    /// It has the session.
    pub used: bool,
    /// A connection is kept, so that a session can begin at once.
    pub ready: bool,
    /// Round trip to it, in microseconds; the shortest of the last ones.
    pub round_trip_us: Option<u64>,
    /// Round trip to the master target through it; none where it is not reached.
    pub to_target_us: Option<u64>,
    /// Sessions it serves.
    pub sessions: Option<u32>,
    /// Thousandths of its memory that are free.
    pub room_permille: Option<u16>,
    /// Whether it would take another session.
    pub accepts: bool,
    /// Why it cannot be used.
    pub problem: Option<String>,
}

/// A part of a disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ByteRange {
    /// Its first byte.
    pub start: u64,
    /// How many.
    pub bytes: u64,
}

/// `GET /v1/status`.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct StatusInfo {
    /// The program's version.
    pub version: String,
    /// This agent.
    pub agent: String,
    /// Seconds since the start.
    pub uptime_seconds: u64,
    /// Whether a session is up.
    pub connected: bool,
    /// The peer of the session.
    pub upstream: Option<String>,
    /// Its role: `process-server` or `master-target`.
    pub upstream_role: Option<String>,
    /// The session's packets travel over TCP, for UDP does not get through.
    #[serde(default)]
    pub over_tcp: bool,
    /// How fast data may be sent now, in bytes per second; none for no limit.
    #[serde(default)]
    pub send_rate: Option<u64>,
    /// Sessions begun.
    pub sessions: u64,
    /// The peers this agent may use, the best first.
    #[serde(default)]
    pub upstreams: Vec<UpstreamInfo>,
    /// How often the session moved because another peer served better.
    #[serde(default)]
    pub moves: u64,
    /// Why the last session ended, while none is up.
    pub problem: Option<String>,
    /// What the configuration asks for and cannot be had; the configuration that was refused, if one was.
    #[serde(default)]
    pub warnings: Vec<String>,
    /// Revision of the master target's policy that holds; zero without one.
    #[serde(default)]
    pub policy_revision: u64,
    /// Pause between two scan rounds, by policy or configuration.
    #[serde(default)]
    pub scan_interval_ms: u64,
    /// Pause between two points that bring applications to rest; none for never.
    #[serde(default)]
    pub app_interval_ms: Option<u64>,
    /// Closing windows that found no moment, since the start.
    #[serde(default)]
    pub windows_failed: u64,
    /// Events for which the kernel did not run a capture program, since the start.
    #[serde(default)]
    pub events_skipped: u64,
    /// What to look at, the worst first.
    #[serde(default)]
    pub health: Vec<HealthEvent>,
    /// The newest steps up and down the ladder of capture.
    #[serde(default)]
    pub ladder: Vec<LadderStep>,
    /// How many there were since the start.
    #[serde(default)]
    pub ladder_steps: u64,
    /// zstd level in use, where this agent compresses.
    pub level: Option<i32>,
    /// Its protected disks.
    pub disks: Vec<DiskInfo>,
}

/// `POST /v1/mark`.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct MarkRequest {
    /// Name of the point; empty for none.
    pub name: String,
    /// Freeze the file systems of the protected disks while they are read.
    pub freeze: bool,
    /// How long they may be frozen; from 1 s to 10 min.
    pub freeze_limit_ms: u64,
    /// Bring applications to rest by the hooks before, and let them go on after.
    #[serde(default)]
    pub app: bool,
}

impl MarkRequest {
    /// A point without a name, of the machine as it runs.
    #[must_use]
    pub const fn plain() -> Self {
        Self { name: String::new(), freeze: false, freeze_limit_ms: 0, app: false }
    }

    /// Longest name.
    pub const NAME_BYTES_MAX: usize = 64;
}

/// A disk of a point.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct MarkedDisk {
    /// Its UUID.
    pub disk: String,
    /// Its path on this machine.
    pub source: String,
}

/// The answer to [`MarkRequest`]: the point is durable.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct MarkAnswer {
    /// The point's identity, 32 hexadecimal digits; all disks' marks have it.
    pub point: String,
    /// `application-consistent`, `frozen`, `crash-consistent`, `fuzzy`, or `incomplete`: parts of a disk cannot be read, see
    /// `problems`.
    pub class: String,
    /// Its name; empty without one.
    pub name: String,
    /// Its time by this machine's clock.
    pub source_time_ms: u64,
    /// The disks it is of.
    pub disks: Vec<MarkedDisk>,
    /// The mount points that were frozen for it.
    pub frozen: Vec<String>,
    /// How long the calls took that freeze, writing out included; microseconds.
    #[serde(default)]
    pub freeze_call_us: u64,
    /// How long everything was frozen beyond that; microseconds.
    #[serde(default)]
    pub frozen_us: u64,
    /// What went wrong with the hooks or is missing of disks, the point notwithstanding.
    #[serde(default)]
    pub problems: Vec<String>,
}
