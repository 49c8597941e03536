//! The bodies of all frames but batches: fixed heads, some with a bounded tail.
//!
//! Invariants: a head's count says how long its tail is, nothing may follow it; tails are bounded by `limits`.
//! Units: sectors, bytes, sequences; see each field.

use bytes::{BufMut, Bytes, BytesMut};

use super::FormatError;
use super::batch::{Chain, Mark, MarkCause};
use super::frame::{Frame, FrameKind};
use super::handshake::{Hello, HelloAck};
use super::standby::{Load, Probe};
use super::wire::{Text, put_items, take_items, wire, wire_enum};
use crate::checksum::UnitHash;
use crate::limits::{CHUNK_BYTES, COMPARE_FINE_BYTES, COMPARE_UNIT_BYTES, RANGES_PER_MESSAGE_MAX};
use crate::units::{DiskId, Generation, LineageId, PeerId, SectorRange, Sequence};

mod tails;

pub(in crate::format) use tails::check_size;
use tails::{
    all_items, bounded, put_auth, take_auth, take_blob, take_blob_of, take_compare_hashes,
    take_compare_request, take_inventory, take_point_degrade,
};

/// Identifies a source disk on its agent: derived from what the disk itself says, stable over reboots.
pub type SourceId = [u8; 16];

wire! {
    /// Head of AUTH; the signature and the certificates (each with a u16 length before it) follow.
    pub struct AuthHead / AuthHeadWire = 24 {
        /// Who it is.
        agent: PeerId,
        /// Length of the signature over the session's nonce.
        signature_bytes: u16,
        /// Number of certificates, leaf first.
        certificate_count: u16,
        ; reserved: [u8; 4],
    }
}

wire! {
    /// The session may be used.
    pub struct Welcome / WelcomeWire = 16 {
        /// Disks that will be offered now; more may come later.
        offers: u32,
        ; reserved: [u8; 12],
    }
}

wire! {
    /// Head of INVENTORY; [`InventoryDisk`]s follow.
    pub struct InventoryHead / InventoryHeadWire = 80 {
        /// The machine's host name.
        host_name: Text<64>,
        /// Number of disks.
        disk_count: u32,
        ; reserved: [u8; 12],
    }
}

wire! {
    /// One disk an agent could protect.
    pub struct InventoryDisk / InventoryDiskWire = 256 {
        /// Its stable identity.
        source: [u8; 16],
        /// Its size.
        size_sectors: u64,
        /// GPT disk GUID, or zeros.
        gpt_guid: [u8; 16],
        /// MBR signature, or zero.
        mbr_signature: u32,
        /// Number of file-system UUIDs.
        fs_count: u8,
        /// Whether the agent offers it without being told.
        selected: bool,
        /// Path or name on the machine.
        name: Text<82>,
        /// File-system UUIDs, zero-filled.
        fs_uuids: [u8; 128],
    }
}

wire! {
    /// Head of OFFER; the signed grant follows.
    pub struct OfferHead / OfferHeadWire = 64 {
        /// The disk.
        disk: DiskId,
        /// The source disk it is to be read from.
        source: [u8; 16],
        /// Its size.
        size_sectors: u64,
        /// The generation the grant carries.
        generation: Generation,
        /// Length of the signed grant.
        grant_bytes: u16,
        ; reserved: [u8; 14],
    }
}

wire! {
    /// Head of OPEN_DISK; the signed grant follows.
    pub struct OpenDiskHead / OpenDiskHeadWire = 96 {
        /// The disk.
        disk: DiskId,
        /// Its size at the source now.
        size_sectors: u64,
        /// The generation of the presented grant.
        generation: Generation,
        /// The history the agent continues; zeros when it knows none.
        lineage: LineageId,
        /// What the agent last knew to be durable.
        durable: Sequence,
        /// Length of the signed grant.
        grant_bytes: u16,
        ; reserved: [u8; 38],
    }
}

wire_enum! {
    /// What the target needs of a pass over the whole disk.
    pub enum PassMode: u8 {
        /// Nothing: the disk was synced.
        Done = 0,
        /// The target is empty: send everything.
        Copy = 1,
        /// The target holds something: send what differs.
        Compare = 2,
    }
}

wire! {
    /// Head of GRANT; settled ranges (16 bytes each) and then the signed grant of the new generation follow.
    pub struct GrantHead / GrantHeadWire = 112 {
        /// The disk.
        disk: DiskId,
        /// The new fencing token, already durable at the target.
        generation: Generation,
        /// The history at the target.
        lineage: LineageId,
        /// Durable sequence at the target.
        durable: Sequence,
        /// Chain digest at that sequence.
        chain: Chain,
        /// The pass.
        pass: u64,
        /// What it needs.
        mode: PassMode,
        /// Number of settled ranges.
        range_count: u32,
        /// Length of the signed grant.
        grant_bytes: u16,
        ; reserved: [u8; 33],
    }
}

wire! {
    /// Delta acknowledgement; each sequence names a contiguous prefix, `received ≥ durable ≥ applied` (I5).
    pub struct Ack / AckWire = 64 {
        /// The disk.
        disk: DiskId,
        /// Its generation.
        generation: Generation,
        /// Held by the process server or accepted by the target.
        received: Sequence,
        /// Survives any crash.
        durable: Sequence,
        /// On the target.
        applied: Sequence,
        /// Sequence of the last durable mark.
        marked: Sequence,
        /// Number of the last durable mark of this generation; zero before the first.
        mark: u64,
    }
}

wire! {
    /// Head of BULK_ACK; durable ranges follow.
    pub struct BulkAckHead / BulkAckHeadWire = 48 {
        /// The disk.
        disk: DiskId,
        /// Its generation.
        generation: Generation,
        /// The pass.
        pass: u64,
        /// Number of ranges.
        range_count: u32,
        ; reserved: [u8; 12],
    }
}

wire! {
    /// Credit: the sender may have sent this much since GRANT, in all.
    pub struct Credit / CreditWire = 48 {
        /// The disk.
        disk: DiskId,
        /// Its generation.
        generation: Generation,
        /// Upper bound of the summed credit cost of all batches.
        limit: u64,
        ; reserved: [u8; 16],
    }
}

wire_enum! {
    /// Why delta must be sent again.
    pub enum NackReason: u8 {
        /// Sequences are missing before this batch.
        Gap = 1,
        /// A record failed its checks.
        Damaged = 2,
    }
}

wire! {
    /// Delta must be sent again.
    pub struct Nack / NackWire = 48 {
        /// The disk.
        disk: DiskId,
        /// Its generation.
        generation: Generation,
        /// The first sequence wanted.
        resume_from: Sequence,
        /// Why.
        reason: NackReason,
        ; reserved: [u8; 15],
    }
}

wire! {
    /// A higher generation exists: whoever still uses a lower one must stop (I9).
    pub struct Fenced / FencedWire = 32 {
        /// The disk.
        disk: DiskId,
        /// The generation in force.
        generation: Generation,
        ; reserved: [u8; 8],
    }
}

wire! {
    /// Head of COMPARE_REQUEST; the units to refine follow, ascending.
    pub struct CompareRequestHead / CompareRequestHeadWire = 64 {
        /// The disk.
        disk: DiskId,
        /// The asker's generation.
        generation: Generation,
        /// Number of the request, echoed.
        request: u64,
        /// The sectors, at most one chunk.
        range: SectorRange,
        /// Number of units to refine; zero for hashes of the whole range.
        unit_count: u16,
        ; reserved: [u8; 14],
    }
}

/// Blocks of a compare unit.
pub const BLOCKS_PER_UNIT: usize = (COMPARE_UNIT_BYTES / COMPARE_FINE_BYTES) as usize;

wire! {
    /// A unit to refine, in COMPARE_REQUEST.
    pub struct RefineUnit / RefineUnitWire = 66 {
        /// Number of the unit in 64 KiB from the range's start.
        unit: u16,
        /// CRC-32 of each of its 4 KiB blocks at the agent; zeros for blocks behind the range's end.
        crcs: [u32; BLOCKS_PER_UNIT],
    }
}

wire! {
    /// Head of COMPARE_HASHES; the hashes follow, then the masks.
    pub struct CompareHashesHead / CompareHashesHeadWire = 48 {
        /// The disk.
        disk: DiskId,
        /// The asker's generation.
        generation: Generation,
        /// The request answered.
        request: u64,
        /// Number of hashes: one for each unit of the range, or where units were refined the one that confirms the masks.
        hash_count: u32,
        /// Number of masks (u16): one for each unit that was refined.
        mask_count: u16,
        ; reserved: [u8; 10],
    }
}

/// What a target answers when it is asked to compare.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct CompareAnswer {
    /// Hashes of the units, or the one over all blocks of `masks`.
    pub hashes: Vec<UnitHash>,
    /// For each unit to refine, which of its blocks have the CRC that was sent: bit 0 is the first.
    pub masks: Vec<u16>,
}

wire_enum! {
    /// Why a compare pass is asked for.
    pub enum PassCause: u8 {
        /// The operator asked.
        Operator = 1,
        /// The target lost data it had called durable.
        TargetLostDurable = 2,
        /// The stream's chain does not fit the target's.
        ChainMismatch = 3,
        /// The agent lost track of what changed.
        TrackingLost = 4,
        /// The agent continues another history than the target holds.
        OtherLineage = 5,
        /// Another session had the disk open since this agent had: nobody here knows what it wrote.
        OtherSession = 6,
        /// A delta batch failed its checks again and again: the stream was given up where it stood.
        DamagedStream = 7,
    }
}

wire! {
    /// The agent asks for a compare pass.
    pub struct PassBegin / PassBeginWire = 32 {
        /// The disk.
        disk: DiskId,
        /// Its generation.
        generation: Generation,
        /// Why.
        cause: PassCause,
        ; reserved: [u8; 7],
    }
}

wire! {
    /// The state of the pass at the target.
    pub struct PassState / PassStateWire = 48 {
        /// The disk.
        disk: DiskId,
        /// Its generation.
        generation: Generation,
        /// The pass.
        pass: u64,
        /// What it needs now.
        mode: PassMode,
        ; reserved: [u8; 15],
    }
}

wire! {
    /// The agent has covered the whole disk.
    pub struct PassEnd / PassEndWire = 48 {
        /// The disk.
        disk: DiskId,
        /// Its generation.
        generation: Generation,
        /// The pass.
        pass: u64,
        ; reserved: [u8; 16],
    }
}

wire! {
    /// The machine's policy: the agent keeps the newest revision and works by it, also while it has no session.
    pub struct Policy / PolicyWire = 64 {
        /// Counts changes; a lower one is older.
        revision: u64,
        /// Pause between two scan rounds in milliseconds; zero: as the agent's configuration says.
        points_every_ms: u64,
        /// The master target that counts the revisions.
        target: PeerId,
        /// Pause between two points that bring applications to rest, in milliseconds; zero: as the agent's configuration
        /// says; [`Policy::NEVER_MS`]: there are none.
        app_points_every_ms: u64,
        ; reserved: [u8; 24],
    }
}

impl Policy {
    /// In place of a pause: never.
    pub const NEVER_MS: u64 = u64::MAX;
}

wire! {
    /// Something was found out about a part of the stream: points in it promise less than was said.
    pub struct PointDegrade / PointDegradeWire = 192 {
        /// The disk.
        disk: DiskId,
        /// The history the sequences belong to.
        lineage: LineageId,
        /// The sender's fencing token.
        generation: Generation,
        /// The first sequence concerned …
        from: Sequence,
        /// … and the last.
        to: Sequence,
        /// What was found, for people.
        cause: Text<120>,
        ; reserved: [u8; 16],
    }
}

wire! {
    /// The target wants a point of all disks of the machine, behind one more scan round: its marks bear `point`.
    pub struct MarkRequest / MarkRequestWire = 64 {
        /// The point's identity.
        point: [u8; 16],
        /// How long file systems may be frozen, in milliseconds.
        freeze_limit_ms: u64,
        /// What the marks are to say of why they were placed.
        cause: MarkCause,
        /// Freeze what is mounted from the disks, if that can be done.
        freeze: bool,
        ; reserved: [u8; 38],
    }
}

wire! {
    /// A point that was wanted cannot be had.
    pub struct MarkRefused / MarkRefusedWire = 256 {
        /// The point.
        point: [u8; 16],
        /// Why, and what to do, for people.
        reason: Text<232>,
        ; reserved: [u8; 8],
    }
}

wire! {
    /// The source disk is larger than its target, which is to grow; answered by OFFER with the new size, or by ERROR.
    pub struct GrowDisk / GrowDiskWire = 48 {
        /// The disk.
        disk: DiskId,
        /// Of the newest offer or grant.
        generation: Generation,
        /// Its size at the source now.
        size_sectors: u64,
        ; reserved: [u8; 16],
    }
}

wire_enum! {
    /// What went wrong at the other end; the catalogue is in the operations document.
    pub enum ErrorCode: u16 {
        /// No common version or an unknown required feature.
        Version = 1,
        /// The peer is not who or what it must be here.
        Identity = 2,
        /// The grant does not allow this.
        Grant = 3,
        /// A message that makes no sense here.
        Protocol = 4,
        /// A limit was exceeded.
        Limit = 5,
        /// The size at the source is not the size at the target.
        Size = 6,
        /// The target failed; a person must look.
        Target = 7,
        /// The target is full; it goes on by itself when there is space.
        Full = 8,
        /// The master target cannot be reached from the process server.
        Upstream = 9,
        /// The disk is not known here.
        UnknownDisk = 10,
        /// Histories forked: a person must choose.
        Fork = 11,
    }
}

wire! {
    /// Head of ERROR; the text follows.
    pub struct ErrorHead / ErrorHeadWire = 32 {
        /// The disk, or zeros for the session.
        disk: DiskId,
        /// What.
        code: ErrorCode,
        /// Length of the text.
        text_bytes: u16,
        ; reserved: [u8; 12],
    }
}

/// The agent's proof of identity, end to end.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Auth {
    /// Who it is.
    pub agent: PeerId,
    /// Signature over the session's nonce and both identities.
    pub signature: Bytes,
    /// Certificates in DER, leaf first.
    pub certificates: Vec<Bytes>,
}

/// Any message.
#[derive(Clone, Debug, PartialEq, Eq)]
#[expect(missing_docs, reason = "each variant is named after the structure it carries")]
pub enum Message {
    Hello(Hello),
    HelloAck(HelloAck),
    Auth(Auth),
    Welcome(Welcome),
    Inventory(InventoryHead, Vec<InventoryDisk>),
    Offer(OfferHead, Bytes),
    OpenDisk(OpenDiskHead, Bytes),
    Grant(GrantHead, Vec<SectorRange>, Bytes),
    Mark(Mark),
    Ack(Ack),
    BulkAck(BulkAckHead, Vec<SectorRange>),
    Credit(Credit),
    Nack(Nack),
    Fenced(Fenced),
    CompareRequest(CompareRequestHead, Vec<RefineUnit>),
    CompareHashes(CompareHashesHead, CompareAnswer),
    PassBegin(PassBegin),
    PassState(PassState),
    PassEnd(PassEnd),
    Policy(Policy),
    PointDegrade(PointDegrade),
    MarkRequest(MarkRequest),
    MarkRefused(MarkRefused),
    GrowDisk(GrowDisk),
    Probe(Probe),
    Load(Load),
    Error(ErrorHead, String),
}

/// Certificates a proof may carry.
pub const CERTIFICATES_MAX: usize = 4;
/// Longest single certificate in bytes.
pub const CERTIFICATE_BYTES_MAX: usize = 8192;
/// Longest signature in bytes.
pub const SIGNATURE_BYTES_MAX: usize = 512;
/// Longest signed grant in bytes.
pub const GRANT_BYTES_MAX: usize = 512;
/// Most units one request may refine, and most hashes or masks one answer may carry: those of a whole chunk.
pub const UNITS_MAX: usize = (CHUNK_BYTES / COMPARE_UNIT_BYTES) as usize;

impl Message {
    /// The message as a frame.
    #[must_use]
    pub fn encode(&self) -> Frame {
        let mut out = BytesMut::new();
        let kind = match self {
            Self::Hello(m) => put(&mut out, FrameKind::Hello, &m.to_bytes()),
            Self::HelloAck(m) => put(&mut out, FrameKind::HelloAck, &m.to_bytes()),
            Self::Auth(m) => put_auth(&mut out, m),
            Self::Welcome(m) => put(&mut out, FrameKind::Welcome, &m.to_bytes()),
            Self::Inventory(m, disks) => {
                put(&mut out, FrameKind::Inventory, &m.to_bytes());
                for disk in disks {
                    out.put_slice(&disk.to_bytes());
                }
                FrameKind::Inventory
            }
            Self::Offer(m, grant) => {
                put(&mut out, FrameKind::Offer, &m.to_bytes());
                put(&mut out, FrameKind::Offer, grant)
            }
            Self::OpenDisk(m, grant) => {
                put(&mut out, FrameKind::OpenDisk, &m.to_bytes());
                put(&mut out, FrameKind::OpenDisk, grant)
            }
            Self::Grant(m, ranges, grant) => {
                put(&mut out, FrameKind::Grant, &m.to_bytes());
                put_items(&mut out, ranges.iter().copied());
                put(&mut out, FrameKind::Grant, grant)
            }
            Self::Mark(m) => put(&mut out, FrameKind::Mark, &m.to_bytes()),
            Self::Ack(m) => put(&mut out, FrameKind::Ack, &m.to_bytes()),
            Self::BulkAck(m, ranges) => {
                put(&mut out, FrameKind::BulkAck, &m.to_bytes());
                put_items(&mut out, ranges.iter().copied());
                FrameKind::BulkAck
            }
            Self::Credit(m) => put(&mut out, FrameKind::Credit, &m.to_bytes()),
            Self::Nack(m) => put(&mut out, FrameKind::Nack, &m.to_bytes()),
            Self::Fenced(m) => put(&mut out, FrameKind::Fenced, &m.to_bytes()),
            Self::CompareRequest(m, units) => {
                put(&mut out, FrameKind::CompareRequest, &m.to_bytes());
                units.iter().for_each(|unit| out.put_slice(&unit.to_bytes()));
                FrameKind::CompareRequest
            }
            Self::CompareHashes(m, answer) => {
                put(&mut out, FrameKind::CompareHashes, &m.to_bytes());
                put_items(&mut out, answer.hashes.iter().copied());
                put_items(&mut out, answer.masks.iter().copied());
                FrameKind::CompareHashes
            }
            Self::PassBegin(m) => put(&mut out, FrameKind::PassBegin, &m.to_bytes()),
            Self::PassState(m) => put(&mut out, FrameKind::PassState, &m.to_bytes()),
            Self::PassEnd(m) => put(&mut out, FrameKind::PassEnd, &m.to_bytes()),
            Self::Policy(m) => put(&mut out, FrameKind::Policy, &m.to_bytes()),
            Self::PointDegrade(m) => put(&mut out, FrameKind::PointDegrade, &m.to_bytes()),
            Self::MarkRequest(m) => put(&mut out, FrameKind::MarkRequest, &m.to_bytes()),
            Self::MarkRefused(m) => put(&mut out, FrameKind::MarkRefused, &m.to_bytes()),
            Self::GrowDisk(m) => put(&mut out, FrameKind::GrowDisk, &m.to_bytes()),
            Self::Probe(m) => put(&mut out, FrameKind::Probe, &m.to_bytes()),
            Self::Load(m) => put(&mut out, FrameKind::Load, &m.to_bytes()),
            Self::Error(m, text) => {
                put(&mut out, FrameKind::Error, &m.to_bytes());
                put(&mut out, FrameKind::Error, text.as_bytes())
            }
        };
        Frame::new(kind, out.freeze())
    }

    /// Reads a message of a kind that is not a batch.
    ///
    /// # Errors
    /// When the body is not what the format says, or the kind is a batch.
    pub fn decode(kind: FrameKind, body: &Bytes) -> Result<Self, FormatError> {
        Ok(match kind {
            FrameKind::Hello => Self::Hello(Hello::decode(body)?),
            FrameKind::HelloAck => Self::HelloAck(HelloAck::decode(body)?),
            FrameKind::Auth => Self::Auth(take_auth(body)?),
            FrameKind::Welcome => Self::Welcome(Welcome::read_exact(body)?),
            FrameKind::Inventory => take_inventory(body)?,
            FrameKind::Offer => {
                let (head, rest) = OfferHead::read_prefix(body)?;
                check_size("Offer", head.size_sectors)?;
                Self::Offer(head, take_blob(rest, head.grant_bytes, "Offer")?)
            }
            FrameKind::OpenDisk => {
                let (head, rest) = OpenDiskHead::read_prefix(body)?;
                Self::OpenDisk(head, take_blob(rest, head.grant_bytes, "OpenDisk")?)
            }
            FrameKind::Grant => {
                let (head, rest) = GrantHead::read_prefix(body)?;
                let (ranges, rest) =
                    take_items(rest, bounded(head.range_count, RANGES_PER_MESSAGE_MAX, "Grant")?, "Grant")?;
                Self::Grant(head, ranges, take_blob(rest, head.grant_bytes, "Grant")?)
            }
            FrameKind::Mark => Self::Mark(Mark::read_exact(body)?),
            FrameKind::Ack => Self::Ack(Ack::read_exact(body)?),
            FrameKind::BulkAck => {
                let (head, rest) = BulkAckHead::read_prefix(body)?;
                let count = bounded(head.range_count, RANGES_PER_MESSAGE_MAX, "BulkAck")?;
                Self::BulkAck(head, all_items(rest, count, "BulkAck")?)
            }
            FrameKind::Credit => Self::Credit(Credit::read_exact(body)?),
            FrameKind::Nack => Self::Nack(Nack::read_exact(body)?),
            FrameKind::Fenced => Self::Fenced(Fenced::read_exact(body)?),
            FrameKind::CompareRequest => take_compare_request(body)?,
            FrameKind::CompareHashes => take_compare_hashes(body)?,
            FrameKind::PassBegin => Self::PassBegin(PassBegin::read_exact(body)?),
            FrameKind::PassState => Self::PassState(PassState::read_exact(body)?),
            FrameKind::PassEnd => Self::PassEnd(PassEnd::read_exact(body)?),
            FrameKind::Policy => Self::Policy(Policy::read_exact(body)?),
            FrameKind::PointDegrade => Self::PointDegrade(take_point_degrade(body)?),
            FrameKind::MarkRequest => Self::MarkRequest(MarkRequest::read_exact(body)?),
            FrameKind::MarkRefused => Self::MarkRefused(MarkRefused::read_exact(body)?),
            FrameKind::GrowDisk => {
                let grow = GrowDisk::read_exact(body)?;
                check_size("GrowDisk", grow.size_sectors)?;
                Self::GrowDisk(grow)
            }
            FrameKind::Probe => Self::Probe(Probe::read_exact(body)?),
            FrameKind::Load => Self::Load(Load::read_exact(body)?),
            FrameKind::Error => {
                let (head, rest) = ErrorHead::read_prefix(body)?;
                let text = take_blob_of(rest, head.text_bytes.into(), usize::from(u16::MAX), "Error")?;
                let text = std::str::from_utf8(&text).map_err(|error| FormatError::Field {
                    what: "Error",
                    field: "text",
                    got: error.valid_up_to() as u64,
                    expected: "UTF-8 to the end",
                })?;
                Self::Error(head, text.to_owned())
            }
            FrameKind::Batch | FrameKind::Bulk => {
                return Err(FormatError::Field {
                    what: "Frame",
                    field: "kind",
                    got: kind as u64,
                    expected: "a message, not a batch",
                });
            }
        })
    }

    /// An ERROR for a disk (or the session, with [`DiskId::NONE`]).
    #[must_use]
    pub fn error(disk: DiskId, code: ErrorCode, text: &str) -> Self {
        let cut: String = text.chars().take(1000).collect();
        Self::Error(ErrorHead { disk, code, text_bytes: cut.len() as u16 }, cut)
    }
}

fn put(out: &mut BytesMut, kind: FrameKind, bytes: &[u8]) -> FrameKind {
    out.put_slice(bytes);
    kind
}
