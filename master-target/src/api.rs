//! What the admin interface says: the JSON that daemon and commands exchange, version 1.
//!
//! Invariants: fields are only added; bytes are plain numbers, times are milliseconds. Used by `admin` and `commands`.

use serde::{Deserialize, Serialize};

/// A protected disk in `GET /v1/status`.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct DiskInfo {
    /// Its UUID.
    pub disk: String,
    /// Its machine's name.
    pub machine: String,
    /// Its agent.
    pub agent: String,
    /// Its name on the machine.
    pub source: String,
    /// The target.
    pub path: String,
    /// Its kind.
    pub kind: String,
    /// Size in bytes.
    pub size_bytes: u64,
    /// `waiting`, `copying`, `comparing`, `synced`, `failed` or `closed`.
    pub state: String,
    /// Whether an agent has it open now.
    pub connected: bool,
    /// Bytes of the disk settled by the running pass; the whole size when synced.
    pub settled_bytes: u64,
    /// The newest generation.
    pub generation: u64,
    /// Durable and applied sequence.
    pub durable: u64,
    /// Sequence of the last mark.
    pub marked: u64,
    /// Bytes of batches received since the daemon started.
    pub wire_bytes: u64,
    /// Plain bytes in them.
    pub plain_bytes: u64,
    /// Bytes written to the target since the daemon started.
    pub written_bytes: u64,
    /// Bytes zeroed on the target since the daemon started.
    pub zeroed_bytes: u64,
    /// What is wrong, if anything.
    pub problem: Option<String>,
}

/// A live session.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct SessionInfo {
    /// Its agent, once proven.
    pub agent: Option<String>,
    /// Where it comes from.
    pub address: String,
    /// The process server it comes through.
    pub relay: Option<String>,
}

/// `GET /v1/status`.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct StatusInfo {
    /// The program's version.
    pub version: String,
    /// The target's UUID.
    pub target: String,
    /// The site.
    pub site: String,
    /// Where it listens.
    pub listen: String,
    /// Seconds since the start.
    pub uptime_seconds: u64,
    /// All disks.
    pub disks: Vec<DiskInfo>,
    /// All sessions.
    pub sessions: Vec<SessionInfo>,
}

/// `POST /v1/invite`.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct InviteRequest {
    /// `agent` or `process-server`.
    pub role: String,
    /// How long it is valid.
    pub valid_seconds: u64,
}

/// The answer to [`InviteRequest`].
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct InviteAnswer {
    /// The token.
    pub token: String,
    /// The UUID the invited daemon will have.
    pub peer: String,
    /// How long it is valid.
    pub valid_seconds: u64,
    /// Where it will connect.
    pub addresses: Vec<String>,
}

/// `POST /v1/revoke`.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct RevokeRequest {
    /// UUID of a peer, or name of a machine.
    pub peer: String,
}

/// The answer to [`RevokeRequest`].
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct RevokeAnswer {
    /// The peer refused from now on.
    pub peer: String,
}

/// `POST /v1/unprotect`.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct UnprotectRequest {
    /// UUID of a protected disk, path of its target, or `MACHINE:DISK`.
    pub disk: String,
    /// Only tell which disk it is.
    pub dry_run: bool,
}

/// The answer to [`UnprotectRequest`].
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct UnprotectAnswer {
    /// The disk's UUID.
    pub disk: String,
    /// Its name on its machine.
    pub source: String,
    /// Its target, which stays.
    pub path: String,
}

/// A disk of a machine in `GET /v1/machines`.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct MachineDisk {
    /// Stable identity on the agent.
    pub source: String,
    /// Path or name on the machine.
    pub name: String,
    /// Size in bytes.
    pub size_bytes: u64,
    /// Whether the agent offers it without being told.
    pub selected: bool,
    /// The target it is replicated to, when it is.
    pub protected_as: Option<String>,
    /// The UUID under which it is protected, when it is.
    pub disk: Option<String>,
}

/// A machine in `GET /v1/machines`.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct MachineInfo {
    /// Its agent.
    pub agent: String,
    /// What it calls itself.
    pub host_name: String,
    /// Whether its agent is connected now.
    pub connected: bool,
    /// Its disks, from its last inventory.
    pub disks: Vec<MachineDisk>,
}

/// `POST /v1/policy`.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct PolicyRequest {
    /// Name or agent UUID of a machine.
    pub machine: String,
    /// Pause between two scan rounds in milliseconds; zero for the agent's own configuration; none to change nothing.
    pub points_every_ms: Option<u64>,
}

/// The answer to [`PolicyRequest`].
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct PolicyAnswer {
    /// The machine's name.
    pub machine: String,
    /// Its agent.
    pub agent: String,
    /// Counts changes; zero where nobody ever set a policy.
    pub revision: u64,
    /// Pause between two scan rounds in milliseconds; zero for the agent's own configuration.
    pub points_every_ms: u64,
    /// Whether its agent is connected, and so knows already.
    pub connected: bool,
}

/// A recovery point of a disk in `GET /v1/points`.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct PointInfo {
    /// `EPOCH.NUMBER`.
    pub point: String,
    /// Its name; empty without one.
    pub name: String,
    /// What it promises: `crash-consistent`, `frozen`, `application-consistent`, or `fuzzy` (nothing).
    pub class: String,
    /// Its time by the source's clock.
    pub source_time_ms: u64,
    /// Kept until somebody says otherwise.
    pub pinned: bool,
    /// It promised more once.
    pub degraded: bool,
}

/// `POST /v1/points`.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct PointsRequest {
    /// UUID of a protected disk, path of its target, or `MACHINE:DISK`.
    pub disk: String,
}

/// The answer to [`PointsRequest`].
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct PointsAnswer {
    /// The disk's UUID.
    pub disk: String,
    /// Its points, newest first.
    pub points: Vec<PointInfo>,
    /// What is mounted, of all disks.
    pub mounts: Vec<MountInfo>,
}

/// `POST /v1/mount`.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct MountRequest {
    /// As in [`PointsRequest`].
    pub disk: String,
    /// `EPOCH.NUMBER`, a name, or `newest`.
    pub point: String,
    /// On a throw-away overlay.
    pub writable: bool,
}

/// A mounted point; the answer to [`MountRequest`] and [`UnmountRequest`].
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct MountInfo {
    /// Its name.
    pub id: String,
    /// The disk's UUID.
    pub disk: String,
    /// `EPOCH.NUMBER`.
    pub point: String,
    /// On a throw-away overlay.
    pub writable: bool,
    /// Where NBD clients find it.
    pub uri: String,
}

/// `POST /v1/unmount`.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct UnmountRequest {
    /// The mount's name.
    pub id: String,
}

/// `POST /v1/rollback`.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct RollbackRequest {
    /// As in [`PointsRequest`].
    pub disk: String,
    /// `EPOCH.NUMBER` or a name.
    pub point: String,
}

/// The answer to [`RollbackRequest`].
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct RollbackAnswer {
    /// The disk's UUID.
    pub disk: String,
    /// `EPOCH.NUMBER`.
    pub point: String,
    /// Bytes that could differ and were compared.
    pub compared_bytes: u64,
    /// Bytes that did differ and were written.
    pub written_bytes: u64,
}
