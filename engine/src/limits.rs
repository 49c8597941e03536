//! Every bound of the system in one file, with the arithmetic between them asserted at compile time.
//!
//! Names end in their unit and bound. A number that was tuned says how.

use crate::units::{BLOCK_BYTES, SECTOR_BYTES};

/// Largest plain size of a delta record: small, so that the journal can be read at random.
pub const DELTA_RECORD_BYTES_MAX: u64 = 64 << 10;
/// Largest plain size of a bulk record: ratio 2.29 instead of 2.10 at zstd level −1 on realistic data.
pub const BULK_RECORD_BYTES_MAX: u64 = 1 << 20;
/// Largest run one ZERO or DISCARD record may cover; it carries no payload.
pub const ZERO_RECORD_BYTES_MAX: u64 = 1 << 30;
/// Largest plain payload of one batch, delta or bulk.
pub const BATCH_PLAIN_BYTES_MAX: u64 = 4 << 20;
/// Most records in a batch: a full batch of single sectors.
pub const BATCH_RECORDS_MAX: u32 = (BATCH_PLAIN_BYTES_MAX / SECTOR_BYTES) as u32;
/// A delta batch is closed after this long even if it is not full.
pub const BATCH_AGE_NANOS_MAX: u64 = 200_000_000;

/// Largest body of any frame.
pub const FRAME_BODY_BYTES_MAX: u32 = 8 << 20;
/// Largest body of a control frame other than batches and hashes: bounds what an unauthenticated peer can make us hold.
pub const CONTROL_BODY_BYTES_MAX: u32 = 256 << 10;

/// Compare granularity of the first round.
pub const COMPARE_UNIT_BYTES: u64 = 64 << 10;
/// Compare granularity of the refinement.
pub const COMPARE_FINE_BYTES: u64 = BLOCK_BYTES;
/// A pass works in chunks of this many bytes: one chunk is one bulk batch or one compare request.
pub const CHUNK_BYTES: u64 = BATCH_PLAIN_BYTES_MAX;
/// Chunks an agent keeps open per disk (read, compared or unacknowledged as written): bounds its memory to 64 MiB.
pub const CHUNKS_OPEN_MAX: usize = 16;

/// Bytes per disk that may be sent and not yet written at the target: bounds the target's memory per disk, and
/// what is sent twice after a kill.
pub const UNWRITTEN_BYTES_MAX: u64 = 32 << 20;
/// Bytes per disk that may be written and not yet durable.
pub const UNDURABLE_BYTES_MAX: u64 = 192 << 20;
/// The target flushes and records progress after this many written bytes …
pub const PROGRESS_BYTES: u64 = 64 << 20;
/// … or this long after the first unflushed write.
pub const PROGRESS_NANOS: u64 = 1_000_000_000;
/// Memory a process server may hold in payload, all peers together, by default.
pub const RELAY_MEMORY_BYTES_DEFAULT: u64 = 256 << 20;

/// Length of a redo log segment by default: long enough that changing segments costs nothing.
pub const SEGMENT_BYTES_DEFAULT: u64 = 256 << 20;
/// Shortest redo log segment: a group of the largest size fits.
pub const SEGMENT_BYTES_MIN: u64 = 32 << 20;
/// Length a manifest may grow to; it is written anew long before.
pub const MANIFEST_BYTES_MAX: u64 = 1 << 30;
/// A manifest is written anew after this many bytes of edits, or its own size if that is more.
pub const MANIFEST_CHECKPOINT_BYTES: u64 = 4 << 20;
/// Zeros that are kept written behind a manifest's newest edit, so that edits meet no full medium: 256 of them. Never
/// more than a segment of the redo log, which a journal needs anyway.
pub const MANIFEST_PREPARED_BYTES: u64 = 1 << 20;
/// A delta batch that fails its checks at the target so many times in a row is not sent again: the disk is compared.
pub const DAMAGED_BATCHES_MAX: u32 = 4;

/// Marks of a disk that may wait to become durable: those of some minutes without a session, at one every 10 s.
pub const MARKS_PENDING_MAX: usize = 64;

/// Bytes of durable batches that an agent keeps, all disks together, for a target that loses them after all.
pub const GRACE_BYTES: u64 = 64 << 20;

/// Disks one agent may announce or open.
pub const DISKS_PER_AGENT_MAX: usize = 64;
/// Largest disk: one sparse VMDK file ends at 2 TiB, VMware disks at 62 TiB; addresses are checked against this.
pub const DISK_BYTES_MAX: u64 = 64 << 40;
/// Ranges one progress message may carry; more are coalesced by leaving the smallest out (they are compared again).
pub const RANGES_PER_MESSAGE_MAX: usize = 4096;

/// A peer that does not finish its handshake in this time is dropped.
pub const HANDSHAKE_NANOS_MAX: u64 = 10_000_000_000;
/// Keep-alive interval of a connection.
pub const KEEP_ALIVE_NANOS: u64 = 250_000_000;

const _: () = {
    assert!(BATCH_PLAIN_BYTES_MAX >= BULK_RECORD_BYTES_MAX);
    assert!(BULK_RECORD_BYTES_MAX >= DELTA_RECORD_BYTES_MAX);
    assert!(BULK_RECORD_BYTES_MAX.is_multiple_of(BLOCK_BYTES));
    assert!(DELTA_RECORD_BYTES_MAX.is_multiple_of(BLOCK_BYTES));
    assert!(COMPARE_UNIT_BYTES.is_multiple_of(COMPARE_FINE_BYTES));
    assert!(CHUNK_BYTES.is_multiple_of(COMPARE_UNIT_BYTES));
    assert!(CHUNK_BYTES.is_multiple_of(BULK_RECORD_BYTES_MAX));
    // A batch with raw payload, one header per sector-sized record and its CRCs still fits a frame.
    assert!(BATCH_PLAIN_BYTES_MAX + (BATCH_RECORDS_MAX as u64) * 64 < FRAME_BODY_BYTES_MAX as u64);
    // A credit window holds several batches, so that one batch never waits for its own acknowledgement.
    assert!(UNWRITTEN_BYTES_MAX >= 4 * BATCH_PLAIN_BYTES_MAX);
    assert!(UNDURABLE_BYTES_MAX > 2 * PROGRESS_BYTES);
};
