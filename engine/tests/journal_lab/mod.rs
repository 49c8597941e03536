//! What tests of the journal share: entries as they are logged, windows, whole disks at a point, merged runs.
//!
//! Invariant: an entry is durable before it is applied here, as the master target has it. `place.rs` beside this is a
//! whole journal with its disks. Units: sectors, entry numbers. Called by the tests of the model, of faults and of flips.

use bytes::Bytes;
use reprotect_engine::compress::Decompressor;
use reprotect_engine::format::batch::{BatchHeader, CHAIN_START, Stretch, encode_batch};
use reprotect_engine::format::extent::Record;
use reprotect_engine::io::BlockFile;
use reprotect_engine::store::journal::applier::{Applier, Position};
use reprotect_engine::store::journal::entry::entry_writes;
use reprotect_engine::store::journal::view::{At, View};
use reprotect_engine::store::journal::window::Window;
use reprotect_engine::store::journal::{Journal, JournalError, LogEntry};
use reprotect_engine::units::{DiskId, Generation, LineageId, Sequence, Timestamp};

pub(crate) const NOW: Timestamp = Timestamp(1);
pub(crate) const POSITION: Position =
    Position { lineage: LineageId([2; 16]), generation: Generation(1), sequence: Sequence(0) };

pub(crate) fn id(disk: usize) -> DiskId {
    DiskId([disk as u8 + 1; 16])
}

/// The body of a batch as it is logged.
pub(crate) fn batch(disk: DiskId, first_sequence: u64, records: &[Record]) -> Bytes {
    let header = BatchHeader {
        disk,
        lineage: POSITION.lineage,
        generation: POSITION.generation,
        first_sequence: Sequence(first_sequence),
        chain: CHAIN_START,
        source_time: NOW,
        record_count: records.len() as u32,
        stretch: Stretch::Ordered,
    };
    encode_batch(&header, records).body()
}

/// One window: what waits of a disk, up to an entry.
pub(crate) fn apply_through(
    journal: &mut Journal,
    applier: &mut Applier<Box<dyn BlockFile>>,
    through: u64,
) -> Result<(), JournalError> {
    let mut decompressor = Decompressor::new().expect("a decompressor");
    let from = applier.applied().number;
    let wanted = |entry: &&LogEntry| entry.number > from && entry.number <= through;
    let wanted: Vec<_> = journal.entries(applier.disk()).iter().filter(wanted).copied().collect();
    let Some(last) = wanted.last().map(|entry| entry.number) else { return Ok(()) };
    journal.commit(NOW)?; // an entry is durable before it is applied
    let mut window = Window::default();
    for entry in wanted {
        let (head, body) = journal.read(entry.place)?;
        let writes =
            entry_writes(head.kind, body.into(), &mut decompressor).expect("an entry that was checked");
        writes.into_iter().for_each(|write| window.put(write));
    }
    applier.apply(journal, last, &window, NOW)
}

/// A whole disk at a point.
pub(crate) fn view(
    journal: &mut Journal,
    applier: &mut Applier<Box<dyn BlockFile>>,
    at: At,
) -> Result<Vec<u8>, JournalError> {
    let view = View::open(journal, applier.disk(), at)?;
    let runs = view.open_runs(journal, applier)?;
    let mut bytes = vec![0; view.size_bytes() as usize];
    view.read(&runs, applier, 0, &mut bytes)?;
    Ok(bytes)
}
