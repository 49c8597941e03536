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
    /// `waiting`, `copying`, `comparing`, `synced`, `incomplete` (synced, except what the source cannot read), `failing-back`, `released` (to its virtual machine), `failed` or
    /// `closed`.
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
    /// What the source could not read and is therefore not here, in bytes, by the newest mark since the daemon started.
    #[serde(default)]
    pub unread_bytes: u64,
    /// What is wrong, if anything.
    pub problem: Option<String>,
    /// What the scrub read and found; none where there is no journal.
    #[serde(default)]
    pub scrub: Option<ScrubInfo>,
}

/// What the scrub did at a disk since the daemon started.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct ScrubInfo {
    /// Rounds that ended.
    pub rounds: u64,
    /// Bytes of target, undo runs and redo log that were read.
    pub read_bytes: u64,
    /// What is not as it was written.
    pub findings: Vec<String>,
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
    /// Pause between two points that bring applications to rest, in milliseconds; zero for the agent's own
    /// configuration, `u64::MAX` for never; none to change nothing.
    #[serde(default)]
    pub app_points_every_ms: Option<u64>,
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
    /// Pause between two points that bring applications to rest, in the same way.
    #[serde(default)]
    pub app_points_every_ms: u64,
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
    /// What is known to be damaged of that which it is made from.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub damaged: Option<String>,
    /// Its identity; the parts of one machine's point have the same.
    pub id: String,
    /// Why its mark was placed: `pass`, `timer`, `command` or `stop`.
    pub cause: String,
    /// It outlives the redo log.
    pub kept: bool,
    /// The target itself kept it (as-found, before-undo, before-rollback): the source was never like that.
    #[serde(default)]
    pub targets_own: bool,
    /// All disks that were asked for have it.
    pub complete: bool,
    /// Where it is on each disk that has it.
    pub parts: Vec<PointPart>,
}

/// A point on one disk.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct PointPart {
    /// The disk's UUID.
    pub disk: String,
    /// `EPOCH.NUMBER`.
    pub point: String,
}

/// `POST /v1/points`.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct PointsRequest {
    /// UUID of a protected disk, path of its target, `MACHINE:DISK`, or a machine: all its disks.
    pub disk: String,
    /// Fuzzy ones, too.
    #[serde(default)]
    pub all: bool,
}

/// The answer to [`PointsRequest`].
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct PointsAnswer {
    /// The disk's UUID; of several, with commas between.
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
    /// `EPOCH.NUMBER`, a name, the first digits of an identity, `newest`, `newest-app`, `@TIME` or `seq:N`.
    pub point: String,
    /// On a throw-away overlay.
    pub writable: bool,
    /// Something of it is known to be damaged, and that is accepted.
    #[serde(default)]
    pub accept_damage: bool,
}

/// The answer to [`MountRequest`]: one for each disk.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct MountAnswer {
    /// What was mounted.
    pub mounts: Vec<MountInfo>,
    /// Another point than the one meant was taken, and why.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub note: Option<String>,
}

/// A mounted point; the answer to [`UnmountRequest`].
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
    /// As in [`MountRequest`].
    pub point: String,
    /// Something of it is known to be damaged, and that is accepted.
    #[serde(default)]
    pub accept_damage: bool,
}

/// `POST /v1/pin`.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct PinRequest {
    /// As in [`PointsRequest`].
    pub disk: String,
    /// As in [`MountRequest`].
    pub point: String,
    /// Keep it until somebody says otherwise, or no longer; `None`: as it is.
    pub pinned: Option<bool>,
    /// Its new name.
    pub name: Option<String>,
}

/// The answer to [`PinRequest`].
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct PinAnswer {
    /// What was changed.
    pub parts: Vec<PointPart>,
    /// Another point than the one meant was taken, and why.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub note: Option<String>,
}

/// `POST /v1/timeline`: as [`PointsRequest`].
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct TimelineAnswer {
    /// Disk by disk.
    pub disks: Vec<DiskTimeline>,
}

/// What a disk offers.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct DiskTimeline {
    /// The disk's UUID.
    pub disk: String,
    /// Its name on its machine.
    pub source: String,
    /// Stretches of time, oldest first.
    pub intervals: Vec<IntervalInfo>,
    /// Its consistent points, newest first.
    pub points: Vec<PointInfo>,
}

/// A stretch of time, by the source's clock.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct IntervalInfo {
    /// `any-write`, `point-only`, `degraded`, `damaged` or `lost`.
    pub offer: String,
    /// From.
    pub from_ms: u64,
    /// To.
    pub to_ms: u64,
}

/// `GET` and `POST /v1/retention`: what is kept how long; `None` leaves a value as it is.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct RetentionRequest {
    /// As the configuration's `retention.any_write`.
    pub any_write: Option<String>,
    /// As `retention.every_epoch`.
    pub every_epoch: Option<String>,
    /// As `retention.rungs`.
    pub rungs: Option<Vec<String>>,
    /// As `retention.keep`.
    pub keep: Option<String>,
    /// As `retention.guaranteed`.
    pub guaranteed: Option<String>,
    /// Back to what the configuration says.
    pub reset: bool,
}

/// The answer to [`RetentionRequest`].
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct RetentionAnswer {
    /// The retention folder.
    pub folder: String,
    /// What is kept how long, as it is now.
    pub ladder: RetentionRequest,
    /// What of it has no effect, because nothing is kept so long.
    #[serde(default)]
    pub without_effect: Vec<String>,
    /// Whether a command changed it from what the configuration says.
    pub changed: bool,
    /// Bytes that the journal occupies or may.
    pub total_bytes: u64,
    /// Free bytes of the drive.
    pub free_bytes: u64,
    /// What the drive's fill does.
    pub pressure: String,
    /// What stays whatever the fill, and the remedy: what is pinned, and the last points that the disks of a machine have in
    /// common; `None` where nothing is.
    #[serde(default)]
    pub stays: Option<String>,
    /// Bytes of redo log and of undo runs.
    pub log_bytes: u64,
    /// Bytes of undo runs.
    pub undo_bytes: u64,
    /// Bytes of redo log written in the last hour.
    pub log_bytes_last_hour: u64,
    /// Bytes of undo runs that were finished in the last hour.
    pub undo_bytes_last_hour: u64,
    /// Hours of history the drive holds at that churn; `None` without any.
    pub hours_held: Option<u64>,
    /// There is no hour of history yet.
    #[serde(default)]
    pub is_young: bool,
}

/// The answer to [`RollbackRequest`]: one for each disk.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct RollbackAnswers {
    /// What went back.
    pub disks: Vec<RollbackAnswer>,
}

/// A disk that went back.
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

/// `POST /v1/export`.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct ExportRequest {
    /// As in [`PointsRequest`], or a machine.
    pub what: String,
    /// `EPOCH.NUMBER`, a name, or `newest`.
    pub point: String,
    /// `flat`, `sparse`, `stream` or `raw`.
    pub format: String,
    /// The new file, or of a machine a folder; absolute, on the master target.
    pub path: std::path::PathBuf,
    /// Something of it is known to be damaged, and that is accepted.
    #[serde(default)]
    pub accept_damage: bool,
}

/// A copy that was made.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct ExportedInfo {
    /// The disk's UUID.
    pub disk: String,
    /// `EPOCH.NUMBER`.
    pub point: String,
    /// The files of the copy.
    pub files: Vec<String>,
    /// Bytes of the disk.
    pub size_bytes: u64,
    /// Bytes that held something.
    pub data_bytes: u64,
    /// Length of the files.
    pub file_bytes: u64,
}

/// The answer to [`ExportRequest`].
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct ExportAnswer {
    /// One per disk.
    pub copies: Vec<ExportedInfo>,
    /// Another point than the one meant was taken, and why.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub note: Option<String>,
}

/// `POST /v1/verify`.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct VerifyRequest {
    /// As in [`PointsRequest`].
    pub disk: String,
    /// `EPOCH.NUMBER`, a name, `newest` or `all`.
    pub point: String,
}

/// Bytes of a point that cannot be had.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct DamagedRange {
    /// First byte.
    pub start: u64,
    /// One past the last byte.
    pub end: u64,
    /// What is wrong with the first of them.
    pub reason: String,
}

/// A point that was read to its last block.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct VerifiedPoint {
    /// `EPOCH.NUMBER`.
    pub point: String,
    /// Bytes that were read; what was never written is left out.
    pub read_bytes: u64,
    /// Blocks of 4 KiB in them.
    pub blocks: u64,
    /// Bytes that cannot be had.
    pub damaged_bytes: u64,
    /// Where they are.
    pub damaged: Vec<DamagedRange>,
    /// Ranges that are not in `damaged`, for there are too many.
    pub left_out: u64,
    /// Why the point cannot be opened at all.
    pub refused: Option<String>,
}

/// The answer to [`VerifyRequest`].
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct VerifyAnswer {
    /// The disk's UUID.
    pub disk: String,
    /// Everything could be read.
    pub sound: bool,
    /// The points, in the order in which they were read.
    pub points: Vec<VerifiedPoint>,
}

/// A part of a disk.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ByteRange {
    /// Its first byte.
    pub start: u64,
    /// How many.
    pub bytes: u64,
}

/// What is written down of a pass over a whole disk.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Receipt {
    /// Counts receipts of this master target.
    pub number: u64,
    /// The disk.
    pub disk: String,
    /// Why: `INITIAL_COPY`, `INITIAL_COMPARE`, `TARGET_IN_DOUBT` (it lost something, or was taken back), or the cause for which the
    /// agent asked.
    pub cause: String,
    /// `running`, `done`, `superseded` by another one before it was, or `unprotected` before.
    pub result: String,
    /// The disk's size.
    pub size_bytes: u64,
    /// Bytes whose hashes were compared; sent again after a lost session counts again.
    pub compared_bytes: u64,
    /// Plain bytes that were moved.
    pub moved_bytes: u64,
    /// In how many ranges.
    pub range_count: u64,
    /// The first of them, at most 64.
    pub ranges: Vec<ByteRange>,
    /// When it began.
    pub begun_ms: u64,
    /// When this was last written down.
    pub updated_ms: u64,
    /// When it ended; zero while it runs.
    pub ended_ms: u64,
    /// Points from before it that could be had after it.
    pub points_kept: Option<u64>,
    /// Of these, how many promise less than their marks did.
    pub points_degraded: Option<u64>,
}

/// `POST /v1/receipts`.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct ReceiptsRequest {
    /// MACHINE, MACHINE:DISK, a disk's UUID or the path of its target; empty for all.
    pub disk: String,
}

/// The answer.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct ReceiptsAnswer {
    /// Newest first.
    pub receipts: Vec<Receipt>,
}
