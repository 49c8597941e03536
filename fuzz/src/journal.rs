//! Entry functions for a journal's files: structures alone, and a small whole journal with damaged files.
//!
//! Invariants checked: what is accepted is written back as it was read; a journal that opens in spite of damage, or is
//! refused, never makes the program panic, allocates no more than its files justify, and can be opened once more when it
//! opened before. Checksums would hide most of it from mutated input, so each is also tried put right.

use std::path::Path;
use std::sync::OnceLock;

use bytes::Bytes;
use reprotect_engine::checksum::crc32;
use reprotect_engine::compress::Decompressor;
use reprotect_engine::format::extent::Record;
use reprotect_engine::format::manifest::{DiskAdded, Edit, EditHead, EpochCause, ManifestHeader, Superblock};
use reprotect_engine::format::segment::{EntryHead, EntryKind, GroupHeader, SegmentHeader, entries};
use reprotect_engine::format::segment_index::{
    SEGMENT_INDEX_MAGIC, SegmentIndexHead, encode_index, index_bytes,
};
use reprotect_engine::format::undo::frame::{Frame, FrameHead};
use reprotect_engine::format::undo::index::{Trailer, read_fence_page, read_index_page};
use reprotect_engine::format::undo::{RunHeader, RunIdentity};
use reprotect_engine::format::wire::Row;
use reprotect_engine::store::files::Files as _;
use reprotect_engine::store::files::memory::MemoryFiles;
use reprotect_engine::store::journal::applier::{Applier, Position};
use reprotect_engine::store::journal::entry::{Content, Write, entry_writes};
use reprotect_engine::store::journal::undo::{ActiveRun, BlockRange, SealedRun};
use reprotect_engine::store::journal::window::Window;
use reprotect_engine::store::journal::{Journal, JournalSettings, RunFile, applier::run_path};
use reprotect_engine::units::{DiskId, Generation, LineageId, SectorRange, Sequence, Timestamp};

const FOLDER: &str = "/retention";
const TARGET: &str = "/datastore/disk";
const SECTORS: u64 = 16 * 8 - 3;
const SETTINGS: JournalSettings = JournalSettings { segment_bytes: 32 << 10 };
const NOW: Timestamp = Timestamp(1);
const DISK: DiskId = DiskId([5; 16]);
const POSITION: Position =
    Position { lineage: LineageId([2; 16]), generation: Generation(1), sequence: Sequence(0) };

/// A copy of the superblock.
pub fn superblock(data: &[u8]) {
    for input in [data.to_vec(), fixed(data, Superblock::TABLE, "crc", 12..Superblock::BYTES)] {
        if let Ok(superblock) = Superblock::open(&input) {
            assert_eq!(superblock.to_block()[..Superblock::BYTES], input[..Superblock::BYTES]);
        }
    }
}

/// A manifest: its header, then edits, each in blocks of its own.
pub fn manifest(data: &[u8]) {
    let header = fixed(data, ManifestHeader::TABLE, "crc", 12..ManifestHeader::BYTES);
    if let Ok(header) = ManifestHeader::open(&header) {
        assert_eq!(ManifestHeader::open(&header.to_block()).as_ref(), Ok(&header));
    }
    edit(data);
    let mut put_right = data.to_vec();
    if let Some(body) = data.get(EditHead::BYTES..) {
        let len = edit_body_bytes(data).min(body.len());
        put(&mut put_right, EditHead::TABLE, "body_crc", &crc32(&body[..len]).to_le_bytes());
    }
    edit(&fixed(&put_right, EditHead::TABLE, "crc", 8..EditHead::BYTES));
}

fn edit_body_bytes(data: &[u8]) -> usize {
    let row = EditHead::TABLE.iter().find(|row| row.field == "body_bytes");
    let bytes = row.and_then(|row| data.get(row.offset..row.offset + 4)?.try_into().ok());
    bytes.map_or(0, u32::from_le_bytes) as usize
}

fn edit(data: &[u8]) {
    let Ok(head) = EditHead::open(data) else { return };
    let rest = data.get(EditHead::BYTES..).unwrap_or_default();
    let Some(body) = rest.get(..head.body_bytes as usize) else { return };
    if let Ok(edit) = Edit::decode(&head, body) {
        let again = edit.encode(head.manifest, head.index, head.durable_index, head.durable_group);
        let used = EditHead::BYTES + body.len();
        assert_eq!(again[..used], data[..used], "{edit:?} is not written back as it was read");
        assert_eq!(again.len() as u64, head.stored_bytes());
    }
}

/// A segment: its header, or a group with its entries.
pub fn segment(data: &[u8]) {
    let header = fixed(data, SegmentHeader::TABLE, "crc", 12..SegmentHeader::BYTES);
    if let Ok(header) = SegmentHeader::open(&header) {
        assert_eq!(SegmentHeader::open(&header.to_block()).as_ref(), Ok(&header));
    }
    for input in [data, &fixed(data, GroupHeader::TABLE, "crc", 8..GroupHeader::BYTES)] {
        if let Ok(header) = GroupHeader::open(input) {
            let rest = input.get(GroupHeader::BYTES..).unwrap_or_default();
            let _ = header.check_payload(rest.get(..header.payload_bytes as usize).unwrap_or_default());
            assert!(header.stored_bytes() >= u64::from(header.payload_bytes));
        }
    }
    let payload = data.get(GroupHeader::BYTES..).unwrap_or_default();
    for input in [payload.to_vec(), with_entry_crcs(payload)] {
        let mut end = 0;
        for entry in entries(&input) {
            let Ok((at, head, body)) = entry else { break };
            assert_eq!(at, end);
            assert_eq!(body.len(), head.body_bytes as usize);
            end = at + EntryHead::BYTES + body.len();
        }
        assert!(end <= input.len());
    }
}

/// The index of a segment: items, and the head in the last block.
pub fn segment_index(data: &[u8]) {
    let Some((items, block)) = data.len().checked_sub(4096).map(|at| data.split_at(at)) else { return };
    let mut put_right = block.to_vec();
    put(&mut put_right, SegmentIndexHead::TABLE, "items_crc", &crc32(items).to_le_bytes());
    for block in [block, &fixed(&put_right, SegmentIndexHead::TABLE, "crc", 12..SegmentIndexHead::BYTES)] {
        let Ok(head) = SegmentIndexHead::open(block) else { continue };
        assert!(SegmentIndexHead::is_of(block, head.salt));
        let at = head.items_offset().expect("an open head has room for its items");
        assert!(at >= head.groups_end && at + index_bytes(head.items.into()) == head.bytes);
        let Ok(read) = head.open_items(items) else { continue };
        assert!(read.iter().all(|item| item.offset + u64::from(item.bytes) <= head.groups_end));
        let again = encode_index(&head, &read);
        assert_eq!(again.len(), data.len());
        assert_eq!(again[..items.len()], *items, "it is not written back as it was read");
    }
}

/// The body of an entry: the first byte says of which kind.
pub fn redo_entry(data: &[u8]) {
    let Some((kind, body)) = data.split_first() else { return };
    let kind = EntryKind::ALL[usize::from(*kind) % EntryKind::ALL.len()];
    let Ok(mut decompressor) = Decompressor::new() else { return };
    let Ok(writes) = entry_writes(kind, Bytes::copy_from_slice(body), &mut decompressor) else { return };
    let mut window = Window::default();
    for Write { range, content } in writes {
        assert!(range.start <= range.end);
        if let Content::Data(data) = &content {
            assert_eq!(data.len() as u64, range.bytes());
        }
        // What an entry writes is checked against the disk's size when it is accepted; a window needs no such bound.
        if range.end <= SECTORS * 1024 {
            window.put(Write { range, content });
        }
    }
    let mut end = 0;
    for run in window.runs() {
        assert!(run.range.start >= end && !run.range.is_empty());
        end = run.range.end;
    }
    let whole = SectorRange::new(0, SECTORS * 1024);
    assert_eq!(window.overlap(whole).map(|run| run.range.bytes()).sum::<u64>(), window.bytes());
}

/// The structures of an undo run, whichever the input is.
pub fn undo_run(data: &[u8]) {
    for input in [data.to_vec(), fixed_over(data, RunHeader::TABLE, RunHeader::BYTES)] {
        if let Ok(header) = RunHeader::from_block(&input) {
            assert_eq!(
                RunHeader::from_block(&header.to_block()).map(|it| it.identity()),
                Ok(header.identity())
            );
        }
    }
    let salt = word(data, FrameHead::TABLE, "salt");
    let offset = word(data, FrameHead::TABLE, "offset");
    let mut plain = vec![0; 64 << 10];
    let frame_fixed = fixed_head(data);
    for input in [data, frame_fixed.as_slice()] {
        let Ok(frame) = Frame::read(input, salt, offset) else { continue };
        assert!(frame.head.used_bytes() <= input.len() as u64);
        let _ = frame.check_stored();
        if let Ok(mut decompressor) = Decompressor::new() {
            let _ = frame.open_into(&mut decompressor, &mut plain);
        }
    }
    for page in [data.to_vec(), fixed_page(data)] {
        let (salt, number) = (page_word(&page, 8), page_word(&page, 16));
        if let Ok(entries) = read_index_page(&page, salt, number, 1 << 40) {
            assert!(entries.windows(2).all(|pair| pair[0].blocks().end <= pair[1].first_block));
        }
        let _ = read_fence_page(&page, salt, number);
    }
    let salt = word(data, Trailer::TABLE, "salt");
    for input in [data.to_vec(), fixed_over(data, Trailer::TABLE, Trailer::BYTES)] {
        if let Ok(trailer) = Trailer::from_block(&input, salt, data.len() as u64) {
            assert_eq!(trailer.places().file_bytes(), data.len() as u64);
        }
    }
}

/// A whole journal with patches: which file, where, what. Groups, edits and frames whose checksum is put right get
/// past the first line of defence.
pub fn journal(data: &[u8]) {
    let files = base().snapshot();
    let Ok(names) = files.neighbours(Path::new("/retention/any")) else { return };
    for patch in data.chunks_exact(6) {
        let [file, place, place_high, xor, len, how] = *patch else { continue };
        let Some(name) = names.get(usize::from(file) % names.len()) else { continue };
        let path = Path::new(FOLDER).join(name);
        let written = files.bytes_sparse(&path);
        let total: usize = written.iter().map(|(_, bytes)| bytes.len()).sum();
        let mut at = (usize::from(place) | usize::from(place_high) << 8) * 17 % total.max(1);
        let Some((offset, bytes)) = written.iter().find(|(_, bytes)| {
            let inside = at < bytes.len();
            at -= if inside { 0 } else { bytes.len() };
            inside
        }) else {
            continue;
        };
        match how % 8 {
            0 => _ = files.opener().resize(&path, offset + at as u64),
            1 => _ = files.opener().remove(&path),
            _ => {
                let end = bytes.len().min(at + 1 + usize::from(len) % 64);
                let patched: Vec<u8> = bytes[at..end].iter().map(|byte| byte ^ xor).collect();
                files.poke(&path, offset + at as u64, &patched);
                if how % 2 == 0 {
                    put_right(&files, &path, (offset + at as u64) / 4096 * 4096);
                }
            }
        }
    }
    for round in 0..2 {
        match open(&files) {
            Ok(()) => {}
            Err(_) if round == 0 => return,
            Err(error) => panic!("it opened once, and not again: {error}"),
        }
    }
    runs(&files);
}

/// Opens each undo run of the damaged journal by itself.
fn runs(files: &MemoryFiles) {
    let Ok((journal, _)) = Journal::open(files.opener(), Path::new(FOLDER), SETTINGS, NOW) else { return };
    let identity = |epoch| RunIdentity {
        journal: journal.id(),
        disk: DISK,
        lineage: POSITION.lineage,
        generation: POSITION.generation,
        undo_epoch: epoch,
        undo_epoch_last: epoch,
    };
    for epoch in 1..4 {
        let path = run_path(&journal, DISK, RunFile::Epoch(epoch));
        if let Ok(mut run) = SealedRun::open(files, &path, &identity(epoch)) {
            let _ = run.verify();
            let _ = run.lookup(BlockRange::new(0, 16));
        }
        let _ = ActiveRun::reopen(files, &path, &identity(epoch), 12288, 1 << 20);
    }
}

/// Opens the journal and its disk, and goes on.
fn open(files: &MemoryFiles) -> Result<(), String> {
    let refused = |error: reprotect_engine::store::journal::JournalError| error.to_string();
    let (mut journal, found) =
        Journal::open(files.opener(), Path::new(FOLDER), SETTINGS, NOW).map_err(refused)?;
    for log in found.disks.values() {
        assert!(log.entries.windows(2).all(|pair| pair[0].number < pair[1].number));
        for entry in &log.entries {
            let _ = journal.read(entry.place);
        }
    }
    let Ok(target) = files.opener().open(Path::new(TARGET), true) else { return Ok(()) };
    let said = found.disks.get(&DISK).and_then(|log| log.applied).map(|(applied, _)| applied);
    // A disk that cannot be opened is stopped; the others go on.
    let _ = Applier::open(&journal, DISK, target, said);
    journal.append(DISK, EntryKind::Mark, &[b"mark"], NOW).map_err(refused)?;
    journal.commit(NOW).map_err(refused)
}

/// A journal with two closed undo epochs and one that goes on.
fn base() -> &'static MemoryFiles {
    static BASE: OnceLock<MemoryFiles> = OnceLock::new();
    BASE.get_or_init(|| {
        let files = MemoryFiles::default();
        make(&files).expect("an intact journal");
        files.snapshot()
    })
}

fn make(files: &MemoryFiles) -> Result<(), reprotect_engine::store::journal::JournalError> {
    files.put(TARGET, &vec![7; SECTORS as usize * 512]);
    let mut journal = Journal::create(files.opener(), Path::new(FOLDER), SETTINGS, NOW)?;
    journal.add_disk(DiskAdded { disk: DISK, machine: [1; 16], size_sectors: SECTORS, time: NOW }, NOW)?;
    let target = files.opener().open(Path::new(TARGET), true)?;
    let (mut applier, _) = Applier::open(&journal, DISK, target, None)?;
    for epoch in 1..=3_u64 {
        applier.begin_epoch(&mut journal, EpochCause::Time, POSITION, None, NOW)?;
        for number in 1..=4 {
            let data = Bytes::from(vec![(epoch * 10 + number) as u8; 4096]);
            let record = Record::data(number * 9, data.clone());
            let (number, _) = journal.append(DISK, EntryKind::Batch, &[&batch(&record)], NOW)?;
            journal.commit(NOW)?;
            let mut window = Window::default();
            window.put(Write { range: record.range(), content: Content::Data(data) });
            applier.apply(&mut journal, number, &window, NOW)?;
        }
        journal.commit(NOW)?;
        if epoch < 3 {
            applier.close_epoch(&mut journal, NOW)?;
        }
    }
    drop(applier);
    journal.close(NOW)
}

fn batch(record: &Record) -> Bytes {
    use reprotect_engine::format::batch::{BatchHeader, CHAIN_START, Stretch, encode_batch};
    let header = BatchHeader {
        disk: DISK,
        lineage: POSITION.lineage,
        generation: POSITION.generation,
        first_sequence: Sequence(1),
        chain: CHAIN_START,
        source_time: NOW,
        record_count: 1,
        stretch: Stretch::Ordered,
    };
    encode_batch(&header, std::slice::from_ref(record)).body()
}

/// Puts the checksum of the structure at the front of a block right, whichever it is.
fn put_right(files: &MemoryFiles, path: &Path, block: u64) {
    let mut file = match files.opener().open(path, false) {
        Ok(file) if block + 4096 <= file.size_bytes() => file,
        _ => return,
    };
    let mut bytes = vec![0; 4096];
    let read = file.read(&mut [reprotect_engine::io::ReadAt { offset: block, data: &mut bytes }]);
    let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
    let fixed = match name.split('-').next() {
        Some("superblock") => fixed(&bytes, Superblock::TABLE, "crc", 12..Superblock::BYTES),
        Some("manifest") if block == 0 => {
            fixed(&bytes, ManifestHeader::TABLE, "crc", 12..ManifestHeader::BYTES)
        }
        Some("manifest") => {
            let len = edit_body_bytes(&bytes).min(4096 - EditHead::BYTES);
            let crc = crc32(&bytes[EditHead::BYTES..EditHead::BYTES + len]);
            put(&mut bytes, EditHead::TABLE, "body_crc", &crc.to_le_bytes());
            fixed(&bytes, EditHead::TABLE, "crc", 8..EditHead::BYTES)
        }
        Some("redo") if block == 0 => fixed(&bytes, SegmentHeader::TABLE, "crc", 12..SegmentHeader::BYTES),
        Some("redo") if bytes.starts_with(&SEGMENT_INDEX_MAGIC) => {
            fixed(&bytes, SegmentIndexHead::TABLE, "crc", 12..SegmentIndexHead::BYTES)
        }
        Some("redo") => fixed(&bytes, GroupHeader::TABLE, "crc", 8..GroupHeader::BYTES),
        _ if block < 8192 => fixed_over(&bytes, RunHeader::TABLE, RunHeader::BYTES),
        _ => fixed_head(&bytes),
    };
    drop(file);
    if read.is_ok() {
        files.poke(path, block, &fixed);
    }
}

/// The input with a checksum over a range put where the table says.
fn fixed(data: &[u8], table: &[Row], field: &str, over: std::ops::Range<usize>) -> Vec<u8> {
    let mut fixed = data.to_vec();
    if let Some(bytes) = data.get(over) {
        put(&mut fixed, table, field, &crc32(bytes).to_le_bytes());
    }
    fixed
}

/// The input with a checksum over a whole structure, its own field zero, put right.
fn fixed_over(data: &[u8], table: &[Row], bytes: usize) -> Vec<u8> {
    let mut fixed = data.to_vec();
    put(&mut fixed, table, "crc", &[0; 4]);
    if let Some(crc) = fixed.get(..bytes).map(crc32) {
        put(&mut fixed, table, "crc", &crc.to_le_bytes());
    }
    fixed
}

/// The input with the checksum of an undo frame's head put right.
fn fixed_head(data: &[u8]) -> Vec<u8> {
    let mut fixed = data.to_vec();
    put(&mut fixed, FrameHead::TABLE, "head_crc", &[0; 4]);
    if let Ok((head, _)) = FrameHead::read_prefix(&fixed) {
        let crcs = if head.codec.has_payload() { (head.block_count as usize).saturating_mul(4) } else { 0 };
        if let Some(crc) = fixed.get(..FrameHead::BYTES.saturating_add(crcs)).map(crc32) {
            put(&mut fixed, FrameHead::TABLE, "head_crc", &crc.to_le_bytes());
        }
    }
    fixed
}

/// The input with the checksum of a page put right: it covers all of it.
fn fixed_page(data: &[u8]) -> Vec<u8> {
    let mut fixed = data.to_vec();
    if let Some(slot) = fixed.get_mut(4..8) {
        slot.fill(0);
        let crc = crc32(&fixed).to_le_bytes();
        fixed[4..8].copy_from_slice(&crc);
    }
    fixed
}

/// The input with the checksums of entries put right, as far as they can be told apart.
fn with_entry_crcs(data: &[u8]) -> Vec<u8> {
    let mut fixed = data.to_vec();
    let mut at = 0;
    while let Some(rest) = fixed.get_mut(at..).filter(|rest| rest.len() >= EntryHead::BYTES) {
        let Ok((head, body)) = EntryHead::read_prefix(rest) else { break };
        let body_crc = crc32(&body[..(head.body_bytes as usize).min(body.len())]);
        put(rest, EntryHead::TABLE, "body_crc", &body_crc.to_le_bytes());
        put(rest, EntryHead::TABLE, "crc", &[0; 4]);
        let crc = crc32(&rest[..EntryHead::BYTES]);
        put(rest, EntryHead::TABLE, "crc", &crc.to_le_bytes());
        at = at.saturating_add(EntryHead::BYTES).saturating_add(head.body_bytes as usize);
    }
    fixed
}

fn put(out: &mut [u8], table: &[Row], field: &str, bytes: &[u8]) {
    if let Some(row) = table.iter().find(|row| row.field == field)
        && let Some(slot) = out.get_mut(row.offset..row.offset + bytes.len())
    {
        slot.copy_from_slice(bytes);
    }
}

fn word(data: &[u8], table: &[Row], field: &str) -> u64 {
    table.iter().find(|row| row.field == field).map_or(0, |row| page_word(data, row.offset))
}

fn page_word(data: &[u8], at: usize) -> u64 {
    data.get(at..at + 8).and_then(|bytes| bytes.try_into().ok()).map_or(0, u64::from_le_bytes)
}
